"""What the quantised kinds share: appending to the tail, packing whole groups, attending to both.

One layer's state is a dict. `packed`: codes and scales of each row's first `packed_B` tokens.
`k`, `v`: the tail (B, K, W, H), the tokens behind them in full precision, oldest first, zeros
where unused. On a TPU heads narrower than its lanes lie side by side in `packed`
(`pallas_kernels.lanes`); shapes say how many. `bad` (B, K, 1): a NaN or an infinity came in with
keys or values, which codes could hide; every later output of that kv head is NaN.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from jaxlm.cache.base import State
from jaxlm.cache.local import per_head
from jaxlm.models.attention import Mask, attention, merge
from jaxlm.models.config import AttentionSpec
from jaxlm.models.layers import apply_rope
from pallas_kernels.lanes import apart, keys_beside, values_beside
from pallas_kernels.quant import (
    PackedKV,
    QuantFormat,
    init_packed,
    key_center,
    pack_words,
    quantise_values,
)
from pallas_kernels.quant_decode_attention import quant_decode_attention
from pallas_kernels.quant_decode_attention.common import (
    Softmax,
    cap,
    finish,
    start_softmax,
    weigh,
)
from pallas_kernels.quant_decode_attention.xla import read_chunk
from pallas_kernels.quant_flush import quant_flush
from pallas_kernels.squat import Compensation

QUERIES, TOKENS = 256, 1024  # of several queries' scores, held at once


def empty(spec: AttentionSpec, batch: int, capacity: int, tail: int, fmt: QuantFormat,
          dtype, many: int = 1) -> State:
    """No tokens; room for `capacity` coded ones (rounded up to whole tiles) and `tail` others.

    `many` kv heads lie side by side."""
    packed = init_packed(batch, spec.num_kv_heads, capacity, spec.head_dim, fmt, many)
    packed = packed._replace(  # donated buffers must not be one and the same
        k_min=jnp.zeros_like(packed.k_scale), v_min=jnp.zeros_like(packed.v_scale))
    shape = (batch, spec.num_kv_heads, tail, spec.head_dim)
    return {"packed": packed, "k": jnp.zeros(shape, dtype), "v": jnp.zeros(shape, dtype),
            "packed_B": jnp.zeros(batch, jnp.int32),
            "bad": jnp.zeros((batch, spec.num_kv_heads, 1), bool)}


def not_finite(k_BTKH: jax.Array, v_BTKH: jax.Array, count_B: jax.Array) -> jax.Array:
    """Where the first `count_B` tokens hold a NaN or an infinity, bool (B, K, 1); by head, so
    that heads on several devices need not meet."""
    fine_BTK = jnp.isfinite(k_BTKH).all(3) & jnp.isfinite(v_BTKH).all(3)
    real_BT = jnp.arange(fine_BTK.shape[1]) < count_B[:, None]
    return (~fine_BTK & real_BT[..., None]).any(1)[..., None]


def join(tail_BKWH: jax.Array, new_BKTH: jax.Array, held_B: jax.Array, count_B: jax.Array):
    """Each row's `held_B` tail tokens, then `count_B` new ones, then zeros: (B, K, W + T, H)."""
    size = tail_BKWH.shape[2] + new_BKTH.shape[2]
    both = jnp.concatenate([tail_BKWH, new_BKTH.astype(tail_BKWH.dtype)], 2)
    at_BS = jnp.broadcast_to(jnp.arange(size), (both.shape[0], size))
    held, total = held_B[:, None], (held_B + count_B)[:, None]
    source = jnp.where(at_BS < held, at_BS, at_BS - held + tail_BKWH.shape[2])
    taken = jnp.take_along_axis(both, jnp.minimum(source, size - 1)[:, None, :, None], axis=2)
    return jnp.where((at_BS < total)[:, None, :, None], taken, 0)


def leftover(x_BKSH: jax.Array, gone_B: jax.Array, count_B: jax.Array, size: int) -> jax.Array:
    """`size` tokens from `gone_B` on, zeros beyond `count_B`."""
    at_BW = gone_B[:, None] + jnp.arange(size)
    taken = jnp.take_along_axis(
        x_BKSH, jnp.minimum(at_BW, x_BKSH.shape[2] - 1)[:, None, :, None], axis=2)
    return jnp.where((at_BW < count_B[:, None])[:, None, :, None], taken, 0)


