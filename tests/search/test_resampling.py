"""Resampling by the compiler's own account: one layer's room, no collective, one prompt copy."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.cache.shared import SharedState, gather_cache
from jaxlm.core.mesh import make_mesh
from jaxlm.core.tree import nbytes
from jaxlm.decode.placement import state_shardings
from jaxlm.decode.rows import gather
from jaxlm.decode.state import layer_kinds
from jaxlm.decode.stop import Stop
from jaxlm.models.config import ModelConfig
from jaxlm.models.lm import LM
from jaxlm.search.base import Steps
from jaxlm.search.engine import StepStop, Tools, begin
from jaxlm.search.memory import estimate
from jaxlm.search.particles import filter_of
from tests.search.toy import SAMPLER

CONFIG = ModelConfig(vocab_size=16, dim=32, num_layers=5, num_heads=2, num_kv_heads=2, head_dim=32,
                     ffn_dim=16)
STEPS = Steps(tokens=8, max_steps=4, max_new_tokens=256)
COLLECTIVE = r"all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter"


def shapes(cache, prompts, particles, width=32):
    """A population before its first step, as shapes."""
    lm = LM(CONFIG)
    method = filter_of("odds", 1.0, 0.5, "systematic")
    tools = Tools(lm.shapes(), SAMPLER, StepStop(Stop(), np.int32(8)), method)
    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), prompts))
    ints = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.int32)
    return jax.eval_shape(
        lambda tools, tokens, lengths, keys: begin(
            lm, STEPS, tools, tokens, lengths, layer_kinds(lm, cache), keys, particles),
        tools, ints(prompts, width), ints(prompts), keys)


@pytest.mark.parametrize(("cache", "by_prompt"), [
    ("dense", False), ("kivi2", False), ("dense", True)])
def test_resampling_needs_the_room_of_one_layer(cache, by_prompt):
    """Or, where prompts move one after another, of one prompt's part of it."""
    rows = shapes(cache, 4, 16).rows
    layer = max(nbytes(part.own) for part in rows.caches)
    ancestors = jax.ShapeDtypeStruct((4, 16), jnp.int32)
    when = jax.ShapeDtypeStruct((4,), bool) if by_prompt else None
    compiled = jax.jit(gather, donate_argnums=0).lower(rows, ancestors, when).compile()
    memory = compiled.memory_analysis()
    assert memory.alias_size_in_bytes > 0.99 * nbytes(rows.caches)  # in place
    assert memory.temp_size_in_bytes < 1.25 * layer * (0.5 if by_prompt else 1)


def test_prompts_that_move_one_after_another_move_as_together():
    key = jax.random.key(0)
    numbers = lambda leaf: jax.random.uniform(key, leaf.shape).astype(leaf.dtype)
    state = jax.tree.map(numbers, shapes("dense", 4, 16).rows.caches[0].own)
    ancestors = jnp.tile(jnp.arange(16), (4, 1)).at[1].set(3).at[3, ::2].set(5)
    moves = (ancestors != jnp.arange(16)).any(1)
    assert moves.tolist() == [False, True, False, True]
    together, apart = (gather_cache(state, ancestors, when) for when in (moves.any(), moves))
    jax.tree.map(np.testing.assert_array_equal, apart, together)


def test_resampling_prompts_on_eight_devices_has_no_collective():
    mesh = make_mesh(data=8)
    rows = shapes("dense", 8, 4).rows
    places = state_shardings(rows, CONFIG.num_kv_heads, mesh)
    placed = jax.tree.map(lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where),
                          rows, places)
    where = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    ancestors = jax.ShapeDtypeStruct((8, 4), jnp.int32, sharding=where)
    text = jax.jit(gather).lower(placed, ancestors).compile().as_text()
    assert not re.findall(COLLECTIVE, text)

    def flat(rows, ancestors):  # the power check: an index over all rows
        index = (ancestors + 4 * jnp.arange(8)[:, None]).reshape(-1)
        return jax.tree.map(lambda x: x[index], rows.caches[0].own)

    assert re.findall(COLLECTIVE, jax.jit(flat).lower(placed, ancestors).compile().as_text())


def test_the_prompt_is_stored_once_and_the_estimate_says_so():
    few, many = (shapes("dense", 2, particles).rows for particles in (1, 16))
    assert all(isinstance(part, SharedState) for part in many.caches)
    prompt = lambda rows: sum(nbytes(part.prompt) for part in rows.caches)
    assert prompt(many) == prompt(few)
    found = estimate(LM(CONFIG), LM(CONFIG).shapes(), layer_kinds(LM(CONFIG), "dense"), 2, 32, 16,
                     STEPS.max_new_tokens)
    assert found.prompts == prompt(many)
    assert found.suffixes == sum(nbytes(part.own) for part in many.caches)
    assert found.layer * CONFIG.num_layers == found.suffixes
