"""Plain XLA (CPU, T4, anything): one chunk of the cache is dequantised at a time.

Tried on 2 CPU cores, 8 rows x 4,096 tokens, 8/4 heads of 64 (`experiments/quant_decode_cpu.py`):
row by row, so that 512 dequantised tokens stay in a core's own cache, takes half the time of all
rows together; folding scales into q and p (many small products) and a multiply-reduce in place of
the product lose; chunks of 4,096 leave the cache and are many times slower.
"""

import jax
import jax.numpy as jnp

from pallas_kernels.quant import PackedKV, QuantFormat, decode_scales, unpack_words
from pallas_kernels.quant_decode_attention.common import (
    Softmax,
    cap,
    finish,
    start_softmax,
    weigh,
)

EXACT = jax.lax.Precision.HIGHEST  # of float32: cards and TPUs would round what is multiplied


def attend(q, packed, lengths, first, tail, *, fmt, softcap=None, rotate=None, interpret=False):
    """q [B, K, G, H], already scaled -> (out [B, K, G, H], lse [B, K, G])."""
    del interpret
    capacity = packed.k_words.shape[2] * 32 // fmt.k_bits

    def absorb(state: Softmax, q, keys, values, index, first, keep) -> Softmax:
        keep = (keep & (index >= first[:, None]))[:, None, None, :]
        logits = cap(jnp.einsum("bkgh,bksh->bkgs", q, keys, precision=EXACT), softcap)
        state, weights = weigh(state, logits, keep)
        more = jnp.einsum("bkgs,bksh->bkgh", weights, values, precision=EXACT)
        return state._replace(values=state.values + more)

    def read(size: int, row, q, lengths, first, rotate) -> Softmax:
        """Over the codes of one row, or of all where `row` is None."""

        def body(i, state: Softmax) -> Softmax:
            keys, values = read_chunk(packed, i, size, fmt, row, lengths)
            index = jnp.broadcast_to(i * size + jnp.arange(size), (len(q), size))
            keys = keys if rotate is None else rotate(keys, index)
            return absorb(state, q, keys, values, index, first, index < lengths[:, None])

        low, high = jnp.min(first) // size, (jnp.max(lengths) + size - 1) // size
        start = start_softmax(q.shape[:3], q.shape[3])
        return jax.lax.fori_loop(low, jnp.maximum(high, low), body, start)

    def row_by_row() -> Softmax:
        """What one row's chunk is dequantised to stays in the cache of a core."""
        rows = (q, lengths, first, rotate)
        one = lambda row: read(chunk_tokens(capacity, fmt, 512), row, *jax.tree.map(
            lambda x: jax.lax.dynamic_slice_in_dim(x, row, 1), rows))
        return jax.tree.map(lambda x: x[:, 0], jax.lax.map(one, jnp.arange(len(q))))

    together = lambda: read(chunk_tokens(capacity, fmt, 4096), None, q, lengths, first, rotate)
    cpu = row_by_row if rotate is None or isinstance(rotate, jax.tree_util.Partial) else together
    state = jax.lax.platform_dependent(cpu=cpu, default=together)
    if tail is not None:
        k_tail, v_tail, tail_lengths = tail
        at = jnp.broadcast_to(jnp.arange(k_tail.shape[2]), (len(q), k_tail.shape[2]))
        keep = at < tail_lengths[:, None]
        # a slot not in use may hold anything: 0 * NaN would reach the sum
        clean = lambda x: jnp.where(keep[:, None, :, None], x.astype(jnp.float32), 0.0)
        index = at + lengths[:, None]
        keys = clean(k_tail) if rotate is None else rotate(clean(k_tail), index)
        state = absorb(state, q, keys, clean(v_tail), index, first, keep)
    return finish(state)


def chunk_tokens(capacity: int, fmt: QuantFormat, target: int) -> int:
    """Tokens read at once: whole tiles that divide the capacity, `target` or fewer if they can."""
    tiles = capacity // fmt.tile
    many = max(n for n in range(1, tiles + 1) if tiles % n == 0
               and (n == 1 or n * fmt.tile <= target))
    return many * fmt.tile


def read_chunk(packed: PackedKV, i, size: int, fmt: QuantFormat,
               row=None, lengths=None) -> tuple[jax.Array, jax.Array]:
    """Keys and values float32 [B, K, size, H] of tokens [i * size, (i + 1) * size).

    Of one row, [1, K, size, H], where its index is given. Values from `lengths` on, if given, are
    zeros, whatever their scales: a NaN there would reach a sum even with a weight of 0.
    """
    batch, kv_heads, _, head_dim = packed.k_words.shape
    batch = batch if row is None else 1

    def take(x, axis, n):
        at, sizes = [0] * x.ndim, list(x.shape)
        at[axis], sizes[axis] = i * n, n
        if row is not None:
            at[0], sizes[0] = row, 1
        return jax.lax.dynamic_slice(x, at, sizes)

    k_codes = unpack_words(take(packed.k_words, 2, size * fmt.k_bits // 32), fmt.k_bits, fmt.group)
    v_codes = unpack_words(take(packed.v_words, 2, size * fmt.v_bits // 32), fmt.v_bits, fmt.group)
    groups, width = size // fmt.group, head_dim // packed.v_scale.shape[2]
    center = packed.k_center
    if center is not None and row is not None:
        center = jax.lax.dynamic_slice_in_dim(center, row, 1)
    step, low = decode_scales(take(packed.k_scale, 2, groups), take(packed.k_min, 2, groups),
                              0.0 if center is None else center[:, :, None])
    shape = (batch, kv_heads, groups, fmt.group, head_dim)
    keys = k_codes.astype(jnp.float32).reshape(shape) * step[:, :, :, None] + low[:, :, :, None]
    step, low = decode_scales(take(packed.v_scale, 3, size), take(packed.v_min, 3, size))
    if lengths is not None:
        used = (i * size + jnp.arange(size) < lengths[:, None])[:, None, None]
        step, low = jnp.where(used, step, 0.0), jnp.where(used, low, 0.0)
    per_channel = lambda x: jnp.broadcast_to(
        jnp.swapaxes(x, 2, 3)[..., None], (batch, kv_heads, size, head_dim // width, width)
    ).reshape(batch, kv_heads, size, head_dim)
    values = v_codes.astype(jnp.float32) * per_channel(step) + per_channel(low)
    return keys.reshape(batch, kv_heads, size, head_dim), values