def with_center(state: State, center_BKH: jax.Array | None) -> State:
    """The origin of 8-bit minima, its heads as the codes have them."""
    packed = state["packed"]
    if center_BKH is not None:
        center_BKH = center_BKH.reshape(*packed.k_words.shape[:2], packed.k_words.shape[3])
    return state | {"packed": packed._replace(k_center=center_BKH)}


def center_of(state: State) -> jax.Array | None:
    """What `with_center` was given."""
    center = getattr(state["packed"], "k_center", None)
    return center if center is None else center.reshape(*state["k"].shape[:2], -1)


def first_center(state: State, k_BKSH: jax.Array, count_B: jax.Array, ready_B: jax.Array) -> State:
    """Rows about to code their first keys, and without an origin, take the mean of `count_B`."""
    center = center_of(state)
    if center is None:
        return state
    first_B = (state["packed_B"] == 0) & (ready_B > 0)
    mean = key_center(k_BKSH, jnp.arange(k_BKSH.shape[2]) < count_B[:, None])
    without = first_B[:, None, None] & ~center.any(-1, keepdims=True)
    return with_center(state, jnp.where(without, mean, center))


def ready_groups(count_B: jax.Array, keep: int, group: int) -> jax.Array:
    """Whole groups among `count_B` tokens whose newest `keep` stay in full precision."""
    return jnp.maximum(count_B - keep, 0) // group


