"""A stacked tree computes what the plain one does, and comes back bit for bit."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.core.errors import ConfigError
from jaxlm.models.config import LayerPlan, ModelConfig
from jaxlm.models.lm import LM
from jaxlm.models.stack import period, split, stack, stack_axes, unstack

BASE = dict(vocab_size=31, dim=16, num_heads=4, num_kv_heads=2, head_dim=8, ffn_dim=24)
UNIFORM = ModelConfig(num_layers=4, **BASE)
PATTERN = ModelConfig(num_layers=5, windows=(3, None, 3, None, 3), **BASE)
TOKENS = jax.random.randint(jax.random.key(1), (2, 12), 0, 31)


@pytest.mark.parametrize(("config", "expected"), [(UNIFORM, (4, 1)), (PATTERN, (2, 2))])
def test_the_pattern_is_found(config, expected):
    assert split(config) == expected


def test_a_plan_is_part_of_the_pattern():
    plan = (LayerPlan(attention_scale=0.5), LayerPlan()) * 2
    assert period(UNIFORM, plan) == 2


@pytest.mark.parametrize("config", [UNIFORM, PATTERN])
@pytest.mark.parametrize("remat", [False, True])
def test_stacked_equals_unrolled(config, remat):
    lm = LM(config, remat=remat)
    params = lm.init(jax.random.key(0))
    stacked = stack(params, config)
    loss = lambda tree: lm.logprobs(tree, TOKENS[:, :-1], TOKENS[:, 1:], chunk=7).mean()
    plain, stacked_loss = jax.value_and_grad(loss)(params), jax.value_and_grad(loss)(stacked)
    np.testing.assert_allclose(stacked_loss[0], plain[0], rtol=1e-6)
    back = unstack(stacked_loss[1])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-6), back, plain[1])


def test_unstack_is_the_inverse():
    params = LM(PATTERN).init(jax.random.key(0))
    back = unstack(stack(params, PATTERN))
    assert jax.tree.structure(back) == jax.tree.structure(params)
    jax.tree.map(np.testing.assert_array_equal, back, params)


def test_axes_follow_the_stack():
    lm = LM(PATTERN)
    axes = stack_axes(lm.axes(), PATTERN)
    stacked = stack(lm.init(jax.random.key(0)), PATTERN)
    assert axes["stack"]["layers_1"]["attn"]["q"]["kernel"][0] == "layers"
    is_names = lambda x: isinstance(x, tuple)
    jax.tree.map(
        lambda names, leaf: np.testing.assert_equal(len(names), jnp.ndim(leaf)),
        axes, stacked, is_leaf=is_names,
    )


def test_a_stacked_tree_gives_no_taps():
    lm = LM(UNIFORM)
    stacked = stack(lm.init(jax.random.key(0)), UNIFORM)
    with pytest.raises(ConfigError, match="unstack"):
        lm.apply(stacked, TOKENS, want=("taps",))
