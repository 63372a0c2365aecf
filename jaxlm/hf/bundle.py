"""Bundle: a model, its parameters and its tokenizer, read from and written to a model folder."""

import json
import os
import pathlib
import shutil
import warnings
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.typing import DTypeLike

from jaxlm.core.device import backend, require
from jaxlm.core.errors import CheckpointError, ConfigError, TokenizerError, flag
from jaxlm.core.hosts import is_writer, spans_processes, together
from jaxlm.core.mesh import RULES, Rules, shardings
from jaxlm.core.tree import Params, flatten
from jaxlm.hf.config import from_hf, has_deep_head, labels_from_hf, read_json, to_hf
from jaxlm.hf.families import family_of
from jaxlm.hf.hub import fetch
from jaxlm.hf.staging import staged
from jaxlm.hf.tokenizer import FILES, Tokenizer
from jaxlm.hf.weights import DTYPES, load_params, save_params
from jaxlm.models.lm import LM

BUNDLED = {"tiny": pathlib.Path(__file__).parents[1] / "bundled" / "tiny"}
TOKEN_FIELDS = ("bos_token_id", "eos_token_id", "pad_token_id")
LABEL_FIELDS = ("id2label", "label2id", "problem_type")
# What changes even greedy text in transformers, with the value that changes nothing.
PENALTIES = {"repetition_penalty": 1.0, "encoder_repetition_penalty": 1.0,
             "no_repeat_ngram_size": 0, "min_length": 0, "min_new_tokens": 0,
             "bad_words_ids": None, "suppress_tokens": None, "begin_suppress_tokens": None,
             "sequence_bias": None, "forced_bos_token_id": None, "forced_eos_token_id": None}


@dataclass(frozen=True)
class Bundle:
    """A model to use: the only object here that holds arrays.

    `stop_ids` end a text; `extra` keeps config.json's token ids and label names for `save`.
    """

    lm: LM
    params: Params
    tokenizer: Tokenizer
    stop_ids: tuple[int, ...] = ()
    extra: dict[str, Any] = field(default_factory=dict)
    mesh: Mesh | None = None

    def replace(self, **changes: Any) -> "Bundle":
        """A copy with some fields changed, such as `params` or `lm`."""
        return replace(self, **changes)

    def __repr__(self) -> str:
        """One line: family, size, dtype, and where the parameters are; not every weight."""
        leaves = jax.tree.leaves(self.params)
        count = sum(leaf.size for leaf in leaves)
        dtypes = "/".join(sorted({str(leaf.dtype) for leaf in leaves}))
        where = f"mesh {dict(self.mesh.shape)}" if self.mesh is not None else ", ".join(sorted(
            {str(d) for leaf in leaves if isinstance(leaf, jax.Array) for d in leaf.devices()}))
        labels = "" if self.lm.labels is None else f", {self.lm.labels} labels"
        return (f"Bundle({self.lm.config.family}{labels}, {count:,} parameters, {dtypes}, "
                f"{where or 'not on a device'})")


def load(
    source: str | os.PathLike, *, dtype: DTypeLike | None = None, mesh: Mesh | None = None,
    rules: Rules = RULES, device: str | jax.Device | None = None, revision: str | None = None,
    check_tokenizer: bool = True, ignore_fields: Sequence[str] = (),
) -> Bundle:
    """Load a Hugging Face checkpoint.

    Args:
      source: a model folder, a hub id such as `org/name`, or "tiny", the bundled model.
      dtype: of the parameters, or "own" for the checkpoint's own; default float32 on a CPU, the
        checkpoint's own elsewhere.
      mesh: place every parameter over this mesh by `rules`, tensor by tensor. It may span several
        processes, all of which call, and each of which reads only what its devices hold.
      device: "cpu", "gpu" or "tpu", or a jax.Device; default whatever jax uses.
      revision: of a hub id.
      check_tokenizer: refuse a tokenizer whose size is not the model's, or whose bos id is not
        and config.json's is no special token. Another model's of like size passes: nothing in a
        folder ties it to the weights.
      ignore_fields: of config.json, unknown to jaxlm, that you know not to change the maths.
    Returns: Bundle.
    Raises: ConfigError, CheckpointError, TokenizerError, DeviceError; all before any compute.

    Example:
      >>> load("tiny").lm.config.family
      'llama'
    """
    if device is not None and mesh is not None:
        raise ConfigError("pass either a device or a mesh, not both")
    if dtype not in (None, "own") and not _is_float(dtype):
        raise ConfigError(f"dtype is {dtype!r}; expected float32, bfloat16, float16 or 'own'")
    found = require(device)  # before anything is fetched
    target = found[0] if device is not None else None
    with together(spans_processes(mesh)):  # a process without the file must not leave the others
        return _load(resolve(source, revision), dtype, mesh, rules, target,
                     check_tokenizer, ignore_fields)


