"""A process reward model with token ids of its own: each step's text makes a hop over the host."""

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from jaxlm.core.tree import Params
from jaxlm.decode.generate import round_up
from jaxlm.decode.rows import gather
from jaxlm.decode.state import DecodeState, extend
from jaxlm.models.lm import LM
from jaxlm.rewards.base import Prompts, Rows
from jaxlm.rewards.host import as_texts, flat, objects
from jaxlm.rewards.layout import PROBLEM, Layout, Words
from jaxlm.rewards.process import probability, problem_ids, read_problems

BUCKET = 16  # pieces are padded to multiples of this

extend_jit = jax.jit(extend, static_argnames=("lm", "logits_at"))
gather_jit = jax.jit(gather)
probability_jit = jax.jit(probability, static_argnames="pair")


@dataclass(frozen=True)
class Reading:
    """What one row has read: its answer, where its steps end in that, the ids in its cache behind
    the problem, where among them each step is scored, and the scores."""

    answer: str = ""
    ends: tuple[int, ...] = ()
    ids: tuple[int, ...] = ()
    marks: tuple[int, ...] = ()
    scores: tuple[float, ...] = ()


class TextCarry(struct.PyTreeNode):
    """What goes with B rows: the reward model's caches, the problems' lengths in tokens, what each
    row has read (a numpy array of `Reading`), and, by place, tokens read in all (separators, and
    what is read again, included)."""

    state: DecodeState
    problem_R: np.ndarray
    rows: np.ndarray
    appended_B: np.ndarray


