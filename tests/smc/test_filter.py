"""The filter against enumeration: unbiased evidence, the right law, and a wrong rule refused."""

from collections import Counter
from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.smc.filter import init, run
from jaxlm.smc.weights import normalise
from tests.smc.toy import LENGTH, REWARD, exact, model, start

SEEDS, PARTICLES = 400, 16


@partial(jax.jit, static_argnames=("scheme",))
def sample(key, threshold, scheme="systematic", temper=1.0):
    """Evidence over many seeds, as problems of one program, and one draw from each last set."""
    state = init(start(SEEDS, PARTICLES), (SEEDS, PARTICLES))
    state, info = run(model(), key, state, LENGTH, threshold=threshold, scheme=scheme,
                      temper=temper)
    probs = normalise(state.log_weights_P).probs_P
    return state.log_evidence, probs, state.particles["text"], info


def z_score(log_evidence):
    """How many standard errors the mean evidence lies from the truth."""
    z = np.exp(np.asarray(log_evidence, np.float64))
    return (z.mean() - exact()[0]) / (z.std(ddof=1) / np.sqrt(len(z)))


def distance(evidence, probs, texts):
    """Total variation between the texts of all seeds, weighted by their evidence, and the truth.

    Weighted so, the estimate has no bias of order 1 / P.
    """
    law, found = exact()[1], Counter()
    share = np.asarray(normalise(evidence).probs_P)
    for seed, weights, rows in zip(share, np.asarray(probs), np.asarray(texts), strict=True):
        for weight, row in zip(weights, rows, strict=True):
            found[tuple(int(x) for x in row if x >= 0)] += float(seed * weight)
    return 0.5 * sum(abs(found[text] - law.get(text, 0.0)) for text in {*law, *found})


@pytest.mark.parametrize("scheme", ["multinomial", "stratified", "systematic", "residual"])
@pytest.mark.parametrize("threshold", [0.0, 0.7, 2.0])
def test_the_evidence_is_unbiased_and_the_law_right(scheme, threshold):
    evidence, probs, texts, _ = sample(jax.random.key(1), threshold, scheme)
    assert abs(z_score(evidence)) < 3.5  # Bonferroni at 1% over 14 such tests
    assert distance(evidence, probs, texts) < 0.05


@pytest.mark.parametrize("temper", [1.7, 4.0])
def test_tempered_resampling_keeps_the_target(temper):
    evidence, probs, texts, _ = sample(jax.random.key(2), 2.0, temper=temper)
    assert abs(z_score(evidence)) < 3.5
    assert distance(evidence, probs, texts) < 0.05


def test_tempering_that_forgets_is_refused():
    """The published rule has another target; the same test sees it."""
    state = init(start(SEEDS, PARTICLES), (SEEDS, PARTICLES))
    state, _ = run(model(), jax.random.key(2), state, LENGTH, threshold=2.0, temper=4.0,
                   forget=True)
    assert abs(z_score(state.log_evidence)) > 10


def test_a_sweep_of_thresholds_compiles_once():
    traced = chex.assert_max_traces(sample.__wrapped__, n=1)
    counted = jax.jit(traced, static_argnames="scheme")
    for threshold in (0.1, 0.5, 0.9):
        counted(jax.random.key(0), threshold)
    chex.clear_trace_counter()


def test_ended_particles_are_weighed_once():
    """The published rule weighs them again at every step; the same test refuses it."""
    wrong = model()._replace(ended=None)
    state = init(start(SEEDS, PARTICLES), (SEEDS, PARTICLES))
    state, _ = run(wrong, jax.random.key(3), state, LENGTH, threshold=2.0)
    assert abs(z_score(state.log_evidence)) > 10
    probs = normalise(state.log_weights_P).probs_P
    assert distance(state.log_evidence, probs, state.particles["text"]) > 0.15


def test_reweighing_the_ended_has_its_own_law():
    """`reweigh_ended` is the published rule: it refuses the truth, and has the law it says."""
    state = init(start(SEEDS, PARTICLES), (SEEDS, PARTICLES))
    state, _ = run(model(), jax.random.key(3), state, LENGTH, threshold=2.0, reweigh_ended=True)
    law = {text: p * REWARD[text[-1]] ** (LENGTH - len(text)) for text, p in exact()[1].items()}
    total = exact()[0] * sum(law.values())
    z = np.exp(np.asarray(state.log_evidence, np.float64))
    assert abs(z_score(state.log_evidence)) > 10
    assert abs(z.mean() - total) < 3.5 * z.std(ddof=1) / np.sqrt(SEEDS)


def test_info_counts_and_roots():
    _, _, _, info = sample(jax.random.key(4), 2.0)
    assert bool(info.resampled.all()) and info.ancestors_P.shape == (LENGTH, SEEDS, PARTICLES)
    assert bool((jnp.diff(info.unique_roots, axis=0) <= 0).all())
    never = sample(jax.random.key(4), 0.0)[3]
    assert not bool(never.resampled.any()) and bool((never.unique_roots == PARTICLES).all())


@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf, -jnp.inf])
def test_a_reward_that_is_no_number_is_flagged_and_harms_one_particle(bad):
    def log_weight(before, after, t):
        found = model().log_weight(before, after, t)
        return found.at[0, 0].set(jnp.where(t == 0, bad, found[0, 0]))

    broken = model()._replace(log_weight=log_weight)
    state = init(start(2, PARTICLES), (2, PARTICLES))
    state, _ = run(broken, jax.random.key(5), state, LENGTH, threshold=0.5)
    assert bool(jnp.isfinite(state.log_evidence).all())
    assert state.broken.tolist() == [bool(jnp.isnan(bad) | (bad > 0)), False]


def test_without_any_weight_particles_go_on_alike_and_the_evidence_is_zero():
    dead = model()._replace(log_weight=lambda before, after, t: jnp.full(
        after["last"].shape, -jnp.inf))
    state = init(start(3, PARTICLES), (3, PARTICLES))
    state, info = run(dead, jax.random.key(6), state, LENGTH)
    assert bool(state.broken.all()) and bool((state.log_evidence == -jnp.inf).all())
    np.testing.assert_array_equal(normalise(state.log_weights_P).probs_P, 1 / PARTICLES)
