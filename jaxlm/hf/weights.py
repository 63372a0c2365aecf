"""Safetensors both ways: headers are checked first, then tensors stream one at a time."""

import json
import pathlib
import stat
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from jaxlm.core.errors import CheckpointError
from jaxlm.core.hosts import is_writer, spans_processes, to_host, together
from jaxlm.core.tree import Params, flatten, unflatten
from jaxlm.hf.config import read_json
from jaxlm.hf.families import Family, tensor_name

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
PICKLES = (".bin", ".pt", ".pth", ".pkl")
HEAD, EMBED = "lm_head.weight", "model.embed_tokens.weight"
DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}


def locate(folder: pathlib.Path) -> dict[str, pathlib.Path]:
    """Which file holds each tensor; every header is read, and no tensor.

    As in transformers, an index counts only where there is no `model.safetensors`.
    Raises: CheckpointError for missing, truncated or corrupt files, and for pickles.
    """
    if (folder / INDEX).exists() and not (folder / SINGLE).exists():
        weight_map = read_json(folder / INDEX).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise CheckpointError(f"{folder / INDEX} has no weight_map; the index is damaged")
        names = sorted({str(name) for name in weight_map.values()})
    else:
        weight_map, names = {}, [SINGLE]
    files: dict[str, pathlib.Path] = {}
    for name in names:
        if pathlib.PurePath(name).name != name:
            raise CheckpointError(f"{folder / INDEX} names {name!r}; expected a plain file name")
        path = folder / name
        if not path.exists():
            raise CheckpointError(_missing(folder, path))
        with open_file(path) as file:
            for tensor in file.keys():
                if tensor in files:
                    raise CheckpointError(
                        f"{folder}: tensor {tensor!r} is in both {files[tensor].name} and {name}; "
                        "expected it once"
                    )
                files[tensor] = path
    for tensor, name in weight_map.items():
        if tensor not in files or files[tensor].name != name:
            raise CheckpointError(
                f"{folder}: the index says that {name} holds {tensor!r}, but it does not; "
                "fetch index and shards again"
            )
    return files


def _missing(folder: pathlib.Path, path: pathlib.Path) -> str:
    pickles = [p.name for end in PICKLES for p in sorted(folder.glob(f"*{end}"))]
    if pickles:
        return (f"{folder} holds {pickles[0]}, a pickle, which is never loaded because it can run "
                "code; convert it to safetensors with transformers' save_pretrained first")
    return f"{path} is missing; expected {SINGLE} or {INDEX} with its shards"


def open_file(path: pathlib.Path) -> Any:
    """A safetensors file, lazily."""
    if path.is_dir():
        raise CheckpointError(f"{path} is a folder; expected a safetensors file")
    try:
        return safe_open(path, framework="numpy")
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(
            f"{path} is not a whole safetensors file ({error}); fetch it again"
        ) from error


def load_params(
    folder: pathlib.Path, shapes: Params, family: Family, dtype: Any = None,
    placement: Params | None = None,
) -> Params:
    """A checkpoint's tensors as our tree, each read, checked, cast and placed in turn.

    Of a sharded tensor a process reads the slices that its own devices hold, and no others.

    Args:
      shapes: the tree to fill, from `LM.shapes`.
      dtype: of the result; None keeps the file's.
      placement: a tree of shardings or devices, or None for the default device.
    Raises: CheckpointError for a missing, surplus or misshapen tensor, and for NaN or infinity.
    """
    wanted = flatten(shapes)
    places = flatten(placement) if placement is not None else {}
    files = locate(folder)
    names = {path: tensor_name(path, family) for path in wanted}
    _check_headers(folder, files, names, wanted)
    _check_tied(folder, files, set(names.values()))
    out: dict[str, jax.Array] = {}
    for file_path in dict.fromkeys(files.values()):
        with open_file(file_path) as file:
            for path, name in names.items():
                if files[name] == file_path:
                    out[path] = _load(file, name, file_path, wanted[path].shape, dtype,
                                      places.get(path))
    return unflatten({path: out[path] for path in wanted})


def _load(file, name, file_path, shape, dtype, place) -> jax.Array:
    """One tensor in its place."""
    if not isinstance(place, jax.sharding.Sharding):
        return jax.device_put(_cast(read_slice(file, name, file_path, shape), dtype, name), place)
    held: dict[str, np.ndarray] = {}  # devices that hold the same slice share one reading

    def piece(index: tuple[slice, ...] | None) -> np.ndarray:
        if str(index) not in held:
            held[str(index)] = _cast(read_slice(file, name, file_path, shape, index), dtype, name)
        return held[str(index)]

    return jax.make_array_from_callback(shape, place, piece)


