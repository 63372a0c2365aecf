"""What the run before has left for the tunings that remember: its adapters, its Fisher."""

import json
import pathlib
from typing import Any

import jax
from jax.sharding import Mesh

from jaxlm.core.errors import CheckpointError
from jaxlm.core.hosts import is_writer
from jaxlm.hf.bundle import Bundle
from jaxlm.train import setup
from jaxlm.train.checkpoint import Checkpoints
from jaxlm.train.config import Config, settings
from jaxlm.train.log import write_json

SAME = ("tuning.kind", "tuning.targets", "stack")  # what the tree of a run depends on
END = "end.json"  # checksums of the weights that a run ended with
DTYPES = ("float32", "bfloat16", "float16")  # that they may be exported or loaded in


def remember(out: pathlib.Path, params: Any) -> None:
    """Write what tells the weights that a run ended with; a meeting of all processes."""
    sums = {dtype: setup.weights_hash(jax.tree.map(lambda x, to=dtype: x.astype(to), params))
            for dtype in DTYPES}
    if is_writer():
        write_json(out / END, sums)


def read_previous(bundle: Bundle, config: Config, mesh: Mesh | None) -> tuple[Any, Any]:
    """(trained, frozen) at the end of the run whose `out` is `config.previous`.

    Raises: CheckpointError where it holds no checkpoint, is not done, did not end with the weights
      of the bundle, or is of another model or another way of tuning.
    """
    out = pathlib.Path(str(config.previous)).expanduser()
    if not (out / "checkpoints").is_dir():
        raise CheckpointError(f"previous is {out}, which holds no checkpoint; expected `out` of "
                              "the run that learnt the task before")
    saved = Checkpoints(out, read_only=True)
    try:
        if (step := saved.latest()) is None:
            raise CheckpointError(f"previous is {out}, whose run has left no checkpoint yet")
        check(out, step, saved.meta(step), bundle, config)
        return saved.tuned(step, setup.placer(config.tuning, mesh))
    finally:
        saved.close()


def check(
    out: pathlib.Path, step: int, found: dict[str, Any], bundle: Bundle, config: Config
) -> None:
    """CheckpointError unless a run's last checkpoint is one that this run can build on."""
    if found["model_hash"] != setup.model_hash(bundle.lm):
        raise CheckpointError(f"previous, {out}, is of another model, {found['model']!r}; expected "
                              f"one of the shape of {config.model!r}")
    ours, theirs = settings(config), found["settings"]
    if wrong := [name for name in SAME if theirs.get(name) != ours.get(name)]:
        raise CheckpointError(f"previous, {out}, has {wrong[0]} {theirs.get(wrong[0])!r}; this run "
                              f"has {ours.get(wrong[0])!r}; expected the same")
    if step < found.get("steps", step):
        raise CheckpointError(f"previous, {out}, was stopped at step {step} of {found['steps']}; "
                              "run its command again, to its end")
    if (end := out / END).exists():  # runs of an earlier version have none
        if setup.weights_hash(bundle.params) not in json.loads(end.read_text()).values():
            raise CheckpointError(f"previous, {out}, did not end with the weights that this run "
                                  f"begins from; expected its export, model: {out}/model (its "
                                  "command again writes it)")
