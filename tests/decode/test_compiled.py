"""What the compiled decode loop holds and copies, read from the program itself."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.cache.dense import Dense, bounded, read_sizes
from jaxlm.core.tree import nbytes
from jaxlm.decode.samplers import Greedy
from jaxlm.decode.state import decode, prefill
from jaxlm.models.config import ModelConfig
from jaxlm.models.lm import LM

SMALL = LM(ModelConfig(vocab_size=32, dim=16, num_layers=2, num_heads=4, num_kv_heads=2,
                       head_dim=4, ffn_dim=24))
SLOTS = 1024


def compiled(batch: int):
    """The decode loop over a donated state, and that state's shapes."""
    state = jax.eval_shape(
        lambda params, keys: prefill(SMALL, params, Greedy(), jnp.ones((batch, 4), jnp.int32),
                                     jnp.full(batch, 4), Dense(), SLOTS, keys),
        SMALL.shapes(), jax.eval_shape(lambda: jax.random.split(jax.random.key(0), batch)),
    )
    loop = jax.jit(lambda params, state: decode(SMALL, params, Greedy(), state, max_new=9),
                   donate_argnums=1)
    return loop.lower(SMALL.shapes(), state).compile(), state


@pytest.mark.parametrize("batch", [1, 3])
def test_a_step_copies_no_cache(batch):
    program, state = compiled(batch)
    leaves = {",".join(map(str, x.shape)) for x in jax.tree.leaves(state.caches)}
    copies = re.findall(r"= f32\[([\d,]+)\]\S* copy\(", program.as_text())
    assert not leaves & set(copies)
    assert program.memory_analysis().temp_size_in_bytes < nbytes(state.caches)


def test_the_copy_check_sees_a_copy():
    x = jax.ShapeDtypeStruct((2, 3), jnp.float32)
    text = jax.jit(lambda x: (x, x + 1)).lower(x).compile().as_text()
    assert re.findall(r"= f32\[([\d,]+)\]\S* copy\(", text) == ["2,3"]


@pytest.mark.parametrize("slots", [1, 64, 85, 86, 208, 1000])
def test_a_bounded_read_holds_the_longest_row(slots):
    whole = lambda: jnp.asarray(slots)
    size = jax.jit(lambda n: bounded(lambda size: jnp.asarray(size), n, read_sizes(slots), whole))
    sizes = np.asarray([size(longest) for longest in range(1, slots + 1)])
    assert (sizes >= np.arange(1, slots + 1)).all() and sizes.max() == slots
    assert slots < 86 or sizes.min() == 64