def _load(
    folder: pathlib.Path, dtype: Any, mesh: Mesh | None, rules: Rules, target: Any,
    check_tokenizer: bool, ignore_fields: Sequence[str],
) -> Bundle:
    """`load` of a folder, onto a mesh or a device."""
    raw = read_json(folder / "config.json")
    config = from_hf(raw, ignore_fields)
    labels, per_token = labels_from_hf(raw)
    lm = LM(config, labels=labels, per_token=per_token, deep_head=has_deep_head(raw))
    _check_token_ids(raw, folder, config.vocab_size)
    tokenizer = Tokenizer(folder)
    if check_tokenizer:
        _check_tokenizer(tokenizer, raw, folder, config.vocab_size)
    stop_ids = _stop_ids(tokenizer, raw, folder, config.vocab_size)
    _warn_of_penalties(folder, raw)
    if dtype is None and (target.platform if target else backend()) == "cpu":
        dtype = jnp.float32
    dtype = None if dtype == "own" else dtype
    shapes = lm.shapes(dtype or jnp.float32)
    placement = None
    if mesh is not None:
        placement = shardings(lm.axes(), shapes, mesh, rules)
    elif target is not None:
        placement = jax.tree.map(lambda _: target, shapes)
    params = load_params(folder, shapes, family_of(config.family), dtype, placement)
    names = TOKEN_FIELDS if labels is None else TOKEN_FIELDS + LABEL_FIELDS
    extra = {name: raw[name] for name in names if raw.get(name) is not None}
    return Bundle(lm, params, tokenizer, stop_ids, extra, mesh)


def _is_float(dtype: Any) -> bool:
    """Whether parameters may be of this dtype: one with a mantissa to lose, not an integer."""
    try:
        return jnp.dtype(dtype) in map(jnp.dtype, ("float32", "bfloat16", "float16"))
    except TypeError:
        return False


def check_bundle(bundle: Any) -> None:
    """ConfigError for what is no Bundle, such as the name of a model."""
    if not isinstance(bundle, Bundle):
        raise ConfigError(f"bundle is {bundle!r}; expected a Bundle, such as jaxlm.load('tiny')")


def resolve(source: str | os.PathLike, revision: str | None = None) -> pathlib.Path:
    """The folder of a source: a path, the bundled model's name, or a hub id to be fetched."""
    if not isinstance(source, str | os.PathLike) or not os.fspath(source):  # "" would be "."
        raise CheckpointError(f"source is {source!r}; expected a folder, a hub id like 'org/name', "
                              f"or one of {sorted(BUNDLED)}")
    path = pathlib.Path(source).expanduser()
    if path.is_dir():
        return path
    name = str(source)
    if name in BUNDLED:
        return BUNDLED[name]
    if path.exists():
        raise CheckpointError(f"{path} is a file; expected a model folder or a hub id")
    if name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise CheckpointError(
            f"{name!r} is neither a folder, nor a hub id like 'org/name', nor one of "
            f"{sorted(BUNDLED)}"
        )
    return fetch(name, revision)


