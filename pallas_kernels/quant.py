"""Asymmetric low-bit quantisation of key and value caches, and the planar word layout.

A group is quantised to `code = round_half_even(clip((x - min) / scale, 0, 2^bits - 1))` and read
back as `code * scale + min`. Keys share a scale along `group` consecutive tokens of one channel,
values along `gcd(group, H)` consecutive channels of one token (KIVI, arXiv 2402.02750).

Planar words: a tile is `group` int32 word rows of H lanes and holds f * group tokens, f = 32/bits.
Bit slot j of every word holds token group j, so that row w of slot j is token `j * group + w` of
the tile. A flush of one group is an OR into one slot, and scales fold in slot by slot.
"""

import dataclasses
import functools
import math
import numbers
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

SCALE_DTYPES = ("float32", "float16", "bfloat16", "int8")
_OCTAVE = 8  # 8-bit scales: codes per doubling
_MIN_UNIT = 16  # 8-bit minima: units per scale
_HALF_ULP = {"float16": (2.0**-11, 2.0**-25), "bfloat16": (2.0**-8, 0.0)}


@dataclasses.dataclass(frozen=True)
class QuantFormat:
    """How keys and values are coded; hashed by value.

    Args:
      k_bits, v_bits: 2, 4 or 8, independently.
      group: tokens that share a key scale (and the rows of a word tile).
      scales: dtype of scales and minima; 'int8' codes `scale = 2^(e/8)` and
        `min = center + z * scale / 16` with e, z in one byte each. Of a group of one value
        `c`, `|c - center| / 230 + 2^-20` may be lost then: no byte holds every `c`.
      shrinks: candidate widths of the grid relative to the min-max range; the one of least squared
        error is kept. (1.0,) is plain min-max; more candidates cost nothing at decode.

    >>> QuantFormat(k_bits=2, v_bits=4).tile
    512
    """

    k_bits: int = 2
    v_bits: int = 2
    group: int = 32
    scales: str = "bfloat16"
    shrinks: tuple[float, ...] = (1.0, 0.9, 0.8, 0.7)

    def __post_init__(self):
        for name, bits in (("k_bits", self.k_bits), ("v_bits", self.v_bits)):
            if not isinstance(bits, numbers.Integral) or bits not in (2, 4, 8):
                raise ValueError(f"{name} is 2, 4 or 8, got {bits!r}")
        if not isinstance(self.group, int) or self.group < 8 or self.group % 8:
            raise ValueError(f"group is a positive multiple of 8 tokens, got {self.group!r}")
        if self.scales not in SCALE_DTYPES:
            raise ValueError(f"scales is one of {SCALE_DTYPES}, got {self.scales!r}")
        fine = lambda shrink: isinstance(shrink, int | float) and 0.0 < shrink <= 1.0
        if (not isinstance(self.shrinks, tuple) or not self.shrinks
                or not all(map(fine, self.shrinks))):
            raise ValueError("shrinks is a tuple of numbers in (0, 1], at least one, "
                             f"got {self.shrinks!r}")

    @property
    def tile(self) -> int:
        """Tokens in one whole tile of both keys and values; capacities are multiples of it."""
        return 32 // min(self.k_bits, self.v_bits) * self.group

    @property
    def exact(self) -> bool:
        """float32 scales are the conformance setting: division is then correctly rounded."""
        return self.scales == "float32"

    def channels(self, head_dim: int) -> int:
        """Channels that share a value scale."""
        return math.gcd(self.group, head_dim)


class PackedKV(NamedTuple):
    """Codes and scales of B rows, K kv heads and S tokens (S a multiple of `QuantFormat.tile`)."""

    k_words: jax.Array  # int32 [B, K, S * k_bits / 32, H]
    k_scale: jax.Array  # [B, K, S / group, H]
    k_min: jax.Array
    v_words: jax.Array  # int32 [B, K, S * v_bits / 32, H]
    v_scale: jax.Array  # [B, K, H / channels, S]
    v_min: jax.Array
    k_center: jax.Array | None = None  # float32 [B, K, H], with 8-bit scales only


