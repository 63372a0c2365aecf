"""TurboQuant: a random rotation, then the best scalar codebook for a coordinate of a random vector.
"""

from dataclasses import dataclass
from functools import cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm.cache import quantised
from jaxlm.cache.dense import FLOATS
from jaxlm.cache.rotated import RotatedKivi
from jaxlm.core.errors import ConfigError, whole
from jaxlm.models.config import AttentionSpec
from pallas_kernels.quant import QuantFormat, pack_words, unpack_words


class Codes(NamedTuple):
    """Indices of codebooks, packed as in `pallas_kernels.quant`, and a norm a token."""

    k_words: jax.Array  # int32 [B, K, S k_bits / 32, H]
    k_norm: jax.Array  # [B, K, S]
    v_words: jax.Array
    v_norm: jax.Array


@dataclass(frozen=True)
class TurboQuant(RotatedKivi):
    """Vectors as their norm and, by coordinate of a random turn, the nearest of 2^bits levels.

    `x^ = |x| Pi^T c[argmin_j |(Pi x / |x|)_i - c_j|]`, c the levels of least squared error for a
    coordinate of a random unit vector, density `(1 - t^2)^((H - 3) / 2)`. This is the variant of
    least squared error, without the extra sign bit for inner products. A token and kv head takes
    `(k_bits + v_bits) H / 8` bytes and two norms of `scales`; the tail is that of `Kivi`. Read by
    plain XLA on every device, a chunk at a time.

    Args (besides Kivi's k_bits, v_bits, group, window):
      scales: dtype of the norms.
      seed: of the rotation, one for all heads and layers.
      shrinks, rope, implementation: as they are; another value is refused.
    Raises: ConfigError.

    Example:
      >>> levels(64, 1).astype(float).round(3).tolist()
      [-0.1, 0.1]

    Source: arXiv 2504.19874, section 3.1.
    """

    seed: int = 0

    def __post_init__(self):
        super().__post_init__()
        if self.scales not in FLOATS:
            raise ConfigError(f"scales is {self.scales!r}; norms are one of {FLOATS}")
        whole("seed", self.seed, 0)
        for name in ("shrinks", "implementation"):
            if getattr(self, name) != getattr(TurboQuant, name):
                raise ConfigError(f"{name} is {getattr(self, name)!r}; a TurboQuant cache has no "
                                  "grids to shrink and no kernels: leave it out")

    def matrix(self, head_dim: int) -> np.ndarray:
        """A random rotation, orthonormal float32 (H, H)."""
        return random_rotation(head_dim, self.seed)

    def side_by_side(self, spec: AttentionSpec) -> int:
        """Each head alone: plain XLA, which reads them, lays out arrays as it likes."""
        return 1

    def init(self, spec: AttentionSpec, batch: int, slots: int, dtype: Any):
        """No tokens yet; room for `slots` a row."""
        state = super().init(spec, batch, slots, dtype)
        packed = state["packed"]
        norms = [jnp.zeros((*packed.v_scale.shape[:2], packed.v_scale.shape[3]), self.scales)
                 for _ in range(2)]
        return state | {"packed": Codes(packed.k_words, norms[0], packed.v_words, norms[1])}

    def read_prompt(self, spec, state, q_BTNH, k_BKTH, valid_BT):
        """Nothing is learnt from a prompt."""
        return state, None

    def fill(self, packed: Codes, k_BKTH, v_BKTH, code_keys) -> Codes:
        """Empty codes with a prompt's tokens in them, a tile at a time."""
        tile = self.format.tile
        pieces = -(-min(k_BKTH.shape[2], packed.k_norm.shape[2]) // tile)
        fit = lambda x: jnp.pad(x, ((0, 0), (0, 0), (0, max(pieces * tile - x.shape[2], 0)),
                                    (0, 0)))
        k_BKTH, v_BKTH = fit(k_BKTH), fit(v_BKTH)

        def put(i, packed: Codes) -> Codes:
            at = lambda old, new: jax.lax.dynamic_update_slice_in_dim(
                old, new, i * new.shape[2], 2)
            parts = []
            for x, bits in ((k_BKTH, self.k_bits), (v_BKTH, self.v_bits)):
                codes, norm = encode(jax.lax.dynamic_slice_in_dim(x, i * tile, tile, 2), bits,
                                     self.scales)
                parts += [pack_words(codes, bits, self.group), norm]
            return Codes(*(at(old, new) for old, new in zip(packed, parts, strict=True)))

        return jax.lax.fori_loop(0, pieces, put, packed)

    def writer(self, state) -> quantised.Write:
        """A loop of slice updates over rows, in place."""
        group = self.group

        def write(packed: Codes, k_BKSH, v_BKSH, lengths_B, ready_B) -> Codes:
            new = [(*encode(x, bits, self.scales), bits)
                   for x, bits in ((k_BKSH, self.k_bits), (v_BKSH, self.v_bits))]

            def row(b, packed: Codes) -> Codes:
                place, on = lengths_B[b] // group, ready_B[b]

                def put(old, now, start, merge=lambda before, now: now):
                    at = (b, 0, start) + (0,) * (old.ndim - 3)
                    before = jax.lax.dynamic_slice(old, at, now.shape)
                    now = jnp.where(on, merge(before, now), before)
                    return jax.lax.dynamic_update_slice(old, now, at)

                found = []
                for i, (codes, norm, bits) in enumerate(new):
                    slots = 32 // bits
                    shift = bits * (place % slots)
                    hole = jnp.int32(2**bits - 1) << shift
                    merge = lambda old, now, hole=hole, shift=shift: (old & ~hole) | (now << shift)
                    found += [put(packed[2 * i], codes[b][None], place // slots * group, merge),
                              put(packed[2 * i + 1], norm[b][None], lengths_B[b])]
                return Codes(*found)

            return jax.lax.fori_loop(0, len(lengths_B), row, packed)

        return write

    @partial(jax.jit, static_argnums=(0, 1))
    def attend_one(self, spec, state, q_B1NH, pos_B, length_B, first_B):
        """One placed query a row over codes and tail."""
        return self.attend_many(spec, state, q_B1NH, pos_B[:, None], state["k"], state["v"],
                                length_B, first_B)

    def attend_many(self, spec, state, q_BTNH, pos_BT, k_BKSH, v_BKSH, length_B, first_B):
        """Placed queries over codes and the uncoded tokens behind them."""
        return quantised.attend_many(spec, state, q_BTNH, pos_BT, k_BKSH, v_BKSH, length_B, first_B,
                                     self.format, False, read_chunk)


def encode(x: jax.Array, bits: int, dtype: str) -> tuple[jax.Array, jax.Array]:
    """Turned vectors (..., H) as codes int32 (..., H) and norms (...)."""
    table = levels(x.shape[-1], bits)
    norm = jnp.linalg.norm(x.astype(jnp.float32), axis=-1).astype(dtype)
    unit = x / jnp.maximum(norm.astype(jnp.float32), 1e-30)[..., None]
    codes = jnp.searchsorted(jnp.asarray((table[1:] + table[:-1]) / 2), unit)
    return codes.astype(jnp.int32), norm


def read_chunk(packed: Codes, i, size: int, fmt: QuantFormat) -> tuple[jax.Array, jax.Array]:
    """Turned keys and values float32 [B, K, size, H] of tokens [i * size, (i + 1) * size)."""
    take = lambda x, n: jax.lax.dynamic_slice_in_dim(x, i * n, n, 2)

    def read(words, norm, bits):
        codes = unpack_words(take(words, size * bits // 32), bits, fmt.group)
        table = jnp.asarray(levels(words.shape[-1], bits))
        return table[codes] * take(norm, size).astype(jnp.float32)[..., None]

    return (read(packed.k_words, packed.k_norm, fmt.k_bits),
            read(packed.v_words, packed.v_norm, fmt.v_bits))


@cache
def levels(head_dim: int, bits: int) -> np.ndarray:
    """The 2^bits levels of least squared error for a coordinate of a random unit vector, float32.

    Lloyd's iteration on a fine grid, begun where Panter and Dite's rule puts the levels.
    """
    edge = min(1.0, 8 / np.sqrt(head_dim))
    t = np.linspace(-edge, edge, 40001)
    density = np.maximum(1 - t**2, 0) ** ((head_dim - 3) / 2)
    spread = np.cumsum(density ** (1 / 3))
    count = 2**bits
    table = np.interp((np.arange(count) + 0.5) / count, spread / spread[-1], t)
    for _ in range(300):
        cell = np.searchsorted((table[1:] + table[:-1]) / 2, t)
        mass = np.bincount(cell, density, count)
        mean = np.bincount(cell, density * t, count) / np.maximum(mass, 1e-300)
        table = np.where(mass > 0, mean, table)
    return ((table - table[::-1]) / 2).astype(np.float32)


@cache
def random_rotation(head_dim: int, seed: int) -> np.ndarray:
    """Uniform over orthonormal matrices, float32 (H, H)."""
    normal = np.random.default_rng(seed).standard_normal((head_dim, head_dim))
    q, r = np.linalg.qr(normal)
    return (q * np.sign(np.diag(r))).astype(np.float32)