def _check_tokenizer(
    tokenizer: Tokenizer, raw: dict[str, Any], folder: pathlib.Path, vocab: int
) -> None:
    """The tokenizer can be this model's: its ids fit, with no more to spare than padding takes."""
    other = ("it belongs to another model; put the model's own beside the weights, or, if this is "
             "it, pass check_tokenizer=False to jaxlm.load, or to a command --no-check-tokenizer")
    if tokenizer.base_size > vocab or not is_padding(tokenizer.size, vocab):
        raise TokenizerError(
            f"{folder}: the tokenizer has ids up to {tokenizer.size - 1} but the model's "
            f"vocabulary is {vocab}; {other}"
        )
    ours, theirs = tokenizer.id_of("bos_token"), raw.get("bos_token_id")
    if ours is not None and isinstance(theirs, int) and ours != theirs:
        words = f"{folder}: the tokenizer's bos_token is id {ours} but config.json says {theirs}"
        if theirs not in tokenizer.added_ids:
            raise TokenizerError(f"{words}; {other}")
        # a special token of both, as in the Qwens that DeepSeek distilled with its own marks
        warnings.warn(f"{words}; texts begin as the tokenizer has it", stacklevel=4)


def _check_token_ids(raw: dict[str, Any], folder: pathlib.Path, vocab: int) -> None:
    """config.json's begin and padding tokens are tokens; published files say none by null or -1."""
    for name in ("bos_token_id", "pad_token_id"):
        value = raw.get(name)
        if value is not None and (type(value) is not int or not -1 <= value < vocab):
            raise ConfigError(f"{folder}: {name} is {value!r}; expected an id from 0 to "
                              f"{vocab - 1}, or null; mend config.json")


def is_padding(size: int, vocab: int) -> bool:
    """Whether a vocabulary may be a tokenizer's `size` ids, padded.

    Vocabularies are padded to a multiple of 8 to 128, or by a little of a large one (Qwen2.5 7B:
    151,665 ids of 152,064); 3 % are allowed. Ids beyond the vocabulary, added for images, are not
    looked at here.

    >>> is_padding(151_665, 152_064), is_padding(100, 128), is_padding(100, 105)
    (True, True, False)
    """
    spare = vocab - size
    multiple = any(vocab % step == 0 and spare < step for step in (8, 16, 32, 64, 128))
    return spare <= 0.03 * size or multiple


def _stop_ids(
    tokenizer: Tokenizer, raw: dict[str, Any], folder: pathlib.Path, vocab: int
) -> tuple[int, ...]:
    """The ids that end a text, by generation_config.json, config.json and the tokenizer."""
    own = raw.get("eos_token_id")
    generation = _generation_settings(folder).get("eos_token_id", own)
    listed = lambda stops: stops if isinstance(stops, list) else [stops]
    for stops in (own, generation):
        if any(i is not None and (type(i) is not int or not 0 <= i < vocab)
               for i in listed(stops)):
            raise ConfigError(
                f"{folder}: eos_token_id is {stops!r}; expected ids from 0 to {vocab - 1}"
            )
    eos = tokenizer.id_of("eos_token")
    return tuple(sorted({i for i in (*listed(generation), eos) if i is not None}))


def _warn_of_penalties(folder: pathlib.Path, raw: dict[str, Any]) -> None:
    """Say which generation settings change greedy text: none is applied here.

    They stand in generation_config.json, or, of older checkpoints without one, in config.json.
    """
    settings = _generation_settings(folder) or raw
    kept = {name: settings[name] for name, neutral in PENALTIES.items()
            if settings.get(name) not in (None, neutral)}
    if kept:
        warnings.warn(
            f"{folder}: its generation settings ask for {kept}, which transformers applies and "
            "jaxlm does not; for a repetition penalty pass sampler=jaxlm.Categorical("
            "temperature=0, repetition_penalty=...)", stacklevel=4)


def _generation_settings(folder: pathlib.Path) -> dict[str, Any]:
    """generation_config.json of a model folder; empty where there is none."""
    path = folder / "generation_config.json"
    return read_json(path) if path.exists() else {}


