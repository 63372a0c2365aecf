"""What a step costs and computes does not depend on the parts that its batch has."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxlm.core.count import count
from jaxlm.core.tree import flatten
from jaxlm.train import Ewc, Full, Lora, Osft
from jaxlm.train.step import TrainState, depends, lm_objective, tuned_step
from tests.train.osft_cases import CONFIG, MODEL

PARAMS = MODEL.init(jax.random.key(0))
TOKENS = jax.random.randint(jax.random.key(3), (8, 9), 0, CONFIG.vocab_size)
WEIGHTS = jax.random.uniform(jax.random.key(4), (8, 8))
BATCH = {"tokens": TOKENS, "weights": WEIGHTS}
SGD = optax.sgd(1.0)
TUNINGS = [Full(), Lora(rank=4), *(Osft(form) for form in ("update", "coordinates", "factored"))]


@functools.cache
def begun(tuning):
    """A state and what is frozen."""
    extra = {"batches": [BATCH]} if isinstance(tuning, Ewc) else {}
    trained, frozen = tuning.start(MODEL, PARAMS, jax.random.key(1), **extra)
    return TrainState(trained, tuning.wrap(SGD).init(trained), jnp.zeros((), jnp.int32)), frozen


def step_of(tuning, parts, dtype=jnp.float32):
    """One step, from the beginning, as a function of nothing."""
    state, frozen = begun(tuning)
    return lambda: tuned_step(lm_objective(MODEL), tuning, SGD, state, frozen, BATCH, parts=parts,
                              dtype=dtype)


@pytest.mark.parametrize("tuning", [*TUNINGS[1:], pytest.param(Ewc(), marks=pytest.mark.slow)],
                         ids=str)
def test_eight_parts_give_what_one_gives(tuning):
    (one, measured), (eight, again) = (jax.jit(step_of(tuning, parts))() for parts in (1, 8))
    chex.assert_trees_all_close(one.params, eight.params, atol=2e-6)
    chex.assert_trees_all_close(measured, again, rtol=1e-5, atol=1e-6)
    assert measured["grad_norm"] > 0


def test_parts_in_bfloat16_are_summed_in_float32():
    """Their sum is as near to the whole gradient as bfloat16 products let it be."""
    found = [jax.jit(step_of(Osft("coordinates"), parts, jnp.bfloat16))()[0].params
             for parts in (1, 8)]
    assert {x.dtype for x in jax.tree.leaves(found)} == {jnp.dtype("float32")}
    exact = jax.jit(step_of(Osft("coordinates"), 1))()[0].params
    gap = lambda tree: float(optax.tree.norm(optax.tree.sub(tree, exact)))
    moved = float(optax.tree.norm(optax.tree.sub(exact, begun(Osft("coordinates"))[0].params)))
    assert 0 < gap(found[0]) < 0.05 * moved and gap(found[1]) < 0.05 * moved


@pytest.mark.parametrize("tuning", TUNINGS, ids=str)
def test_eight_parts_cost_what_one_costs(tuning):
    """By the traced program; what a step adds to the model's work is not done for each part."""
    one, eight = (count(jax.make_jaxpr(step_of(tuning, parts))(), "cpu").flops
                  for parts in (1, 8))
    assert one == pytest.approx(eight, rel=0.02)
    state, frozen = begun(tuning)
    made = count(jax.make_jaxpr(tuning.materialise)(state.params, frozen), "cpu").flops
    dense = tuning in (Full(), Osft("update"))
    assert not made if dense else 7 * made > 0.05 * one  # eight times that would be seen


def test_a_frozen_matrix_gets_no_gradient():
    """Nor is one computed for it: an adapter on one projection of seven is cheaper."""
    tuning = Lora(rank=2, targets=("q",))
    state, frozen = begun(tuning)
    params = tuning.materialise(state.params, frozen)
    moves = depends(lambda x: tuning.materialise(x, frozen), state.params)
    named = flatten(jax.tree.unflatten(jax.tree.structure(params), moves))
    assert all(moved == path.endswith("q/kernel") for path, moved in named.items())
    small, full = (count(jax.make_jaxpr(step_of(one, 8))(), "cpu").flops
                   for one in (tuning, Full()))
    products = sum(2 * x.size for p, x in flatten(PARAMS).items()
                   if p.endswith("kernel") and not p.endswith("q/kernel"))
    tokens = 64
    assert small < full - 0.9 * products * tokens


def test_what_does_not_move_is_told_from_what_does():
    x, y = jnp.ones(3), jnp.ones(2)
    inner = jax.jit(lambda x, y: (x + 1, 2 * y))
    found = depends(lambda x: {"a": inner(x, y)[0], "b": y, "c": x, "d": 3.0, "e": y * 2}, x)
    assert found == [True, False, True, False, False]
    assert np.all(depends(lambda x: x, {"a": x, "b": y}))