def _check_headers(folder, files, names, wanted) -> None:
    """Names and shapes agree, before any tensor is read."""
    needed = {name: path for path, name in names.items()}
    if lost := sorted(set(needed) - set(files)):
        raise CheckpointError(f"{folder}: tensor {lost[0]!r} is missing ({len(lost)} in all)")
    surplus = [n for n in files if n not in needed and not _harmless(n, needed)]
    if surplus:
        raise CheckpointError(
            f"{folder}: tensor {sorted(surplus)[0]!r} has no place in the model "
            f"({len(surplus)} in all); is config.json the right one?"
        )
    for file_path in dict.fromkeys(files.values()):
        with open_file(file_path) as file:
            for name, path in needed.items():
                if files[name] == file_path:
                    _check_slice(folder, file.get_slice(name), name, wanted[path].shape)


def _check_slice(folder, piece, name, shape) -> None:
    if piece.get_dtype() not in DTYPES:
        raise CheckpointError(
            f"{folder}: tensor {name!r} is {piece.get_dtype()}; expected one of {list(DTYPES)}"
        )
    expected = hf_shape(name, shape)
    if tuple(piece.get_shape()) != expected:
        raise CheckpointError(
            f"{folder}: tensor {name!r} is {tuple(piece.get_shape())}; expected {expected} by "
            "config.json"
        )


def _harmless(name: str, needed: dict[str, str]) -> bool:
    """Tensors that old exports carry and nobody needs."""
    tied = name == HEAD and EMBED in needed
    return tied or name.endswith("rotary_emb.inv_freq")


def _check_tied(folder, files, needed: set[str], rows: int = 8192) -> None:
    """A head that a tied model's file still carries is the embedding, or the tie is an error."""
    if HEAD not in files or needed & {HEAD, "score.weight", "score.0.weight"}:
        return
    with open_file(files[HEAD]) as one, open_file(files[EMBED]) as other:
        head, embed = one.get_slice(HEAD), other.get_slice(EMBED)
        same = head.get_shape() == embed.get_shape() and head.get_dtype() == embed.get_dtype()
        last = head.get_shape()[0] if same else 0
        for start in range(0, last, rows):
            part = slice(start, min(start + rows, last))
            same = same and np.array_equal(head[part], embed[part])
    if not same:
        raise CheckpointError(
            f"{folder}: config.json ties the head to the embedding, but {HEAD!r} differs from "
            f"{EMBED!r}; set tie_word_embeddings to false"
        )


def read_slice(
    file: Any, name: str, path: pathlib.Path, shape: tuple[int, ...],
    index: tuple[slice, ...] | None = None,
) -> np.ndarray:
    """A part of a stored tensor in our layout, checked; only its rows and columns are read.

    Args:
      file: from `open_file(path)`. shape: of the whole, in our layout.
      index: a slice a dimension, as shardings give them; default the whole.
    Raises: CheckpointError for what cannot be read, and for NaN or infinity.
    """
    stored, taken, inner = _stored_slices(name, shape, index or (slice(None),) * len(shape))
    try:
        array = file.get_tensor(name) if index is None else file.get_slice(name)[stored]
    except (SafetensorError, OSError, ValueError, TypeError) as error:
        raise CheckpointError(f"{path}: tensor {name!r} cannot be read ({error})") from error
    if not _finite(array):
        raise CheckpointError(f"{path}: tensor {name!r} holds NaN or infinity, or what "
                              "float32 cannot hold; the file is damaged")
    return to_ours(array, name, taken)[inner]


def _stored_slices(
    name: str, shape: tuple[int, ...], index: tuple[slice, ...]
) -> tuple[tuple[slice, ...], tuple[int, ...], tuple[slice, ...]]:
    """Where a part of our array stands in the file: the slices to read, the shape they have in
    our layout, and what is still to be cut from that.

    A stored dimension is the product of a run of ours (heads and head dim, say). A cut of the
    run's first is a range of rows; cuts of the others follow after reading.
    """
    if is_kernel(name):
        inputs = 2 if ".o_proj." in name else 1
        runs = [range(inputs, len(shape)), range(inputs)]
    elif name.endswith(".bias"):
        runs = [range(len(shape))]
    else:
        runs = [range(i, i + 1) for i in range(len(shape))]
    taken, inner, stored = list(shape), list(index), []
    for run in runs:
        start, stop, _ = index[run[0]].indices(shape[run[0]])
        width = int(np.prod([shape[i] for i in run[1:]], dtype=int))
        stored.append(slice(start * width, stop * width))
        taken[run[0]], inner[run[0]] = stop - start, slice(None)
    return tuple(stored), tuple(taken), tuple(inner)