def init_packed(batch: int, kv_heads: int, capacity: int, head_dim: int,
                fmt: QuantFormat, many: int = 1) -> PackedKV:
    """Empty codes for `capacity` tokens a row, rounded up to whole tiles.

    `many` kv heads lie side by side (`pallas_kernels.lanes`).

    >>> init_packed(1, 2, 600, 64, QuantFormat()).k_words.shape
    (1, 2, 64, 64)
    """
    size = -(-capacity // fmt.tile) * fmt.tile
    dtype = jnp.dtype(fmt.scales)
    lead, across = (batch, kv_heads // many), many * head_dim
    k_scale = jnp.zeros((*lead, size // fmt.group, across), dtype)
    v_scale = jnp.zeros((*lead, across // fmt.channels(head_dim), size), dtype)
    words = [jnp.zeros((*lead, size * bits // 32, across), jnp.int32)
             for bits in (fmt.k_bits, fmt.v_bits)]
    center = jnp.zeros((*lead, across), jnp.float32) if fmt.scales == "int8" else None
    return PackedKV(words[0], k_scale, k_scale, words[1], v_scale, v_scale, center)


def pack_words(codes: jax.Array, bits: int, group: int) -> jax.Array:
    """int32 codes [..., S, H] to planar words [..., S * bits / 32, H]; S is whole tiles.

    >>> bool((unpack_words(pack_words(jnp.ones((128, 4), jnp.int32), 8, 32), 8, 32) == 1).all())
    True
    """
    slots = 32 // bits
    *lead, size, head_dim = codes.shape
    tiles = codes.reshape(*lead, size // (slots * group), slots, group, head_dim)
    shift = (bits * jnp.arange(slots, dtype=jnp.int32))[:, None, None]
    words = jnp.sum(tiles << shift, axis=-3, dtype=jnp.int32)  # slots are disjoint: a sum is an OR
    return words.reshape(*lead, size // slots, head_dim)


def unpack_words(words: jax.Array, bits: int, group: int) -> jax.Array:
    """Inverse of `pack_words`."""
    slots = 32 // bits
    *lead, rows, head_dim = words.shape
    tiles = words.reshape(*lead, rows // group, 1, group, head_dim)
    shift = (bits * jnp.arange(slots, dtype=jnp.int32))[:, None, None]
    return ((tiles >> shift) & (2**bits - 1)).reshape(*lead, rows * slots, head_dim)


def decode_scales(scale: jax.Array, minimum: jax.Array, center=0.0) -> tuple[jax.Array, jax.Array]:
    """Stored scales and minima as float32; inside kernels too."""
    if scale.dtype != jnp.int8:
        return scale.astype(jnp.float32), minimum.astype(jnp.float32)
    step = jnp.exp2(scale.astype(jnp.float32) * (1 / _OCTAVE))
    return step, center + minimum.astype(jnp.float32) * (step * (1 / _MIN_UNIT))


def encode_scales(low: jax.Array, high: jax.Array, bits: int, dtype: str, center=0.0,
                  exact: bool = False) -> tuple[jax.Array, jax.Array]:
    """The narrowest storable grid of 2^bits points that covers [low, high].

    Rounding is outward (the minimum down, the scale up), so storing scales in few bits widens the
    grid a little and never cuts values off. In float32 this is plain min-max.
    """
    steps = float(2**bits - 1)
    if dtype == "int8":
        need = jnp.maximum((high - low) / (steps - 1 / _MIN_UNIT),
                           jnp.abs(low - center) * (_MIN_UNIT / 127))
        code = jnp.ceil(_OCTAVE * jnp.log2(jnp.maximum(need, 2.0**-16)))
        code = jnp.clip(code, -128, 127)
        unit = jnp.exp2(code * (1 / _OCTAVE)) * (1 / _MIN_UNIT)
        units = (low - center) / unit
        nearest = jnp.where(high > low, jnp.floor(units), jnp.round(units))
        minimum = jnp.clip(nearest, -128, 127)
        return code.astype(jnp.int8), minimum.astype(jnp.int8)
    relative, absolute = _HALF_ULP.get(dtype, (0.0, 0.0))
    minimum = (low - jnp.maximum(jnp.abs(low) * relative, absolute)).astype(dtype)
    scale = _divide(high - minimum.astype(jnp.float32), steps, exact)
    scale = (scale + jnp.maximum(scale * relative, absolute)).astype(dtype)
    return jnp.where(scale > 0, scale, jnp.ones_like(scale)), minimum  # a constant group: code 0


class Grid(NamedTuple):
    """A quantised group: codes and what they mean."""

    codes: jax.Array  # int32, the shape of x
    scale: jax.Array  # as stored, x's shape with 1 on the grouped axis
    minimum: jax.Array
    value: jax.Array  # float32, what is read back


def quantise(x: jax.Array, axis: int, bits: int, scales: str = "float32",
             shrinks: tuple[float, ...] = (1.0,), center=0.0, exact: bool = False) -> Grid:
    """Quantises float32 x with one scale along `axis`.

    Of the grids `shrink * [min, max]` about the middle, keeps the one of least squared error.
    `exact` asks for correctly rounded division (so that ties fall as in the method's reference).

    >>> quantise(jnp.array([0.0, 1.0, 2.0, 3.0]), 0, 2).codes.tolist()
    [0, 1, 2, 3]
    """
    along = lambda reduce, y: reduce(y, axis=axis, keepdims=True)
    return quantise_by(along, x, bits, scales, shrinks, center, exact)


def quantise_by(along: Callable[[Callable, jax.Array], jax.Array], x: jax.Array, bits: int,
                scales: str, shrinks: tuple[float, ...], center=0.0, exact: bool = False) -> Grid:
    """`quantise` with any grouping: `along(jnp.min | jnp.max | jnp.sum, y)` reduces each group."""
    low, high = along(jnp.min, x), along(jnp.max, x)

    def attempt(shrink: float) -> tuple[Grid, jax.Array]:
        cut = (high - low) * ((1.0 - shrink) / 2) if shrink < 1.0 else 0.0
        stored = encode_scales(low + cut, high - cut, bits, scales, center, exact)
        grid = _on_grid(x, *stored, bits, center, exact)
        return grid, along(jnp.sum, (grid.value - x) ** 2)

    tried = shrinks if bits < 8 else (1.0,)  # at 8 bits clipping never pays
    best, least = attempt(tried[0])
    for shrink in tried[1:]:
        grid, error = attempt(shrink)
        better = error < least
        best = Grid(*(jnp.where(better, new, old) for new, old in zip(grid, best, strict=True)))
        least = jnp.minimum(error, least)
    return best


def _divide(x, y, exact: bool) -> jax.Array:
    """x / y; XLA turns division by a broadcast into a product with 1/y, off by an ulp."""
    return x / (jax.lax.optimization_barrier(jnp.broadcast_to(y, x.shape)) if exact else y)


def _on_grid(x, scale, minimum, bits, center, exact) -> Grid:
    step, low = decode_scales(scale, minimum, center)
    codes = jnp.round(jnp.clip(_divide(x - low, step, exact), 0.0, float(2**bits - 1)))
    return Grid(codes.astype(jnp.int32), scale, minimum, codes * step + low)


@functools.partial(jax.jit, static_argnames="fmt")
def quantise_keys(k: jax.Array, fmt: QuantFormat, center: jax.Array | None = None) -> Grid:
    """Keys [..., S, H], one scale per channel and `group` tokens; scales [..., S/group, H].

    `center` [..., H] is the origin of 8-bit minima (`key_center`), otherwise unused.
    """
    *lead, size, head_dim = k.shape
    grouped = k.astype(jnp.float32).reshape(*lead, size // fmt.group, fmt.group, head_dim)
    origin = 0.0 if center is None else center[..., None, None, :]
    grid = quantise(grouped, -2, fmt.k_bits, fmt.scales, fmt.shrinks, origin,
                    fmt.exact)
    return Grid(grid.codes.reshape(k.shape), grid.scale[..., 0, :], grid.minimum[..., 0, :],
                grid.value.reshape(k.shape))


@functools.partial(jax.jit, static_argnames="fmt")
def quantise_values(v: jax.Array, fmt: QuantFormat) -> Grid:
    """Values [..., S, H], one scale per token and channel group; scales [..., C, S]."""
    *lead, size, head_dim = v.shape
    width = fmt.channels(head_dim)
    grouped = v.astype(jnp.float32).reshape(*lead, size, head_dim // width, width)
    grid = quantise(grouped, -1, fmt.v_bits, fmt.scales, fmt.shrinks, exact=fmt.exact)
    return Grid(grid.codes.reshape(v.shape), jnp.swapaxes(grid.scale[..., 0], -1, -2),
                jnp.swapaxes(grid.minimum[..., 0], -1, -2), grid.value.reshape(v.shape))


def key_center(k: jax.Array, valid: jax.Array) -> jax.Array:
    """Mean key of the valid tokens: k [B, K, T, H], valid [B, T] -> float32 [B, K, H]."""
    weight = valid.astype(jnp.float32)[:, None, :, None]
    total = jnp.sum(jnp.where(weight > 0, k.astype(jnp.float32), 0.0), axis=2)
    return total / jnp.maximum(jnp.sum(weight, axis=2), 1.0)


def pack(keys: Grid, values: Grid, capacity: int, fmt: QuantFormat,
         center: jax.Array | None = None) -> PackedKV:
    """Quantised keys and values [B, K, S, H] as words and scales for `capacity` tokens."""
    size = -(-capacity // fmt.tile) * fmt.tile
    have = keys.codes.shape[2]
    if have > size:
        raise ValueError(f"{have} tokens do not fit a capacity of {capacity}; raise the capacity")

    def to(x, axis, length):
        pad = [(0, 0)] * x.ndim
        pad[axis] = (0, length - x.shape[axis])
        return jnp.pad(x, pad)

    words = [pack_words(to(grid.codes, 2, size), bits, fmt.group)
             for grid, bits in ((keys, fmt.k_bits), (values, fmt.v_bits))]
    k_scales = [to(x, 2, size // fmt.group) for x in (keys.scale, keys.minimum)]
    v_scales = [to(x, 3, size) for x in (values.scale, values.minimum)]
    if fmt.scales == "int8" and center is None:
        center = jnp.zeros((*keys.codes.shape[:2], keys.codes.shape[3]), jnp.float32)
    return PackedKV(words[0], k_scales[0], k_scales[1], words[1], v_scales[0], v_scales[1],
                    center if fmt.scales == "int8" else None)
