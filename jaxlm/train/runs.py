"""A whole run from its settings: load, train, export, and check what was exported."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm.core.errors import CheckpointError
from jaxlm.core.hosts import to_host
from jaxlm.core.tree import flatten
from jaxlm.hf.bundle import Bundle, load, save
from jaxlm.train.config import Config
from jaxlm.train.loop import Fitted, train
from jaxlm.train.setup import mesh_of
from jaxlm.train.stopping import leave_if_asked, listening


def run(config: Config) -> Fitted:
    """Train `config.model` on `config.data`, and write `config.out/model`.

    A run that was killed goes on from its last checkpoint when it is called again; one that is
    done only exports.

    Returns: Fitted.
    Raises: as `fit`; CheckpointError where the exported folder does not give the same parameters;
      `jaxlm.train.stopping.Stopped` where a SIGTERM came before the first step or in the export.
    """
    with listening():
        fitted = train(lambda: load(
            config.model, revision=config.revision, mesh=mesh_of(config),
            ignore_fields=config.ignore_fields, check_tokenizer=config.check_tokenizer), config)
        if not fitted.stopped and config.export != "none":
            leave_if_asked()
            export(fitted.bundle, pathlib.Path(config.out) / "model", config.export)
    return fitted


def export(bundle: Bundle, folder: pathlib.Path, dtype: str = "float32") -> pathlib.Path:
    """Write a Hugging Face folder, load it again, and compare parameters and logits to the bit.

    Raises: CheckpointError where they differ; nothing is deleted then.
    """
    low = bundle.replace(params=jax.tree.map(lambda x: x.astype(dtype), bundle.params))
    save(low, folder, overwrite=True)
    leave_if_asked()
    again = load(folder, dtype="own", mesh=bundle.mesh, check_tokenizer=False)  # checked at first
    intact = "the checkpoint beside it is intact"
    same = jax.device_get(_same(flatten(low.params), flatten(again.params)))
    if wrong := [path for path in same if not same[path]]:
        raise CheckpointError(f"{folder} gives another {wrong[0]!r} than was trained; {intact}")
    tokens = jnp.arange(32, dtype=jnp.int32)[None] % bundle.lm.config.vocab_size
    wanted, got = (to_host(x.lm.apply(x.params, tokens).logits) for x in (low, again))
    if not np.array_equal(wanted, got):
        raise CheckpointError(f"{folder} gives logits that differ by up to "
                              f"{np.abs(wanted - got).max():.3g} from the trained model's; "
                              f"{intact}")
    return folder


@jax.jit
def _same(wanted: dict[str, jax.Array], got: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """Of each array, by its path, whether all its numbers came back."""
    return {path: jnp.array_equal(x, got[path]) if path in got else jnp.array(False)
            for path, x in wanted.items()}