def fill(packed: PackedKV, k_BKTH: jax.Array, v_BKTH: jax.Array, fmt: QuantFormat,
         code_keys: Callable) -> PackedKV:
    """Code all T tokens (B, K, T, H) into empty words, a tile at a time, bits beyond T included.

    Of a text shorter than a tile, its groups alone.
    """
    room = packed.k_words.shape[2] * 32 // fmt.k_bits
    many = k_BKTH.shape[1] // packed.k_words.shape[1]
    have = min(k_BKTH.shape[2], room)
    chunk = min(fmt.tile, -(-have // fmt.group) * fmt.group)
    pieces = -(-have // chunk)
    pad = lambda x, size: jnp.pad(x, ((0, 0), (0, 0), (0, max(size - x.shape[2], 0)), (0, 0)))
    k_BKTH, v_BKTH = pad(k_BKTH, pieces * chunk), pad(v_BKTH, pieces * chunk)

    def put(i, packed: PackedKV) -> PackedKV:
        take = lambda x: jax.lax.dynamic_slice_in_dim(x, i * chunk, chunk, 2)
        keys = keys_beside(code_keys(take(k_BKTH)), many)
        values = values_beside(quantise_values(take(v_BKTH), fmt), many)
        words = lambda codes, bits: pack_words(pad(codes, fmt.tile), bits, fmt.group)
        at = lambda old, new, axis: jax.lax.dynamic_update_slice_in_dim(
            old, new.astype(old.dtype), i * new.shape[axis], axis)
        return packed._replace(
            k_words=at(packed.k_words, words(keys.codes, fmt.k_bits), 2),
            v_words=at(packed.v_words, words(values.codes, fmt.v_bits), 2),
            k_scale=at(packed.k_scale, keys.scale, 2), k_min=at(packed.k_min, keys.minimum, 2),
            v_scale=at(packed.v_scale, values.scale, 3), v_min=at(packed.v_min, values.minimum, 3))

    return jax.lax.fori_loop(0, pieces, put, packed)


Write = Callable[[Any, jax.Array, jax.Array, jax.Array, jax.Array], Any]


def flusher(fmt: QuantFormat, comp: Compensation | None, block: int,
            implementation: tuple[str, ...]) -> Write:
    """`pack_ready`'s `write` for words with scales and minima."""
    names = [name for name in implementation if name != "gpu"] or ["xla"]  # no flush in Triton
    return lambda packed, k, v, lengths_B, ready_B: quant_flush(
        packed, k, v, lengths_B, ready_B, fmt, comp, block=block, guard=False,
        implementation=names)


def pack_ready(state: State, k_BKSH: jax.Array, v_BKSH: jax.Array, count_B: jax.Array,
               ready_B: jax.Array, group: int, write: Write) -> State:
    """Of `count_B` uncoded tokens a row, code the first `ready_B` groups; the rest is the tail.

    One group of every ready row at a time, written in place by
    `write(packed, k_BKSH, v_BKSH, lengths_B, ready_B)`.
    """
    short = max(group - k_BKSH.shape[2], 0)
    fit = lambda x: jnp.pad(x, ((0, 0), (0, 0), (0, short), (0, 0)))
    keys, values = fit(k_BKSH), fit(v_BKSH)

    def put(i, packed):
        take = lambda x: jax.lax.dynamic_slice_in_dim(x, i * group, group, 2)
        return write(packed, take(keys), take(values), state["packed_B"] + i * group, ready_B > i)

    packed = jax.lax.fori_loop(0, jnp.max(ready_B), put, state["packed"])
    gone_B = ready_B * group
    state = state | {"packed": packed, "packed_B": state["packed_B"] + gone_B}
    return keep_tail(state, k_BKSH, v_BKSH, gone_B, count_B)


def keep_tail(state: State, k_BKSH: jax.Array, v_BKSH: jax.Array, gone_B: jax.Array,
              count_B: jax.Array) -> State:
    """The tail becomes what `count_B` tokens leave when their first `gone_B` are taken."""
    kept = lambda new, old: leftover(new, gone_B, count_B, old.shape[2]).astype(old.dtype)
    return state | {"k": kept(k_BKSH, state["k"]), "v": kept(v_BKSH, state["v"])}


def once_if(wanted: jax.Array, function: Callable[[State], State], state: State) -> State:
    """`function(state)` where `wanted`, else the state, by a loop of one turn or none.

    A `cond` would copy the codes. A loop writes in place, and what it works with is gone before
    the next layer's begins: else the matrices of all layers would be held at once.
    """
    large = ("packed", "k", "v")

    def turn(i, state):
        # what does not change in a loop may be computed ahead of it, wanted or not: tie it here
        small = {name: x for name, x in state.items() if name not in large}
        small, _ = jax.lax.optimization_barrier((small, i))
        return function(state | small)

    return jax.lax.fori_loop(0, wanted.astype(jnp.int32), turn, state)


def attend_one(spec: AttentionSpec, state: State, q_B1NH: jax.Array, pos_B: jax.Array,
               length_B: jax.Array, first_B: jax.Array, fmt: QuantFormat, before: bool,
               implementation: tuple[str, ...], mesh: Mesh | None = None,
               ) -> tuple[jax.Array, jax.Array]:
    """One query a row over codes and tail together; token i stands at `first_B + i`."""
    seen_B = jnp.clip(pos_B - first_B + 1, 0, length_B)
    coded_B = jnp.minimum(seen_B, state["packed_B"])
    start = None if spec.window is None else jnp.maximum(pos_B - first_B - spec.window + 1, 0)

    def look(q_BNH, packed, k_BKWH, v_BKWH, coded_B, tail_B, start_B, first_B):
        return quant_decode_attention(
            q_BNH, packed, coded_B, fmt, k_BKWH, v_BKWH, tail_B, start=start_B, scale=spec.scale,
            softcap=spec.softcap, rotate=rotation(spec, first_B) if before else None,
            implementation=implementation)

    tail_B = jnp.maximum(seen_B - state["packed_B"], 0)
    out, lse = per_head(look, mesh, spec.num_kv_heads, q_B1NH[:, 0], state["packed"], state["k"],
                        state["v"], coded_B, tail_B, start, first_B)
    return out[:, None].astype(q_B1NH.dtype), lse[:, None]


def attend_many(spec: AttentionSpec, state: State, q_BTNH: jax.Array, pos_BT: jax.Array,
                k_BKSH: jax.Array, v_BKSH: jax.Array, length_B: jax.Array, first_B: jax.Array,
                fmt: QuantFormat, before: bool, read: Callable = read_chunk
                ) -> tuple[jax.Array, jax.Array]:
    """Queries over the codes and over uncoded tokens (B, K, S, H) behind them, merged.

    `read(packed, i, size, fmt)` gives keys and values of the i-th `size` coded tokens.
    """
    packed_B = jnp.minimum(state["packed_B"], length_B)
    slot_BS = packed_B[:, None] + jnp.arange(k_BKSH.shape[2])
    if before:
        k_BKSH = rotation(spec, first_B)(k_BKSH, slot_BS)
    rest = attention(
        q_BTNH, k_BKSH.astype(q_BTNH.dtype).swapaxes(2, 3), v_BKSH.astype(q_BTNH.dtype),
        Mask(window=spec.window), pos_BT, slot_BS + first_B[:, None], scale=spec.scale,
        softcap=spec.softcap, key_valid_BS=slot_BS < length_B[:, None])
    time = q_BTNH.shape[1]
    if time <= QUERIES:
        coded = attend_codes(spec, state["packed"], packed_B, q_BTNH, pos_BT, first_B, fmt, before,
                             read)
        return merge([rest, coded])
    count = -(-time // QUERIES)
    cut = lambda x: jnp.moveaxis(jnp.pad(
        x, ((0, 0), (0, count * QUERIES - time)) + ((0, 0),) * (x.ndim - 2)
    ).reshape(x.shape[0], count, QUERIES, *x.shape[2:]), 1, 0)
    coded = jax.lax.map(lambda part: attend_codes(
        spec, state["packed"], packed_B, part[0], part[1], first_B, fmt, before, read),
        (cut(q_BTNH), cut(pos_BT)))
    whole = lambda x: jnp.moveaxis(x, 0, 1).reshape(x.shape[1], -1, *x.shape[3:])[:, :time]
    return merge([rest, (whole(coded[0]), whole(coded[1]))])


def attend_codes(spec: AttentionSpec, packed: PackedKV, packed_B: jax.Array, q_BTNH: jax.Array,
                 pos_BT: jax.Array, first_B: jax.Array, fmt: QuantFormat, before: bool,
                 read: Callable = read_chunk):
    """Several queries a row over the codes, a chunk dequantised at a time, by online softmax."""
    batch, time, heads, width = q_BTNH.shape
    many = packed.k_words.shape[3] // width  # heads side by side
    kv_heads = packed.k_words.shape[1] * many
    q = q_BTNH.reshape(batch, time, kv_heads, -1, width).transpose(0, 2, 3, 1, 4)
    q = q.astype(jnp.float32) * spec.scale  # B K G T H
    exact = jax.lax.Precision.HIGHEST if q_BTNH.dtype == jnp.float32 else None
    tiles = packed.k_words.shape[2] * 32 // fmt.k_bits // fmt.tile
    most = max(TOKENS // fmt.tile, 1)
    size = fmt.tile * max(n for n in range(1, tiles + 1) if tiles % n == 0 and n <= most)

    def absorb(i, soft: Softmax) -> Softmax:
        keys, values = (apart(x, many) for x in read(packed, i, size, fmt))
        slot_BS = jnp.broadcast_to(i * size + jnp.arange(size), (batch, size))
        if before:
            keys = rotation(spec, first_B)(keys, slot_BS)
        behind = pos_BT[:, :, None] - (slot_BS + first_B[:, None])[:, None]
        keep = (behind >= 0) & (slot_BS < packed_B[:, None])[:, None]
        if spec.window is not None:
            keep &= behind < spec.window
        values = jnp.where((slot_BS < packed_B[:, None])[:, None, :, None], values, 0.0)
        scores = cap(jnp.einsum("bkgth,bksh->bkgts", q, keys, precision=exact), spec.softcap)
        soft, weights = weigh(soft, scores, keep[:, None, None])
        more = jnp.einsum("bkgts,bksh->bkgth", weights, values, precision=exact)
        return soft._replace(values=soft.values + more)

    pieces = (jnp.max(packed_B) + size - 1) // size
    soft = jax.lax.fori_loop(0, pieces, absorb, start_softmax(q.shape[:4], width))
    out, lse = finish(soft)
    out = out.transpose(0, 3, 1, 2, 4).reshape(batch, time, heads, width)
    return out.astype(q_BTNH.dtype), lse.transpose(0, 3, 1, 2).reshape(batch, time, heads)


def rotation(spec: AttentionSpec, first_B: jax.Array) -> jax.tree_util.Partial:
    """Rotates keys (B, K, S, H) kept before RoPE by the positions of their slots (B, S)."""

    def rotate(first_B, keys, slot_BS):
        turned = apply_rope(keys.swapaxes(1, 2), slot_BS + first_B[:, None], spec.rope)
        return turned.swapaxes(1, 2)

    return jax.tree_util.Partial(rotate, first_B)