def _finite(array: np.ndarray) -> bool:
    """Whether every number is finite, and float32 can hold it."""
    with np.errstate(over="ignore", invalid="ignore"):
        return bool(np.isfinite(array.astype(np.float32, copy=False).sum(dtype=np.float64)))


def _cast(array: np.ndarray, dtype: Any, name: str) -> np.ndarray:
    """To `dtype`, refusing what it cannot hold (float16 ends at 65,504)."""
    if dtype is None or array.dtype == dtype:
        return array
    with np.errstate(over="ignore"):
        cast = array.astype(dtype)
    if not _finite(cast):
        raise CheckpointError(
            f"tensor {name!r} holds {np.abs(array).max()}, beyond {np.dtype(dtype)}; load it in "
            "float32 or bfloat16"
        )
    return cast


def is_kernel(name: str) -> bool:
    """Whether a Hugging Face tensor is a projection, stored (out, in)."""
    return "_proj." in name and name.endswith(".weight")


def hf_shape(name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The stored shape of one of our arrays: (out, in) for projections, flat for biases."""
    if not is_kernel(name):
        return (int(np.prod(shape)),) if name.endswith(".bias") else tuple(shape)
    inputs = 2 if ".o_proj." in name else 1
    return int(np.prod(shape[inputs:])), int(np.prod(shape[:inputs]))


def to_ours(array: np.ndarray, name: str, shape: tuple[int, ...]) -> np.ndarray:
    """(out, in) to our (*in, *out); tables, scales and biases keep their order."""
    return (array.T if is_kernel(name) else array).reshape(shape)


def to_theirs(array: Any, name: str) -> np.ndarray:
    """The inverse of `to_ours`, contiguous."""
    host = np.asarray(array)
    out_in = hf_shape(name, host.shape)
    flat = host.reshape(out_in[::-1]).T if is_kernel(name) else host.reshape(out_in)
    return np.ascontiguousarray(flat)


def save_params(
    folder: pathlib.Path, params: Params, family: Family, shard_bytes: int = 5 * 2**30
) -> None:
    """Write our tree as safetensors, in shards of at most `shard_bytes` with an index.

    Arrays that span processes are gathered tensor by tensor; the first process alone writes, and
    `folder` is for it alone to see. All must call.
    Raises: CheckpointError for NaN or infinity, which `load_params` would refuse.
    """
    flat = flatten(params)
    shared = spans_processes(params)
    shards = list(_shards(flat, shard_bytes))
    weight_map: dict[str, str] = {}
    for number, paths in enumerate(shards, 1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        name = SINGLE if len(shards) == 1 else name
        tensors = {}
        for path in paths:
            array = to_host(flat[path])
            if is_writer(shared):
                tensors[tensor_name(path, family)] = to_theirs(array, tensor_name(path, family))
        with together(shared):
            if is_writer(shared):
                _check_finite(tensors)
                _write(tensors, folder / name)
        weight_map |= dict.fromkeys(tensors, name)
    if len(shards) > 1 and is_writer(shared):
        total = sum(int(x.size) * x.dtype.itemsize for x in flat.values())
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / INDEX).write_text(json.dumps(index, indent=2))


def _write(tensors: dict[str, np.ndarray], path: pathlib.Path) -> None:
    """One file of tensors, with the permissions that any new file gets here."""
    path.touch()
    mode = path.stat().st_mode
    save_file(tensors, path, metadata={"format": "pt"})
    path.chmod(stat.S_IMODE(mode))  # safetensors leaves it to its owner alone


def _check_finite(tensors: dict[str, np.ndarray]) -> None:
    """Every tensor can be read again."""
    for name, array in tensors.items():
        if not _finite(array):
            raise CheckpointError(
                f"tensor {name!r} to be written holds NaN or infinity in float32, and could not be "
                "loaded again; save those of an earlier step, or mend them"
            )


def _shards(flat: dict[str, Any], limit: int) -> Iterator[list[str]]:
    """Paths in order, cut where a shard would outgrow the limit."""
    paths: list[str] = []
    held = 0
    for path, array in flat.items():
        size = int(array.size) * jnp.dtype(array.dtype).itemsize
        if paths and held + size > limit:
            yield paths
            paths, held = [], 0
        paths.append(path)
        held += size
    yield paths
