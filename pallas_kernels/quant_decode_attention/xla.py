"""Plain XLA (CPU, T4, anything): one chunk of the cache is dequantised at a time.

Tried on 2 CPU cores, 8 rows x 4,096 tokens, 8/4 heads of 64 (`experiments/quant_decode_cpu.py`):
dequantising chunks of 512 tokens beats folding scales into q and p (many small products) and a
multiply-reduce in place of the product; chunks of 4,096 leave the cache and are many times slower.
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


def attend(q, packed, lengths, first, tail, *, fmt, softcap=None, rotate=None, interpret=False):
    """q [B, K, G, H], already scaled -> (out [B, K, G, H], lse [B, K, G])."""
    del interpret
    batch, kv_heads, rows, head_dim = packed.k_words.shape
    size = chunk_tokens(rows * 32 // fmt.k_bits, fmt)

    def absorb(state: Softmax, keys, values, index, keep) -> Softmax:
        keep = (keep & (index >= first[:, None]))[:, None, None, :]
        keys = keys if rotate is None else rotate(keys, index)
        logits = cap(jnp.einsum("bkgh,bksh->bkgs", q, keys), softcap)
        state, weights = weigh(state, logits, keep)
        return state._replace(values=state.values + jnp.einsum("bkgs,bksh->bkgh", weights, values))

    def body(i, state: Softmax) -> Softmax:
        keys, values = read_chunk(packed, i, size, fmt)
        index = jnp.broadcast_to(i * size + jnp.arange(size), (batch, size))
        return absorb(state, keys, values, index, index < lengths[:, None])

    state = start_softmax(q.shape[:3], head_dim)
    low, high = jnp.min(first) // size, (jnp.max(lengths) + size - 1) // size
    state = jax.lax.fori_loop(low, jnp.maximum(high, low), body, state)
    if tail is not None:
        k_tail, v_tail, tail_lengths = tail
        at = jnp.broadcast_to(jnp.arange(k_tail.shape[2]), (batch, k_tail.shape[2]))
        keep = at < tail_lengths[:, None]
        # a slot not in use may hold anything: 0 * NaN would reach the sum
        clean = lambda x: jnp.where(keep[:, None, :, None], x.astype(jnp.float32), 0.0)
        state = absorb(state, clean(k_tail), clean(v_tail), at + lengths[:, None], keep)
    return finish(state)


def chunk_tokens(capacity: int, fmt: QuantFormat) -> int:
    """Tokens read at once: whole tiles that divide the capacity, near 512 on a CPU, 4,096 else."""
    target = 512 if jax.default_backend() == "cpu" else 4096
    tiles = capacity // fmt.tile
    many = max(n for n in range(1, tiles + 1) if tiles % n == 0
               and (n == 1 or n * fmt.tile <= target))
    return many * fmt.tile


def read_chunk(packed: PackedKV, i, size: int, fmt: QuantFormat) -> tuple[jax.Array, jax.Array]:
    """Keys and values float32 [B, K, size, H] of tokens [i * size, (i + 1) * size)."""
    take = lambda x, axis, n: jax.lax.dynamic_slice_in_dim(x, i * n, n, axis)
    batch, kv_heads, _, head_dim = packed.k_words.shape
    k_codes = unpack_words(take(packed.k_words, 2, size * fmt.k_bits // 32), fmt.k_bits, fmt.group)
    v_codes = unpack_words(take(packed.v_words, 2, size * fmt.v_bits // 32), fmt.v_bits, fmt.group)
    groups, width = size // fmt.group, fmt.channels(head_dim)
    center = 0.0 if packed.k_center is None else packed.k_center[:, :, None]
    step, low = decode_scales(take(packed.k_scale, 2, groups), take(packed.k_min, 2, groups),
                              center)
    shape = (batch, kv_heads, groups, fmt.group, head_dim)
    keys = k_codes.astype(jnp.float32).reshape(shape) * step[:, :, :, None] + low[:, :, :, None]
    step, low = decode_scales(take(packed.v_scale, 3, size), take(packed.v_min, 3, size))
    per_channel = lambda x: jnp.broadcast_to(
        jnp.swapaxes(x, 2, 3)[..., None], (batch, kv_heads, size, head_dim // width, width)
    ).reshape(batch, kv_heads, size, head_dim)
    values = v_codes.astype(jnp.float32) * per_channel(step) + per_channel(low)
    return keys.reshape(batch, kv_heads, size, head_dim), values
