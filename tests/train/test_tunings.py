"""LoRA, O-LoRA and EWC against independent arithmetic."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.core.errors import ConfigError
from jaxlm.core.tree import flatten, unflatten
from jaxlm.models.stack import stack, unstack
from jaxlm.train import Ewc, Lora, OLora
from jaxlm.train.ewc import fisher
from jaxlm.train.step import lm_objective
from tests.tiny import model

Q, O = "layers_1/attn/q/kernel", "layers_0/attn/o/kernel"


def random_like(tree, seed):
    keys = jax.random.split(jax.random.key(seed), len(jax.tree.leaves(tree)))
    return jax.tree.unflatten(jax.tree.structure(tree), [
        jax.random.normal(k, x.shape) for k, x in zip(keys, jax.tree.leaves(tree), strict=True)])


@pytest.mark.parametrize("stacked", [False, True])
def test_lora_is_its_formula_and_merged_it_is_the_same_model(stacked):
    lm, params = model()
    tuning = Lora(rank=3, alpha=6.0)
    given = stack(params, lm.config) if stacked else params
    trained, frozen = tuning.start(lm, given, jax.random.key(0))
    fresh = tuning.materialise(trained, frozen)
    jax.tree.map(np.testing.assert_array_equal, fresh, given)  # b is zero
    trained = random_like(trained, 1)
    merged = tuning.materialise(trained, frozen)
    merged = unstack(merged) if stacked else merged
    factors = flatten(unstack(trained) if stacked else trained)
    for path, shape in ((Q, (16, 32)), (O, (32, 16))):
        w = np.asarray(flatten(params)[path], np.float64).reshape(shape)
        a, b = (np.asarray(factors[f"{path}/{x}"], np.float64) for x in "ab")
        wanted = w + 6.0 / 3 * a @ b
        np.testing.assert_allclose(flatten(merged)[path].reshape(shape), wanted, atol=1e-5)
        x = np.random.default_rng(0).normal(size=(5, shape[0]))
        apart = x @ w + 2.0 * (x @ a) @ b  # the adapter beside its matrix
        np.testing.assert_allclose(x @ flatten(merged)[path].reshape(shape), apart, atol=1e-4)
    untouched = [p for p in flatten(params) if not p.endswith("kernel")]
    for path in untouched:
        np.testing.assert_array_equal(flatten(merged)[path], flatten(params)[path])


def test_olora_avoids_the_inputs_of_every_earlier_task():
    lm, params = model()
    tuning = OLora(rank=2, weight=0.3)
    first = tuning.start(lm, params, jax.random.key(0))
    assert float(tuning.penalty(*first)) == 0
    second = tuning.start(lm, params, jax.random.key(1), previous=first)
    third = tuning.start(lm, params, jax.random.key(2), previous=second)
    names = [p for p in flatten(first[0]) if p.endswith("/a")]
    wanted = sum(np.abs(np.asarray(flatten(old)[p]).T @ np.asarray(flatten(third[0])[p])).sum()
                 for old in (first[0], second[0]) for p in names)
    np.testing.assert_allclose(tuning.penalty(*third), 0.3 * wanted, rtol=1e-5)
    np.testing.assert_allclose(tuning.metrics(*third)["overlap"], wanted, rtol=1e-5)
    tuning.axes(*third)  # a name for every leaf
    # adapters whose inputs are orthogonal cost nothing
    apart = {p: jnp.eye(*x.shape) if p.endswith("/a") else x for p, x in flatten(third[0]).items()}
    held = {p[:-2]: jnp.eye(*apart[p].shape, k=-2) for p in names}
    frozen = {"base": params, "earlier": unflatten(held)}
    assert float(tuning.penalty(unflatten(apart), frozen)) == 0


def test_fisher_is_the_mean_of_each_samples_squared_gradient():
    lm, params = model()
    tokens = jax.random.randint(jax.random.key(0), (4, 7), 0, 258)
    weights = jnp.ones((4, 6)).at[1, 3:].set(0).at[3].set(0)  # the last is padding
    found = fisher(lm_objective(lm), params, [{"tokens": tokens[:2], "weights": weights[:2]},
                                              {"tokens": tokens[2:], "weights": weights[2:]}])

    def log_likelihood(params, i):
        logits = lm.apply(params, tokens[i:i + 1, :-1]).logits[0]
        picked = jax.nn.log_softmax(logits)[jnp.arange(6), tokens[i, 1:]]
        return (picked * weights[i]).sum()

    each = [jax.grad(log_likelihood)(params, i) for i in range(3)]
    wanted = jax.tree.map(lambda *g: sum(np.square(x) for x in g) / 3, *each)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-3, atol=1e-5),
                 found, wanted)
    averaged = jax.tree.map(lambda *g: np.square(sum(g) / 3), *each)  # what it is often taken for
    gap = lambda tree: sum(float(np.abs(x - y).sum()) for x, y in zip(
        jax.tree.leaves(found), jax.tree.leaves(tree), strict=True))
    assert gap(averaged) > 100 * gap(wanted)


def test_ewc_ties_parameters_by_their_fisher_and_adds_tasks_up():
    lm, params = model()
    tokens = jax.random.randint(jax.random.key(0), (2, 7), 0, 258)
    tuning = Ewc(weight=3.0, decay=0.5)
    with pytest.raises(ConfigError, match="data.calibration"):
        tuning.start(lm, params, jax.random.key(0))
    trained, frozen = tuning.start(lm, params, None, batches=[{"tokens": tokens}])
    assert float(tuning.penalty(trained, frozen)) == 0
    moved = jax.tree.map(lambda x, d: x + 0.1 * d, trained, random_like(trained, 3))
    parts = jax.tree.map(
        lambda f, now, then: (np.asarray(f, np.float64) * np.square(now - then)).sum(),
        frozen["fisher"], moved, trained)
    wanted = sum(jax.tree.leaves(parts))
    np.testing.assert_allclose(tuning.penalty(moved, frozen), 1.5 * wanted, rtol=1e-4)
    _, later = tuning.start(lm, moved, None, batches=[], previous=(moved, frozen))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, 0.5 * np.asarray(b)),
                 later["fisher"], frozen["fisher"])
    jax.tree.map(np.testing.assert_array_equal, later["anchor"], moved)