def save(bundle: Bundle, folder: str | os.PathLike, *, overwrite: bool = False) -> pathlib.Path:
    """Write a folder that transformers loads: config, safetensors, tokenizer.

    The weights are written in the dtype that they have here, and config.json says which. On a CPU
    `load` makes all weights float32, so a bfloat16 checkpoint is saved in twice its bytes; load it
    with `dtype="own"` to keep the checkpoint's dtype.
    All is written beside `folder` under a temporary name and then put in place in one move, so
    a full disk or a kill leaves what was there. Where the system cannot swap two folders in one
    call (macOS, some network disks) the move is two renames, and a kill between them leaves what
    was there as `NAME.old-xxxxxxxx` beside it: rename it back. Other files of an overwritten folder
    are kept, links as links, and so are its permissions; a new one's are the umask's.
    Parameters that span processes: all call, the first one writes, and none returns before it has.

    Raises:
      CheckpointError: `folder` is no path; it exists and `overwrite` is false, or it holds the
        working directory;
        the parameters do not fit the model, are no floats or not finite (`load` would refuse
        them); or the disk is full.
      ConfigError: the family's config.json cannot express the model (a plan, say).
    """
    check_bundle(bundle)
    flag("overwrite", overwrite)
    if not isinstance(folder, str | os.PathLike) or not os.fspath(folder):
        raise CheckpointError(f"folder is {folder!r}; expected the path of a folder to write")
    shared = spans_processes(bundle.params)
    with ExitStack() as exits:
        stage = pathlib.Path()
        with together(shared):
            raw, files = _check_save(bundle)
            if is_writer(shared):
                stage = exits.enter_context(staged(pathlib.Path(folder), overwrite))
                _write_words(stage, bundle, raw, files)
        save_params(stage, bundle.params, family_of(bundle.lm.config.family))
        with together(shared):
            exits.close()
    return pathlib.Path(folder)


def _check_save(bundle: Bundle) -> tuple[dict[str, Any], list[pathlib.Path]]:
    """A bundle that a folder can hold: its config.json, and the tokenizer's files."""
    lm = bundle.lm
    if lm.plan:
        raise ConfigError(
            "a Hugging Face folder cannot hold a layer plan; save LM(config) with the full "
            "parameters instead"
        )
    _check_fit(bundle)
    dtype = str(bundle.params["embed"]["table"].dtype)
    raw = to_hf(lm.config, lm.labels, lm.per_token, lm.deep_head, dtype=dtype, **bundle.extra)
    files = [path for name in FILES if (path := bundle.tokenizer.folder / name).exists()]
    if not files:
        raise CheckpointError(
            f"{bundle.tokenizer.folder} no longer holds the tokenizer's files; expected one of "
            f"{FILES}; put them back, or load the model again"
        )
    return raw, files


def _write_words(
    stage: pathlib.Path, bundle: Bundle, raw: dict[str, Any], files: list[pathlib.Path]
) -> None:
    """All of the folder but the weights: the two configs, and the tokenizer's files.

    How the source wants to be sampled (do_sample, temperature, ...) is kept; ids are the bundle's.
    """
    (stage / "config.json").write_text(json.dumps(raw, indent=2) + "\n")
    tokens = {name: bundle.extra[name] for name in TOKEN_FIELDS if name in bundle.extra}
    generation = {**_generation_settings(bundle.tokenizer.folder), **tokens,
                  "eos_token_id": list(bundle.stop_ids) or None}
    (stage / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")
    for path in files:
        shutil.copyfile(path, stage / path.name)


def _check_fit(bundle: Bundle) -> None:
    """The parameters are those of the model and floats, or the folder could not be loaded again."""
    found, wanted = flatten(bundle.params), flatten(bundle.lm.shapes())
    for path in {**wanted, **found}:
        got = tuple(found[path].shape) if path in found else "absent"
        expected = tuple(wanted[path].shape) if path in wanted else "absent"
        if got != expected:
            raise CheckpointError(
                f"parameter {path!r} is {got}; expected {expected} by the model's config; save a "
                "bundle whose lm and params belong together"
            )
        if str(found[path].dtype) not in DTYPES.values():
            raise CheckpointError(
                f"parameter {path!r} is {found[path].dtype}; expected one of "
                f"{list(DTYPES.values())}, or the folder could not be loaded again"
            )
