"""Mosaic kernel for TPU: grid (row, kv head, block of tokens), codes read once per kv head.

Nothing is dequantised element by element. Keys: `q . (code * s + m) = (q * s) . code + q . m`, with
one scaled copy of q per token group, stacked so that 128 tokens go through the MXU at once; the
wanted blocks of the product are its block diagonal. Values: one copy of the weights per channel
group, scaled by that group's scales; each copy's own lanes are kept at the end. Codes are exact in
bfloat16; the scaled q and p go as a high and a low bfloat16 part, so results are those of float32.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.quant import QuantFormat, decode_scales
from pallas_kernels.quant_decode_attention.common import EMPTY_LSE, Softmax, cap, finish, weigh

_SUBLANES = 8


def attend(q, packed, lengths, first, tail, *, fmt, softcap=None, rotate=None, interpret=False):
    """q [B, K, G, H], already scaled -> (out [B, K, G, H], lse [B, K, G])."""
    if rotate is not None:
        raise NotImplementedError("keys before RoPE are read by implementation='xla'")
    if fmt.scales == "float16":
        raise NotImplementedError("Mosaic has no float16; use bfloat16 scales or 'xla'")
    batch, kv_heads, heads, head_dim = q.shape
    size = packed.k_words.shape[2] * 32 // fmt.k_bits
    block = block_tokens(size, fmt, 512 if interpret else 2048)  # unrolled: long to compile
    padded = -(-heads // _SUBLANES) * _SUBLANES
    q = jnp.pad(q, ((0, 0), (0, 0), (0, padded - heads), (0, 0)))
    if tail is None:
        empty = jnp.zeros((batch, kv_heads, _SUBLANES, head_dim), jnp.float32)
        tail = (empty, empty, jnp.zeros_like(lengths))
    k_tail, v_tail, tail_lengths = tail
    bounds = jnp.stack([lengths, first, tail_lengths])

    def at(t, bounds, b):  # blocks outside [first, length) are neither computed nor fetched
        last = jnp.maximum((bounds[0, b] + block - 1) // block - 1, 0)
        return jnp.clip(t, jnp.minimum(bounds[1, b] // block, last), last)

    rows = lambda n: pl.BlockSpec((1, 1, n, head_dim),
                                  lambda b, h, t, bounds: (b, h, at(t, bounds, b), 0))
    fixed = lambda n, lanes=head_dim: pl.BlockSpec((1, 1, n, lanes),
                                                   lambda b, h, t, bounds: (b, h, 0, 0))
    parts = packed.v_scale.shape[2]
    columns = pl.BlockSpec((1, 1, parts, block),
                           lambda b, h, t, bounds: (b, h, 0, at(t, bounds, b)))
    center = packed.k_center
    center = jnp.zeros((batch, kv_heads, head_dim), jnp.float32) if center is None else center
    kernel = functools.partial(_kernel, fmt=fmt, block=block, softcap=softcap)
    stacked = parts * padded
    out, lse = pl.pallas_call(
        kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1, grid=(batch, kv_heads, size // block),
            in_specs=[fixed(padded), rows(block * fmt.k_bits // 32), rows(block // fmt.group),
                      rows(block // fmt.group), fixed(1), rows(block * fmt.v_bits // 32), columns,
                      columns, fixed(k_tail.shape[2]), fixed(k_tail.shape[2])],
            out_specs=[fixed(padded), fixed(padded, 128)],
            scratch_shapes=[pltpu.VMEM((padded, 128), jnp.float32),
                            pltpu.VMEM((padded, 128), jnp.float32),
                            pltpu.VMEM((stacked, head_dim), jnp.float32)]),
        out_shape=[jax.ShapeDtypeStruct((batch, kv_heads, padded, head_dim), jnp.float32),
                   jax.ShapeDtypeStruct((batch, kv_heads, padded, 128), jnp.float32)],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary")),
        interpret=interpret,
    )(bounds, q, packed.k_words, packed.k_scale, packed.k_min, center[:, :, None], packed.v_words,
      packed.v_scale, packed.v_min, k_tail, v_tail)
    return out[:, :, :heads], lse[:, :, :heads, 0]


def block_tokens(size: int, fmt: QuantFormat, most: int = 2048) -> int:
    """Tokens a grid step: whole tiles that divide the capacity and fill whole memory tiles."""
    packing = 32 // jnp.dtype(fmt.scales).itemsize
    tiles = size // fmt.tile
    for many in range(min(tiles, max(most // fmt.tile, 1)), 0, -1):
        block = many * fmt.tile
        whole = block % 128 == 0 and block // fmt.group % packing == 0
        if tiles % many == 0 and (whole or many == tiles):
            return block
    raise NotImplementedError(f"no block of whole tiles fits a capacity of {size} tokens under "
                              f"{fmt}; use a multiple of {most} tokens or implementation='xla'")


def _kernel(bounds, q_ref, kw_ref, ks_ref, km_ref, kc_ref, vw_ref, vs_ref, vm_ref, kt_ref, vt_ref,
            out_ref, lse_ref, top_ref, total_ref, acc_ref, *, fmt, block, softcap):
    b, t = pl.program_id(0), pl.program_id(2)
    length, first, tail_length = bounds[0, b], bounds[1, b], bounds[2, b]
    q = q_ref[0, 0]
    rows, head_dim = q.shape
    parts = vs_ref.shape[2]
    width = head_dim // parts

    @pl.when(t == 0)
    def _():
        top_ref[...] = jnp.full_like(top_ref, EMPTY_LSE)
        total_ref[...] = jnp.zeros_like(total_ref)
        acc_ref[...] = jnp.zeros_like(acc_ref)

    def update(logits, index, keep, values_of):
        """Online softmax over new logits [rows, S]; `values_of(weights)` is [parts * rows, H]."""
        state = Softmax(top_ref[:, :1], total_ref[:, :1], jnp.zeros((rows, 1), jnp.float32))
        shrink_from = state.top
        state, weights = weigh(state, cap(logits, softcap), keep & (index >= first))
        top_ref[...] = jnp.broadcast_to(state.top, top_ref.shape)
        total_ref[...] = jnp.broadcast_to(state.total, total_ref.shape)
        shrink = jnp.concatenate([jnp.exp(shrink_from - state.top)] * parts, 0)
        acc_ref[...] = acc_ref[...] * shrink + values_of(weights)

    @pl.when((t * block < length) & ((t + 1) * block > first))
    def _():
        scale, low = decode_scales(ks_ref[0, 0], km_ref[0, 0], kc_ref[0, 0])
        logits = _key_logits(q, kw_ref, scale, low, fmt, block)
        index = t * block + jax.lax.broadcasted_iota(jnp.int32, logits.shape, 1)
        used = t * block + jax.lax.broadcasted_iota(jnp.int32, (parts, block), 1) < length
        scale, low = decode_scales(vs_ref[0, 0], vm_ref[0, 0])
        scales = jnp.where(used, scale, 0.0), jnp.where(used, low, 0.0)  # 0 * NaN would be summed
        update(logits, index, index < length,
               lambda weights: _value_sums(weights, vw_ref, *scales, fmt, block))

    @pl.when(t == pl.num_programs(2) - 1)
    def _():
        keys, values = (ref[0, 0].astype(jnp.float32) for ref in (kt_ref, vt_ref))
        used = jax.lax.broadcasted_iota(jnp.int32, keys.shape, 0) < tail_length
        keys, values = jnp.where(used, keys, 0.0), jnp.where(used, values, 0.0)
        logits = _dot(q, keys, 1, jax.lax.Precision.HIGHEST)
        index = jax.lax.broadcasted_iota(jnp.int32, logits.shape, 1)

        def tail_values(weights):  # exact already: every part gets the same sum
            return jnp.concatenate([_dot(weights, values, 0, jax.lax.Precision.HIGHEST)] * parts, 0)

        update(logits, index + length, index < tail_length, tail_values)
        lane = jax.lax.broadcasted_iota(jnp.int32, (rows, head_dim), 1) // width
        own = jnp.zeros((rows, head_dim), jnp.float32)
        for c in range(parts):
            own = jnp.where(lane == c, acc_ref[c * rows:(c + 1) * rows], own)
        out, lse = finish(Softmax(top_ref[:, :1], total_ref[:, :1], own))
        out_ref[0, 0] = out
        lse_ref[0, 0] = jnp.broadcast_to(lse[:, None], lse_ref.shape[2:])


def _key_logits(q, words_ref, scale, low, fmt, block):
    """q . key of every token of the block: [rows, block]."""
    rows, group = q.shape[0], fmt.group
    slots = 32 // fmt.k_bits
    together = max(1, min(128 // group, slots))  # token groups in one product
    pieces = []
    for start in range(0, block // group, together):
        tile, slot = divmod(start, slots)
        words = words_ref[0, 0, tile * group:(tile + 1) * group, :]
        codes = [_codes(words, slot + j, fmt.k_bits) for j in range(together)]
        scaled = [q * scale[start + j][None] for j in range(together)]
        product = _split_dot(jnp.concatenate(scaled, 0), jnp.concatenate(codes, 0), 1)
        lane = jax.lax.broadcasted_iota(jnp.int32, (rows, together * group), 1) // group
        piece = jnp.zeros((rows, together * group), jnp.float32)
        for j in range(together):
            shift = jnp.sum(q * low[start + j][None], -1, keepdims=True)
            piece = jnp.where(lane == j, product[j * rows:(j + 1) * rows] + shift, piece)
        pieces.append(piece)
    return jnp.concatenate(pieces, 1)


def _value_sums(weights, words_ref, scale, low, fmt, block):
    """weights [rows, block] times values, one copy a channel group: [parts * rows, H]."""
    group, slots = fmt.group, 32 // fmt.v_bits
    parts = scale.shape[0]
    stacked = jnp.concatenate([weights * scale[c][None] for c in range(parts)], 0)
    shifts = jnp.concatenate(
        [jnp.sum(weights * low[c][None], -1, keepdims=True) for c in range(parts)], 0)
    together = max(1, min(128 // group, slots))
    total = jnp.broadcast_to(shifts, (stacked.shape[0], words_ref.shape[3]))
    for start in range(0, block // group, together):
        tile, slot = divmod(start, slots)
        words = words_ref[0, 0, tile * group:(tile + 1) * group, :]
        codes = [_codes(words, slot + j, fmt.v_bits) for j in range(together)]
        tokens = slice(start * group, (start + together) * group)
        total = total + _split_dot(stacked[:, tokens], jnp.concatenate(codes, 0), 0)
    return total


def _codes(words, slot: int, bits: int):
    return ((words >> (bits * slot)) & (2**bits - 1)).astype(jnp.float32).astype(jnp.bfloat16)


def _split_dot(x, codes, contract: int):
    """x @ codes in two bfloat16 passes stacked along rows; codes are exact in bfloat16."""
    high = x.astype(jnp.bfloat16)
    rest = (x - high.astype(jnp.float32)).astype(jnp.bfloat16)
    both = _dot(jnp.concatenate([high, rest], 0), codes, contract)
    return both[:x.shape[0]] + both[x.shape[0]:]


def _dot(x, y, contract: int, precision=None):
    return jax.lax.dot_general(x, y, (((1,), (contract,)), ((), ())), precision=precision,
                               preferred_element_type=jnp.float32)
