"""Methods by name: budgets they can share, what they tell as it is done, batches in turn."""

import math

import jax
import jax.numpy as jnp
import pytest

from jaxlm.core.errors import ConfigError
from jaxlm.search.methods import METHODS, Request, Solution, in_turn
from tests.search.test_lent_rows import LONG, PROMPTS
from tests.search.toy import REWARD, bundle

KEYS = jax.random.split(jax.random.key(3), len(PROMPTS))


@pytest.mark.parametrize(("name", "fits", "not_so"), [
    ("particle-filter", (1, 3, 16), (0,)), ("best-of-n", (1, 7), (0,)),
    ("beam", (1, 2, 3, 4, 8, 16), (0, 5, 6, 18)), ("dvts", (1, 4, 12), (0, 6)),
    ("particle-gibbs", (4, 6, 16), (0, 1, 2, 3, 5)),
    ("parallel-tempering", (8, 12, 16), (0, 4, 6, 10))])
def test_a_budget_is_checked_without_a_model(name, fits, not_so):
    for budget in fits:
        METHODS[name].check(budget)
    for budget in not_so:
        with pytest.raises(ConfigError):
            METHODS[name].check(budget)


def test_methods_without_a_queue_take_a_batch_after_another():
    asked, told = [], []

    def run(request, prompts, keys_R):
        asked.append((list(prompts), list(request.questions), request.at_once, len(keys_R)))
        return [Solution(text, text, 0.5, math.nan, (), 1, ()) for text in prompts]

    request = Request(bundle(), at_once=2, questions=("A", "B", "C"),
                      on_solution=lambda number, one: told.append((number, one.text, len(asked))))
    found = in_turn(run)(request, ["a", "b", "c"], jnp.arange(3))
    assert [one.text for one in found] == ["a", "b", "c"]
    assert asked == [(["a", "b"], ["A", "B"], None, 2), (["c"], ["C"], None, 1)]
    assert told == [(0, "a", 1), (1, "b", 1), (2, "c", 2)]  # before the next batch is begun


@pytest.mark.parametrize("name", [
    "particle-filter", pytest.param("best-of-n", marks=pytest.mark.slow),
    pytest.param("dvts", marks=pytest.mark.slow),
    pytest.param("particle-gibbs", marks=pytest.mark.slow),
    pytest.param("multi-temperature", marks=pytest.mark.slow)])
def test_a_queue_gives_what_all_at_once_do_and_tells_each(name):
    told = {}
    request = Request(bundle(), REWARD, 4, LONG, 1.0)
    whole = METHODS[name].run(request, PROMPTS, KEYS)
    queue = Request(bundle(), REWARD, 4, LONG, 1.0, at_once=2, on_solution=told.__setitem__)
    found = METHODS[name].run(queue, PROMPTS, KEYS)
    assert [one.text for one in found] == [one.text for one in whole]
    assert [told[i] for i in range(len(PROMPTS))] == found and len(told) == len(PROMPTS)
