"""What many runs say together: rank correlations, a stopping rule, paired differences."""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import comb
from typing import Any

import numpy as np
from scipy import stats

from jaxlm.train import rank_runs

RESAMPLES = 10_000


@dataclass(frozen=True)
class Trace:
    """A run: each of its first steps' loss and gradient norm, all its steps, its final loss."""

    loss: Sequence[float]
    grad_norm: Sequence[float]
    steps: int
    final: float


def correlation(
    x: Sequence[float], y: Sequence[float], groups: Sequence[Any] = (),
    blocks: Sequence[Any] = (), seed: int = 0, resamples: int = RESAMPLES,
) -> dict[str, float]:
    """Spearman's rank correlation, its 95% bootstrap interval, and a two-sided permutation p.

    Args:
      groups: of each point; then it is the mean of the correlations within groups, and points are
        drawn and permuted within theirs. A group in which x or y does not vary counts 0.
      blocks: of each point; those of one block, within a group, are drawn and permuted together,
        in their order. For points that share their x and so are not independent.
    Returns: `rho`, `low`, `high`, `p`, at least 1 / (resamples + 1).
    Raises: ValueError: blocks of a group that differ in size.

    >>> correlation([1, 2, 3, 4, 5, 6], [1, 2, 3, 4, 6, 5], resamples=99)["rho"].__round__(3)
    0.943
    """
    a, b = np.asarray(x, float), np.asarray(y, float)
    names, together = [*groups] or [0] * len(a), [*blocks] or [*range(len(a))]
    members = [_blocks([i for i, n in enumerate(names) if n == name], together)
               for name in dict.fromkeys(names)]
    rng = np.random.default_rng(seed)
    rho = np.mean([spearman(a[m.ravel()], b[m.ravel()]) for m in members])
    drawn, mixed = np.zeros(resamples), np.zeros(resamples)
    for m in members:
        count = len(m)
        at = m[rng.integers(count, size=(resamples, count))].reshape(resamples, -1)
        drawn += spearman(a[at], b[at]) / len(members)
        order = rng.permuted(np.tile(np.arange(count), (resamples, 1)), axis=1)
        mixed += spearman(a[m.ravel()], b[m[order].reshape(resamples, -1)]) / len(members)
    low, high = np.quantile(drawn, [0.025, 0.975])
    extreme = (np.abs(mixed) >= abs(rho) - 1e-12).sum()
    return {"rho": float(rho), "low": float(low), "high": float(high),
            "p": float((extreme + 1) / (resamples + 1))}


def _blocks(points: list[int], of: Sequence[Any]) -> np.ndarray:
    """The points of each block, a row each."""
    found = [[i for i in points if of[i] == block]
             for block in dict.fromkeys(of[i] for i in points)]
    if len({len(row) for row in found}) > 1:
        raise ValueError(f"blocks of {sorted(len(row) for row in found)} points; expected as many "
                         "in each: leave out what is left over")
    return np.array(found)


def spearman(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Pearson's correlation of ranks, ties at their mean, along the last axis; 0 without spread.

    >>> float(spearman(np.array([1.0, 2.0, 2.0]), np.array([3.0, 5.0, 9.0])).round(3))
    0.866
    """
    def centred(z):
        ranks = stats.rankdata(z, axis=-1)
        return ranks - ranks.mean(-1, keepdims=True)

    a, b = centred(x), centred(y)
    scale = np.sqrt((a * a).sum(-1) * (b * b).sum(-1))
    return (a * b).sum(-1) / np.where(scale > 0, scale, 1)


def paired(first: Sequence[float], second: Sequence[float]) -> dict[str, float]:
    """The mean of `second - first` over pairs, with Student's 95% interval.

    >>> {k: round(v, 2) for k, v in paired([1.0, 2.0, 3.0], [2.0, 3.0, 5.0]).items()}
    {'mean': 1.33, 'low': -0.1, 'high': 2.77, 'pairs': 3}
    """
    gaps = np.asarray(second, float) - np.asarray(first, float)
    half = stats.t.ppf(0.975, len(gaps) - 1) * gaps.std(ddof=1) / np.sqrt(len(gaps))
    return {"mean": float(gaps.mean()), "low": float(gaps.mean() - half),
            "high": float(gaps.mean() + half), "pairs": len(gaps)}


def stopped(
    order: Sequence[Any], final: Mapping[Any, float], cost: Mapping[Any, float]
) -> dict[str, Any]:
    """What stopping the worse half of an order saves and loses.

    Args:
      order: runs, the likeliest to end best first; the first half, rounded up, is kept.
      final: the loss that each ends with. cost: the share of each that stopping saves.
    Returns: `compute_saved_fraction`, of all runs' compute; `regret`, the best kept loss less the
      best of all; `regret_at_random`, its mean over all halves that could have been kept.

    >>> stopped("ab", {"a": 2.0, "b": 1.0}, {"a": 0.5, "b": 0.5})
    {'compute_saved_fraction': 0.25, 'regret': 1.0, 'regret_at_random': 0.5}
    """
    keep = -(-len(order) // 2)
    best = min(final.values())
    spread = sorted(final.values())
    halves = comb(len(order), keep)
    chance = sum(comb(len(order) - 1 - i, keep - 1) / halves * (loss - best)
                 for i, loss in enumerate(spread))
    return {"compute_saved_fraction": sum(cost[name] for name in order[keep:]) / len(order),
            "regret": min(final[name] for name in order[:keep]) - best,
            "regret_at_random": chance}


def signal(
    traces: Mapping[Any, Trace], groups: Mapping[str, Sequence[Any]], blocks: Sequence[Any],
    window: int | float, seed: int = 0, resamples: int = RESAMPLES,
) -> dict[str, Any]:
    """How well the first steps of runs tell their ends.

    Correlations are with the final quality, minus the held-out loss: above 0, more of it ended
    better. Within groups too, where what defines the groups cannot be the cause.

    Args:
      groups: by name, of each run. blocks: runs whose first steps are not independent.
      window: steps, as `rank_runs` has it; or a share of each run, below 1.
    """
    spans = {name: max(1, round(window * t.steps)) if window < 1 else int(window)
             for name, t in traces.items()}
    rows = {name: [{"loss": float(np.mean(t.loss[:spans[name]])),
                    "grad_norm": float(np.mean(t.grad_norm[:spans[name]]))}]
            for name, t in traces.items()}
    with warnings.catch_warnings(action="ignore"):
        ranked = rank_runs(rows, window=1)
    places = {name: -place for place, name in enumerate(ranked.order)}
    quality = [-t.final for t in traces.values()]
    final = {name: t.final for name, t in traces.items()}
    cost = {name: max(0.0, 1 - spans[name] / t.steps) for name, t in traces.items()}
    found: dict[str, Any] = {"window": window}
    for key, values in (("early_loss", ranked.loss), ("early_gradnorm", ranked.grad_norm),
                        ("rank_runs", places)):
        x = [values[name] for name in traces]
        found[f"{key}_spearman"] = correlation(x, quality, (), blocks, seed, resamples)
        found |= {f"{key}_spearman_within_{name}": correlation(
            x, quality, of, blocks, seed, resamples) for name, of in groups.items()}
    found |= stopped(ranked.order, final, cost)
    found["reversed"] = stopped(ranked.order[::-1], final, cost)
    return found
