"""Several kv heads side by side, so that rows of a narrow head fill a TPU's 128 lanes.

`m` heads of H channels are kept as one head of m H: words and key scales [B, K/m, ..., m H], value
scales [B, K/m, m C, S]. Codes and scales are those of the heads apart. A head dim of 64 takes 2
heads and one of 96 takes 4; alone, either would be padded to 128 lanes, in memory too.
"""

import math

import jax
import jax.numpy as jnp

from pallas_kernels.quant import Grid

LANES = 128


def side_by_side(head_dim: int, kv_heads: int) -> int:
    """Heads that fill whole lanes together; 1 where they do alone, or cannot.

    >>> [side_by_side(width, 8) for width in (64, 96, 128, 256)], side_by_side(64, 3)
    ([2, 4, 1, 1], 1)
    """
    many = LANES // math.gcd(LANES, head_dim)
    return many if kv_heads % many == 0 else 1


def beside(x: jax.Array, many: int) -> jax.Array:
    """[B, K, S, H] as [B, K/m, S, m H].

    >>> beside(jnp.arange(4).reshape(1, 2, 1, 2), 2).tolist()
    [[[[0, 1, 2, 3]]]]
    """
    if many == 1:
        return x
    batch, heads, size, width = x.shape
    x = x.reshape(batch, heads // many, many, size, width).swapaxes(2, 3)
    return x.reshape(batch, heads // many, size, many * width)


def apart(x: jax.Array, many: int) -> jax.Array:
    """The inverse of `beside`."""
    if many == 1:
        return x
    batch, heads, size, width = x.shape
    x = x.reshape(batch, heads, size, many, width // many).swapaxes(2, 3)
    return x.reshape(batch, heads * many, size, width // many)


def keys_beside(grid: Grid, many: int) -> Grid:
    """Quantised keys [B, K, S, H], scales [B, K, S/group, H]."""
    return Grid(*(beside(x, many) for x in grid))


def values_beside(grid: Grid, many: int) -> Grid:
    """Quantised values [B, K, S, H], scales [B, K, C, S]."""
    stack = lambda x: x.reshape(x.shape[0], x.shape[1] // many, many * x.shape[2], x.shape[3])
    return Grid(beside(grid.codes, many), stack(grid.scale), stack(grid.minimum),
                beside(grid.value, many))


def queries_beside(q: jax.Array, many: int) -> jax.Array:
    """[B, K, G, H] as [B, K/m, m G, m H], zero in the other heads' lanes."""
    batch, heads, group, width = q.shape
    q = q.reshape(batch, heads // many, many, group, 1, width)
    q = q * jnp.eye(many, dtype=q.dtype)[:, None, :, None]
    return q.reshape(batch, heads // many, many * group, many * width)


def own_lanes(out: jax.Array, many: int) -> jax.Array:
    """Of [B, K/m, m G, m H] each query's own lanes: [B, K, G, H]."""
    batch, heads, group, width = out.shape
    out = out.reshape(batch, heads, many, group // many, many, width // many)
    out = jnp.stack([out[:, :, i, :, i] for i in range(many)], 2)
    return out.reshape(batch, heads * many, group // many, width // many)


def matrices_beside(x: jax.Array, many: int) -> jax.Array:
    """[B, K, H, H] as block diagonals [B, K/m, m H, m H]."""
    if many == 1:
        return x
    batch, heads, width, _ = x.shape
    x = x.reshape(batch, heads // many, many, width, 1, width)
    x = x * jnp.eye(many, dtype=x.dtype)[:, None, :, None]
    return x.reshape(batch, heads // many, many * width, many * width)
