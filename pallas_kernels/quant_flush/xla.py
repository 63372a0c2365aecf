"""Plain XLA: all rows are quantised together, then written by a loop of slice updates.

A row loop of `dynamic_update_slice` updates words in place on every compiler tried; a `vmap` of it
becomes a scatter that copies the codes.
"""

import jax
import jax.numpy as jnp

from pallas_kernels.quant import PackedKV
from pallas_kernels.quant_flush.reference import quantised


def flush(packed, k, v, lengths, ready, comp, *, fmt, block, guard, interpret=False):
    """One group of tokens a row; see `api.quant_flush`."""
    del interpret
    keys, values = quantised(packed, k, v, comp, fmt, block, guard)
    zero = jnp.int32(0)
    # XLA for CPU would widen a whole bfloat16 array to update a slice of it: move bits instead
    bits_of = lambda x: x if x.dtype != jnp.bfloat16 else jax.lax.bitcast_convert_type(x, jnp.int16)
    keys, values, state = jax.tree.map(bits_of, (keys, values, packed))

    def write_row(b, packed: PackedKV) -> PackedKV:
        token_group, on = lengths[b] // fmt.group, ready[b]

        def put(state, new, axis, start, merge=lambda old, new: new):
            at = [b, zero, zero, zero]
            at[axis] = start
            new = jax.lax.dynamic_slice_in_dim(new, b, 1, 0)
            old = jax.lax.dynamic_slice(state, at, new.shape)
            return jax.lax.dynamic_update_slice(state, jnp.where(on, merge(old, new), old), at)

        def words(state, codes, bits):
            tile, slot = token_group // (32 // bits), token_group % (32 // bits)
            hole = jnp.int32(2**bits - 1) << (bits * slot)
            merge = lambda old, new: (old & ~hole) | (new << (bits * slot))
            return put(state, codes, 2, tile * fmt.group, merge)

        return PackedKV(
            words(packed.k_words, keys.codes, fmt.k_bits),
            put(packed.k_scale, keys.scale, 2, token_group),
            put(packed.k_min, keys.minimum, 2, token_group),
            words(packed.v_words, values.codes, fmt.v_bits),
            put(packed.v_scale, values.scale, 3, lengths[b]),
            put(packed.v_min, values.minimum, 3, lengths[b]), packed.k_center)

    written = jax.lax.fori_loop(0, k.shape[0], write_row, state)
    return jax.tree.map(lambda x, like: x if x.dtype == like.dtype
                        else jax.lax.bitcast_convert_type(x, like.dtype), written, packed)
