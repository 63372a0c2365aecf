"""Selection by the model's own probabilities: perplexity consistency, and pruned, RPC.

Everything stays in logarithms: a text of a hundred tokens has a probability of e^-60. For the same
reason the Weibull densities of probabilities p are fitted as densities of log p.
Source: arXiv 2502.00511.
"""

import math
from dataclasses import dataclass

import numpy as np

from jaxlm.core.errors import ShapeError
from jaxlm.search.select import Choice, Rollouts, choose, log_by_class

SHAPES = (1e-2, 1e2)  # of a Weibull; a cluster of equal values would have none
FEWEST = 4  # distinct probabilities below which no mixture is fitted


def distinct(drawn: Rollouts) -> np.ndarray:
    """bool (P,): the first rollout of every text."""
    first = {text: i for i, text in reversed(list(enumerate(drawn.texts)))}
    return np.array([first[text] == i for i, text in enumerate(drawn.texts)])


def perplexity_consistency(drawn: Rollouts) -> Choice:
    """`argmax_y sum_{texts t, each once} 1[g(t) = y] p(t)`, p(t) a text's own probability.

    Its error falls exponentially with the number of rollouts, that of counting as 1 / n.
    Source: arXiv 2502.00511, section 3.2.
    """
    logs = np.where(distinct(drawn), drawn.logprobs_P, -np.inf)
    return choose(drawn, log_by_class(drawn, logs), drawn.logprobs_P)


def rpc(drawn: Rollouts) -> Choice:
    """Perplexity consistency without the texts that reasoning pruning drops.

    A mixture of two Weibulls is fitted to the probabilities of this question's texts; dropped is a
    text that the higher part claims with less than 1/2, unless it is likelier than the mean.
    Source: arXiv 2502.00511, section 3.3.
    """
    logs = np.where(kept_texts(drawn), drawn.logprobs_P, -np.inf)
    return choose(drawn, log_by_class(drawn, logs), logs)


def kept_texts(drawn: Rollouts) -> np.ndarray:
    """bool (P,): distinct texts with an answer that pruning keeps; all of too few."""
    able = distinct(drawn) & (drawn.classes_P >= 0) & np.isfinite(drawn.logprobs_P)
    logs = drawn.logprobs_P[able]
    if len(np.unique(logs)) < FEWEST:
        return able
    top = logs.max()
    mean = top + math.log(np.exp(logs - top).mean())
    keep = (fit_mixture(logs).high(logs) >= 0.5) | (logs > mean)
    out = able.copy()
    out[able] = keep
    return out


@dataclass(frozen=True)
class Mixture:
    """`f = w1 Weibull(k1, l1) + w2 Weibull(k2, l2)`, the higher mean last.

    weights, shapes, log_scales: (2,). loglik: of the fitted log p.
    """

    weights: np.ndarray
    shapes: np.ndarray
    log_scales: np.ndarray
    loglik: float

    def log_parts(self, logs_n: np.ndarray) -> np.ndarray:
        """(2, n): the log density of log p in each part, weighted."""
        z = self.shapes[:, None] * (logs_n - self.log_scales[:, None])
        return np.log(self.weights * self.shapes)[:, None] + z - np.exp(z.clip(max=500))

    def high(self, logs_n: np.ndarray) -> np.ndarray:
        """(n,): the probability that a value belongs to the higher part."""
        parts = self.log_parts(logs_n)
        return np.exp(parts[1] - np.logaddexp(*parts))


def fit_mixture(logs_n: np.ndarray, rounds: int = 500, tolerance: float = 1e-9) -> Mixture:
    """Maximum likelihood by EM from a split at each quartile; the best of the three.

    Args: logs_n: log p, at least 4 of them distinct.
    Raises: ShapeError for fewer, or for values that are not finite.
    """
    logs = np.sort(np.asarray(logs_n, float))
    if not np.isfinite(logs).all() or len(np.unique(logs)) < FEWEST:
        raise ShapeError(f"got {len(logs)} log-probabilities; expected at least {FEWEST} distinct "
                         "finite ones")
    fits = [_em(logs, share, rounds, tolerance) for share in (0.25, 0.5, 0.75)]
    best = max(fits, key=lambda fit: fit.loglik)
    means = [scale + math.lgamma(1 + 1 / k)
             for k, scale in zip(best.shapes, best.log_scales, strict=True)]
    order = np.argsort(means)
    return Mixture(best.weights[order], best.shapes[order], best.log_scales[order], best.loglik)


def _em(logs: np.ndarray, share: float, rounds: int, tolerance: float) -> Mixture:
    """EM from the lowest `share` of the values as one part."""
    cut = min(max(int(share * len(logs)), 1), len(logs) - 1)
    low = np.where(np.arange(len(logs)) < cut, 0.9, 0.1)
    duty, before = np.stack([low, 1 - low]), -np.inf
    for _ in range(rounds):
        found = [fit_weibull(logs, part) for part in duty]
        weights = duty.sum(1).clip(1e-12) / len(logs)
        shapes, scales = map(np.array, zip(*found, strict=True))
        made = Mixture(weights, shapes, scales, loglik=0.0)
        parts = made.log_parts(logs)
        total = np.logaddexp(*parts)
        duty, loglik = np.exp(parts - total), float(total.sum())
        if abs(loglik - before) <= tolerance * len(logs):
            break
        before = loglik
    return Mixture(made.weights, made.shapes, made.log_scales, loglik)


def fit_weibull(logs_n: np.ndarray, weights_n: np.ndarray) -> tuple[float, float]:
    """Shape k and log scale of a Weibull by weighted maximum likelihood, of values given as logs.

    k solves `sum r p^k log p / sum r p^k - 1/k = sum r log p / sum r`, whose left side increases;
    then `l^k = sum r p^k / sum r`.
    """
    r = weights_n / weights_n.sum().clip(1e-300)
    mean, top = float(r @ logs_n), float(logs_n.max())
    y = logs_n - top

    def slope(k: float) -> float:
        tilted = r * np.exp(k * y)
        return float(tilted @ logs_n / max(tilted.sum(), 1e-300)) - 1 / k - mean

    low, high = map(math.log, SHAPES)
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if slope(math.exp(middle)) < 0 else (low, middle)
    k = math.exp((low + high) / 2)
    return k, top + math.log(max(float(r @ np.exp(k * y)), 1e-300)) / k
