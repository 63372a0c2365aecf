"""What a run is made of, from its settings: mesh, batches, and where arrays go."""

import math
import pathlib
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, SingleDeviceSharding

from jaxlm.core.errors import ConfigError, DeviceError
from jaxlm.core.mesh import make_mesh, shardings
from jaxlm.hf.bundle import Bundle
from jaxlm.models.lm import LM
from jaxlm.models.stack import stack
from jaxlm.train.batches import Batches, Order, mask_thoughts, my_rows, place
from jaxlm.train.checkpoint import digest
from jaxlm.train.config import Config, hash_of
from jaxlm.train.data import Examples, Reader, open_examples
from jaxlm.train.log import watched
from jaxlm.train.stopping import leave_if_asked
from jaxlm.train.tuning import Tuning


@dataclass(frozen=True)
class Sources:
    """The data of a run. `calibration` is of earlier tasks, a sample a row; None if not named."""

    train: Batches
    held_out: Batches | None
    calibration: Batches | None
    digest: str


def mesh_of(config: Config) -> Mesh | None:
    """The mesh of a run; None on one device.

    Raises: DeviceError where devices and axes, or axes and batch, do not fit.
    """
    sizes = asdict(config.mesh)
    if math.prod(sizes.values()) == 1 and jax.process_count() == 1:
        return None
    mesh = make_mesh(**sizes)
    ways, rows = sizes["data"] * sizes["fsdp"], config.rows // config.accumulate
    if rows % ways:
        raise DeviceError(
            f"{rows} rows (batch {config.rows} in {config.accumulate} parts) do not divide over "
            f"{ways} devices of mesh axes data and fsdp; make the batch a multiple of "
            f"{ways * config.accumulate}, or change the mesh")
    return mesh


def sources(bundle: Bundle, config: Config, mesh: Mesh | None) -> Sources:
    """Open and tokenise all files. Raises: DataError, ConfigError."""
    data = config.data
    if data.window > bundle.lm.config.max_len:
        raise ConfigError(f"data.window is {data.window}; the model reads at most "
                          f"{bundle.lm.config.max_len} tokens")
    read = reader(bundle, config)
    files = (*data.train, *data.replay)
    if not data.train:
        raise ConfigError("data.train names no file; expected jsonl files, as in [a.jsonl]")
    examples = open_examples(files, read, data.window, data.long, line_by_line)
    groups = [np.flatnonzero((examples.group == i) & (examples.lengths > 0))
              for i in range(len(files))]
    old = np.concatenate([np.zeros(0, np.int64), *groups[len(data.train):]])
    order = Order(tuple(groups[:len(data.train)]), config.epochs, config.seed, data.phased, old,
                  data.replay_share if len(old) else 0.0)
    if config.steps is None and config.epochs is None:
        raise ConfigError("neither steps nor epochs is given; expected one, the run's length")
    train = Batches(examples, order, config.rows, data.pack, my_rows(config.rows, mesh),
                    noise(bundle, config), config.steps or 0)
    held = None
    if data.eval:
        held = plain(open_examples(data.eval, read, data.window, data.long, line_by_line), config,
                     mesh, packed=data.pack)
    return Sources(train, held, calibration(bundle, config, mesh), examples.digest)


def line_by_line(numbers: Sequence[int]) -> Iterator[int]:
    """A bar over the lines of a file, where someone looks. Raises: Stopped after a SIGTERM."""
    from tqdm.auto import tqdm

    for number in tqdm(numbers, desc="tokenise", unit="line", leave=False, delay=1,
                       disable=not watched()):
        leave_if_asked()
        yield number


def reader(bundle: Bundle, config: Config) -> Reader:
    """How the run reads a line."""
    template = None
    if config.data.chat_template is not None:
        try:
            template = pathlib.Path(config.data.chat_template).expanduser().read_text()
        except OSError as error:
            raise ConfigError(f"cannot read data.chat_template {config.data.chat_template}: "
                              f"{error.strerror}") from error
    ends = bundle.stop_ids
    end = bundle.tokenizer.id_of("eos_token")
    return Reader(bundle.tokenizer, config.data.loss_on == "answers", template,
                  end if end is not None else ends[0] if ends else None)


