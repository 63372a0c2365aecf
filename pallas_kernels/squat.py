"""SQuat: query-aware error compensation of quantised keys (arXiv 2503.24358).

The error that matters is that of the logits, so keys are quantised under the metric
`A = I + lambda C`, `C = sum q q^T` over the prompt's queries of a kv head. Channels go in blocks;
once block F is rounded with error delta, the channels R that follow move to their optimum

    x_R <- x_R - A_RR^{-1} A_RF delta .

All updates are one matrix, `M[F, R] = -A_FR A_RR^{-1}` for every block, applied as
`x <- x + delta M` (rows: the rounded channels; columns: the ones that follow). Sweeping A's
channels from the last to the first leaves `A_FR A_RR^{-1}` in place whenever R has been swept.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.quant import Grid, QuantFormat, quantise

_EXACT = jax.lax.Precision.HIGHEST


class Compensation(NamedTuple):
    """What a key quantiser needs to know of the queries, per row and kv head."""

    matrix: jax.Array  # float32 [..., H, H], natural channel order: error of row -> move of column
    order: jax.Array  # int32 [..., H]: channels in processing order
    gram: jax.Array  # float32 [..., H, H], for the guard; its scale does not matter


class Sketch(NamedTuple):
    """The queries' metric in few bytes, `A = I + S^T S + diag(rest)` with `S = scale * rows`."""

    rows: jax.Array  # int8 [..., r, H]
    scale: jax.Array  # float32 [..., r]
    rest: jax.Array  # bfloat16 [..., H]: of the diagonal, what the rows leave out


