"""What a task starts from: the bases of every protected matrix, in the form's own shape."""

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxlm.core.mesh import shardings
from jaxlm.core.tree import flatten
from jaxlm.models.axes import axes_of
from jaxlm.models.stack import STACK
from jaxlm.train.matrices import Matrix, as_matrix, input_axes
from jaxlm.train.subspace import Svd, complement, decompose, reflector

Parts = dict[str, jax.Array]  # of one kernel: (..., n or m, columns); the names say which
LEFT, RIGHT = ("left", "u"), ("right", "v")  # how names of a side begin


def bases_of(frozen: Any) -> dict[str, Parts]:
    """Path of a kernel -> its bases, as matrices."""
    found: dict[str, Parts] = {}
    for name, leaf in flatten(frozen.get("bases", {})).items():
        path, _, part = name.rpartition("/")
        two = matrix if part == "low" else columns
        found.setdefault(path, {})[part] = two(path, leaf)
    return found


def columns(path: str, leaf: jax.Array) -> jax.Array:
    """Parts of a kernel, stored with its own axes, as (..., rows, columns)."""
    lead = leaf.shape[:len(as_matrix(path, leaf.shape).lead)]
    return leaf.reshape(*lead, math.prod(leaf.shape[len(lead):-1]), leaf.shape[-1])


def matrix(path: str, kernel: jax.Array) -> jax.Array:
    """A kernel as (..., n, m)."""
    shape = as_matrix(path, kernel.shape)
    return kernel.reshape(*shape.lead, shape.n, shape.m)


def wide(leaf: jax.Array) -> jax.Array:
    """At least float32."""
    return jnp.asarray(leaf, jnp.promote_types(leaf.dtype, jnp.float32))


def find_bases(
    flat: dict[str, jax.Array], kept: dict[str, tuple[int, ...]], form: str, constraint: str,
    mesh: Mesh | None = None, decompose: Callable[..., Iterator[Svd]] = decompose,
) -> dict[str, Parts]:
    """The bases of some kernels, path -> name -> array, and what the form trains besides.

    Args:
      flat: kernels by path; a stacked one has several matrices.
      kept: k of each matrix of a kernel, not all 0.
    Returns: for "update" `left` or `left_free`, `right` or `right_free`; for "factored" `left`,
      `right`, `u`, `s`, `v`; for "coordinates" of each side `_free`, or `_vectors` and `_core`.
    """
    build: Callable[..., Parts] = {"update": _update, "factored": _factored,
                                   "coordinates": _coordinates}[form]
    shapes = {path: as_matrix(path, flat[path].shape) for path in kept}
    places: dict[str, NamedSharding] = {} if mesh is None else flatten(shardings(
        {path: axes_of(path) for path in kept}, {path: flat[path] for path in kept}, mesh))
    specs = {path: _spec(path, places.get(path)) for path in kept}
    alike = lambda path: (*shapes[path][1:], str(specs[path]))
    made = {}
    from tqdm import tqdm  # comes with huggingface_hub

    with tqdm(total=sum(map(len, kept.values())), desc="SVD", unit="matrix",
              disable=None, leave=False) as bar:
        for (n, m, _), group in itertools.groupby(sorted(kept, key=alike), key=alike):
            paths = list(group)
            all_k = [k for path in paths for k in kept[path]]
            every = (one for path in paths
                     for one in matrices_of(path, jax.device_put(flat[path], places.get(path))))
            low = form != "update" or constraint == "two_sided" and _needs_low(n, m, all_k)
            found = decompose(every, all_k, mesh, whole=low, spec=specs[paths[0]])
            for path in paths:
                parts = build([_step(bar, next(found)) for _ in kept[path]], kept[path], n, m,
                              constraint)
                made[path] = placed(path, parts, shapes[path], flat[path].shape, mesh)
    return made


def matrices_of(path: str, kernel: jax.Array) -> Iterator[jax.Array]:
    """Each matrix (n, m) of a kernel.

    By index: to iterate over an array that is split is to fetch it to the host.
    """
    whole = matrix(path, kernel)
    whole = whole.reshape(-1, *whole.shape[-2:])
    return (whole[i] for i in range(whole.shape[0]))


def _spec(path: str, where: NamedSharding | None) -> PartitionSpec:
    """How rows and columns of a kernel's matrices lie over the mesh."""
    if where is None:
        return PartitionSpec()
    lead = int(path.startswith(f"{STACK}/"))
    return PartitionSpec(where.spec[lead], where.spec[lead + input_axes(path)])


def _step(bar: Any, found: Svd) -> Svd:
    bar.update()
    return found


def _needs_low(n: int, m: int, all_k: Sequence[int]) -> bool:
    return any(cheapest(n, m, max(all_k), min(all_k)))


def placed(
    path: str, parts: Parts, shape: Matrix, kernel: tuple[int, ...], mesh: Mesh | None
) -> Parts:
    """Parts of one kernel with its own axes in place of rows and columns, on the mesh."""
    lead = len(shape.lead)
    split = lead + input_axes(path)
    out = {}
    for name, part in parts.items():
        part = part if lead else part[0]
        axes = {LEFT: kernel[lead:split], RIGHT: kernel[split:]}
        for start, rows in axes.items():
            if name.startswith(start) and not name.endswith("_core"):
                part = part.reshape(*shape.lead, *rows, part.shape[-1])
        out[name] = part
    if mesh is None:
        return out
    names = {name: part_axes(path, name) for name in out}
    return jax.device_put(out, shardings(names, out, mesh))


