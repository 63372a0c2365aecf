"""One run's settings: frozen, hashable, read from YAML, every field checked by name."""

import dataclasses
import difflib
import hashlib
import json
import pathlib
import types
import typing
from dataclasses import dataclass
from typing import Any, Literal

from jaxlm.core.errors import ConfigError, number, share, whole
from jaxlm.core.tree import flatten
from jaxlm.train.ewc import Ewc
from jaxlm.train.lora import Lora, OLora
from jaxlm.train.osft import Osft
from jaxlm.train.tuning import Full

TUNINGS: dict[str, type] = {"full": Full, "osft": Osft, "lora": Lora, "olora": OLora, "ewc": Ewc}
AnyTuning = Full | Osft | Lora | OLora | Ewc
Remembering = OLora | Ewc  # those that read the run before


@dataclass(frozen=True)
class Data:
    """What is learnt.

    Args:
      train: jsonl files (`jaxlm.train.data` has the forms of a line).
      eval: held-out files, measured every `evaluate_every` steps.
      window: inputs of a row; a sample may have one token more.
      loss_on: "answers" (the assistant's or the completion's tokens), or "all".
      long: what becomes of a sample longer than a row: "cut", "skip" or "error".
      pack: several samples a row; else one.
      chat_template: a Jinja file, in place of the tokenizer's own.
      phased: train the files in turn, each for all its epochs, instead of shuffled together.
      replay: files of earlier tasks; `replay_share` of each pass is drawn from them.
      replay_share: in [0, 1).
      calibration: files of earlier tasks, for the tunings that ask what mattered for them; their
        first `calibration_samples` are read.
      calibration_samples: how many.
      mask_thoughts: share of an answer's tokens that the model sees masked (2403.02178).
      mask_token: what masks them; default the tokenizer's own mask, padding or unknown token.
    """

    train: tuple[str, ...] = ()
    eval: tuple[str, ...] = ()
    window: int = 1024
    loss_on: Literal["answers", "all"] = "answers"
    long: Literal["cut", "skip", "error"] = "cut"
    pack: bool = True
    chat_template: str | None = None
    phased: bool = False
    replay: tuple[str, ...] = ()
    replay_share: float = 0.1
    calibration: tuple[str, ...] = ()
    calibration_samples: int = 128
    mask_thoughts: float = 0.0
    mask_token: str | None = None

    def __post_init__(self):
        whole("data.window", self.window)
        whole("data.calibration_samples", self.calibration_samples)
        share("data.replay_share", self.replay_share)
        share("data.mask_thoughts", self.mask_thoughts)


@dataclass(frozen=True)
class Optimizer:
    """The optimiser, by optax, and its rate over the run.

    Args:
      kind: "adamw", "lion", "muon" (Adam for what is no matrix) or "sgd".
      rate: peak learning rate.
      schedule: "constant", "linear" or "cosine" down to 0 at the last step, after `warmup` steps.
      warmup: steps in which the rate rises from 0.
      b1: decay of the first moment, SGD's momentum; in [0, 1).
      b2: decay of the second moment; in [0, 1).
      weight_decay: decoupled, times the rate; on matrices alone.
      clip: largest global norm of the gradient; 0 for none.
    """

    kind: Literal["adamw", "lion", "muon", "sgd"] = "adamw"
    rate: float = 2e-5
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    warmup: int = 0
    b1: float = 0.9
    b2: float = 0.95
    weight_decay: float = 0.0
    clip: float = 1.0

    def __post_init__(self):
        whole("optimizer.warmup", self.warmup, low=0)
        for name in ("rate", "weight_decay", "clip"):
            number(f"optimizer.{name}", getattr(self, name))
        for name in ("b1", "b2"):
            share(f"optimizer.{name}", getattr(self, name))


@dataclass(frozen=True)
class MeshSizes:
    """Mesh axes: their product is the number of devices. All 1 on one device.

    Args:
      data: copies of the model, each with a part of the batch.
      fsdp: parts that weights and batch are split into.
      tensor: parts that heads and the feed-forward width are split into.
    """

    data: int = 1
    fsdp: int = 1
    tensor: int = 1

    def __post_init__(self):
        for name in ("data", "fsdp", "tensor"):
            whole(f"mesh.{name}", getattr(self, name))


