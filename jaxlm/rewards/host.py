"""What rewards of texts share: they run on the host, and score each new text once."""

import warnings
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from flax import struct

from jaxlm.core.errors import ConfigError
from jaxlm.rewards.base import Prompts, RewardError, Rows

Failures = dict[int, str]  # number of a prompt -> why it has no score


class Seen(struct.PyTreeNode):
    """What goes with B rows: the prompts (R,), the answers that were scored (B,), None before the
    first, both numpy arrays of texts, so that leaves lead with R or B as everywhere; and their
    scores, float32 (B,)."""

    prompts: np.ndarray
    answers: np.ndarray
    scores_B: np.ndarray


class HostReward:
    """A reward by `values`; a row whose answer is the one scored before keeps its score.

    Before its first step a row scores `before`; an answer that ends empty is scored. A text that
    several rows share is scored once.
    """

    on_device = False
    before = 1.0

    def values(
        self, prompts: Sequence[str], answers: Sequence[str], numbers: Sequence[int]
    ) -> tuple[np.ndarray, Failures]:
        """A score for each pair; `numbers` says which prompt each belongs to."""
        raise NotImplementedError

    def wanted(self, carry: Seen, rows: Rows) -> list[int]:
        """The rows that have something new to score."""
        texts = as_texts(rows)
        ended_B = [False] * len(texts) if rows.ended_B is None else np.asarray(rows.ended_B)
        known = zip(carry.answers, texts, ended_B, strict=True)
        return [row for row, (old, new, ended) in enumerate(known)
                if new != (old or "") or (ended and old is None)]

    def init(self, prompts: Prompts, particles: int, slots: int) -> Seen:
        """Remember the prompts; `slots` does not matter to texts."""
        B = len(prompts.texts) * particles
        return Seen(objects(prompts.texts), objects([None] * B),
                    np.full(B, self.before, np.float32))

    def score(self, carry: Seen, rows: Rows) -> tuple[np.ndarray, Seen]:
        """Score what is new.

        Raises: RewardError when some prompts got no score; it holds the others'.
        """
        texts, P = as_texts(rows), len(carry.answers) // len(carry.prompts)
        wanted = self.wanted(carry, rows)
        pairs = list(dict.fromkeys((row // P, texts[row]) for row in wanted))
        values, failed = self.values([carry.prompts[r] for r, _ in pairs], [t for _, t in pairs],
                                     [r for r, _ in pairs]) if pairs else (np.zeros(0), {})
        found = dict(zip(pairs, within_unit(values), strict=True))
        scores_B, answers = carry.scores_B.copy(), carry.answers.copy()
        for row in wanted:
            scores_B[row] = found[row // P, texts[row]]
            if row // P not in failed:
                answers[row] = texts[row]
        carry = carry.replace(answers=answers, scores_B=scores_B)
        if failed:
            raise RewardError(
                f"the reward failed for prompts {sorted(failed)}: {next(iter(failed.values()))}; "
                "mend it, or record these problems as failed and go on with the others",
                sorted(failed), [failed[r] for r in sorted(failed)], scores_B, carry)
        return scores_B, carry

    def gather(self, carry: Seen, ancestors_RP: jax.Array) -> Seen:
        """Scores go with their rows."""
        index_B = flat(ancestors_RP)
        return carry.replace(answers=carry.answers[index_B], scores_B=carry.scores_B[index_B])


def flat(ancestors_RP: Any) -> np.ndarray:
    """Indices of rows, (B,), from those within each prompt.

    >>> flat([[1, 1], [0, 1]])
    array([1, 1, 2, 3])
    """
    within_RP = np.asarray(ancestors_RP)
    R, P = within_RP.shape
    return (np.arange(R)[:, None] * P + within_RP).reshape(-1)


def objects(values: Sequence[Any]) -> np.ndarray:
    """Any values as a numpy array of one axis.

    >>> objects(["a", ("b", "c")]).shape
    (2,)
    """
    found = np.empty(len(values), object)
    for i, value in enumerate(values):
        found[i] = value
    return found


def as_texts(rows: Rows) -> Sequence[str]:
    """The answers so far; ConfigError where the search gave none."""
    if rows.texts is None:
        raise ConfigError("this reward reads texts; pass rows.texts, the answers so far")
    return rows.texts


def within_unit(values: Any) -> np.ndarray:
    """float32 scores; what is no number from 0 to 1 becomes NaN, which a search flags.

    >>> within_unit([0.5, 1.0000001])
    array([0.5, 1. ], dtype=float32)
    """
    scores = np.asarray(values, np.float64)
    outside = ~((scores >= -1e-6) & (scores <= 1 + 1e-6))
    if (outside & ~np.isnan(scores)).any():
        warnings.warn(f"a reward gave {scores[outside & ~np.isnan(scores)][0]}; expected 0 to 1: "
                      "counted as NaN", stacklevel=2)
    return np.where(outside, np.nan, np.clip(scores, 0, 1)).astype(np.float32)
