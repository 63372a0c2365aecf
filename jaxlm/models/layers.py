"""The maths of a layer, as free functions over arrays."""

import math

import jax
import jax.numpy as jnp

from jaxlm.models.config import Rope


def rms_norm(x: jax.Array, scale_D: jax.Array, eps: float, offset: float = 0.0) -> jax.Array:
    """`x / sqrt(mean(x^2) + eps) * (offset + scale)`, in float32, returned in x's dtype.

    Source: 1910.07467, equation 4.
    """
    x32 = x.astype(jnp.float32)
    normed = x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, -1, keepdims=True) + eps)
    if offset:
        return (normed * (offset + scale_D.astype(jnp.float32))).astype(x.dtype)
    return normed.astype(x.dtype) * scale_D


def rope_frequencies(rope: Rope, head_dim: int) -> jax.Array:
    """Radians a position for each of the `head_dim / 2` planes, float32."""
    exponent = jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim
    frequency = 1.0 / (rope.theta**exponent)
    if rope.kind == "linear":
        return frequency / rope.factor
    if rope.kind == "llama3":
        turns = rope.original_max_len * frequency / (2 * math.pi)
        band = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
        keep = jnp.clip(band, 0.0, 1.0)
        return frequency * (keep + (1 - keep) / rope.factor)
    return frequency


def apply_rope(x_BTNH: jax.Array, pos_BT: jax.Array, rope: Rope) -> jax.Array:
    """Rotate plane `i` (components i and i + H/2) by `pos * frequency_i`.

    Args:
      x_BTNH: queries or keys of any float dtype.
      pos_BT: positions, int32, counted from 0.
    Returns: the same shape and dtype; the angles are float32.
    Source: 2104.09864, section 3.2, in the half-split order of published Llama weights.
    """
    cos_BTH, sin_BTH = (table[..., None, :] for table in _turns(pos_BT, rope, x_BTNH.shape[-1]))
    x = x_BTNH.astype(jnp.float32)
    left, right = jnp.split(x, 2, axis=-1)
    return (x * cos_BTH + jnp.concatenate([right, left], -1) * sin_BTH).astype(x_BTNH.dtype)


def _turns(pos_BT: jax.Array, rope: Rope, head_dim: int) -> tuple[jax.Array, jax.Array]:
    """`(cos, cos)` and `(-sin, sin)` of the planes' angles, float32 (B, T, H).

    XLA:CPU puts sines and cosines into whatever reads them, and so computes them anew for every
    head of every layer. It fuses no product: there, one with ones and zeros keeps them apart.
    """
    angle = pos_BT[..., None].astype(jnp.float32) * rope_frequencies(rope, head_dim)
    cos, sin, one = jnp.cos(angle), jnp.sin(angle), jnp.eye(head_dim // 2)
    join = lambda *halves: jnp.concatenate(halves, -1)
    return jax.lax.platform_dependent(
        cpu=lambda: (cos @ join(one, one), sin @ join(-one, one)),
        default=lambda: (join(cos, cos), join(-sin, sin)))


def activate(x: jax.Array, name: str) -> jax.Array:
    """The gate's nonlinearity."""
    if name == "silu":
        return jax.nn.silu(x)
    return jax.nn.gelu(x, approximate=name == "gelu_tanh")


def softcap(x: jax.Array, cap: float | None) -> jax.Array:
    """`cap * tanh(x / cap)`; the identity without a cap. Source: 2408.00118, section 2."""
    return x if cap is None else cap * jnp.tanh(x / cap)


def linear(x: jax.Array, kernel: jax.Array, inputs: int) -> jax.Array:
    """Contract x's last axes (flattened) with the kernel's first `inputs` axes, as one matmul.

    Args:
      x: (..., *in) with in of `inputs` axes.
      kernel: (*in, *out).
    Returns: (..., *out), in x's dtype.

    x is a matrix here: XLA:CPU multiplies a third axis more slowly, most of all in the backward
    pass.
    """
    lead = x.shape[: x.ndim - inputs]
    matrix = kernel.reshape(math.prod(kernel.shape[:inputs]), -1).astype(x.dtype)
    return (x.reshape(-1, matrix.shape[0]) @ matrix).reshape(*lead, *kernel.shape[inputs:])


def against_rows(x: jax.Array, table_VD: jax.Array) -> jax.Array:
    """`x` (..., D) against every row of a table, float32 (..., V).

    x is a matrix here, as in `linear`: where it has a third axis, XLA:CPU of jaxlib 0.7.2 cannot
    run the product of bfloat16s that it compiles.
    """
    out = jnp.einsum("nd,vd->nv", x.reshape(-1, x.shape[-1]), table_VD.astype(x.dtype),
                     preferred_element_type=jnp.float32)
    return out.reshape(*x.shape[:-1], len(table_VD))
