"""KIVI and SQuat after a rotation that spreads outlying channels over all of them."""

from dataclasses import dataclass
from functools import cache
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm.cache.base import Attended
from jaxlm.cache.kivi import Kivi
from jaxlm.cache.squat import Squat
from jaxlm.core.errors import ConfigError
from jaxlm.models.layers import apply_rope


@dataclass(frozen=True)
class RotatedKivi(Kivi):
    """`Kivi` on `H q`, `H k` and `H v`, H an orthonormal Hadamard matrix; a peer to compare with.

    Keys and queries are turned after rotary positions, so that scores stay what they were; what
    comes of the values is turned back. A head dim that is no power of two is turned in equal
    parts, the largest that are one. Bytes are those of `Kivi`.

    Args: those of `Kivi`; rope is 'after'.
    Raises: ConfigError.

    Example:
      >>> RotatedKivi(4, 2).matrix(2).astype(float).round(3).tolist()
      [[0.707, 0.707], [0.707, -0.707]]

    Source: arXiv 2404.00456, section 4, for the rotation; 2402.02750 for the codes.
    """

    turns: ClassVar[bool] = True

    def __post_init__(self):
        super().__post_init__()
        if self.rope != "after":
            raise ConfigError(f"rope is {self.rope!r}; rotated kinds turn keys 'after' rotary "
                              "positions, which do not commute with the rotation")

    def matrix(self, head_dim: int) -> np.ndarray:
        """The rotation, orthonormal float32 (H, H)."""
        return hadamard(head_dim)

    def turn(self, x: jax.Array, back: bool = False) -> jax.Array:
        """The rotation of the last axis, or its inverse, in float32."""
        matrix = self.matrix(x.shape[-1])
        turned = jnp.matmul(x.astype(jnp.float32), matrix if back else matrix.T,
                            precision=jax.lax.Precision.HIGHEST)
        return turned.astype(x.dtype)

    def place(self, spec, x_BTNH, pos_BT):
        """Queries or keys as they meet."""
        return self.turn(apply_rope(x_BTNH, pos_BT, spec.rope))

    def prefill(self, spec, state, q_BTNH, k_BTKH, v_BTKH, pos_BT, count_B) -> Attended:
        """As `Kivi`, with turned values."""
        out, lse, state = super().prefill(
            spec, state, q_BTNH, k_BTKH, self.turn(v_BTKH), pos_BT, count_B)
        return self.turn(out, back=True), lse, state

    def extend(self, spec, state, q_BTNH, k_BTKH, v_BTKH, pos_BT, start_B, count_B) -> Attended:
        """As `Kivi`, with turned values."""
        out, lse, state = super().extend(
            spec, state, q_BTNH, k_BTKH, self.turn(v_BTKH), pos_BT, start_B, count_B)
        return self.turn(out, back=True), lse, state

    def step(self, spec, state, q_B1NH, k_B1KH, v_B1KH, pos_B, start_B) -> Attended:
        """As `Kivi`, with turned values."""
        out, lse, state = super().step(
            spec, state, q_B1NH, k_B1KH, self.turn(v_B1KH), pos_B, start_B)
        return self.turn(out, back=True), lse, state

    def attend(self, spec, state, q_BTNH, pos_BT, length_B, first_B) -> tuple[jax.Array, jax.Array]:
        """As `Kivi`, turned back."""
        out, lse = super().attend(spec, state, q_BTNH, pos_BT, length_B, first_B)
        return self.turn(out, back=True), lse


@dataclass(frozen=True)
class RotatedSquat(RotatedKivi, Squat):
    """`Squat` on `H q`, `H k` and `H v`: the subspace of the turned queries, and turned values.

    Args: those of `Squat`; rope is 'after'.
    Raises: ConfigError.

    Example:
      >>> RotatedSquat(4, 2, block=8).flush_every
      8

    Source: arXiv 2503.24358, section 3, and 2404.00456, section 4; putting them together is ours.
    """

    def seen_ahead(self, spec, gram_BKHH) -> jax.Array:
        """As `Squat`: rotary positions turn the queries before H does."""
        both = lambda gram, matrix: jnp.einsum("ij,...jk,lk->...il", matrix, gram, matrix,
                                               precision=jax.lax.Precision.HIGHEST)
        matrix = self.matrix(spec.head_dim)
        return both(super().seen_ahead(spec, both(gram_BKHH, matrix.T)), matrix)


@cache
def hadamard(size: int) -> np.ndarray:
    """Sylvester's matrix, orthonormal; on the diagonal in equal parts if `size` is no power of 2.

    >>> hadamard(6).astype(bool).sum(0).tolist()
    [2, 2, 2, 2, 2, 2]
    """
    part = size & -size
    matrix = np.ones((1, 1))
    while len(matrix) < part:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    return np.kron(np.eye(size // part), matrix / np.sqrt(part)).astype(np.float32)
