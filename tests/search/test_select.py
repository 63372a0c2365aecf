"""Methods that only select, against numpy by hand and against enumerated laws."""

import math
from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxlm.core.errors import ConfigError, ShapeError
from jaxlm.search import select
from jaxlm.search.perplexity import perplexity_consistency, rpc
from jaxlm.search.select import rollouts

METHODS = [select.best_of_n, select.weighted_best_of_n, select.self_consistency,
           select.multi_temperature_vote, select.calibrated_best_of_n, perplexity_consistency, rpc]
NAN = math.nan


def drawn(answers, rewards=None, **more):
    return rollouts([f"text {i}" for i in range(len(answers))], answers, rewards=rewards, **more)


def test_each_method_by_hand():
    found = drawn(["1", "2", "2", "3", None], [0.6, 0.3, 0.4, 0.5, 0.9])
    assert select.best_of_n(found).index == 0
    choice = select.weighted_best_of_n(found)
    assert choice.index == 2 and np.allclose(choice.scores_P[:4], [0.6, 0.7, 0.7, 0.5])
    assert select.self_consistency(found).index == 1
    assert select.calibrated_best_of_n(found, t=1e3).index == 0
    assert select.calibrated_best_of_n(found, t=1e-3).index == 2


def test_an_infinite_reward_is_none():
    found = drawn(["1", "2", "3"], [0.6, math.inf, -math.inf])
    for method in (select.best_of_n, select.weighted_best_of_n, select.calibrated_best_of_n):
        assert method(found).index == 0


def test_temperatures_have_the_same_say():
    found = drawn(["1"] * 6 + ["2", "2"], temperatures=[0.5] * 6 + [0.9] * 2)
    assert np.allclose(select.multi_temperature_vote(found).scores_P, 0.5)
    more = drawn(["1"] * 6 + ["2", "2", "2"], temperatures=[0.5] * 4 + [0.9] * 5)
    by_hand = {"1": (1 + 2 / 5) / 2, "2": (3 / 5) / 2}
    assert np.allclose(select.multi_temperature_vote(more).scores_P[[0, 8]], list(by_hand.values()))
    assert select.agreed(found, 1.0, 0.5) and not select.agreed(found, 1.0, 0.9)
    assert not select.agreed(more, 0.9, 0.1)


@given(st.lists(st.tuples(st.sampled_from(["1", "2", "3", None]), st.one_of(
    st.just(NAN), st.floats(0, 1)), st.floats(-50, -0.1)), min_size=1, max_size=12))
@settings(max_examples=60, deadline=None)
def test_any_rollouts_give_a_choice_with_an_answer_where_there_is_one(rows):
    answers, rewards, logprobs = map(list, zip(*rows, strict=True))
    found = drawn(answers, rewards, logprobs=logprobs)
    for method in METHODS:
        index = method(found).index
        assert answers[index] is not None or not any(answers), method.__name__
    alone = [a for a, r in zip(answers, rewards, strict=True) if a and r == r]
    if alone:  # a NaN never wins against a number
        assert not math.isnan(rewards[select.best_of_n(found).index])


@pytest.mark.parametrize("method", METHODS, ids=lambda m: m.__name__)
def test_the_order_of_rollouts_does_not_change_the_answer(method):
    rng = np.random.default_rng(0)
    answers = [str(a) for a in rng.integers(0, 4, 21)]
    found = drawn(answers, rng.random(21), logprobs=np.log(rng.random(21)))
    order = rng.permutation(21)
    again = found.take(order)
    scores, moved = method(found), method(again)
    np.testing.assert_allclose(scores.scores_P[order], moved.scores_P, rtol=1e-9)


def posterior_by_quadrature(first, second):
    """P(p > 1/2) of Beta(first + 1, second + 1), by a fine sum."""
    p = (np.arange(200_000) + 0.5) / 200_000
    density = p**first * (1 - p)**second
    return density[p > 0.5].sum() / density.sum()


