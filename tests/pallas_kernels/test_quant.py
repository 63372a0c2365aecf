"""The scalar quantiser, scale storage and the planar word layout."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels import quant
from pallas_kernels.quant import QuantFormat

PLAIN = QuantFormat(scales="float32", shrinks=(1.0,))


def minmax_numpy(x, axis, bits):
    """Independent reference: float32 min-max, clamp, then round half to even."""
    low, high = x.min(axis, keepdims=True), x.max(axis, keepdims=True)
    scale = (high - low) / np.float32(2**bits - 1)
    scale = np.where(scale > 0, scale, np.float32(1))
    codes = np.rint(np.clip((x - low) / scale, 0, 2**bits - 1))
    return codes.astype(np.int32), scale, low


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("group", [8, 32])
def test_planar_words_hold_each_code_in_its_slot(bits, group):
    slots = 32 // bits
    codes = np.random.default_rng(0).integers(0, 2**bits, (2, 2 * slots * group, 5))
    words = np.asarray(quant.pack_words(jnp.asarray(codes, jnp.int32), bits, group))
    assert words.shape == (2, 2 * group, 5)
    for tile in range(2):
        for slot in range(slots):
            for row in (0, group - 1):
                token = (tile * slots + slot) * group + row
                word = words[:, tile * group + row].view(np.uint32)
                got = (word >> np.uint32(bits * slot)) & np.uint32(2**bits - 1)
                np.testing.assert_array_equal(got, codes[:, token])
    np.testing.assert_array_equal(quant.unpack_words(jnp.asarray(words), bits, group), codes)


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("head_dim", [24, 64, 96])
def test_keys_and_values_equal_an_independent_minmax(bits, head_dim):
    rng = np.random.default_rng(bits)
    x = rng.standard_normal((2, 3, 64, head_dim)).astype(np.float16).astype(np.float32)
    fmt = QuantFormat(bits, bits, scales="float32", shrinks=(1.0,))
    codes, scale, low = minmax_numpy(x.reshape(2, 3, 2, 32, head_dim), -2, bits)
    keys = quant.quantise_keys(jnp.asarray(x), fmt)
    np.testing.assert_array_equal(keys.codes, codes.reshape(x.shape))
    np.testing.assert_array_equal(keys.scale, scale[..., 0, :])
    np.testing.assert_array_equal(keys.minimum, low[..., 0, :])
    width = fmt.channels(head_dim)
    codes, scale, low = minmax_numpy(x.reshape(2, 3, 64, -1, width), -1, bits)
    values = quant.quantise_values(jnp.asarray(x), fmt)
    np.testing.assert_array_equal(values.codes, codes.reshape(x.shape))
    np.testing.assert_array_equal(values.scale, np.swapaxes(scale[..., 0], -1, -2))
    np.testing.assert_array_equal(values.minimum, np.swapaxes(low[..., 0], -1, -2))


@pytest.mark.parametrize("scales", quant.SCALE_DTYPES)
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_stored_grids_cover_their_group(scales, bits):
    """Rounding of scales is outward: nothing is cut off, whatever the offset of the group."""
    rng = np.random.default_rng(1)
    offset = np.array([0.0, 0.3, -20.0, 100.0, 1e-3], np.float32)[:, None]
    spread = np.array([1.0, 0.01, 3.0, 0.5, 1e-3], np.float32)[:, None]
    x = offset + spread * rng.standard_normal((5, 32)).astype(np.float32)
    stored = quant.encode_scales(jnp.asarray(x.min(1)), jnp.asarray(x.max(1)), bits, scales)
    step, low = map(np.asarray, quant.decode_scales(*stored))
    tol = 1e-6 * np.abs(x).max(1)
    assert (low <= x.min(1) + tol).all()
    assert (low + step * (2**bits - 1) >= x.max(1) - tol).all()
    if scales != "int8":  # and not much wider than it must be
        width = (x.max(1) - x.min(1)) + np.abs(x).max(1) * 2.0**-6
        assert (step * (2**bits - 1) <= width * 1.02 + 1e-6).all()
    grid = quant.quantise(jnp.asarray(x), 1, bits, scales)
    assert (np.abs(grid.value - x) <= 0.501 * step[:, None] + tol[:, None]).all()


def test_eight_bit_scales_cost_little_for_centred_groups():
    x = jnp.asarray(np.random.default_rng(2).standard_normal((64, 256, 64)), jnp.float32)
    for shrinks, most in (((1.0,), 1.2), (QuantFormat().shrinks, 1.1)):
        error = {}
        for scales in ("float32", "int8"):
            fmt = QuantFormat(scales=scales, shrinks=shrinks)
            error[scales] = float(jnp.mean((quant.quantise_keys(x, fmt).value - x) ** 2))
        assert error["float32"] < error["int8"] < most * error["float32"]


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("scales", ["float32", "bfloat16", "float16"])
def test_a_constant_group_is_read_back(bits, scales):
    for constant in (0.0, float(np.float32(-3.1415927)), 77.0):
        grid = quant.quantise(jnp.full((32,), constant), 0, bits, scales)
        np.testing.assert_allclose(grid.value, constant, rtol=0 if scales == "float32" else 2e-4)


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("center", [0.0, 1.7])
def test_eight_bit_scales_lose_little_of_a_constant_group(bits, center):
    """The bound that `QuantFormat` states, and that it is no slack one."""
    constant = np.concatenate([np.geomspace(1e-8, 1e4, 4001), [0.0]]).astype(np.float32)
    constant = np.concatenate([constant, -constant])[:, None]
    grid = quant.quantise(jnp.asarray(np.repeat(constant, 8, 1)), 1, bits, "int8", center=center)
    lost, away = np.abs(np.asarray(grid.value) - constant), np.abs(constant - center)
    assert (lost <= away / 230 + 2.0**-20 + 1e-6 * (np.abs(constant) + center)).all()
    assert (lost > away / 300)[away[:, 0] > 1e-3].any()
    assert not np.ptp(np.asarray(grid.codes), 1).any()


def test_shrinking_never_loses_squared_error_and_usually_wins():
    x = jnp.asarray(np.random.default_rng(3).standard_normal((500, 32)), jnp.float32)
    wide = jnp.sum((quant.quantise(x, 1, 2).value - x) ** 2, 1)
    best = jnp.sum((quant.quantise(x, 1, 2, shrinks=(1.0, 0.9, 0.8, 0.7)).value - x) ** 2, 1)
    assert bool((best <= wide).all())
    assert float(best.sum() / wide.sum()) < 0.8  # a shrink that did nothing would give 1.0


def test_packing_round_trip_through_a_capacity():
    fmt = QuantFormat(2, 4)
    x = jnp.asarray(np.random.default_rng(4).standard_normal((2, 2, 96, 64)), jnp.float32)
    keys, values = quant.quantise_keys(x, fmt), quant.quantise_values(x, fmt)
    packed = quant.pack(keys, values, 600, fmt)
    empty = quant.init_packed(2, 2, 600, 64, fmt)
    assert jax.tree.map(jnp.shape, packed) == jax.tree.map(jnp.shape, empty)
    assert jax.tree.map(lambda a: a.dtype, packed) == jax.tree.map(lambda a: a.dtype, empty)
    got = quant.unpack_words(packed.k_words, 2, fmt.group)[:, :, :96]
    np.testing.assert_array_equal(got, keys.codes)
    got = quant.unpack_words(packed.v_words, 4, fmt.group)[:, :, :96]
    np.testing.assert_array_equal(got, values.codes)
    with pytest.raises(ValueError, match="96 tokens do not fit"):
        quant.pack(keys, values, 0, fmt)


@settings(max_examples=40, deadline=None)
@given(bits=st.integers(-2, 40), group=st.integers(-40, 70), scales=st.sampled_from(["int8", "i4"]))
def test_bad_formats_are_refused_before_compute(bits, group, scales):
    good = bits in (2, 4, 8) and group > 0 and group % 8 == 0 and scales == "int8"
    if good:
        assert QuantFormat(bits, bits, group, scales).tile == 32 // bits * group
    else:
        with pytest.raises(ValueError, match="got"):
            QuantFormat(bits, bits, group, scales)


def test_formats_hash_by_value():
    assert hash(QuantFormat(2, 4)) == hash(QuantFormat(2, 4)) and QuantFormat(2) != QuantFormat(4)
