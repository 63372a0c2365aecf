"""Triton kernel for NVIDIA cards of compute capability 8 and more: grid (row, kv head, split).

Keys and values are made into bfloat16 two at a time: a code is written into the mantissa of 128,
which takes no conversion, and two packed multiply-adds make `code * scale + min` of it. For 2 and 4
bits scales are bfloat16 then, whatever they are kept in. Of q a high and a low bfloat16 part fill
the 16 rows that a product has anyway.

Over 2 bits it runs far below the copy bandwidth (`experiments/device_suite.py`), so words and
scales are loaded ahead of their use, and few threads meet at barriers. Triton unpacks words in the
registers that the tensor cores read only where no run-time shift comes first, that is, where a step
is whole word tiles; else what is unpacked goes through shared memory. Splits are merged outside.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from pallas_kernels.quant import QuantFormat, decode_scales
from pallas_kernels.quant_decode_attention.common import EMPTY_LSE, Softmax, cap, finish

_TAIL = 16  # tail tokens at once
_STEP = 8 * 32 * 128  # tokens x channels of a step at most
_PIECE = 4  # token groups at once where some are masked
_STAGED = 64 * 128  # words of K or V whose next ones are fetched ahead: more do not fit an A100
_PROGRAMS = 1024  # enough to fill the largest card several times over
_LOG2E = math.log2(math.e)  # cards have exp2; q carries the factor


def attend(q, packed, lengths, first, tail, *, fmt, softcap=None, rotate=None, interpret=False,
           dtype=None):
    """q [B, K, G, H], already scaled -> (out [B, K, G, H], lse [B, K, G]).

    `dtype`: of what is multiplied; None: bfloat16, or float32 to interpret.
    """
    if rotate is not None:
        raise NotImplementedError("keys before RoPE are read by implementation='xla'")
    batch, kv_heads, heads, head_dim = q.shape
    width = head_dim // packed.v_scale.shape[2]  # of one head, where several lie side by side
    if fmt.group & (fmt.group - 1) or fmt.group < 16 or width < 16:
        raise NotImplementedError("Triton needs a power-of-two group of 16 or more, dividing the "
                                  f"head dim into parts of 16 or more; got group {fmt.group}, head "
                                  f"dim {head_dim}; use implementation='xla'")
    if dtype is None:
        dtype = jnp.float32 if interpret else jnp.bfloat16
    half = max(8, pl.next_power_of_2(heads))
    q = jnp.pad(q, ((0, 0), (0, 0), (0, half - heads), (0, 0)))
    q = q * _LOG2E if softcap is None else q
    high = q.astype(dtype)
    q = jnp.concatenate([high, (q - high.astype(jnp.float32)).astype(dtype)], 2)
    tail = _whole_tail(tail, q, lengths)
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
    lead = (batch, kv_heads, splits)
    column = jax.ShapeDtypeStruct((*lead, half), jnp.float32)
    values, top, total = pl.pallas_call(
        functools.partial(_kernel, fmt=fmt, width=width, span=span, splits=splits, softcap=softcap,
                          dtype=dtype, assembly=not interpret),
        grid=lead,
        in_specs=[row, row, row, whole(2 * half, head_dim), along(span * fmt.k_bits // 32),
                  along(span // fmt.group), along(span // fmt.group), whole(head_dim),
                  along(span * fmt.v_bits // 32), tokens, tokens,
                  whole(tail[0].shape[2], head_dim), whole(tail[1].shape[2], head_dim)],
        out_specs=[split(2 * half, head_dim), split(half), split(half)],
        out_shape=[jax.ShapeDtypeStruct((*lead, 2 * half, head_dim), jnp.float32), column,
                   column],
        # two channels a thread: their scales are 4 bytes, the least that is fetched ahead
        compiler_params=plt.CompilerParams(
            num_warps=max(1, pl.next_power_of_2(head_dim // 64)),
            num_stages=2 if fmt.group * head_dim <= _STAGED else 1),
        interpret=interpret,
    )(lengths, first, tail[2], q, packed.k_words, packed.k_scale, packed.k_min, center,
      packed.v_words, packed.v_scale, packed.v_min, tail[0], tail[1])
    return _merge_splits(values[..., :heads, :], top[..., :heads, None], total[..., :heads, None])


def _whole_tail(tail, q, lengths):
    """A tail whose length is a multiple of `_TAIL`."""
    if tail is None:
        empty = jnp.zeros((*q.shape[:2], _TAIL, q.shape[3]), q.dtype)
        return empty, empty, jnp.zeros_like(lengths)
    extra = -tail[0].shape[2] % _TAIL
    pad = lambda x: jnp.pad(x, ((0, 0), (0, 0), (0, extra), (0, 0))) if extra else x
    return pad(tail[0]), pad(tail[1]), tail[2]


def _merge_splits(values, top, total):
    best = jnp.max(top, 2, keepdims=True)
    shrink = jnp.exp2(top - best)
    return finish(Softmax(best[:, :, 0] / _LOG2E, jnp.sum(total * shrink, 2),
                          jnp.sum(values * shrink, 2)))


def _kernel(length_ref, first_ref, tail_length_ref, q_ref, kw_ref, ks_ref, km_ref, kc_ref, vw_ref,
            vs_ref, vm_ref, kt_ref, vt_ref, out_ref, top_ref, total_ref, *, fmt: QuantFormat, width,
            span, splits, softcap, dtype, assembly):
    length, first, tail_length = length_ref[0], first_ref[0], tail_length_ref[0]
    split, group = pl.program_id(2), fmt.group
    head_dim = q_ref.shape[1]
    spans = _power_of_two_spans(head_dim)
    q = [q_ref[:, lanes] for lanes in spans]
    start = split * span
    dequantise = functools.partial(_dequantise, dtype=dtype, assembly=assembly)

    def keys(held, at, lanes):
        scale, low = ks_ref[at, lanes], km_ref[at, lanes]
        if scale.dtype == jnp.int8:
            scale, low = decode_scales(scale, low, kc_ref[lanes])
        scale, low = (_kept(x, fmt.k_bits, dtype)[None] for x in (scale, low))
        return dequantise(held, fmt.k_bits, scale, low)

    def values(held, at, lanes, masked):
        tokens = pl.ds(at * group, group)
        parts = pl.ds(lanes.start // width, lanes.size // width)
        scale, low = vs_ref[parts, tokens], vm_ref[parts, tokens]
        if scale.dtype == jnp.int8:
            scale, low = decode_scales(scale, low)
        if masked:  # a scale not in use may be NaN, and 0 * NaN would reach the sum
            used = start + at * group + _iota(scale.shape, 1) < length
            scale, low = (jnp.where(used, x, jnp.zeros_like(x)) for x in (scale, low))
        shape = (group, lanes.size // width, width)
        wide = lambda x: jnp.broadcast_to(x.T[:, :, None], shape).reshape(group, lanes.size)
        scale, low = (wide(_kept(x, fmt.v_bits, dtype)) for x in (scale, low))
        return dequantise(held, fmt.v_bits, scale, low)

    def over(many, masked, step):
        """A loop's body: `many` token groups at `step(i)`; of masked ones not all are in use."""

        def body(i, state):
            base = step(i) * many
            k_words, v_words = ([_words(ref, bits, base, many, group, lanes)
                                 for lanes in spans]
                                for ref, bits in ((kw_ref, fmt.k_bits), (vw_ref, fmt.v_bits)))
            logits = [_both_halves(sum(_dot(q[c], keys(k_words[c][n], base + n, lanes), 1)
                                       for c, lanes in enumerate(spans))) for n in range(many)]
            logits = [x if softcap is None else cap(x, softcap) * _LOG2E for x in logits]
            if masked:
                token = start + base * group + _iota(logits[0].shape, 1)
                logits = [_keep(x, token + n * group, first, length) for n, x in enumerate(logits)]
            top, total, sums, weights = _weigh(state, logits, dtype)
            for n, weight in enumerate(weights):
                sums = [acc + _dot(weight, values(v_words[c][n], base + n, lanes, masked), 0)
                        for c, (acc, lanes) in enumerate(zip(sums, spans, strict=True))]
            return top, total, tuple(sums)

        return body

    def tail_body(i, state):
        at = pl.ds(i * _TAIL, _TAIL)
        used = lambda n: i * _TAIL + _iota((_TAIL, n), 0) < tail_length
        read = lambda ref, lanes: _high_low(
            jnp.where(used(lanes.size), ref[at, lanes].astype(jnp.float32), 0.0), ref.dtype, dtype)
        logits = _both_halves(sum(_dot(q[c], x, 1) for c, lanes in enumerate(spans)
                                  for x in read(kt_ref, lanes)))
        logits = logits if softcap is None else cap(logits, softcap) * _LOG2E
        token = i * _TAIL + _iota(logits.shape, 1)
        logits = _keep(logits, token, first - length, tail_length)
        top, total, sums, [weight] = _weigh(state, [logits], dtype)
        return top, total, tuple(
            acc + sum(_dot(weight, x, 0) for x in read(vt_ref, lanes))
            for acc, lanes in zip(sums, spans, strict=True))

    many = _groups_a_step(fmt, head_dim, len(spans))
    piece = min(_PIECE, many)
    here = lambda token: jnp.clip(token - start, 0, span)
    up = lambda tokens, n: (tokens + n * group - 1) // (n * group)
    low, high = here(first) // (piece * group), up(here(length), piece)
    # steps all of whose tokens are in use, then the pieces before and after them
    begin, end = up(here(first), many), here(length) // (many * group)
    some = end > begin
    before = jnp.where(some, begin * (many // piece) - low, 0)
    after = jnp.where(some, end * (many // piece), low)
    rows = (q[0].shape[0] // 2, 1)
    state = (jnp.full(rows, EMPTY_LSE, jnp.float32), jnp.zeros(rows, jnp.float32),
             tuple(jnp.zeros((q[0].shape[0], lanes.size), jnp.float32) for lanes in spans))
    state = jax.lax.fori_loop(begin, jnp.maximum(end, begin), over(many, False, lambda i: i), state)
    pieces = over(piece, True, lambda i: jnp.where(i < before, low + i, after + i - before))
    state = jax.lax.fori_loop(0, before + jnp.maximum(high - after, 0), pieces, state)
    steps = jnp.where(split == splits - 1, (tail_length + _TAIL - 1) // _TAIL, 0)
    top, total, sums = jax.lax.fori_loop(0, steps, tail_body, state)
    for lanes, acc in zip(spans, sums, strict=True):
        out_ref[:, lanes] = acc
    top_ref[...] = jnp.sum(top, 1)
    total_ref[...] = jnp.sum(total, 1)


def _groups_a_step(fmt: QuantFormat, head_dim: int, spans: int) -> int:
    """Token groups of one word tile; where that is more than _STEP, of a half, a quarter, ..."""
    many = fmt.tile // fmt.group
    while many > 1 and many * fmt.group * head_dim * spans > _STEP:
        many //= 2
    return many


def _keep(logits, token, first, length):
    """Logits of tokens from `first` to `length`; the others far below any maximum."""
    return jnp.where((token >= first) & (token < length), logits, 2 * EMPTY_LSE)


def _weigh(state, logits, dtype):
    """Online softmax, base 2, over tiles of new logits: the new state and their weights."""
    top, total, sums = state
    new = jnp.max(functools.reduce(jnp.maximum, logits), 1, keepdims=True)
    new = jnp.maximum(top, new)
    weights = [jnp.exp2(x - new) for x in logits]
    shrink = jnp.exp2(top - new)
    total = total * shrink + jnp.sum(sum(weights), 1, keepdims=True)
    sums = [acc * _twice(shrink) for acc in sums]
    return new, total, sums, [_twice(x.astype(dtype)) for x in weights]


def _power_of_two_spans(size: int) -> list:
    """Slices of power-of-two lengths that cover `size`: 96 is 64 and 32."""
    spans, start = [], 0
    while start < size:
        length = 1 << ((size - start).bit_length() - 1)
        spans.append(pl.ds(start, length))
        start += length
    return spans


def _words(ref, bits, base, many, group, lanes) -> list[tuple]:
    """Of each of `many` token groups from `base` on, its words and its slot in them."""
    slots = 32 // bits
    if many < slots:
        words = ref[pl.ds(base // slots * group, group), lanes] >> (bits * (base % slots))
        return [(words, n) for n in range(many)]
    tiles = [ref[pl.ds((base // slots + i) * group, group), lanes] for i in range(many // slots)]
    return [(tiles[n // slots], n % slots) for n in range(many)]


def _dequantise(held, bits, scale, low, dtype, assembly):
    """code * scale + low of the codes in a slot of words; scale and low as `_kept` gives them."""
    words, slot = held
    scale, low = (jnp.broadcast_to(x, words.shape) for x in (scale, low))
    if not assembly or bits == 8:
        code = (words >> (bits * slot)) & (2**bits - 1)
        scale, low = scale.astype(jnp.float32), low.astype(jnp.float32)
        return (code.astype(jnp.float32) * scale + low).astype(dtype)
    # two words' halves go side by side. Of a half's codes those in 7 bits, a mantissa, share a
    # shift; 128 + code * 2^at is then in place, and a multiply-add takes both off again
    half, slot = divmod(slot, 16 // bits)
    shift = slot // (7 // bits) * (7 // bits) * bits
    at = slot * bits - shift
    both = lambda number: f"{number * 0x00010001:#010x}"
    return plt.elementwise_inline_asm(
        f"""{{ .reg .b32 code, unit, away;
        mov.b32 unit, {both(0x3F80 - (at << 7))}; mov.b32 away, {both(0xC300 - (at << 7))};
        prmt.b32 code, $1, $2, {("0x5410", "0x7632")[half]}; shr.b32 code, code, {shift};
        lop3.b32 code, code, {both((2**bits - 1) << at)}, {both(0x4300)}, 0xEA;
        fma.rn.bf16x2 code, code, unit, away; fma.rn.bf16x2 $0, code, $3, $4; }}""",
        args=[words, scale, low], constraints="=r,r,r,r,r", pack=2,
        result_shape_dtypes=[jax.ShapeDtypeStruct(words.shape, dtype)])[0]


def _kept(x, bits, dtype):
    """A scale or minimum as codes of so many bits are multiplied by it."""
    return x.astype(jnp.float32 if bits == 8 else dtype)


def _dot(x, y, contract: int):
    return jax.lax.dot_general(x, y, (((1,), (contract,)), ((), ())),
                               preferred_element_type=jnp.float32)


def _iota(shape, axis):
    return jax.lax.broadcasted_iota(jnp.int32, shape, axis)


def _both_halves(x):
    """The sum of the two halves of the rows."""
    rows, n = x.shape
    return jnp.sum(x.reshape(2, rows // 2, n), 0)


def _twice(x):
    """The rows, and once more: a product has 16, and who reads its result takes the first half."""
    rows, n = x.shape
    return jnp.broadcast_to(x[None], (2, rows, n)).reshape(2 * rows, n)


def _high_low(x, held, dtype):
    """float32 x in parts of `dtype`: one if it is held in that, else two."""
    high = x.astype(dtype)
    if dtype == held:
        return (high,)
    return high, (x - high.astype(jnp.float32)).astype(dtype)