@dataclass(frozen=True)
class Config:
    """One run of `jaxlm train`.

    Args:
      model: a folder, a hub id or "tiny".
      revision: of a hub id; default its main branch.
      ignore_fields: of the model's config.json, unknown to jaxlm, that you know not to change the
        maths.
      check_tokenizer: refuse a tokenizer that looks like another model's.
      out: folder for checkpoints, logs and the export; a second run with it goes on.
      data: what is learnt.
      tuning: how: "full", "osft", "lora", "olora" or "ewc".
      optimizer: by what steps.
      batch: rows of a step, in all devices and accumulated parts together.
      batch_tokens: instead of `batch`, inputs of a step: rows times the window.
      accumulate: parts that a batch is computed in, one after another.
      steps: how long; or `epochs`.
      epochs: passes over the data; or `steps`.
      remat: recompute each block in the backward pass.
      dtype: of the compute; what is trained is float32.
      stack: run the layers as one scan, which compiles faster.
      mesh: axes of devices.
      evaluate_every: steps between evaluations; 0 is at the end alone.
      checkpoint_every: steps between checkpoints; 0 is at the end and by `checkpoint_minutes`.
      checkpoint_minutes: a checkpoint is also written so long after the last one; 0 for none.
      keep: checkpoints that are kept.
      previous: for "olora" and "ewc", `out` of the run that learnt the task before; `model` is then
        the folder `model` in it.
      seed: of the order of samples and of what starts at random.
      export: dtype of `out/model`, the Hugging Face folder written at the end; "none" writes none.
      tensorboard: write `out/tensorboard` besides `out/log.jsonl`.
    """

    model: str = "tiny"
    revision: str | None = None
    ignore_fields: tuple[str, ...] = ()
    check_tokenizer: bool = True
    out: str = "runs/train"
    data: Data = Data()
    tuning: AnyTuning = Full()
    optimizer: Optimizer = Optimizer()
    batch: int | None = None
    batch_tokens: int | None = None
    accumulate: int = 1
    steps: int | None = None
    epochs: int | None = None
    remat: bool = False
    dtype: Literal["float32", "bfloat16"] = "float32"
    stack: bool = False
    mesh: MeshSizes = MeshSizes()
    evaluate_every: int = 0
    checkpoint_every: int = 0
    checkpoint_minutes: float = 10.0
    keep: int = 2
    previous: str | None = None
    seed: int = 0
    export: Literal["float32", "bfloat16", "float16", "none"] = "float32"
    tensorboard: bool = False

    def __post_init__(self):
        for name in ("accumulate", "keep"):
            whole(name, getattr(self, name))
        for name in ("evaluate_every", "checkpoint_every", "seed"):
            whole(name, getattr(self, name), low=0)
        number("checkpoint_minutes", self.checkpoint_minutes)
        for first, second in (("batch", "batch_tokens"), ("steps", "epochs")):
            given = [n for n in (first, second) if getattr(self, n) is not None]
            if len(given) == 2:
                raise ConfigError(f"{first} and {second} are both given; expected one of them")
            for name in given:
                whole(name, getattr(self, name))
        if self.batch_tokens is not None and self.batch_tokens % self.data.window:
            raise ConfigError(f"batch_tokens is {self.batch_tokens}; expected a multiple of "
                              f"data.window, {self.data.window}")
        if self.rows % self.accumulate:
            raise ConfigError(f"a batch of {self.rows} rows does not divide into accumulate: "
                              f"{self.accumulate} parts; change one of them")
        if self.previous is not None and not isinstance(self.tuning, Remembering):
            raise ConfigError(f"previous is {self.previous!r}; of the ways of tuning only olora "
                              "and ewc read the run before; leave it out")
        if self.data.phased and self.epochs is None:
            raise ConfigError("data.phased needs epochs, the passes over each file; got steps")

    @property
    def rows(self) -> int:
        """Rows of a step."""
        return self.batch or (self.batch_tokens or 8 * self.data.window) // self.data.window

    def replace(self, **changes: Any) -> "Config":
        """A copy with some fields changed."""
        return dataclasses.replace(self, **changes)


