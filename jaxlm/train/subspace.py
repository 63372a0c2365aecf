"""Singular subspaces on device: a whole SVD or its leading part, layers shared by the devices."""

import itertools
from collections.abc import Callable, Iterable, Iterator
from functools import lru_cache
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

from jaxlm.core.errors import NumericsError
from jaxlm.train.exchange import back, back_by_columns, back_by_rows, own, split_of

HIGHEST = jax.lax.Precision.HIGHEST  # passes of bfloat16 or TF32 would leak a thousandth
LARGE = 2048  # from here on, a leading quarter or less is found by iteration
EXTRA, ROUNDS = 16, 8  # columns beyond the k that are wanted; products with W W^T
UNSPLIT = PartitionSpec()
RESIDUAL = 1e-3  # of the values found; above it, the whole SVD is taken


class Svd(NamedTuple):
    """`W = U diag(s) V^T`: u (..., n, r), s (..., r) falling, v (..., m, r)."""

    u: jax.Array
    s: jax.Array
    v: jax.Array


def dot(a: jax.Array, b: jax.Array) -> jax.Array:
    """`a @ b` in full float32."""
    return jnp.matmul(a, b, precision=HIGHEST)


def transpose(x: jax.Array) -> jax.Array:
    """The last two axes exchanged."""
    return jnp.swapaxes(x, -1, -2)


def svd(w: jax.Array) -> Svd:
    """The thin SVD of matrices (..., n, m), with orthonormal columns.

    >>> found = svd(jnp.array([[0.0, 2.0], [1.0, 0.0]]))
    >>> found.s.tolist()
    [2.0, 1.0]
    """
    u, s, vt = jnp.linalg.svd(w, full_matrices=False)
    return Svd(orthonormal(u), s, orthonormal(transpose(vt)))


def orthonormal(u: jax.Array) -> jax.Array:
    """Columns that are nearly orthonormal, made so to rounding: `U (3 I - U^T U) / 2`.

    The first step of Newton's iteration for the polar factor; it squares the error, which after
    an SVD in float32 is a few 1e-6.
    """
    return 1.5 * u - 0.5 * dot(u, dot(transpose(u), u))


def leading(w: jax.Array, k: int, key: jax.Array) -> tuple[Svd, jax.Array]:
    """The k largest singular triplets, by subspace iteration.

    Args: w: (..., n, m). k: at most min(n, m).
    Returns: an Svd of k columns, and `||W V - U diag(s)|| / ||s||`, which is 0 where the columns
      span an invariant subspace.
    Source: 0909.4061, algorithms 4.4 and 5.1.
    """
    width = min(k + EXTRA, *w.shape[-2:])
    q = jnp.linalg.qr(dot(w, jax.random.normal(key, (*w.shape[:-2], w.shape[-1], width))))[0]
    step = lambda _, q: jnp.linalg.qr(dot(w, dot(transpose(w), q)))[0]
    q = jax.lax.fori_loop(0, ROUNDS, step, q)
    small = svd(dot(transpose(q), w))
    u, s, v = dot(q, small.u)[..., :k], small.s[..., :k], small.v[..., :k]
    missed = jnp.linalg.norm(dot(w, v) - u * s[..., None, :], axis=(-2, -1))
    total = jnp.linalg.norm(s, axis=-1)
    return Svd(orthonormal(u), s, v), missed / jnp.maximum(total, jnp.finfo(s.dtype).tiny)


