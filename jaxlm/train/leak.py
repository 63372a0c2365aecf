"""How far a change of weights is from what orthogonal subspaces promise."""

import jax
import jax.numpy as jnp

from jaxlm.train.subspace import dot, reflect, transpose

Basis = dict[str, jax.Array]


def leaks(matrices: dict[str, tuple[jax.Array, jax.Array, Basis]]) -> dict[str, jax.Array]:
    """`||U_h^T dW||_F` and `||dW V_h||_F` of the worst matrix, and the shares of all of dW.

    Args: matrices: path -> dW and W_0, (..., n, m), and the bases.
    Returns: `leak_left` and `leak_right`, over `||W_0||`; the same with `_of_update`, over
      `||dW||`; `protected_share`, what of `||dW||^2` lies in either kept subspace; `free_share`,
      the rest. Nothing where there is no matrix.

    >>> e1, change = jnp.array([[1.0], [0.0]]), jnp.array([[0.0, 0.0], [3.0, 4.0]])
    >>> found = leaks({"w": (change, 10 * jnp.eye(2), {"left": e1, "right": e1})})
    >>> {name: round(float(value), 2) for name, value in found.items() if "update" not in name}
    {'leak_left': 0.0, 'leak_right': 0.21, 'protected_share': 0.36, 'free_share': 0.64}
    """
    rows = []
    for change, weight, basis in matrices.values():
        left, outside = apart(change, basis, "left")
        right, _ = apart(transpose(change), basis, "right")
        _, free = apart(transpose(outside), basis, "right")
        rows.append([jnp.linalg.norm(x, axis=(-2, -1)).reshape(-1)
                     for x in (left, right, free, change, weight)])
    if not rows:
        return {}
    left, right, free, moved, weight = map(jnp.concatenate, zip(*rows, strict=True))
    tiny = jnp.finfo(moved.dtype).tiny
    worst = lambda leak, norm: (leak / jnp.maximum(norm, tiny)).max()
    total = jnp.maximum((moved**2).sum(), tiny)
    share = jnp.minimum((free**2).sum() / total, 1.0)
    return {"leak_left": worst(left, weight), "leak_right": worst(right, weight),
            "leak_left_of_update": worst(left, moved), "leak_right_of_update": worst(right, moved),
            "protected_share": jnp.where(moved.any(), 1 - share, 0.0), "free_share": share}


def apart(x: jax.Array, basis: Basis, side: str) -> tuple[jax.Array, jax.Array]:
    """Columns x (..., n, c) inside a side's kept subspace and outside of it.

    Each in some orthonormal basis: their norms are what counts. A side is known by its kept
    columns, by those that are free, or by a reflector.
    """
    if side in basis:
        inside = dot(transpose(basis[side]), x)
        return inside, x - dot(basis[side], inside)
    if f"{side}_free" in basis:
        outside = dot(transpose(basis[f"{side}_free"]), x)
        return x - dot(basis[f"{side}_free"], outside), outside
    vectors = basis[f"{side}_vectors"]
    turned = reflect(x, vectors, basis[f"{side}_core"])
    return turned[..., :vectors.shape[-1], :], turned[..., vectors.shape[-1]:, :]