def part_axes(path: str, name: str) -> tuple[str, ...]:
    """Axis names of one of a kernel's parts.

    >>> part_axes("layers_0/attn/q/kernel", "right_free")
    ('heads', 'head_dim', 'rank')
    """
    names = axes_of(path)
    lead = int(path.startswith(f"{STACK}/"))
    split = lead + input_axes(path)
    first, rows, columns = names[:lead], names[lead:split], names[split:]
    if name.endswith("_core"):
        return (*first, "rank", "rank")
    if name.startswith(LEFT):
        return (*first, *rows, "rank")
    if name.startswith(RIGHT):
        return (*first, *columns, "rank")
    if name == "s":
        return (*first, "rank")
    return (*first, rows[0], columns[0])  # coordinates: as rows and columns of the matrix


def cheapest(n: int, m: int, k: int, least_k: int | None = None) -> tuple[bool, bool]:
    """Whether to project each side by the columns that are free instead of those that are kept.

    Only the side of length min(n, m) has all of its free columns in the SVD.

    Args: k: kept columns; of several matrices in one stack the most, and `least_k` the fewest.

    >>> cheapest(8, 8, 2), cheapest(8, 8, 6), cheapest(8, 32, 6)
    ((False, False), (True, True), (True, False))
    """
    r = min(n, m)
    free = r - (k if least_k is None else least_k)
    sides = [(left, right) for left in {False, n == r} for right in {False, m == r}]
    if k == r:  # nothing is free: kept columns would leave a rounding's worth
        sides = [pair for pair in sides if pair[0] == (n == r) and pair[1] == (m == r)]
    return min(sorted(sides), key=lambda pair: projection_flops(n, m, k, free, *pair))


def projection_flops(
    n: int, m: int, k: int, free: int, left_free: bool, right_free: bool
) -> float:
    """FLOPs of `osft.project` on one matrix.

    >>> projection_flops(8, 8, 4, 4, False, False), projection_flops(8, 8, 4, 4, True, True)
    (2048.0, 1536.0)
    """
    flops, rows, columns = 0.0, n, m
    if left_free:
        flops, rows = flops + 4.0 * n * free * m, free
    if right_free:
        flops, columns = flops + 4.0 * rows * m * free, free
    if not left_free:
        flops += 4.0 * n * k * columns
    return flops if right_free else flops + 4.0 * rows * m * k


def _pad(parts: Sequence[jax.Array]) -> jax.Array:
    """Matrices of several widths as one stack; the columns of zeros change nothing."""
    width = max(part.shape[-1] for part in parts)
    return jnp.stack([jnp.pad(part, [(0, 0)] * (part.ndim - 1) + [(0, width - part.shape[-1])])
                      for part in parts])


def _update(found: list[Svd], ks: Sequence[int], n: int, m: int, constraint: str) -> Parts:
    free = (False, False) if constraint == "corner" else cheapest(n, m, max(ks), min(ks))
    parts = {}
    for side, low, columns in zip(("left", "right"), free, ([one.u for one in found],
                                                            [one.v for one in found]),
                                  strict=True):
        pairs = list(zip(columns, ks, strict=True))
        parts[f"{side}_free" if low else side] = _pad(
            [u[:, k:] if low else u[:, :k] for u, k in pairs])
    return parts


def _factored(found: list[Svd], ks: Sequence[int], n: int, m: int, constraint: str) -> Parts:
    pairs = list(zip(found, ks, strict=True))
    return {"left": _pad([one.u[:, :k] for one, k in pairs]),
            "right": _pad([one.v[:, :k] for one, k in pairs]),
            "u": _pad([one.u[:, k:] for one, k in pairs]),
            "s": _pad([one.s[k:] for one, k in pairs]),
            "v": _pad([one.v[:, k:] for one, k in pairs])}


def _coordinates(found: list[Svd], ks: Sequence[int], n: int, m: int, constraint: str) -> Parts:
    pairs = list(zip(found, ks, strict=True))
    parts = _side("left", [(one.u, k) for one, k in pairs])
    return parts | _side("right", [(one.v, k) for one, k in pairs])


def _side(side: str, pairs: list[tuple[jax.Array, int]]) -> Parts:
    """The complement of the kept columns, by itself or, where that is smaller, by a reflector."""
    rows, r = pairs[0][0].shape
    ks = {k for _, k in pairs}
    if len(ks) == 1 and max(ks) < rows - max(ks):
        vectors, core = reflector(jnp.stack([u[:, :k] for u, k in pairs]))
        return {f"{side}_vectors": vectors, f"{side}_core": core}
    if rows == r:
        return {f"{side}_free": _pad([u[:, k:] for u, k in pairs])}
    return {f"{side}_free": _pad([complement(u[:, :k]) for u, k in pairs])}
