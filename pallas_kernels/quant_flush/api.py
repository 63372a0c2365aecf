"""The flush of every ready row: compensate, quantise, pack into place."""

import jax
import jax.numpy as jnp

from pallas_kernels.dispatch import Implementation, dispatch, later
from pallas_kernels.quant import PackedKV, QuantFormat
from pallas_kernels.quant_flush import reference, xla
from pallas_kernels.squat import Compensation

_TABLE = {"xla": xla.flush, "tpu": later("pallas_kernels.quant_flush.tpu", "flush"),
          "reference": reference.flush}


def quant_flush(
    packed: PackedKV, k: jax.Array, v: jax.Array, lengths: jax.Array, ready: jax.Array,
    fmt: QuantFormat, comp: Compensation | None = None, *, block: int = 16, guard: bool = True,
    implementation: Implementation = None, interpret: bool = False,
) -> PackedKV:
    """Writes F new tokens after the first `lengths` of each ready row; other rows stay as they are.

    Under jit with `packed` donated nothing the size of the codes is copied.

    Args:
      packed: what is written into; m kv heads may lie side by side in it (`lanes`).
      k, v: [B, K, F, H], F a multiple of `fmt.group`.
      lengths: int32 [B], multiples of `fmt.group`; `lengths + F` fits the capacity where ready.
      ready: bool [B].
      fmt: the format of `packed` (static).
      comp: SQuat's compensation [B, K, ...] of the keys; None is plain min-max (KIVI).
      block, guard: see `pallas_kernels.squat`; `block` is the one `comp` was made with.
      implementation: None, 'xla', 'tpu', 'reference', or a list to try in order.
      interpret: run the Pallas kernel in interpret mode (tests).

    Returns: the packed state with those tokens; the caller advances its lengths.

    Raises:
      ValueError: shapes that do not belong together. NotImplementedError: declined.
    """
    batch, stored, _, across = packed.k_words.shape
    many = max(k.shape[1] // stored, 1) if k.ndim == 4 else 1
    kv_heads, head_dim = stored * many, across // many
    if (k.shape != v.shape or k.ndim != 4 or k.shape[:2] != (batch, kv_heads)
            or k.shape[3] * many != across or k.shape[2] % fmt.group or k.shape[2] == 0):
        raise ValueError(f"k and v are [B, K, F, H] = [{batch}, {kv_heads}, multiple of "
                         f"{fmt.group}, {head_dim}], got {k.shape} and {v.shape}")
    if lengths.shape != (batch,) or ready.shape != (batch,):
        raise ValueError(f"lengths and ready are [{batch}], got {lengths.shape}, {ready.shape}")
    if comp is not None and comp.matrix.shape != (batch, kv_heads, head_dim, head_dim):
        raise ValueError(f"comp.matrix is {(batch, kv_heads, head_dim, head_dim)}, "
                         f"got {comp.matrix.shape}")
    lengths = lengths.astype(jnp.int32)
    for start in range(0, k.shape[2], fmt.group):
        part = slice(start, start + fmt.group)
        packed = dispatch(_TABLE, implementation, packed, k[:, :, part], v[:, :, part],
                          lengths + start, ready, comp, fmt=fmt, block=block, guard=guard,
                          interpret=interpret)
    return packed
