"""How well a model does what the bundled one was taught: worked arithmetic, and recall.

Problems come from the test side of `jaxlm.eval.arithmetic` and `jaxlm.eval.recall`, never seen in
training, and are a function of the seed alone.
"""

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np

from jaxlm.cache.base import CacheKind
from jaxlm.cache.dense import Dense
from jaxlm.decode.generate import Generation, generate
from jaxlm.decode.samplers import Temperature
from jaxlm.decode.state import Kinds
from jaxlm.eval import arithmetic, recall
from jaxlm.hf.bundle import Bundle

ROOM = 160  # tokens of an arithmetic problem and its solution: one shape for all levels
ANSWER_TOKENS = 112
Tick = Callable[[], Any]  # called after each part of the work


@dataclass(frozen=True)
class Share:
    """A share of right answers and its standard error."""

    value: float
    error: float


def share(right: int, count: int) -> Share:
    """`right / count`, with the standard error at `(right + 2) / (count + 4)`.

    The shift keeps the error above zero when all or none are right (Agresti and Coull, 1998).

    >>> share(8, 8)
    Share(value=1.0, error=0.107...)
    """
    shifted = (right + 2) / (count + 4)
    return Share(right / count, math.sqrt(shifted * (1 - shifted) / (count + 4)))


def clustered(right_RP: np.ndarray) -> Share:
    """The mean over problems of several samples each; samples of one problem are not independent.

    So the standard error is that of the problems' means, but never below `share`'s.
    Args: right_RP: bool, problems by samples; at least 2 problems.
    """
    means = right_RP.mean(1)
    independent = share(int(right_RP.sum()), right_RP.size)
    error = max(float(means.std(ddof=1)) / math.sqrt(len(means)), independent.error)
    return Share(independent.value, error)


def any_of(right_RP: np.ndarray, count: int) -> Share:
    """The share of problems that at least one of `count` samples gets right, known as pass@count.

    The mean over problems of 1 - C(P - c, count) / C(P, count), with c of P samples right: the mean
    over all choices of `count` samples, so unbiased. The error is that of whole problems right or
    wrong, an upper bound.

    Args: right_RP: bool, problems by samples. count: 1 to P.
    Raises: ValueError: count out of range.
    Source: arXiv 2107.03374, section 2.1.

    >>> any_of(np.array([[True, False], [False, False]]), 2).value
    0.5
    """
    R, P = right_RP.shape
    if not 1 <= count <= P:
        raise ValueError(f"any_of takes 1 to {P} of the {P} samples, got count={count}")
    missed = sum(math.comb(P - int(c), count) for c in right_RP.sum(1)) / math.comb(P, count)
    return Share(1 - missed / R, share(round(R - missed), R).error)


@dataclass(frozen=True)
class Attempt:
    """One problem and one answer to it."""

    problem: arithmetic.Problem
    answer: Generation
    verdict: arithmetic.Verdict


@dataclass(frozen=True)
class ArithmeticResult:
    """One level: greedy, one sample, the most frequent answer of all samples, any sample right.

    `right_RP` says of every sample of every problem whether its answer is right.
    """

    level: str
    greedy: Share
    sampled: Share
    majority: Share
    any_of: Share
    steps: Share
    attempts: tuple[Attempt, ...]
    right_RP: np.ndarray = field(default_factory=lambda: np.zeros((0, 0), bool), compare=False)


def solve_arithmetic(
    bundle: Bundle, level: str, *, problems: int = 64, samples: int = 4,
    temperature: float = 0.8, seed: int = 0, cache: CacheKind | Kinds = Dense(),
    tick: Tick = lambda: None,
) -> ArithmeticResult:
    """Worked solutions of held-out problems: once greedily, then `samples` times at `temperature`.

    Args:
      level: a name in `arithmetic.LEVELS`.
      problems: at least 2. samples: at least 1.
      tick: called after each of the `1 + samples` rounds.
    Returns: ArithmeticResult; `attempts` are the greedy ones, `steps` counts their worked steps.
    """
    rng = np.random.default_rng([seed, list(arithmetic.LEVELS).index(level)])
    asked = [arithmetic.sample(rng, level, "test") for _ in range(problems)]
    rounds = []
    for number in range(1 + samples):
        answers = generate(
            bundle, [problem.prompt for problem in asked], max_new_tokens=ANSWER_TOKENS,
            sampler=Temperature(temperature if number else 0.0), max_len=ROOM, cache=cache,
            key=jax.random.fold_in(jax.random.key(seed), number),
        )
        rounds.append([Attempt(problem, answer, arithmetic.check_steps(problem, answer.text))
                       for problem, answer in zip(asked, answers, strict=True)])
        tick()
    greedy, sampled = rounds[0], list(zip(*rounds[1:], strict=True))
    right = np.array([[attempt.verdict.correct for attempt in row] for row in sampled])
    votes = [majority([final_answer(attempt.answer.text) for attempt in row]) for row in sampled]
    won = sum(vote == str(problem.answer) for vote, problem in zip(votes, asked, strict=True))
    steps = [step for attempt in greedy for step in attempt.verdict.steps]
    return ArithmeticResult(
        level, share(sum(attempt.verdict.correct for attempt in greedy), problems),
        clustered(right), share(won, problems), any_of(right, samples),
        share(sum(steps), max(len(steps), 1)), tuple(greedy), right,
    )


def final_answer(text: str) -> str | None:
    """What the answer line says; None without one.

    >>> final_answer("1+1=2\\nA:2\\n")
    '2'
    """
    lines = [line[2:] for line in text.split("\n") if line.startswith("A:")]
    return lines[0] if lines and lines[0].isdigit() else None


def majority(answers: list[str | None]) -> str | None:
    """The most frequent answer, the first of equals; None where nobody answered.

    >>> majority(["3", None, "4", "4"])
    '4'
    """
    counts = Counter(answer for answer in answers if answer is not None)
    return counts.most_common(1)[0][0] if counts else None


@dataclass(frozen=True)
class RecallResult:
    """One context length in tokens."""

    length: int
    accuracy: Share


def solve_recall(
    bundle: Bundle, length: int, *, documents: int = 16, seed: int = 0,
    cache: CacheKind | Kinds = Dense(), tick: Tick = lambda: None,
) -> RecallResult:
    """One query about each of several held-out documents of `length` tokens, answered greedily."""
    rng = np.random.default_rng([seed, length])
    asked = [recall.sample(rng, length, queries=1, split="test") for _ in range(documents)]
    answers = generate(bundle, [document.prompt(0) for document in asked], max_new_tokens=3,
                       sampler=Temperature(0.0), max_len=length + 3, cache=cache)
    right = sum(recall.check_answer(document, 0, answer.text)
                for document, answer in zip(asked, answers, strict=True))
    tick()
    return RecallResult(length, share(right, documents))
