"""Shares with their errors, judged on answers that are known in advance."""

import itertools
import math

import numpy as np
import pytest

from jaxlm.decode.generate import Generation
from jaxlm.eval import arithmetic, recall, skills
from jaxlm.hf.bundle import BUNDLED

SOLUTIONS = {
    p.prompt: p.solution
    for level in range(len(arithmetic.LEVELS))
    for rng in [np.random.default_rng([0, level])]
    for p in [arithmetic.sample(rng, list(arithmetic.LEVELS)[level], "test") for _ in range(40)]
}


def answers(monkeypatch, write):
    """Replace the model by `write(prompt, greedy) -> text`."""

    def generate(bundle, prompts, *, sampler, **_):
        greedy = sampler.temperature == 0
        return [Generation(p, write(p, greedy), (), np.zeros(0), "stop") for p in prompts]

    monkeypatch.setattr(skills, "generate", generate)


def test_error_of_a_share():
    found = skills.share(30, 100)
    assert found.value == 0.3
    assert found.error == pytest.approx(math.sqrt(0.3 * 0.7 / 100), rel=0.05)
    assert skills.share(0, 20).error == pytest.approx(skills.share(20, 20).error) != 0


def test_coverage_of_the_error():
    """Two errors either side hold the truth about 95% of the time, near the ends too."""
    rng = np.random.default_rng(0)
    for truth in (0.5, 0.05):
        counts = rng.binomial(64, truth, 2000)
        found = [skills.share(int(count), 64) for count in counts]
        held = np.mean([abs(s.value - truth) <= 2 * s.error for s in found])
        assert 0.92 < held < 0.995
        narrow = np.mean([abs(s.value - truth) <= s.error for s in found])
        assert narrow < 0.9  # the check sees an interval that is too narrow


def test_error_of_samples_of_the_same_problems():
    """Samples of a problem that agree count once: the error is the spread between problems."""
    rng = np.random.default_rng(1)
    same = np.repeat(rng.random((400, 1)) < 0.5, 8, 1)
    free = rng.random((400, 8)) < 0.5
    assert skills.clustered(same).error == pytest.approx(0.5 / math.sqrt(400), rel=0.1)
    assert skills.clustered(free).error == pytest.approx(0.5 / math.sqrt(3200), rel=0.1)


@pytest.mark.parametrize("level", arithmetic.LEVELS)
def test_right_answers_are_counted(monkeypatch, level):
    answers(monkeypatch, lambda prompt, greedy: SOLUTIONS[prompt])
    found = skills.solve_arithmetic(None, level, problems=8, samples=2)
    shares = (found.greedy, found.sampled, found.majority, found.any_of, found.steps)
    assert [s.value for s in shares] == [1] * 5


def test_wrong_answers_are_not(monkeypatch):
    answers(monkeypatch, lambda prompt, greedy: "1+1=3\nA:7777\n")
    found = skills.solve_arithmetic(None, "easy", problems=8, samples=2)
    shares = (found.greedy, found.sampled, found.majority, found.any_of, found.steps)
    assert [s.value for s in shares] == [0] * 5


def test_samples_are_judged_apart_from_the_greedy_answer(monkeypatch):
    """Right with chance 0.4 in samples, never greedily; wrong answers all differ."""
    rng = np.random.default_rng(2)

    def write(prompt, greedy):
        right = not greedy and rng.random() < 0.4
        return SOLUTIONS[prompt] if right else f"A:{rng.integers(10**6, 10**8)}\n"

    answers(monkeypatch, write)
    ticks: list = []
    found = skills.solve_arithmetic(
        None, "hard", problems=40, samples=6, tick=lambda: ticks.append(1)
    )
    assert found.greedy.value == 0 and len(ticks) == 7
    assert abs(found.sampled.value - 0.4) < 4 * found.sampled.error
    assert abs(found.any_of.value - (1 - 0.6**6)) < 4 * found.any_of.error
    assert found.sampled.value < found.majority.value <= found.any_of.value


def test_any_of_is_the_mean_over_all_choices():
    right = np.random.default_rng(4).random((5, 6)) < 0.3
    for count in range(1, 7):
        chosen = [right[:, list(some)].any(1) for some in itertools.combinations(range(6), count)]
        assert np.isclose(skills.any_of(right, count).value, np.mean(chosen))


@pytest.mark.parametrize("count", [0, 7])
def test_any_of_takes_no_more_than_there_are(count):
    with pytest.raises(ValueError, match=f"got count={count}"):
        skills.any_of(np.zeros((5, 6), bool), count)


def test_recall_counts_exact_values(monkeypatch):
    rng = np.random.default_rng([0, 64])
    documents = [recall.sample(rng, 64, 1, "test") for _ in range(8)]
    right = {d.prompt(0): d.answers[0] + "\n" for d in documents[:3]}
    answers(monkeypatch, lambda prompt, greedy: right.get(prompt, "x\n"))
    found = skills.solve_recall(None, 64, documents=8)
    assert found.accuracy.value == 3 / 8


@pytest.mark.skipif(not (BUNDLED["tiny"] / "model.safetensors").exists(),
                    reason=f"the bundled model is not here: no weights in {BUNDLED['tiny']}")
def test_same_seed_same_answers():
    from jaxlm.hf.bundle import load

    bundle = load("tiny")
    run = lambda seed: skills.solve_arithmetic(bundle, "easy", problems=4, samples=1, seed=seed)
    text = lambda result: [attempt.answer.text for attempt in result.attempts]
    first, second, other = run(0), run(0), run(1)
    assert text(first) == text(second) and first.sampled == second.sampled
    assert text(first) != text(other)
