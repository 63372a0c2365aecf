"""The plain definition: unpack everything, put the new codes where they go, pack again."""

import jax.numpy as jnp

from pallas_kernels.lanes import keys_beside, values_beside
from pallas_kernels.quant import PackedKV, pack_words, quantise_keys, quantise_values, unpack_words
from pallas_kernels.squat import quantise_keys_squat


def quantised(packed, k, v, comp, fmt, block, guard):
    """The new group as two grids, their heads as `packed` has them."""
    center, many = packed.k_center, k.shape[1] // packed.k_words.shape[1]
    center = center if center is None else center.reshape(*k.shape[:2], k.shape[3])
    if comp is None:
        keys = quantise_keys(k, fmt, center)
    else:
        keys = quantise_keys_squat(k, comp, fmt, block, guard, center)
    return keys_beside(keys, many), values_beside(quantise_values(v, fmt), many)


def flush(packed, k, v, lengths, ready, comp, *, fmt, block, guard, interpret=False):
    """One group of tokens a row; see `api.quant_flush`."""
    del interpret
    keys, values = quantised(packed, k, v, comp, fmt, block, guard)
    size = packed.v_scale.shape[3]
    place = jnp.arange(size) - lengths[:, None]  # index into the new group
    inside = (place >= 0) & (place < fmt.group) & ready[:, None]
    place = jnp.clip(place, 0, fmt.group - 1)

    def words(old, new, bits):
        codes = unpack_words(old, bits, fmt.group)
        taken = jnp.take_along_axis(new, place[:, None, :, None], axis=2)
        return pack_words(jnp.where(inside[:, None, :, None], taken, codes), bits, fmt.group)

    groups = jnp.arange(size // fmt.group) == (lengths // fmt.group)[:, None]
    groups = (groups & ready[:, None])[:, None, :, None]
    across = lambda new: jnp.take_along_axis(new, place[:, None, None, :], axis=3)
    tokens = inside[:, None, None, :]
    return PackedKV(
        words(packed.k_words, keys.codes, fmt.k_bits),
        jnp.where(groups, keys.scale, packed.k_scale),
        jnp.where(groups, keys.minimum, packed.k_min),
        words(packed.v_words, values.codes, fmt.v_bits),
        jnp.where(tokens, across(values.scale), packed.v_scale),
        jnp.where(tokens, across(values.minimum), packed.v_min), packed.k_center)
