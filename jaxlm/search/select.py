"""Methods that only select: many answers are drawn first, and one of them is chosen.

All take the same `Rollouts`, so that one set of draws serves every method. An answer that could
not be read is never chosen while another one could. Ties go to the first drawn. What only the
answers' probabilities decide stands in `perplexity.py`.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from jaxlm.core.errors import ConfigError, ShapeError, whole
from jaxlm.rewards.answers import Same, classes, same


@dataclass(frozen=True)
class Rollouts:
    """P independent answers to one prompt.

    texts: what was written. answers: the final answer of each, None where there is none.
    classes_P: int, alike for equal answers, -1 without one. logprobs_P: float64, of the whole
    text. lengths_P: int, tokens. rewards_P: float, NaN where there is no number; it never wins.
    temperatures_P: float, what each was drawn at.
    """

    texts: tuple[str, ...]
    answers: tuple[str | None, ...]
    classes_P: np.ndarray
    logprobs_P: np.ndarray
    lengths_P: np.ndarray
    rewards_P: np.ndarray
    temperatures_P: np.ndarray

    def take(self, index: Sequence[int] | np.ndarray | slice) -> "Rollouts":
        """Some of them, in the order given."""
        at = np.arange(len(self.texts))[index]
        pick = lambda many: tuple(many[i] for i in at)
        return Rollouts(pick(self.texts), pick(self.answers), self.classes_P[at],
                        self.logprobs_P[at], self.lengths_P[at], self.rewards_P[at],
                        self.temperatures_P[at])


def rollouts(
    texts: Sequence[str], answers: Sequence[str | None], *, equal: Same = same,
    logprobs: Sequence[float] | None = None, lengths: Sequence[int] | None = None,
    rewards: Sequence[float] | None = None, temperatures: Sequence[float] | None = None,
) -> Rollouts:
    """Rollouts from parallel sequences; what is not given is 0, rewards are NaN, as are infinite
    ones.

    Raises: ShapeError without a rollout, or for sequences of different lengths.

    >>> rollouts(["a", "b"], ["1", "1.0"]).classes_P.tolist()
    [0, 0]
    """
    count = len(texts)
    given = {"answers": answers, "logprobs": logprobs, "lengths": lengths, "rewards": rewards,
             "temperatures": temperatures}
    wrong = {name: len(value) for name, value in given.items()
             if value is not None and len(value) != count}
    if not count or wrong:
        raise ShapeError(f"got {count} texts and {wrong or 'nothing else'}; expected at least one "
                         "text and as many of each")
    numbers = lambda value, fill: np.array([fill] * count if value is None else value, float)
    scores = numbers(rewards, math.nan)
    return Rollouts(tuple(texts), tuple(answers), classes(answers, equal), numbers(logprobs, 0),
                    numbers(lengths, 0).astype(int), np.where(np.isfinite(scores), scores, np.nan),
                    numbers(temperatures, 0))


@dataclass(frozen=True)
class Choice:
    """index: the rollout chosen. scores_P: float, what each rollout's answer got; -inf for one
    without. used: how many rollouts were looked at."""

    index: int
    scores_P: np.ndarray
    used: int


def best_of_n(drawn: Rollouts) -> Choice:
    """`argmax_i r_i`. Source: arXiv 2502.01618, section 4."""
    return choose(drawn, np.where(np.isnan(drawn.rewards_P), -np.inf, drawn.rewards_P))


def weighted_best_of_n(drawn: Rollouts) -> Choice:
    """`argmax_y sum_i r_i 1[y_i = y]`; of the class that wins, its best rollout.

    Source: arXiv 2206.02336; search-and-learn has it for process rewards.
    """
    rewards = np.nan_to_num(drawn.rewards_P, nan=0.0)
    return choose(drawn, by_class(drawn, rewards), rewards)


def self_consistency(drawn: Rollouts, confidence: float | None = None) -> Choice:
    """`argmax_y sum_i 1[y_i = y]`, the vote of the majority.

    With a `confidence`, rollouts are looked at one after another until `settled` says that more of
    them would not change the winner: `used` is then how many a caller who draws in turn had needed.
    Source: arXiv 2203.11171; the stop, arXiv 2305.11860.

    >>> self_consistency(rollouts(list("abc"), ["1", "2", "2"])).index
    1
    """
    used = len(drawn.texts)
    if confidence is not None:
        counts = np.zeros(used, int)
        for i, found in enumerate(drawn.classes_P):
            counts[found] += found >= 0
            if settled(counts.tolist(), confidence):
                used = i + 1
                break
    seen = drawn.take(slice(used))
    return choose(seen, by_class(seen, np.ones(used)))


def settled(counts: Sequence[int], confidence: float = 0.95) -> bool:
    """Whether the leading answer leads the second surely enough.

    `1 - I_{1/2}(v1 + 1, v2 + 1) >= confidence`, v1 and v2 the two largest counts: the posterior
    probability, under a uniform prior, that the first is the likelier of the two. For whole counts
    it is `P(Binomial(v1 + v2 + 1, 1/2) <= v1)`, an exact sum.
    Raises: ConfigError for a confidence outside (0, 1).

    >>> settled([4, 0]), settled([3, 0])
    (True, False)
    """
    if not 0 < confidence < 1:
        raise ConfigError(f"confidence is {confidence}; expected between 0 and 1")
    first, second = sorted([*counts, 0, 0])[:-3:-1]
    n = first + second + 1
    return bool(sum(math.comb(n, k) for k in range(first + 1)) >= confidence * 2**n)


def multi_temperature_vote(drawn: Rollouts) -> Choice:
    """`argmax_y mean_T p_T(y)`, p_T the share of the rollouts at temperature T that answer y.

    Every temperature has the same say, however many rollouts it has. Source: arXiv 2510.02611.
    """
    weight = np.zeros(len(drawn.texts))
    kinds = np.unique(drawn.temperatures_P)
    for temperature in kinds:
        here = drawn.temperatures_P == temperature
        weight[here] = 1.0 / (len(kinds) * here.sum())
    return choose(drawn, by_class(drawn, weight))


def agreed(drawn: Rollouts, within: float, across: float) -> bool:
    """Whether a caller who draws in turn may stop: at every temperature the majority has a share of
    at least `within`, and a share of at least `across` of the temperatures have the same majority.

    Source: arXiv 2510.02611, whose values of the two are not given here.
    """
    winners = []
    for temperature in np.unique(drawn.temperatures_P):
        found = drawn.classes_P[drawn.temperatures_P == temperature]
        counts = np.bincount(found[found >= 0], minlength=1)
        if counts.max() < within * len(found) or not counts.any():
            return False
        winners.append(int(counts.argmax()))
    return bool(np.bincount(winners).max() >= across * len(winners))


def calibrated(rewards_P: np.ndarray, reference_K: np.ndarray) -> np.ndarray:
    """`C_i = P(r < r_i) + P(r = r_i) / 2` over reference rewards: rank, uniform under their law.

    NaN stays NaN; NaN among the references is left out.
    Raises: ShapeError without a reference.
    Source: arXiv 2412.19792, section 4.

    >>> calibrated(np.array([0.2, 0.9]), np.array([0.1, 0.2, 0.2, 0.5])).tolist()
    [0.5, 1.0]
    """
    ordered = np.sort(reference_K[~np.isnan(reference_K)])
    if not len(ordered):
        raise ShapeError("got no reference rewards that are numbers; expected at least one")
    low, high = (np.searchsorted(ordered, rewards_P, side) for side in ("left", "right"))
    return np.where(np.isnan(rewards_P), np.nan, (low + high) / (2 * len(ordered)))


def transformed(calibrated_P: np.ndarray, t: float) -> np.ndarray:
    """`log |Phi_t(C)| = t C`, of `Phi_t(u) = sign(t) e^(t u)`: t of about 10 for best-of-n, -10 for
    worst-of-n. Source: arXiv 2412.19792, section 5."""
    if not math.isfinite(t) or t == 0:
        raise ConfigError(f"t is {t}; expected a finite number other than 0")
    return t * calibrated_P


def calibrated_best_of_n(
    drawn: Rollouts, reference_K: np.ndarray | None = None, t: float = 10.0
) -> Choice:
    """`argmax_y sum_i e^(t C_i) 1[y_i = y]`: a vote by calibrated and transformed rewards.

    It does not change when rewards go through any increasing function; with large t it is
    best-of-n, near 0 the majority. Without references the rollouts are their own.
    Raises: ConfigError for t that is not above 0: Phi is negative then, and the answer that few
      gave would win.
    """
    if not t > 0:
        raise ConfigError(f"t is {t}; expected a number above 0: of weights below 0 the sum is no "
                          "vote")
    reference = drawn.rewards_P if reference_K is None else np.asarray(reference_K, float)
    if np.isnan(reference).all():
        return choose(drawn, np.full(len(drawn.texts), -np.inf))
    logs = transformed(calibrated(drawn.rewards_P, reference), t)
    logs = np.where(np.isnan(logs), -np.inf, logs)
    return choose(drawn, log_by_class(drawn, logs), logs)


def best_of_n_law(law_Y: np.ndarray, rewards_Y: np.ndarray, n: int) -> np.ndarray:
    """The exact law of best-of-n over texts that can be enumerated.

    `pi_N(y) = pi(y) / pi(r = r_y) (P(r <= r_y)^n - P(r < r_y)^n)`, ties by lot; where no two
    rewards are equal and each text is rare, `n C^(n-1) pi`. Its divergence from pi is at most
    `log n - (n - 1) / n`. Source: arXiv 2401.01879.

    >>> best_of_n_law(np.array([0.5, 0.5]), np.array([0.0, 1.0]), 2).tolist()
    [0.25, 0.75]
    """
    n = whole("n", n)
    _, level = np.unique(rewards_Y, return_inverse=True)
    mass = np.bincount(level.reshape(-1), law_Y)
    up_to = np.cumsum(mass)
    won = up_to**n - (up_to - mass)**n
    return law_Y * np.divide(won, mass, out=np.zeros_like(mass), where=mass > 0)[level.reshape(-1)]


def by_class(drawn: Rollouts, weights_P: np.ndarray) -> np.ndarray:
    """The sum of the weights of all rollouts with the same answer, for each."""
    answered = drawn.classes_P >= 0
    sums = np.bincount(drawn.classes_P[answered], weights_P[answered], minlength=1)
    return np.where(answered, sums[drawn.classes_P.clip(0)], -np.inf)


def log_by_class(drawn: Rollouts, logs_P: np.ndarray) -> np.ndarray:
    """`by_class` of weights given by their logarithms, in logarithms."""
    top = logs_P[drawn.classes_P >= 0].max(initial=-np.inf)
    if top == -np.inf:
        return np.full(len(logs_P), -np.inf)
    with np.errstate(divide="ignore"):
        return np.log(by_class(drawn, np.exp(logs_P - top)).clip(0)) + top


def choose(
    drawn: Rollouts, scores_P: np.ndarray, within_P: np.ndarray | None = None
) -> Choice:
    """The rollout of the best score, the best by `within_P` of equals, then the first."""
    able = (drawn.classes_P >= 0) | (drawn.classes_P < 0).all()
    scores = np.where(able, scores_P, -np.inf)
    best = np.flatnonzero((scores == scores.max()) & able)
    index = best[0] if within_P is None else best[np.argmax(within_P[best])]
    return Choice(int(index), scores, len(drawn.texts))
