"""Mosaic kernel for TPU: grid (row, kv head), everything of one flush stays in VMEM.

Compensation, min-max, packing and the scales' placement in one pass; the blocks written are chosen
by the row's length through the index maps, and inputs alias outputs, so that only one word tile and
one memory tile of each scale array move. Channels need no permutation: in step i every channel is
quantised, and only those of block i are kept and hand on their error.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.lanes import beside, matrices_beside
from pallas_kernels.quant import Grid, PackedKV, quantise_by

_LANES = 128
_EXACT = jax.lax.Precision.HIGHEST


def flush(packed, k, v, lengths, ready, comp, *, fmt, block, guard, interpret=False):
    """One group of tokens a row; see `api.quant_flush`."""
    batch, kv_heads, _, head_dim = packed.k_words.shape
    many = k.shape[1] // kv_heads  # heads side by side
    blocks = -(-k.shape[3] // block)
    k, v = beside(k, many), beside(v, many)
    size = packed.v_scale.shape[3]
    if many > 1 and guard and comp is not None:
        raise NotImplementedError("a guard judges each head alone, not side by side; use 'xla'")
    if fmt.scales == "float16":
        raise NotImplementedError("Mosaic has no float16; use bfloat16 scales or 'xla'")
    if _LANES % fmt.group or size % _LANES:
        raise NotImplementedError(f"group divides {_LANES} and capacity is a multiple of it on TPU,"
                                  f" got group {fmt.group}, {size} tokens; use 'xla'")
    scale_rows = min(32 // jnp.dtype(fmt.scales).itemsize, size // fmt.group)
    parts = packed.v_scale.shape[2]
    rows = jnp.stack([lengths // fmt.group, ready.astype(jnp.int32)])
    fixed = lambda n, m=head_dim: pl.BlockSpec((1, 1, n, m), lambda b, h, rows: (b, h, 0, 0))
    tile = lambda n, every: pl.BlockSpec((1, 1, n, head_dim),
                                         lambda b, h, rows: (b, h, rows[0, b] // every, 0))
    lanes = pl.BlockSpec((1, 1, parts, _LANES),
                         lambda b, h, rows: (b, h, 0, rows[0, b] // (_LANES // fmt.group)))
    moved = [tile(fmt.group, 32 // fmt.k_bits), tile(scale_rows, scale_rows),
             tile(scale_rows, scale_rows), tile(fmt.group, 32 // fmt.v_bits), lanes, lanes]
    queries = _query_side(comp, packed, block, many)
    state = packed[:6]
    written = pl.pallas_call(
        functools.partial(_kernel, fmt=fmt, guard=guard, compensated=comp is not None,
                          blocks=blocks),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1, grid=(batch, kv_heads),
            in_specs=[fixed(fmt.group), fixed(fmt.group), *(fixed(x.shape[2]) for x in queries),
                      *moved],
            out_specs=moved),
        out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in state],
        input_output_aliases={3 + len(queries) + i: i for i in range(6)},
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel")),
        interpret=interpret,
    )(rows, k.astype(jnp.float32), v.astype(jnp.float32), *queries, *state)
    return packed._replace(**dict(zip(PackedKV._fields, written, strict=False)))


def _query_side(comp, packed, block, many):
    """center, block index of each channel, update matrix and Gram, with a leading [B, K]."""
    batch, kv_heads, _, head_dim = packed.k_words.shape
    center = packed.k_center
    center = jnp.zeros((batch, kv_heads, head_dim), jnp.float32) if center is None else center
    if comp is None:
        return (center[:, :, None],)
    index = (jnp.argsort(comp.order, axis=-1) // block).astype(jnp.int32)  # heads run abreast
    return (center[:, :, None], index.reshape(batch, kv_heads, 1, head_dim),
            matrices_beside(comp.matrix, many), matrices_beside(comp.gram, many))


def _kernel(rows_ref, k_ref, v_ref, center_ref, *refs, fmt, guard, compensated, blocks):
    rows = [ref.at[0, 0] for ref in refs]
    sides = 3 if compensated else 0
    queries, old, new = rows[:sides], rows[sides:sides + 6], rows[sides + 6:]
    token_group, on = rows_ref[0, pl.program_id(0)], rows_ref[1, pl.program_id(0)] > 0

    @pl.when(on)
    def _():
        _write(token_group, k_ref[0, 0], v_ref[0, 0], center_ref[0, 0], queries, old, new, fmt,
               guard, compensated, blocks)

    @pl.when(jnp.logical_not(on))  # most rows of most flushes
    def _():
        for before, after in zip(old, new, strict=True):
            after[...] = before[...]


def _write(token_group, k, v, center, queries, old, new, fmt, guard, compensated, blocks):
    by_channel = lambda reduce, y: reduce(y, axis=0, keepdims=True)
    by_part = functools.partial(_reduce_parts, width=v.shape[1] // old[4].shape[0])
    plain = lambda x, shrinks=fmt.shrinks: quantise_by(
        by_channel, x, fmt.k_bits, fmt.scales, shrinks, center)
    widths = dict.fromkeys((fmt.shrinks, (1.0,)))  # grids that the guard may fall back to
    keys = _compensated(k, queries, plain, widths, blocks, guard) if compensated else plain(k)
    values = quantise_by(by_part, v, fmt.v_bits, fmt.scales, fmt.shrinks)

    for at, grid, bits in ((0, keys, fmt.k_bits), (3, values, fmt.v_bits)):
        shift = bits * (token_group % (32 // bits))
        hole = jnp.int32(2**bits - 1) << shift
        word = old[at][...]
        new[at][...] = (word & ~hole) | (grid.codes << shift)
    for at, x in ((1, keys.scale), (2, keys.minimum)):
        before = old[at][...].astype(jnp.float32)
        row = jax.lax.broadcasted_iota(jnp.int32, before.shape, 0)
        after = jnp.where(row == token_group % before.shape[0], x.astype(jnp.float32), before)
        new[at][...] = after.astype(new[at].dtype)
    for at, x in ((4, values.scale), (5, values.minimum)):
        _place_tokens(new[at], old[at], x.astype(jnp.float32), token_group, fmt)


def _compensated(k, queries, plain, widths, blocks, guard) -> Grid:
    """Block by block in processing order; see `pallas_kernels.squat`."""
    index, matrix, gram = (ref[...] for ref in queries)
    x, kept = k, plain(k)
    for i in range(blocks):
        grid = kept if i == 0 else plain(x)
        mine = index == i
        if i > 0:
            kept = _choose(mine, grid, kept)
        if i + 1 < blocks:
            move = jnp.where(mine, grid.value - x, 0.0)
            x = x + jnp.dot(move, matrix, precision=_EXACT, preferred_element_type=jnp.float32)
    if not guard:
        return kept

    def logit_error(grid: Grid):
        error = grid.value - k
        weighted = jnp.dot(error, gram, precision=_EXACT, preferred_element_type=jnp.float32)
        return jnp.sum(jnp.sum(weighted * error, 1, keepdims=True), 0, keepdims=True)

    for first in (plain(k, shrinks) for shrinks in widths):
        kept = _choose(logit_error(kept) < logit_error(first), kept, first)
    return kept


def _choose(where, new: Grid, old: Grid) -> Grid:
    """Per channel; through float32, in which every stored scale is exact."""
    pick = lambda a, b: jnp.where(where, a, b)
    wide = lambda a, b: pick(a.astype(jnp.float32), b.astype(jnp.float32))
    return Grid(pick(new.codes, old.codes), wide(new.scale, old.scale),
                wide(new.minimum, old.minimum), pick(new.value, old.value))


_FILL = {jnp.min: 3e38, jnp.max: -3e38, jnp.sum: 0.0}


def _reduce_parts(reduce, y, width: int):
    """Reduction over each part of `width` lanes, broadcast back over the part."""
    part = jax.lax.broadcasted_iota(jnp.int32, y.shape, 1) // width
    total = jnp.zeros_like(y)
    for c in range(y.shape[1] // width):
        inside = jnp.where(part == c, y, _FILL[reduce])
        total = jnp.where(part == c, reduce(inside, axis=1, keepdims=True), total)
    return total


def _place_tokens(new_ref, old_ref, x, token_group, fmt):
    """x [group, H], constant over each part, into its lanes of [parts, 128], by exact products."""
    parts, (group, head_dim) = old_ref.shape[0], x.shape
    iota = lambda shape, axis: jax.lax.broadcasted_iota(jnp.int32, shape, axis)
    width = head_dim // parts
    first = jnp.where(iota((parts, head_dim), 1) == iota((parts, head_dim), 0) * width, 1.0, 0.0)
    start = token_group % (_LANES // group) * group
    lane = jnp.where(iota((group, _LANES), 1) == iota((group, _LANES), 0) + start, 1.0, 0.0)
    dims = (((1,), (1,)), ((), ()))
    columns = jax.lax.dot_general(first, x, dims, precision=_EXACT,
                                  preferred_element_type=jnp.float32)
    placed = jnp.dot(columns, lane, precision=_EXACT, preferred_element_type=jnp.float32)
    at = iota((parts, _LANES), 1)
    mine = (at >= start) & (at < start + group)
    after = jnp.where(mine, placed, old_ref[...].astype(jnp.float32))
    new_ref[...] = after.astype(new_ref.dtype)
