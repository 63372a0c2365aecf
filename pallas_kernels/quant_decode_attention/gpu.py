"""Triton kernel for NVIDIA cards of compute capability 8 and more: grid (row, kv head, split).

The arithmetic is the TPU kernel's: scales go into q and p, codes into the tensor cores as they are.
Channels are taken in parts of one value-scale group, so any head dim that is a multiple of 16 will
do though Triton's shapes are powers of two. A code is turned into bfloat16 by writing it into the
mantissa of 128 (no conversion instruction); the 128 is taken off with the minimum. Of q and p a
high and a low bfloat16 part fill the 16 rows that a product has anyway. Splits are merged outside.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from pallas_kernels.quant import QuantFormat, decode_scales
from pallas_kernels.quant_decode_attention.common import (
    Softmax,
    cap,
    finish,
    start_softmax,
    weigh,
)

_TAIL = 16  # tail tokens at once
_UNROLL = 4  # token groups a step up to head dim 128, then 1: at 256 four compile for minutes
_STAGED = 64 * 128  # words of K or V whose next ones are fetched ahead: more do not fit an A100
_PROGRAMS = 1024  # enough to fill the largest card several times over


def attend(q, packed, lengths, first, tail, *, fmt, softcap=None, rotate=None, interpret=False,
           unroll=None):
    """q [B, K, G, H], already scaled -> (out [B, K, G, H], lse [B, K, G]).

    `unroll`: token groups a step, 1, 2 or 4; None: a card's, or 1 to interpret, which is quicker.
    """
    if rotate is not None:
        raise NotImplementedError("keys before RoPE are read by implementation='xla'")
    batch, kv_heads, heads, head_dim = q.shape
    width = fmt.channels(head_dim)
    if fmt.group & (fmt.group - 1) or fmt.group < 16 or width < 16:
        raise NotImplementedError("Triton needs a power-of-two group of 16 or more, dividing the "
                                  f"head dim into parts of 16 or more; got group {fmt.group}, head "
                                  f"dim {head_dim}; use implementation='xla'")
    half = max(8, pl.next_power_of_2(heads))
    q = jnp.pad(q, ((0, 0), (0, 0), (0, half - heads), (0, 0)))
    q = jnp.concatenate([q, q], 2)
    tail = _whole_tail(tail, q, lengths)
    if unroll is None:
        unroll = _UNROLL if head_dim <= 128 and not interpret else 1
    size = packed.k_words.shape[2] * 32 // fmt.k_bits
    tiles = size // fmt.tile
    splits = max(n for n in range(1, tiles + 1)
                 if tiles % n == 0 and (n == 1 or batch * kv_heads * n <= _PROGRAMS))
    span = size // splits
    center = packed.k_center
    center = jnp.zeros((batch, kv_heads, head_dim), jnp.float32) if center is None else center

    row = pl.BlockSpec((1,), lambda b, h, s: (b,))
    whole = lambda *shape: pl.BlockSpec((None, None, *shape),
                                        lambda b, h, s: (b, h) + (0,) * len(shape))
    along = lambda n: pl.BlockSpec((None, None, n, head_dim), lambda b, h, s: (b, h, s, 0))
    tokens = pl.BlockSpec((None, None, head_dim // width, span), lambda b, h, s: (b, h, 0, s))
    split = lambda *shape: pl.BlockSpec((None, None, None, *shape),
                                        lambda b, h, s: (b, h, s) + (0,) * len(shape))
    lead = (batch, kv_heads, splits, 2 * half)
    column = jax.ShapeDtypeStruct(lead, jnp.float32)
    values, top, total = pl.pallas_call(
        functools.partial(_kernel, fmt=fmt, span=span, splits=splits, softcap=softcap,
                          unroll=unroll),
        grid=(batch, kv_heads, splits),
        in_specs=[row, row, row, whole(2 * half, head_dim), along(span * fmt.k_bits // 32),
                  along(span // fmt.group), along(span // fmt.group), whole(head_dim),
                  along(span * fmt.v_bits // 32), tokens, tokens,
                  whole(tail[0].shape[2], head_dim), whole(tail[1].shape[2], head_dim)],
        out_specs=[split(2 * half, head_dim), split(2 * half), split(2 * half)],
        out_shape=[jax.ShapeDtypeStruct((*lead, head_dim), jnp.float32), column, column],
        compiler_params=plt.CompilerParams(
            num_warps=4, num_stages=2 if fmt.group * head_dim <= _STAGED else 1),
        interpret=interpret,
    )(lengths, first, tail[2], q, packed.k_words, packed.k_scale, packed.k_min, center,
      packed.v_words, packed.v_scale, packed.v_min, tail[0], tail[1])
    values = (values[..., :half, :] + values[..., half:, :])[..., :heads, :]
    return _merge_splits(values, top[..., :heads], total[..., :heads])


def _whole_tail(tail, q, lengths):
    """A tail whose length is a multiple of `_TAIL`."""
    if tail is None:
        empty = jnp.zeros((*q.shape[:2], _TAIL, q.shape[3]), jnp.bfloat16)
        return empty, empty, jnp.zeros_like(lengths)
    extra = -tail[0].shape[2] % _TAIL
    pad = lambda x: jnp.pad(x, ((0, 0), (0, 0), (0, extra), (0, 0))) if extra else x
    return pad(tail[0]), pad(tail[1]), tail[2]


def _merge_splits(values, top, total):
    best = jnp.max(top, 2, keepdims=True)
    shrink = jnp.exp(top - best)
    return finish(Softmax(best[:, :, 0, :, None], jnp.sum(total * shrink, 2)[..., None],
                          jnp.sum(values * shrink[..., None], 2)))


def _kernel(length_ref, first_ref, tail_length_ref, q_ref, kw_ref, ks_ref, km_ref, kc_ref, vw_ref,
            vs_ref, vm_ref, kt_ref, vt_ref, out_ref, top_ref, total_ref, *, fmt: QuantFormat, span,
            splits, softcap, unroll):
    length, first, tail_length = length_ref[0], first_ref[0], tail_length_ref[0]
    split, group = pl.program_id(2), fmt.group
    head_dim = q_ref.shape[1]
    width = fmt.channels(head_dim)
    parts = head_dim // width
    channels = [pl.ds(c * width, width) for c in range(parts)]
    spans = _power_of_two_spans(head_dim)
    q = [q_ref[:, lanes] for lanes in spans]
    rows = q[0].shape[0]

    absorb = functools.partial(_absorb, first=first, softcap=softcap)

    def body(step, state):
        base = step * unroll  # token groups of one word tile, so that its words are read once
        k_words, v_words = (
            [ref[pl.ds(base // (32 // bits) * group, group), lanes] for lanes in pieces]
            for ref, bits, pieces in ((kw_ref, fmt.k_bits, spans), (vw_ref, fmt.v_bits, channels)))
        for at in [base + i for i in range(unroll)]:
            logits = jnp.zeros((rows, group), jnp.float32)
            for c, lanes in enumerate(spans):
                scale, low = decode_scales(ks_ref[at, lanes], km_ref[at, lanes], kc_ref[lanes])
                codes, offset = _codes(k_words[c], at, fmt.k_bits)
                logits += _scaled_dot(q[c], scale, low, codes, offset, 1)
            index = split * span + at * group + jax.lax.broadcasted_iota(
                jnp.int32, (rows, group), 1)

            def values_of(weights, c, at=at):
                tokens = pl.ds(at * group, group)
                scale, low = decode_scales(vs_ref[c, tokens], vm_ref[c, tokens])
                used = split * span + at * group + jnp.arange(group) < length
                scale, low = jnp.where(used, scale, 0.0), jnp.where(used, low, 0.0)  # as the tail's
                codes, offset = _codes(v_words[c], at, fmt.v_bits)
                return _scaled_dot(weights, scale, low, codes, offset, 0)

            state = absorb(state, logits, index, index < length, values_of)
        return state

    def tail_body(i, state):
        at = pl.ds(i * _TAIL, _TAIL)
        logits = jnp.zeros((rows, _TAIL), jnp.float32)
        used = lambda n: (i * _TAIL + jax.lax.broadcasted_iota(jnp.int32, (_TAIL, n), 0)
                          < tail_length)
        read = lambda ref, lanes: jnp.where(used(lanes.size), ref[at, lanes].astype(jnp.float32),
                                            0.0)
        for c, lanes in enumerate(spans):
            for keys in _high_low(read(kt_ref, lanes), kt_ref.dtype):
                logits += _dot(_split_rows(q[c]), keys, 1)
        index = i * _TAIL + jax.lax.broadcasted_iota(jnp.int32, (rows, _TAIL), 1)

        def values_of(weights, c):
            high_low = _high_low(read(vt_ref, channels[c]), vt_ref.dtype)
            return sum(_dot(_split_rows(weights), values, 0) for values in high_low)

        return absorb(state, logits, index + length, index < tail_length, values_of)

    empty = start_softmax((rows,), width)
    state = (empty.top, empty.total, (empty.values,) * parts)
    here = lambda token: jnp.clip(token - split * span, 0, span)
    tokens = unroll * group
    low, high = here(first) // tokens, (here(length) + tokens - 1) // tokens
    state = jax.lax.fori_loop(low, jnp.maximum(high, low), body, state)
    steps = jnp.where(split == splits - 1, (tail_length + _TAIL - 1) // _TAIL, 0)
    top, total, values = jax.lax.fori_loop(0, steps, tail_body, state)
    for lanes, acc in zip(channels, values, strict=True):
        out_ref[:, lanes] = acc
    top_ref[...] = jnp.sum(top, 1)
    total_ref[...] = jnp.sum(total, 1)


def _absorb(state, logits, index, keep, values_of, *, first, softcap):
    """Online softmax over new logits; `values_of(weights, c)` is channel group c's sum."""
    logits = cap(_both_halves(logits), softcap)
    inner = Softmax(state[0], state[1], jnp.zeros((logits.shape[0], 1), jnp.float32))
    inner, weights = weigh(inner, logits, keep & (index >= first))
    shrink = jnp.exp(state[0] - inner.top)
    return (inner.top, inner.total,
            tuple(acc * shrink + values_of(weights, c) for c, acc in enumerate(state[2])))


