"""Perplexity consistency against its definition; the Weibull mixture against known ones."""

import math

import numpy as np
import pytest

from jaxlm.core.errors import ShapeError
from jaxlm.search.perplexity import (
    fit_mixture,
    fit_weibull,
    kept_texts,
    perplexity_consistency,
    rpc,
)
from jaxlm.search.select import rollouts, self_consistency


def weibull(rng, k, scale, count):
    return scale * rng.weibull(k, count)


def test_a_text_drawn_twice_counts_once():
    found = rollouts(["a", "a", "a", "b"], ["1", "1", "1", "2"],
                     logprobs=np.log([0.2, 0.2, 0.2, 0.3]))
    choice = perplexity_consistency(found)
    assert choice.index == 3 and self_consistency(found).index == 0
    np.testing.assert_allclose(np.exp(choice.scores_P), [0.2, 0.2, 0.2, 0.3])


def test_tiny_probabilities_do_not_vanish():
    found = rollouts(list("abc"), ["1", "2", "2"], logprobs=[-900.0, -900.5, -900.6])
    assert perplexity_consistency(found).index == 1
    assert found.answers[rpc(found).index] == "2"


def test_the_estimate_converges_faster_than_counting():
    """All k texts of an answer seen once give its probability exactly."""
    rng = np.random.default_rng(0)
    p = np.array([0.2] * 3 + [0.1] * 4)  # three texts say 1, four say 2
    runs, n = 300, 30
    errors = []
    for _ in range(runs):
        rows = rng.choice(7, n, p=p)
        found = rollouts([str(i) for i in rows], ["1" if i < 3 else "2" for i in rows],
                         logprobs=np.log(p[rows]))
        by_text = np.exp(perplexity_consistency(found).scores_P[np.argmax(rows < 3)])
        errors.append([(by_text - 0.6) ** 2, ((rows < 3).mean() - 0.6) ** 2])
    text, count = np.mean(errors, 0)
    assert abs(count - 0.24 / n) < 0.3 * 0.24 / n and text < count / 10


@pytest.mark.parametrize(("k", "scale"), [(0.7, 1e-20), (1.0, 0.3), (4.0, 2.0)])
def test_one_weibull_is_recovered(k, scale):
    logs = np.log(weibull(np.random.default_rng(1), k, scale, 20_000))
    found, log_scale = fit_weibull(logs, np.ones(len(logs)))
    assert abs(found / k - 1) < 0.03 and abs(log_scale - math.log(scale)) < 0.05 / k
    gradient = np.mean(np.exp(found * (logs - log_scale)))  # 1 where d loglik / d scale is 0
    assert abs(gradient - 1) < 1e-6


@pytest.mark.parametrize("scale", [1.0, 1e-30])
def test_a_known_mixture_is_recovered(scale):
    rng = np.random.default_rng(2)
    values = np.concatenate([weibull(rng, 1.5, 0.02 * scale, 6000), weibull(rng, 4.0, scale, 4000)])
    found = fit_mixture(np.log(values))
    np.testing.assert_allclose(found.weights, [0.6, 0.4], atol=0.02)
    np.testing.assert_allclose(found.shapes, [1.5, 4.0], rtol=0.05)
    np.testing.assert_allclose(found.log_scales, np.log([0.02 * scale, scale]), atol=0.05)
    high = found.high(np.log(values))
    assert high[:6000].mean() < 0.03 and high[6000:].mean() > 0.95
    truth = 0.6 * np.exp(-6), 0.4  # and the likelihood is no lower than the truth's
    k, l, w = (1.5, 4.0), np.log([0.02 * scale, scale]), (0.6, 0.4)
    y = np.log(values)
    parts = [math.log(w[i] * k[i]) + k[i] * (y - l[i]) - np.exp(k[i] * (y - l[i])) for i in (0, 1)]
    assert found.loglik >= np.logaddexp(*parts).sum() and truth[1] == w[1]


def test_pruning_drops_the_unlikely_and_never_the_likely():
    rng = np.random.default_rng(3)
    values = weibull(rng, 2.0, 1e-12, 30), weibull(rng, 3.0, 0.02, 10)
    logs = np.log(np.concatenate(values))
    found = rollouts([f"t{i}" for i in range(40)], ["wrong"] * 30 + ["right"] * 10, logprobs=logs)
    kept = kept_texts(found)
    assert not kept[:30].any() and kept[30:].all()
    assert found.answers[rpc(found).index] == "right"
    assert found.answers[self_consistency(found).index] == "wrong"
    mean = np.exp(logs).mean()
    assert kept[np.exp(logs) > mean].all()


@pytest.mark.parametrize("logs", [[-1.0], [-2.0] * 9, [-1.0, -2.0, -3.0], [-5.0, -math.inf, -1.0]])
def test_too_few_values_are_all_kept(logs):
    found = rollouts([str(i) for i in range(len(logs))], ["1"] * len(logs), logprobs=logs)
    assert (kept_texts(found) == np.isfinite(logs)).all() and rpc(found).index >= 0


def test_a_mixture_of_nothing_is_refused():
    with pytest.raises(ShapeError, match="distinct"):
        fit_mixture(np.array([-1.0, -1.0, -2.0]))
    with pytest.raises(ShapeError, match="finite"):
        fit_mixture(np.array([-1.0, -np.inf, -2.0, -3.0, -4.0]))