@pytest.mark.parametrize(("first", "second"), [(0, 0), (1, 0), (4, 0), (5, 2), (20, 9), (7, 7)])
def test_settled_is_the_posterior(first, second):
    exact = posterior_by_quadrature(first, second)
    for confidence in (exact - 1e-4, exact + 1e-4):
        assert select.settled([second, first, 0], confidence) is bool(confidence < exact)


def test_early_stopping_uses_fewer_and_keeps_a_clear_winner():
    found = drawn(["2"] + ["1"] * 30)
    choice = select.self_consistency(found, 0.95)
    assert choice.used < 12 and found.answers[choice.index] == "1"
    assert select.self_consistency(drawn(["1", "2"] * 8), 0.95).used == 16
    with pytest.raises(ConfigError, match="confidence"):
        select.self_consistency(found, 1.0)


def test_calibration_is_the_rank_whatever_the_scale():
    rng = np.random.default_rng(1)
    reference, rewards = rng.random(50).round(1), rng.random(20).round(1)
    by_hand = [np.mean(reference < r) + np.mean(reference == r) / 2 for r in rewards]
    np.testing.assert_allclose(select.calibrated(rewards, reference), by_hand)
    np.testing.assert_allclose(select.calibrated(np.exp(9 * rewards), np.exp(9 * reference)),
                               by_hand)
    assert np.isnan(select.calibrated(np.array([NAN]), reference)[0])
    assert (select.transformed(np.array([0.0, 1.0]), -10.0) == [0.0, -10.0]).all()
    for bad in (0.0, NAN):
        with pytest.raises(ConfigError):
            select.transformed(rewards, bad)
    for bad in (-10.0, 0.0, NAN):  # Phi is below 0: the sum would be least for the rarest
        with pytest.raises(ConfigError, match="above 0"):
            select.calibrated_best_of_n(drawn(["1", "2", "2"], [0.1, 0.5, 0.6]), t=bad)
    with pytest.raises(ShapeError):
        select.calibrated(rewards, np.array([NAN]))


@pytest.mark.parametrize("n", [1, 2, 3])
def test_the_law_of_best_of_n_by_enumeration(n):
    law, rewards = np.array([0.1, 0.4, 0.2, 0.3]), np.array([0.5, 0.1, 0.5, 0.9])
    exact = np.zeros(4)
    for rows in product(range(4), repeat=n):
        best = [i for i in rows if rewards[i] == max(rewards[list(rows)])]
        for i in best:  # the first of equals, averaged over orders: each as often
            exact[i] += np.prod(law[list(rows)]) / len(best)
    np.testing.assert_allclose(select.best_of_n_law(law, rewards, n), exact, atol=1e-12)


def test_best_of_n_draws_by_its_law_and_the_law_of_one_is_refused():
    rng = np.random.default_rng(2)
    law, rewards, n, runs = np.full(20, 0.05), rng.permutation(20) / 20, 4, 4000
    rows = rng.integers(0, 20, (runs, n))
    won = [r[select.best_of_n(drawn([str(y) for y in r], rewards[r])).index] for r in rows]
    found = np.bincount(won, minlength=20) / runs
    worst = lambda exact: np.abs((found - exact) / np.sqrt(exact * (1 - exact) / runs)).max()
    assert worst(select.best_of_n_law(law, rewards, n)) < 3.7  # Bonferroni at 1% over 20
    assert worst(law) > 10
    many = np.full(2000, 1 / 2000)
    dense, at = select.best_of_n_law(many, np.arange(2000.0), n), (np.arange(2000) + 0.5) / 2000
    np.testing.assert_allclose(dense, n * at ** (n - 1) * many, rtol=1e-2, atol=1e-8)
    divergence = float((dense * np.log(dense / many)).sum())
    assert abs(divergence - (math.log(n) - (n - 1) / n)) < 1e-2


def test_rollouts_that_do_not_fit_together_are_refused():
    with pytest.raises(ShapeError, match="at least one"):
        rollouts([], [])
    with pytest.raises(ShapeError, match="rewards"):
        drawn(["1", "2"], [0.5])