def query_gram(q: jax.Array, kv_heads: int, valid: jax.Array | None = None) -> jax.Array:
    """Gram of the queries of each kv head, `C = sum q q^T`.

    Args:
      q: [B, T, N, H], rotated if the keys are; query head n belongs to kv head n // (N/K).
      valid: bool [B, T]; queries elsewhere do not count.

    Returns: float32 [B, K, H, H].
    """
    batch, time, heads, head_dim = q.shape
    q = q.astype(jnp.float32).reshape(batch, time, kv_heads, heads // kv_heads, head_dim)
    if valid is not None:
        q = jnp.where(valid[:, :, None, None, None], q, 0.0)
    return jnp.einsum("btkgh,btkgi->bkhi", q, q, precision=_EXACT)


def metric(gram: jax.Array, lam: float, lam_mode: str = "energy", rank: int | None = None,
           rows: jax.Array | None = None) -> jax.Array:
    """`A = I + lambda C`, with lambda per unit of query energy, per query, or raw.

    Args:
      gram: [..., H, H].
      lam_mode: 'energy' divides C by its mean diagonal (neither prompt length nor the scale of q
        matters); 'per_query' divides by `rows`; 'reference' does not normalise.
      rank: keep only this many leading eigenvectors of C (the reference's subspace).
      rows: number of queries in C, broadcastable to gram[..., 0, 0]; for 'per_query'.
    """
    head_dim = gram.shape[-1]
    if rank is not None and rank < head_dim:
        values, vectors = jnp.linalg.eigh(gram)
        values, vectors = jnp.maximum(values[..., -rank:], 0.0), vectors[..., -rank:]
        gram = jnp.einsum("...hr,...r,...ir->...hi", vectors, values, vectors, precision=_EXACT)
    if lam_mode == "energy":
        trace = jnp.trace(gram, axis1=-2, axis2=-1) / head_dim
        gram = gram / jnp.maximum(trace, 1e-30)[..., None, None]
    elif lam_mode == "per_query":
        if rows is None:
            raise ValueError("lam_mode='per_query' needs rows, the number of queries in the Gram")
        gram = gram / jnp.maximum(jnp.asarray(rows, jnp.float32), 1.0)[..., None, None]
    elif lam_mode != "reference":
        raise ValueError(f"lam_mode is 'energy', 'per_query' or 'reference', got {lam_mode!r}")
    return jnp.eye(head_dim) + lam * gram


@functools.partial(jax.jit, static_argnames=("block", "lam_mode", "rank", "energy_order"))
def compensation(gram: jax.Array, block: int = 16, lam: float = 10.0, lam_mode: str = "energy",
                 rank: int | None = None, rows: jax.Array | None = None,
                 energy_order: bool = True) -> Compensation:
    """The update matrix of every block, from one pass over the channels.

    Args:
      gram: [..., H, H] from `query_gram`.
      block: channels quantised together; it need not divide H, and `block >= H` is plain KIVI.
      energy_order: process channels by falling `diag(C)`; stored codes keep their natural order.
      lam, lam_mode, rank, rows: see `metric`.

    >>> compensation(jnp.eye(8), block=8).matrix.any().item()
    False
    """
    if block < 1:
        raise ValueError(f"block is at least 1 channel, got {block}")
    order = _order(gram, energy_order)
    moves = _sweep(_permute(metric(gram, lam, lam_mode, rank, rows), order), block)
    return Compensation(_permute(moves, jnp.argsort(order, axis=-1)), order, gram)


def _sweep(a: jax.Array, block: int) -> jax.Array:
    """`-A_FR A_RR^{-1}` for every block F of channels and the channels R behind it, else zeros.

    One symmetric sweep a channel instead of a Cholesky factorisation and a triangular solve: as XLA
    calls them on a CPU of few cores, several of those at once wait for each other for ever
    (jaxlib 0.10.2, two cores).
    """
    size = a.shape[-1]
    part = jnp.arange(size) // block

    def step(n, carry):
        a, moves = carry
        k = size - 1 - n
        first = (k == size - 1) | ((k + 1) % block == 0)  # of its block; all behind it are swept
        mine = first & (part[:, None] == k // block) & (part[None, :] > k // block)
        return _sweep_channel(a, k), jnp.where(mine, -a, moves)

    return jax.lax.fori_loop(0, size, step, (a, jnp.zeros_like(a)))[1]


def _sweep_channel(a: jax.Array, k) -> jax.Array:
    """The symmetric sweep of channel k; all channels swept, `a` is `-a^{-1}`."""
    column = jax.lax.dynamic_index_in_dim(a, k, -1, keepdims=True)
    pivot = jax.lax.dynamic_index_in_dim(column, k, -2, keepdims=True)
    scaled = column / pivot
    here = jnp.arange(a.shape[-1]) == k
    swept = a - column * jnp.swapaxes(scaled, -1, -2)
    swept = jnp.where(here[None, :], scaled, swept)
    swept = jnp.where(here[:, None], jnp.swapaxes(scaled, -1, -2), swept)
    return jnp.where(here[:, None] & here[None, :], -1 / pivot, swept)


def sketch(weight: jax.Array, rank: int) -> Sketch:
    """The metric `I + weight` by `rank` steps of Cholesky's factorisation, largest pivot first.

    Rows are rounded to 8 bits; `rest` makes the diagonal whole again. No eigenvectors: see
    `_sweep` on LAPACK.

    Args: weight: `lambda C`, float32 [..., H, H].

    >>> found = sketch(jnp.diag(jnp.array([4.0, 1.0])), 1)
    >>> (found.rows * found.scale[:, None]).round(3).tolist(), found.rest.tolist()
    ([[2.0, 0.0]], [0.0, 1.0])
    """
    whole = jnp.diagonal(weight, axis1=-2, axis2=-1)
    floor = 1e-6 * jnp.mean(whole, -1, keepdims=True)

    def step(left, _):
        energy = jnp.diagonal(left, axis1=-2, axis2=-1)
        at = jnp.argmax(energy, -1, keepdims=True)
        top = jnp.take_along_axis(energy, at, -1)
        row = jnp.take_along_axis(left, at[..., None], -2)[..., 0, :]
        row = jnp.where(top > floor, row * jax.lax.rsqrt(jnp.maximum(top, 1e-30)), 0.0)
        return left - row[..., :, None] * row[..., None, :], row

    rows = jnp.moveaxis(jax.lax.scan(step, weight, None, rank)[1], 0, -2)
    scale = jnp.maximum(jnp.max(jnp.abs(rows), -1), 1e-30) / 127
    codes = jnp.round(rows / scale[..., None])
    rest = whole - jnp.sum((codes * scale[..., None]) ** 2, -2)
    return Sketch(codes.astype(jnp.int8), scale, jnp.maximum(rest, 0).astype(jnp.bfloat16))


def sketched_weight(found: Sketch) -> jax.Array:
    """`lambda C` as a sketch has it, float32 [..., H, H]."""
    rows = found.rows * found.scale[..., None]
    low = jnp.einsum("...rh,...ri->...hi", rows, rows, precision=_EXACT)
    return low + found.rest.astype(jnp.float32)[..., None] * jnp.eye(rows.shape[-1])


@functools.partial(jax.jit, static_argnames=("block", "energy_order"))
def sketched_compensation(found: Sketch, block: int = 16, energy_order: bool = True
                          ) -> Compensation:
    """`compensation` from a sketch, in as many steps as it has rows.

    With `D = I + diag(rest)` and `G = S D^{-1/2}`, Woodbury's identity gives
    `A_RR^{-1} A_RF = D_R^{-1/2} G_R^T (I + G_R G_R^T)^{-1} G_F D_F^{1/2}`.
    """
    head_dim, rank = found.rows.shape[-1], found.rows.shape[-2]
    weight = sketched_weight(found)
    order = _order(weight, energy_order)
    pad = -head_dim % block
    root = jnp.take_along_axis(jnp.sqrt(1 + found.rest.astype(jnp.float32)), order, -1)
    rows = jnp.take_along_axis(found.rows * found.scale[..., None], order[..., None, :], -1)
    rows = rows / root[..., None, :]
    parts = jnp.pad(rows, [(0, 0)] * (rows.ndim - 1) + [(0, pad)])
    parts = parts.reshape(*rows.shape[:-1], -1, block)
    own = jnp.einsum("...rnb,...snb->...nrs", parts, parts, precision=_EXACT)
    behind = jax.lax.cumsum(own, own.ndim - 3, reverse=True) - own
    swept = jax.lax.fori_loop(0, rank, lambda k, a: _sweep_channel(a, k), jnp.eye(rank) + behind)
    left = -jnp.einsum("...nrs,...snb->...rnb", swept, parts, precision=_EXACT)
    left = left.reshape(*rows.shape[:-1], -1)[..., :head_dim]
    moves = jnp.einsum("...rc,...re->...ce", left * root[..., None, :],
                       rows / root[..., None, :], precision=_EXACT)
    part = jnp.arange(head_dim) // block
    moves = jnp.where(part[:, None] < part[None, :], -moves, 0.0)
    return Compensation(_permute(moves, jnp.argsort(order, axis=-1)), order, weight)


def _order(gram: jax.Array, energy_order: bool) -> jax.Array:
    """Channels by falling energy, or as they are: int32 [..., H]."""
    energy = jnp.diagonal(gram, axis1=-2, axis2=-1)
    if energy_order:
        return jnp.argsort(-energy, axis=-1).astype(jnp.int32)
    return jnp.broadcast_to(jnp.arange(gram.shape[-1], dtype=jnp.int32), energy.shape)


def _permute(matrix: jax.Array, order: jax.Array) -> jax.Array:
    rows = jnp.take_along_axis(matrix, order[..., :, None], axis=-2)
    return jnp.take_along_axis(rows, order[..., None, :], axis=-1)


@functools.partial(jax.jit, static_argnames=("fmt", "block", "guard"))
def quantise_keys_squat(k: jax.Array, comp: Compensation, fmt: QuantFormat, block: int = 16,
                        guard: bool = True, center: jax.Array | None = None) -> Grid:
    """Keys [..., S, H] under compensation; the same codes, scales and shapes as `quantise_keys`.

    With `guard`, each token group keeps plain codes wherever these have the smaller logit error
    `sum_t e_t^T C e_t` on the queries behind `comp`: those of `fmt.shrinks`, or those of min-max,
    for a grid shrunk to lessen the keys' error may raise the logits'.
    """
    *lead, size, head_dim = k.shape
    groups = size // fmt.group
    origin = jnp.zeros((*lead, head_dim)) if center is None else center
    per_channel = comp.order[..., None, None, :]
    original = k.astype(jnp.float32).reshape(*lead, groups, fmt.group, head_dim)
    x = jnp.take_along_axis(original, per_channel, axis=-1)
    origin = jnp.take_along_axis(origin[..., None, None, :], per_channel, axis=-1)
    moves = _permute(comp.matrix, comp.order)

    def round_block(x, start, width=block):
        cut = lambda y, axis: jax.lax.dynamic_slice_in_dim(y, start, width, axis)
        now = cut(x, -1)
        grid = quantise(now, -2, fmt.k_bits, fmt.scales, fmt.shrinks, cut(origin, -1), fmt.exact)
        move = jnp.einsum("...gth,...hi->...gti", grid.value - now, cut(moves, -2),
                          precision=_EXACT)
        return x + move, grid

    whole = head_dim // block * block
    parts = []
    if whole:  # a scan, so that one block is compiled
        x, blocks = jax.lax.scan(round_block, x, jnp.arange(0, whole, block))
        parts.append(Grid(*(jnp.moveaxis(y, 0, -2).reshape(*y.shape[1:-1], whole)
                            for y in blocks)))
    if whole < head_dim:
        parts.append(round_block(x, whole, head_dim - whole)[1])
    back = jnp.argsort(comp.order, axis=-1)[..., None, None, :]
    grid = Grid(*(jnp.take_along_axis(jnp.concatenate(part, -1), back, axis=-1)
                  for part in zip(*parts, strict=True)))
    if guard:
        natural = 0.0 if center is None else center[..., None, None, :]
        least = logit_error(grid.value - original, comp.gram)
        for shrinks in dict.fromkeys((fmt.shrinks, (1.0,))):
            plain = quantise(original, -2, fmt.k_bits, fmt.scales, shrinks, natural, fmt.exact)
            error = logit_error(plain.value - original, comp.gram)
            better = (least < error)[..., None, None]
            grid = Grid(*(jnp.where(better, new, old)
                          for new, old in zip(grid, plain, strict=True)))
            least = jnp.minimum(least, error)
    return Grid(grid.codes.reshape(k.shape), grid.scale[..., 0, :], grid.minimum[..., 0, :],
                grid.value.reshape(k.shape))


def logit_error(error: jax.Array, gram: jax.Array) -> jax.Array:
    """`sum_t e_t^T C e_t` of each token group: error [..., n, group, H] -> [..., n]."""
    weighted = jnp.einsum("...gth,...hi->...gti", error, gram, precision=_EXACT)
    return jnp.sum(weighted * error, axis=(-2, -1))
