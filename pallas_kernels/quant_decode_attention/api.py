"""Decode attention straight over packed codes: checks, then one of the implementations."""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from pallas_kernels import lanes
from pallas_kernels.dispatch import Implementation, dispatch, later
from pallas_kernels.quant import PackedKV, QuantFormat
from pallas_kernels.quant_decode_attention import reference, xla
from pallas_kernels.quant_decode_attention.common import EMPTY_LSE as EMPTY_LSE

_TABLE = {"xla": xla.attend, "reference": reference.attend,
          **{name: later(f"pallas_kernels.quant_decode_attention.{name}", "attend")
             for name in ("tpu", "gpu")}}

Rotate = Callable[[jax.Array, jax.Array], jax.Array]


def quant_decode_attention(
    q: jax.Array, packed: PackedKV, lengths: jax.Array, fmt: QuantFormat,
    k_tail: jax.Array | None = None, v_tail: jax.Array | None = None,
    tail_lengths: jax.Array | None = None, *, start: jax.Array | None = None,
    scale: float | None = None, softcap: float | None = None, rotate: Rotate | None = None,
    implementation: Implementation = None, interpret: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """Attention of one query token a row over its packed tokens, then its full-precision tail.

    `out = softmax(scale * q [K^ | K_tail]^T) [V^ | V_tail]`. Token i of a row is packed token i for
    i < lengths, then tail token i - lengths. The dequantised cache is never held whole.

    Args:
      q: [B, N, H]; query head n reads kv head n // (N / K).
      packed: codes and scales of K kv heads, or of K/m with m heads side by side (`lanes`).
      lengths: int32 [B], packed tokens in use.
      fmt: the format of `packed` (static).
      k_tail, v_tail: [B, K, W, H], or None for no tail.
      tail_lengths: int32 [B], tail tokens in use.
      start: int32 [B], first token that is attended to (sliding windows); 0 if None.
      scale: of the logits; 1/sqrt(H) if None.
      softcap: logits become `softcap * tanh(logits / softcap)`.
      rotate: `(keys [B, K, S, H], positions [B, S]) -> keys`, applied to keys as they are read, for
        keys kept before RoPE; positions are token indices of the row. What it holds by row comes as
        arrays of a `jax.tree_util.Partial`, leading with B: rows may be read one at a time.
      implementation: None, 'xla', 'tpu', 'gpu', 'reference', or a list to try in order.
      interpret: run the Pallas kernels in interpret mode (tests).

    Returns: out float32 [B, N, H] and the natural log-sum-exp of the scaled logits, float32 [B, N].
      A row with nothing to attend to gives zeros and exactly `EMPTY_LSE` = -1e30.

    Raises:
      ValueError: shapes or formats that do not belong together. NotImplementedError: declined.

    Source: KIVI arXiv 2402.02750 section 4; the log-sum-exp merge is that of arXiv 2205.14135.
    """
    _check(q, packed, lengths, fmt, k_tail, v_tail, tail_lengths)
    batch, heads, head_dim = q.shape
    many = packed.k_words.shape[3] // head_dim
    kv_heads = packed.k_words.shape[1] * many
    scale = 1 / math.sqrt(head_dim) if scale is None else scale
    grouped = (q.astype(jnp.float32) * scale).reshape(batch, kv_heads, -1, head_dim)
    lengths = lengths.astype(jnp.int32)
    if k_tail is None or v_tail is None or tail_lengths is None:
        tail = None
    else:
        tail = (k_tail, v_tail, tail_lengths.astype(jnp.int32))
    first = jnp.zeros_like(lengths) if start is None else start.astype(jnp.int32)
    if many > 1:
        if rotate is not None:
            raise NotImplementedError("keys before RoPE are kept a head a row, not side by side")
        grouped = lanes.queries_beside(grouped, many)
        tail = tail and (lanes.beside(tail[0], many), lanes.beside(tail[1], many), tail[2])
    out, lse = dispatch(_TABLE, implementation, grouped, packed, lengths, first, tail, fmt=fmt,
                        softcap=softcap, rotate=rotate, interpret=interpret)
    out = lanes.own_lanes(out, many) if many > 1 else out
    return out.reshape(batch, heads, head_dim), lse.reshape(batch, heads)


def _check(q, packed, lengths, fmt, k_tail, v_tail, tail_lengths) -> None:
    batch, stored, rows, across = packed.k_words.shape
    if q.ndim != 3 or q.shape[0] != batch or across % q.shape[2] or q.shape[1] % stored:
        raise ValueError(f"q is [B, N, H] = [{batch}, multiple of {stored}, {across}], "
                         f"got {q.shape}")
    head_dim, many = q.shape[2], across // q.shape[2]
    kv_heads = stored * many
    if q.shape[1] % kv_heads:
        raise ValueError(f"packed holds {many} heads of {head_dim} side by side, {kv_heads} in all;"
                         f" got {q.shape[1]} query heads")
    size = rows * 32 // fmt.k_bits
    want = {"k_scale": (batch, stored, size // fmt.group, across),
            "v_words": (batch, stored, size * fmt.v_bits // 32, across),
            "v_scale": (batch, stored, across // fmt.channels(head_dim), size)}
    for name, shape in want.items():
        if getattr(packed, name).shape != shape:
            raise ValueError(f"packed.{name} is {shape} under {fmt}, got "
                             f"{getattr(packed, name).shape}; was it packed in another format?")
    if size % fmt.tile or (packed.k_scale.dtype == jnp.int8) != (packed.k_center is not None):
        raise ValueError(f"packed holds whole tiles of {fmt.tile} tokens, and a k_center with int8 "
                         f"scales only; got {size} tokens, {packed.k_scale.dtype} scales")
    if lengths.shape != (batch,):
        raise ValueError(f"lengths is [{batch}], got {lengths.shape}")
    given = [x is not None for x in (k_tail, v_tail, tail_lengths)]
    if any(given):
        if not all(given):
            raise ValueError("k_tail, v_tail and tail_lengths come together")
        lead = (batch, kv_heads)
        if (k_tail.shape != v_tail.shape or k_tail.shape[:2] != lead or k_tail.shape[3] != head_dim
                or tail_lengths.shape != (batch,)):
            raise ValueError(f"tails are [B, K, W, H] = [{batch}, {kv_heads}, W, {head_dim}] and "
                             f"tail_lengths [{batch}], got {k_tail.shape}, {v_tail.shape}, "
                             f"{tail_lengths.shape}")
