"""Which answer is chosen: never one whose score is no number, nor one that cannot be read."""

import math

import jax
import numpy as np
import pytest

from jaxlm.rewards.base import Stateless
from jaxlm.search import methods
from jaxlm.search.base import Answer, SearchResult
from jaxlm.search.beam import beam_search, dvts
from jaxlm.search.gibbs import Chain
from jaxlm.search.methods import METHODS, Request, by_chains, by_search
from jaxlm.search.particles import particle_filter
from tests.search.toy import HOST, SAMPLER, STEPS, bundle

PROMPTS = [[0, 1, 1], [1], [2, 1]]
KEYS = jax.random.split(jax.random.key(3), len(PROMPTS))
OPTIONS = {"steps": STEPS, "sampler": SAMPLER, "key": KEYS}


def strange(bad, factor=1.0):
    """Scores of 0.2 to 0.8 by a factor, and `bad` in the second row of every prompt's four."""
    def score(rows):
        found = factor * HOST.function(rows)
        found[1::4] = bad
        return found

    return Stateless(score, on_device=False)


@pytest.mark.parametrize(("bad", "weight", "factor"), [
    (math.inf, "odds", 1.0), (math.inf, "prob", 1.0), (math.inf, "raw", 1.0), (1.5, "odds", 1.0),
    (1.5, "prob", 1.0), (math.nan, "raw", -1.0),
    (1.5, "prob", 0.0)])  # no other has a weight: all go on alike
def test_a_strange_score_is_never_the_best(bad, weight, factor):
    found = particle_filter(bundle(), PROMPTS, strange(bad, factor), particles=4, threshold=0.0,
                            weight=weight, **OPTIONS)
    for result in found:
        scores = [answer.score for answer in result.answers]
        assert scores.pop(1) == 0.0 and np.isfinite(scores).all() and result.flags == ("broken",)
        assert result.chosen != 1 and result.answers[result.chosen].score == max(scores)


@pytest.mark.parametrize("search", [beam_search, dvts])
def test_nor_does_a_beam_end_with_it(search):
    found = search(bundle(), PROMPTS, strange(math.inf), budget=4, width=2, **OPTIONS)
    for result in found:
        chosen, known = result.answers[result.chosen], [
            answer.score for answer in result.answers if answer.log_weight > -math.inf]
        assert 0.2 <= chosen.score == max(known) < 0.81 and result.flags == ("broken",)


@pytest.mark.parametrize("bad", [math.inf, 1.5, math.nan])
def test_nor_does_best_of_n_take_it(bad):
    request = Request(bundle(), strange(bad), 4, STEPS, 1.0, extract=lambda text: text,
                      equal=lambda one, other: one == other)
    prompts = [bundle().tokenizer.decode(prompt) for prompt in PROMPTS]
    for found in METHODS["best-of-n"].run(request, prompts, KEYS):
        assert 0.2 <= found.score < 0.81 and found.flags == ("broken",)


def result_of(*answers):
    """A search's result: (text, score, finish, log-weight) of each answer."""
    made = tuple(Answer(text, (0,), 0.0, score, weight, finish, (score,), (1,))
                 for text, score, finish, weight in answers)
    one = np.ones(1)
    return SearchResult("Q", made, int(np.argmax([answer.score for answer in made])), 0.0, one,
                        one > 0, one, one, 3, 1, 1.0)


@pytest.mark.parametrize(("answers", "wanted"), [
    ([("?", 0.9, "stop", 0.0), ("4", 0.5, "stop", 0.0), ("5", 0.6, "stop", 0.0)], "5"),
    ([("?", 0.4, "stop", 0.0), ("!", 0.9, "length", 0.0)], "!"),
    ([("4", 0.6, "length", 0.0), ("5", 0.6, "stop", 0.0), ("6", 0.6, "string", 0.0)], "5"),
    ([("4", 0.6, "length", 0.0), ("5", 0.5, "stop", 0.0)], "4"),
    ([("4", 0.9, "stop", -math.inf), ("5", 0.3, "stop", -1.0)], "5"),
    ([("?", 0.9, "stop", 0.0), ("5", 0.3, "stop", -math.inf)], "5")])
def test_a_method_answers_with_what_can_be_read(answers, wanted, monkeypatch):
    """The best score of those; of equals the first that came to its own end."""
    request = Request(None, particles=4, extract=lambda text: text if text.isdigit() else None)
    result = result_of(*answers)
    monkeypatch.setattr(methods, "particle_gibbs",
                        lambda *args, **options: [Chain((), result, math.nan, 9, (result,))])
    for run in (by_search(lambda *args, **options: [result]), by_chains()):
        assert [found.text for found in run(request, ["Q"], KEYS[:1])] == [wanted]