@dataclass(frozen=True)
class TextProcessReward:
    """A process reward model on the host side of the search, for any policy. One hop a step.

    Made by `process_reward`. The whole partial answer is turned into ids anew at every step, which
    costs no compute, and compared with what the row's cache holds: the cache keeps their common
    beginning and reads the rest. So it holds exactly what reading the text from scratch would.
    A step of white space alone is none. Before the first step a score is 1. A row whose text
    outgrows its room (twice the policy's tokens, and separators for `steps` steps), or the length
    that the model was made for, scores NaN.
    """

    lm: LM
    params: Params
    words: Words
    layout: Layout
    pair: tuple[int, int] | None
    aggregate: str
    steps: int

    on_device = False
    costly = True

    def init(self, prompts: Prompts, particles: int, slots: int) -> TextCarry:
        """Read the problems, once each."""
        bare = self.layout.prompt == PROBLEM and prompts.own is not None
        width = 2 * prompts.tokens_RT.shape[1]
        texts = prompts.own if bare else prompts.texts  # without a form: the policy's own text
        tokens_RT, length_R = problem_ids(self.words, self.layout, texts, width)
        around = (self.layout.first, self.layout.before, self.layout.after)
        extra = sum(len(self._encode(text)) for text in around)
        room = 2 * slots + extra * min(self.steps, slots)
        state = read_problems(self.lm, self.params, tokens_RT, length_R, particles, room)
        B = len(state.length_B)
        return TextCarry(state, length_R, objects([Reading()] * B), np.zeros(B, np.int64))

    def score(self, carry: TextCarry, rows: Rows) -> tuple[np.ndarray, TextCarry]:
        """Read what each answer has gained, and score it."""
        texts = as_texts(rows)
        P = len(texts) // len(carry.problem_R)
        now = [self._reading(old, text) for old, text in zip(carry.rows, texts, strict=True)]
        pairs = zip(carry.rows, now, strict=True)
        kept = np.array([shared(old.ids, new.ids) for old, new in pairs])
        limit_B = np.asarray(carry.state.limit_B) - np.repeat(carry.problem_R, P)
        lost_B = np.array([len(new.ids) for new in now]) > limit_B
        kept = np.where(lost_B, [len(old.ids) for old in carry.rows], kept)
        at_B = kept.copy()
        state = carry.state.replace(
            length_B=jnp.asarray(np.repeat(carry.problem_R, P) + kept, jnp.int32))
        found = [list(old.scores[: sum(mark < k for mark in old.marks)])
                 for old, k in zip(carry.rows, kept, strict=True)]
        while True:
            goal_B = np.array([at if lost else next((m + 1 for m in new.marks if m >= at), at)
                               for at, new, lost in zip(at_B, now, lost_B, strict=True)])
            if not (goal_B > at_B).any():
                break
            state, scores_B = self._read(state, now, at_B, goal_B)
            for row in np.flatnonzero(goal_B > at_B):
                found[row].append(float(scores_B[row]))
            at_B = goal_B
        read = objects([
            old if lost else replace(new, scores=tuple(scores))
            for old, new, lost, scores in zip(carry.rows, now, lost_B, found, strict=True)])
        totals = np.array([self._total(row.scores) for row in read], np.float32)
        totals = np.where(lost_B, np.float32(np.nan), totals)
        return totals, carry.replace(state=state, rows=read,
                                     appended_B=carry.appended_B + at_B - kept)

    def gather(self, carry: TextCarry, ancestors_RP: jax.Array) -> TextCarry:
        """Caches and texts go with their rows, if any moves."""
        if (np.asarray(ancestors_RP) == np.arange(ancestors_RP.shape[1])).all():
            return carry
        return carry.replace(state=gather_jit(carry.state, jnp.asarray(ancestors_RP)),
                             rows=carry.rows[flat(ancestors_RP)])

    def _reading(self, old: Reading, text: str) -> Reading:
        """The answer's steps and ids; a step ends where the answer ended at an earlier call."""
        if text == old.answer:
            return old
        same = len(os.path.commonprefix([old.answer, text]))
        ends = [end for end in old.ends if end <= same]
        rest = text[ends[-1] if ends else 0:]
        if rest.strip() if self.layout.strip else rest:
            ends.append(len(text))
        steps = [text[a:b] for a, b in zip([0, *ends], ends, strict=False)]
        if self.aggregate == "model" and ends:
            steps = [text[: ends[-1]]]
        ids, marks = self._ids(steps)
        return Reading(text, tuple(ends), ids, marks)

    def _ids(self, steps: Sequence[str]) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The ids of a partial answer, and each step's last one."""
        ids: list[int] = []
        marks = []
        for number, step in enumerate(steps):
            lead = self.layout.before if number else self.layout.first
            step = step.strip() if self.layout.strip else step
            ids += self._encode(lead + step + self.layout.after)
            marks.append(len(ids) - 1)
        return tuple(ids), tuple(marks)

    def _encode(self, text: str) -> list[int]:
        return self.words.tokenizer.encode(text, special=False) if text else []

    def _read(
        self, state: DecodeState, now: list[Reading], at_B: np.ndarray, goal_B: np.ndarray
    ) -> tuple[DecodeState, np.ndarray]:
        """Append each row's ids from `at_B` to `goal_B`; the scores there."""
        count_B = goal_B - at_B
        tokens = np.zeros((len(now), round_up(int(count_B.max()), BUCKET)), np.int32)
        for row, (new, at, goal) in enumerate(zip(now, at_B, goal_B, strict=True)):
            tokens[row, : goal - at] = new.ids[at:goal]
        state, _ = extend_jit(self.lm, self.params, state, jnp.asarray(tokens),
                              jnp.asarray(count_B, jnp.int32))
        return state, np.asarray(probability_jit(state.logits_BV, pair=self.pair))

    def _total(self, scores: tuple[float, ...]) -> float:
        if not scores:
            return 1.0
        if self.aggregate == "prod":
            return float(np.prod(scores))
        return float(np.min(scores) if self.aggregate == "min" else scores[-1])  # a NaN stays


def shared(old: Sequence[int], new: Sequence[int]) -> int:
    """How many ids two texts begin with alike.

    >>> shared([1, 2, 3], [1, 2, 4, 5])
    2
    """
    unlike = (i for i, (a, b) in enumerate(zip(old, new, strict=False)) if a != b)
    return next(unlike, min(len(old), len(new)))