def _power_of_two_spans(size: int) -> list:
    """Slices of power-of-two lengths that cover `size`: 96 is 64 and 32."""
    spans, start = [], 0
    while start < size:
        length = 1 << ((size - start).bit_length() - 1)
        spans.append(pl.ds(start, length))
        start += length
    return spans


def _scaled_dot(x, scale, low, codes, offset: float, contract: int):
    """x @ (codes * scale + low), the scales along the contracted axis; x has its rows twice."""
    scaled = _split_rows(x * scale[None])
    shift = _first_half(jnp.sum(x * low[None], 1, keepdims=True))
    shift = shift - offset * jnp.sum(scaled.astype(jnp.float32), 1, keepdims=True)
    return _dot(scaled, codes, contract) + shift


def _codes(words, token_group, bits: int):
    """Codes of a token group as bfloat16, and the offset they carry."""
    code = (words >> (bits * (token_group % (32 // bits)))) & (2**bits - 1)
    if bits == 8:  # 128 + code needs 8 mantissa bits; there are 7
        return code.astype(jnp.float32).astype(jnp.bfloat16), 0.0
    return jax.lax.bitcast_convert_type((code | 0x4300).astype(jnp.int16), jnp.bfloat16), 128.0


def _dot(x, y, contract: int):
    return jax.lax.dot_general(x, y, (((1,), (contract,)), ((), ())),
                               preferred_element_type=jnp.float32)


def _row(x):
    return jax.lax.broadcasted_iota(jnp.int32, x.shape, 0)


def _split_rows(x):
    """x has its rows twice: the first half in bfloat16, the second half what that leaves."""
    high = x.astype(jnp.bfloat16).astype(jnp.float32)
    return jnp.where(_row(x) < x.shape[0] // 2, high, x - high).astype(jnp.bfloat16)


def _first_half(x):
    return jnp.where(_row(x) < x.shape[0] // 2, x, 0.0)


def _both_halves(x):
    """The sum of the two halves of the rows, in each half."""
    rows, n = x.shape
    total = jnp.sum(x.reshape(2, rows // 2, n), 0)
    return jnp.broadcast_to(total[None], (2, rows // 2, n)).reshape(rows, n)


def _high_low(x, dtype):
    high = x.astype(jnp.bfloat16)
    if dtype == jnp.bfloat16:
        return (high,)
    return high, (x - high.astype(jnp.float32)).astype(jnp.bfloat16)
