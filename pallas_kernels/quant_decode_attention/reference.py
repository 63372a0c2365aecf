"""The plain definition: dequantise everything, then softmax. For tests; holds the whole cache."""

import jax
import jax.numpy as jnp

from pallas_kernels.quant import PackedKV, QuantFormat, decode_scales, unpack_words
from pallas_kernels.quant_decode_attention.common import EMPTY_LSE, cap


def dequantise(packed: PackedKV, fmt: QuantFormat) -> tuple[jax.Array, jax.Array]:
    """Keys and values float32 [B, K, S, H] of every slot, in use or not."""
    center = 0.0 if packed.k_center is None else packed.k_center[:, :, None]
    step, low = decode_scales(packed.k_scale, packed.k_min, center)
    per_token = lambda x: jnp.repeat(x, fmt.group, axis=2)
    keys = unpack_words(packed.k_words, fmt.k_bits, fmt.group) * per_token(step) + per_token(low)
    width = keys.shape[-1] // packed.v_scale.shape[2]
    per_channel = lambda x: jnp.repeat(jnp.swapaxes(x, 2, 3), width, axis=3)
    step, low = map(per_channel, decode_scales(packed.v_scale, packed.v_min))
    return keys, unpack_words(packed.v_words, fmt.v_bits, fmt.group) * step + low


def attend(q, packed, lengths, first, tail, *, fmt, softcap=None, rotate=None, interpret=False):
    """q [B, K, G, H], already scaled -> (out [B, K, G, H], lse [B, K, G])."""
    del interpret
    keys, values = dequantise(packed, fmt)
    index = jnp.broadcast_to(jnp.arange(keys.shape[2]), (q.shape[0], keys.shape[2]))
    keep = index < lengths[:, None]
    if tail is not None:
        k_tail, v_tail, tail_lengths = tail
        at = jnp.arange(k_tail.shape[2])[None, :]
        keys = jnp.concatenate([keys, k_tail.astype(jnp.float32)], 2)
        values = jnp.concatenate([values, v_tail.astype(jnp.float32)], 2)
        keep = jnp.concatenate([keep, at < tail_lengths[:, None]], 1)
        index = jnp.concatenate([index, at + lengths[:, None]], 1)
    keep = (keep & (index >= first[:, None]))[:, None, None, :]
    keys = keys if rotate is None else rotate(keys, index)
    logits = cap(jnp.einsum("bkgh,bksh->bkgs", q, keys, precision="highest"), softcap)
    logits = jnp.where(keep, logits, EMPTY_LSE)
    top = jnp.max(logits, -1, keepdims=True)
    weights = jnp.where(keep, jnp.exp(logits - top), 0.0)
    total = jnp.sum(weights, -1, keepdims=True)
    values = jnp.where(keep[:, :, 0, :, None], values, 0.0)
    out = jnp.einsum("bkgs,bksh->bkgh", weights, values, precision="highest")
    some = total > 0
    total = jnp.where(some, total, 1.0)
    lse = jnp.where(some, top + jnp.log(total), EMPTY_LSE)
    return jnp.where(some, out / total, 0.0), lse[..., 0]