def read_config(path: str | pathlib.Path) -> Config:
    """A run's settings from a YAML file.

    Raises: ConfigError that names the file, and the field with the closest that there is.
    """
    import yaml

    try:
        tree = yaml.safe_load(pathlib.Path(path).expanduser().read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not YAML: {' '.join(str(error).split())}") from error
    try:
        return from_dict(Config, {} if tree is None else tree)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error


def from_dict(kind: Any, tree: Any, at: str = "") -> Any:
    """A frozen dataclass from plain values, nested ones too.

    >>> from_dict(Optimizer, {"kind": "lion", "rate": "1e-4"}).rate
    0.0001
    """
    if not isinstance(tree, dict):
        raise ConfigError(f"{at or 'the config'} is {tree!r}; expected fields with values")
    tree = dict(tree)
    if kind == AnyTuning:
        kind = _pick(tree.pop("kind", "full"), TUNINGS, f"{at}.kind")
    hints = typing.get_type_hints(kind)
    fields = [f.name for f in dataclasses.fields(kind)]
    dot = f"{at}." if at else ""
    for name in tree:
        _pick(name, {field: field for field in fields}, "", f"field {dot}{name}")
    values = {name: _value(hints[name], value, f"{dot}{name}") for name, value in tree.items()}
    try:
        return kind(**values)
    except ConfigError as error:
        said = str(error)
        raise ConfigError(said if said.startswith(dot) else f"{dot}{said}") from error


def _pick(name: Any, table: dict[str, Any], at: str, what: str = "") -> Any:
    """An entry by its name, or an error with the closest one."""
    if isinstance(name, str) and name in table:
        return table[name]
    near = difflib.get_close_matches(str(name), table, n=1, cutoff=0.5)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise ConfigError(f"{what or f'{at} {name!r}'} is unknown; expected one of "
                      f"{', '.join(table)}{hint}")


def _value(hint: Any, value: Any, at: str) -> Any:
    """A plain value as its field wants it."""
    options = typing.get_args(hint)
    origin = typing.get_origin(hint)
    if hint == AnyTuning or dataclasses.is_dataclass(hint):
        return from_dict(hint, value, at)
    if origin is Literal:
        return _pick(value, {option: option for option in options}, at)
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in options:
            return None
        return _value(next(o for o in options if o is not type(None)), value, at)
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise ConfigError(f"{at} is {value!r}; expected a list, as in [{value}]")
        if len(options) == 2 and options[1] is ...:
            return tuple(_value(options[0], item, f"{at}[{i}]") for i, item in enumerate(value))
        if len(options) != len(value):
            raise ConfigError(f"{at} is {value!r}; expected {len(options)} entries")
        return tuple(_value(o, item, f"{at}[{i}]")
                     for i, (o, item) in enumerate(zip(options, value, strict=True)))
    if hint is float:
        try:  # YAML 1.1 reads 1e-4 as a string
            return float(value) if not isinstance(value, bool) else _wrong(hint, value, at)
        except (TypeError, ValueError):
            _wrong(hint, value, at)
    if hint in (int, str, bool) and type(value) is not hint:
        _wrong(hint, value, at)
    return value


def _wrong(hint: type, value: Any, at: str) -> Any:
    raise ConfigError(f"{at} is {value!r}; expected {hint.__name__}")


def to_dict(config: Any) -> dict[str, Any]:
    """The inverse of `from_dict`, as JSON has it."""
    tree = dataclasses.asdict(config)
    if isinstance(config, Config):
        names = {kind: name for name, kind in TUNINGS.items()}
        kind = type(config.tuning)
        tree["tuning"] = {"kind": names.get(kind, kind.__qualname__), **tree["tuning"]}
    return tree


# What may differ between a run and its continuation: it does not change what a step computes.
# (`previous` does, and the weights of `model`: they are compared by themselves, in `describe`.)
FREE = ("model", "revision", "ignore_fields", "check_tokenizer", "out", "mesh", "evaluate_every",
        "checkpoint_every", "checkpoint_minutes", "keep", "export", "tensorboard", "previous")
FILES = ("train", "eval", "replay", "calibration")  # compared by what they hold


def settings(config: Config) -> dict[str, Any]:
    """Flat settings that a continuation must share with its checkpoint.

    The length of the run is one of them only where the schedule depends on it; `epochs` are
    compared by themselves, in `describe`.
    """
    tree = {k: v for k, v in to_dict(config).items() if k not in FREE}
    if config.optimizer.schedule == "constant":
        tree["steps"] = tree["epochs"] = None
    tree["data"] = {k: v for k, v in tree["data"].items() if k not in FILES}
    flat = {path.replace("/", "."): value for path, value in flatten(tree).items()}
    return json.loads(json.dumps(flat))


def changes(then: dict[str, Any], now: dict[str, Any]) -> str:
    """What differs between flat settings, in words; "" where nothing does.

    >>> changes({"seed": 0, "batch": 8}, {"seed": 1, "batch": 8})
    'seed was 0 and is 1'
    """
    return ", ".join(f"{name} was {then.get(name)!r} and is {now.get(name)!r}"
                     for name in then | now if then.get(name) != now.get(name))


def hash_of(tree: Any) -> str:
    """A short name for plain values: the same for the same, whatever the order of keys."""
    return hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()[:16]