def plain(
    examples: Examples, config: Config, mesh: Mesh | None, packed: bool, most: int | None = None
) -> Batches:
    """Each sample once, in the order of the file, in batches of the run's rows."""
    kept = np.flatnonzero(examples.lengths > 0)[:most]
    found = Batches(examples, Straight((kept,), 1, config.seed), config.rows, packed,
                    my_rows(config.rows, mesh))
    return found


class Straight(Order):
    """One pass in the order of the files."""

    def passes(self) -> Iterator[np.ndarray]:
        """The samples as they stand."""
        yield np.concatenate(self.samples)


def calibration(bundle: Bundle, config: Config, mesh: Mesh | None) -> Batches | None:
    """Samples of earlier tasks, one a row."""
    data = config.data
    if not data.calibration:
        return None
    examples = open_examples(data.calibration, reader(bundle, config), data.window, data.long,
                             line_by_line)
    return plain(examples, config, mesh, packed=False, most=data.calibration_samples)


def noise(bundle: Bundle, config: Config) -> Any:
    """The masked-thought option; None without it."""
    data, tokenizer = config.data, bundle.tokenizer
    if not data.mask_thoughts:
        return None
    names = [data.mask_token] if data.mask_token else [
        tokenizer.settings.get(role) for role in ("mask_token", "pad_token", "unk_token")]
    texts = [name.get("content") if isinstance(name, dict) else name for name in names if name]
    ids = [i for text in texts
           if (i := tokenizer.backend_tokenizer.token_to_id(text)) is not None]
    if not ids or ids[0] >= bundle.lm.config.vocab_size:
        raise ConfigError(f"data.mask_token is {data.mask_token!r}; expected a token of the "
                          "model's vocabulary for data.mask_thoughts, such as its padding token")
    return mask_thoughts(data.mask_thoughts, ids[0])


def training_lm(bundle: Bundle, config: Config, mesh: Mesh | None) -> LM:
    """The model as it is trained."""
    return replace(bundle.lm, remat=config.remat, mesh=mesh)


def start_params(bundle: Bundle, config: Config) -> Any:
    """The bundle's parameters in the layout of training."""
    lm = bundle.lm
    return stack(bundle.params, lm.config, lm.plan) if config.stack else bundle.params


def placer(tuning: Tuning, mesh: Mesh | None) -> Any:
    """`(trained, frozen)`, arrays or shapes, to where each leaf goes."""
    def where(trained: Any, frozen: Any) -> tuple[Any, Any]:
        if mesh is None:
            here = SingleDeviceSharding(jax.devices()[0])
            return jax.tree.map(lambda _: here, (trained, frozen))
        axes, axes_frozen = tuning.axes(trained, frozen)
        return shardings(axes, trained, mesh), shardings(axes_frozen, frozen, mesh)

    return where


def begin(
    tuning: Tuning, bundle: Bundle, config: Config, mesh: Mesh | None, data: Sources,
    previous: Any = None, batches: Any = None,
) -> tuple[Any, Any]:
    """`tuning.start`, its arrays where they belong, sharing no buffer with the bundle's.

    Args:
      previous: (trained, frozen) of the task before. batches: of earlier tasks, in place of
        `data.calibration`.
    """
    params = start_params(bundle, config)
    if batches is None and data.calibration is not None:
        batches = [place(data.calibration[i], config.rows, mesh)
                   for i in range(len(data.calibration))]
    lm = training_lm(bundle, config, mesh)
    key = jax.random.fold_in(jax.random.key(config.seed), 1)
    trained, frozen = tuning.start(lm, params, key, previous=previous, batches=batches)
    if not jax.tree.leaves(trained):
        raise ConfigError(f"{tuning} has nothing to train; name targets, or for osft raise "
                          "tuning.unfreeze_ratio or say tuning.others: train")
    held = {id(leaf) for leaf in jax.tree.leaves((bundle.params, frozen))}
    trained = jax.tree.map(lambda x: jnp.copy(x) if id(x) in held else x, trained)
    return jax.device_put((trained, frozen), placer(tuning, mesh)(trained, frozen))


def model_hash(lm: LM) -> str:
    """What tells one architecture from another."""
    return hash_of([str(lm.config), lm.labels, lm.per_token])


def weights_hash(params: Any) -> str:
    """What tells weights from others of their shape: the same in any dtype that holds them, on
    any mesh."""
    return hash_of(digest(params, "float32"))
