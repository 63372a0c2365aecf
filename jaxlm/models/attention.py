"""Attention as a free function, masks as a description, and the exact merge of segments."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm.core.errors import ConfigError, ShapeError
from jaxlm.models.layers import softcap as cap_scores

PIECES, LEAST = 4, 32  # of a causal square: more save at most another eighth; queries in one
NEG = float(-0.7 * np.finfo(np.float32).max)  # finite: exp gives 0, differences give no NaN


@dataclass(frozen=True)
class Mask:
    """Who sees whom, as a rule over positions rather than a matrix.

    `causal`: a query sees keys at its own position or before it. `window`: only the last
    `window` positions, its own included. With `prefix` lengths given to `visible`, keys of the
    prefix are seen by every query (prefix language models).
    """

    causal: bool = True
    window: int | None = None

    def __post_init__(self):
        if self.window is not None and self.window < 1:
            raise ConfigError(f"mask window is {self.window}; expected None or at least 1")


def visible(
    mask: Mask,
    query_pos_BT: jax.Array,
    key_pos_BS: jax.Array,
    *,
    key_valid_BS: jax.Array | None = None,
    query_segment_BT: jax.Array | None = None,
    key_segment_BS: jax.Array | None = None,
    prefix_B: jax.Array | None = None,
) -> jax.Array:
    """True where query t may look at key s.

    Args:
      query_pos_BT, key_pos_BS: int32 positions.
      key_valid_BS: false for padding and for slots not yet written.
      query_segment_BT, key_segment_BS: packed documents; only equal segments see each other.
      prefix_B: length of the part every query sees; int32.
    Returns: bool (B, T, S).
    """
    query, key = query_pos_BT[:, :, None], key_pos_BS[:, None, :]
    if (query_segment_BT is None) != (key_segment_BS is None):
        raise ShapeError("segments of queries and of keys come together; got only one of them")
    seen = jnp.ones(jnp.broadcast_shapes(query.shape, key.shape), bool)
    if mask.causal:
        seen = key <= query
    if mask.window is not None:
        seen &= jnp.abs(query - key) < mask.window
    if prefix_B is not None:
        seen |= key < prefix_B[:, None, None]
    if query_segment_BT is not None and key_segment_BS is not None:
        seen &= query_segment_BT[:, :, None] == key_segment_BS[:, None, :]
    if key_valid_BS is not None:
        seen &= key_valid_BS[:, None, :]
    return seen


def attend(
    q_BTNH: jax.Array,
    k_BKHS: jax.Array,
    v_BKSH: jax.Array,
    visible_BTS: jax.Array,
    *,
    scale: float,
    softcap: float | None = None,
    bias_BNTS: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Softmax attention with grouped queries: `softmax(cap(scale q k^T) + bias) v`.

    Args:
      q_BTNH: queries; head n reads kv head `n // (N / K)`.
      k_BKHS, v_BKSH: keys and values, laid out so that both products read them as they lie.
      visible_BTS: bool, from `visible`.
      bias_BNTS: added to the scores after scale and cap; broadcastable.
    Returns:
      out_BTNH in q's dtype, and lse_BTN, the float32 log-sum-exp of the scores. A query that
      sees nothing gets zeros and an lse of `NEG`, so that `merge` ignores it.
    """
    batch, time, heads, width = q_BTNH.shape
    kv_heads, slots = v_BKSH.shape[1], v_BKSH.shape[2]
    grouped = q_BTNH.reshape(batch, time, kv_heads, heads // kv_heads, width)
    q = grouped.transpose(0, 2, 3, 1, 4).reshape(batch, kv_heads, -1, width)  # B K (G T) H
    scores = jnp.einsum("bkqh,bkhs->bkqs", q, k_BKHS, preferred_element_type=jnp.float32) * scale
    scores = cap_scores(scores, softcap).reshape(batch, heads, time, slots)
    if bias_BNTS is not None:
        scores = scores + bias_BNTS
    scores = jnp.where(visible_BTS[:, None], scores, NEG)
    peak = jax.lax.stop_gradient(jnp.max(scores, -1, keepdims=True))
    weights = jnp.exp(scores - peak)
    total = jnp.sum(weights, -1, keepdims=True)
    # sees nothing; XLA:CPU's max may drop a NaN, so that the peak alone would hide it
    blind = (peak == NEG) & ~jnp.isnan(total)
    lse = jnp.where(blind, NEG, peak + jnp.log(total))[..., 0]  # B N T
    mixed = jnp.einsum(
        "bkqs,bksh->bkqh",
        weights.reshape(batch, kv_heads, -1, slots).astype(v_BKSH.dtype), v_BKSH,
        preferred_element_type=jnp.float32,
    ).reshape(batch, heads, time, width)
    mixed = jnp.where(blind, 0.0, mixed / total)
    return mixed.transpose(0, 2, 1, 3).astype(q_BTNH.dtype), lse.transpose(0, 2, 1)


def attention(
    q_BTNH: jax.Array,
    k_BKHS: jax.Array,
    v_BKSH: jax.Array,
    mask: Mask,
    query_pos_BT: jax.Array,
    key_pos_BS: jax.Array,
    *,
    scale: float,
    softcap: float | None = None,
    bias_BNTS: jax.Array | None = None,
    query_segment_BT: jax.Array | None = None,
    chunk: int = 512,
    aligned: bool = False,
    **keys,
) -> tuple[jax.Array, jax.Array]:
    """`attend` under a mask rule, `chunk` queries at a time, so that T x S is never held whole.

    Args: as `attend` and `visible`; `keys` are the key side of `visible`.
      aligned: static; slot t of the keys holds query t's own token, at the same position, and
        positions grow with t. A causal mask then needs little more than half of the products.
    Returns: out_BTNH and lse_BTN. The backward pass recomputes each chunk.
    """
    batch, time = query_pos_BT.shape
    if aligned and mask.causal and keys.get("prefix_B") is None and bias_BNTS is None:
        if time >= 2 * LEAST:
            return _triangle(q_BTNH, k_BKHS, v_BKSH, mask, query_pos_BT, query_segment_BT, keys,
                             scale=scale, softcap=softcap, chunk=chunk)

    def some(q, pos, segment, bias):
        seen = visible(mask, pos, key_pos_BS, query_segment_BT=segment, **keys)
        return attend(q, k_BKHS, v_BKSH, seen, scale=scale, softcap=softcap, bias_BNTS=bias)

    if time <= chunk:
        return some(q_BTNH, query_pos_BT, query_segment_BT, bias_BNTS)
    count = -(-time // chunk)

    def pieces(x, axis=1):
        if x is None:
            return None
        pads = [(0, 0)] * x.ndim
        pads[axis] = (0, count * chunk - time)
        shape = (*x.shape[:axis], count, chunk, *x.shape[axis + 1:])
        return jnp.moveaxis(jnp.pad(x, pads).reshape(shape), axis, 0)

    if bias_BNTS is not None:
        bias_BNTS = jnp.broadcast_to(bias_BNTS, (*bias_BNTS.shape[:2], time, bias_BNTS.shape[3]))
    parts = (pieces(q_BTNH), pieces(query_pos_BT), pieces(query_segment_BT), pieces(bias_BNTS, 2))
    out, lse = jax.lax.map(jax.checkpoint(lambda part: some(*part)), parts)
    join = lambda x: jnp.moveaxis(x, 0, 1).reshape(batch, count * chunk, *x.shape[3:])[:, :time]
    return join(out), join(lse)


def _triangle(q_BTNH, k_BKHS, v_BKSH, mask, pos_BT, segment_BT, keys, **rest):
    """Causal attention of aligned tokens: each piece of queries reads no key that it cannot see."""
    time = pos_BT.shape[1]
    size = max(-(-time // PIECES), LEAST)
    outs = []
    for start in range(0, time, size):
        end = min(start + size, time)
        first = 0 if mask.window is None else max(start - mask.window + 1, 0)
        cut: dict[str, Any] = {
            name: None if x is None else x[:, first:end] for name, x in keys.items()
        }
        outs.append(attention(
            q_BTNH[:, start:end], k_BKHS[..., first:end], v_BKSH[:, :, first:end], mask,
            pos_BT[:, start:end], pos_BT[:, first:end],
            query_segment_BT=None if segment_BT is None else segment_BT[:, start:end],
            **cut, **rest))
    return tuple(jnp.concatenate(part, 1) for part in zip(*outs, strict=True))


def merge(parts: list[tuple[jax.Array, jax.Array]]) -> tuple[jax.Array, jax.Array]:
    """Attention over several segments from attention over each, exactly.

    `lse = log sum_i exp(lse_i)`, `out = sum_i exp(lse_i - lse) out_i`.

    Args: parts: (out_BTNH, lse_BTN) of each segment.
    Returns: (out_BTNH, lse_BTN) of their union.
    """
    lse = jnp.stack([part_lse for _, part_lse in parts])
    peak = jnp.max(lse, 0)
    total = peak + jnp.log(jnp.sum(jnp.exp(lse - peak), 0))
    dtype = parts[0][0].dtype
    mixed = sum(
        jnp.exp(part_lse - total)[..., None] * out.astype(jnp.float32) for out, part_lse in parts
    )
    return jnp.asarray(mixed).astype(dtype), jnp.maximum(total, NEG)