def reflector(u: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Orthonormal columns (..., n, k) as an orthogonal, symmetric `H = I - Y M Y^T`.

    Its first k columns span what u does, so the last n - k are an orthonormal complement, which
    need not be stored. With S the polar factor of the first k rows of u, negated:
    `Y = u - [S; 0]`, `M = 2 (Y^T Y)^-1`, whose condition is at most 2. Source: the block
    reflectors of Schreiber and Parlett, SIAM J. Numer. Anal. 25 (1988).
    Returns: Y (..., n, k) and M (..., k, k).
    """
    k = u.shape[-1]
    p, _, qt = jnp.linalg.svd(u[..., :k, :])
    y = u.at[..., :k, :].add(orthonormal(dot(p, qt)))
    return y, 2 * jnp.linalg.inv(dot(transpose(y), y))


def reflect(x: jax.Array, vectors: jax.Array, core: jax.Array) -> jax.Array:
    """`H x`."""
    return x - dot(vectors, dot(core, dot(transpose(vectors), x)))


def unreflect(a: jax.Array, vectors: jax.Array, core: jax.Array) -> jax.Array:
    """The last n - k columns of H, times a (..., n - k, c)."""
    k = vectors.shape[-1]
    zeros = jnp.zeros((*a.shape[:-2], k, a.shape[-1]), a.dtype)
    inner = dot(core, dot(transpose(vectors[..., k:, :]), a))
    return jnp.concatenate([zeros, a], -2) - dot(vectors, inner)


def complement(u: jax.Array) -> jax.Array:
    """n - k orthonormal columns that u (..., n, k) has none of."""
    n, k = u.shape[-2:]
    eye = jnp.broadcast_to(jnp.eye(n - k, dtype=u.dtype), (*u.shape[:-2], n - k, n - k))
    return orthonormal(unreflect(eye, *reflector(u)))


def decompose(
    matrices: Iterable[jax.Array], ranks: Iterable[int], mesh: Mesh | None = None,
    whole: bool = False, spec: PartitionSpec = UNSPLIT,
) -> Iterator[Svd]:
    """The SVD of each of many matrices of one shape; as many at once as there are devices.

    Nothing goes through the host: matrices move between devices, one to each, and what is found
    goes back to where their rows and columns lie. Where a leading part is found by iteration and
    its residual is above `RESIDUAL`, the whole SVD is taken.

    Args:
      matrices: (n, m) each.
      ranks: of each, the leading columns that are needed at least.
      whole: never a part only.
      spec: how rows and columns lie over the mesh; sizes that divide.
    Yields: an `Svd` of all min(n, m) columns, or of that matrix's rank.
    Raises: NumericsError for a matrix with a NaN or an infinity.
    """
    waiting, k, done = iter(matrices), max(ranks, default=0), 0
    at_once = 1 if mesh is None else mesh.size
    while some := list(itertools.islice(waiting, at_once)):
        padded = some + some[:1] * (at_once - len(some))  # a device without one has company's
        for found in _several(padded, len(some), k, mesh, whole, spec):
            if not bool(jnp.isfinite(found.s).all()):
                raise NumericsError(f"matrix {done} of shape {some[0].shape} has no SVD: it holds "
                                    "a NaN or an infinity; take a checkpoint from before that")
            done += 1
            yield found


def blank(
    matrices: Iterable[jax.Array], ranks: Iterable[int], mesh: Mesh | None = None,
    whole: bool = False, spec: PartitionSpec = UNSPLIT,
) -> Iterator[Svd]:
    """As `decompose`, of zeros: to know shapes without any work, under `jax.eval_shape`."""
    for w in matrices:
        zeros = lambda *shape, w=w: jnp.zeros(shape, jnp.promote_types(w.dtype, jnp.float32))
        r = min(w.shape)
        yield Svd(zeros(w.shape[0], r), zeros(r), zeros(w.shape[1], r))


def _several(
    matrices: list[jax.Array], count: int, k: int, mesh: Mesh | None, whole: bool,
    spec: PartitionSpec,
) -> list[Svd]:
    """One matrix a device; the first `count` are wanted."""
    least = min(matrices[0].shape)
    apart = lambda found: [Svd(*(part[i] for part in found)) for i in range(count)]
    if not whole and least >= LARGE and 0 < k <= least // 4:
        found, residual = shared(k, mesh, spec)(matrices)
        if bool((residual[:count] <= RESIDUAL).all()):
            return apart(found)
    return apart(shared(None, mesh, spec)(matrices)[0])


@lru_cache
def shared(
    k: int | None, mesh: Mesh | None, spec: PartitionSpec
) -> Callable[[list[jax.Array]], tuple[Svd, jax.Array]]:
    """The jitted `svd` (k None; its residual is 0) or `leading` of matrices, one to a device.

    U comes back over the axes of the mesh that the rows lie over, V over those of the columns.
    """
    def function(w):
        w = w.astype(jnp.promote_types(w.dtype, jnp.float32))
        if k is None:
            return svd(w), jnp.zeros(w.shape[0])
        return leading(w, k, jax.random.key(0))

    if mesh is None or mesh.size == 1:
        return jax.jit(lambda matrices: function(jnp.stack(matrices)))
    split = split_of(spec, mesh)

    def on_each(matrices):
        found, residual = function(own(matrices, split))
        every = split.copies + split.rows + split.columns
        return Svd(back_by_rows(found.u, split), back(found.s, every),
                   back_by_columns(found.v, split)), back(residual, every)

    specs: list[Any] = [split.rows_spec, PartitionSpec(), split.columns_spec]
    out = Svd(*specs), PartitionSpec()
    return jax.jit(jax.shard_map(on_each, mesh=mesh, in_specs=spec, out_specs=out,
                                 check_vma=False))
