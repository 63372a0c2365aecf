"""What a search is told and what it gives: steps, answers, results."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from jaxlm.core.errors import ConfigError, NumericsError, ShapeError, whole
from jaxlm.decode.stop import as_texts
from jaxlm.smc.weights import standard_error

FINISHES = ("stop", "string", "length", "steps", "failed")


class Room(NamedTuple):
    """What a search's programs are compiled for: the most tokens of a prompt, steps of an answer,
    and tokens of an answer. Searches that share a room share their programs."""

    prompt: int
    steps: int
    tokens: int


@dataclass(frozen=True)
class Steps:
    """Where a step of an answer ends, and where the answer does.

    A step ends once a delimiter is complete in what the row drew, or after `tokens` tokens,
    whichever comes first. An answer ends at a stop id or a stop string, after `max_steps` steps or
    after `max_new_tokens` tokens. A stop id behind a step's end belongs to that step, whose score
    is then that of the ended text.

    Args:
      delimiters: texts that end a step; they stay in the answer.
      tokens: the most tokens of one step; None: no bound but the answer's. One of the two is
        needed.
      max_steps: at least 1. max_new_tokens: at least 1, of all steps together.
      stop: texts that end an answer; they are cut off.
      stop_ids: tokens that end it; None: the model's own.
      room: what is compiled, no less than asked for here; None: as much as is asked for. It costs
        memory, and changes an answer by rounding alone.
    Raises: ConfigError.

    >>> Steps("\\n").delimiters
    ('\\n',)
    """

    delimiters: str | tuple[str, ...] = ()
    tokens: int | None = None
    max_steps: int = 40
    max_new_tokens: int = 256
    stop: str | tuple[str, ...] = ()
    stop_ids: tuple[int, ...] | None = None
    room: Room | None = None

    def __post_init__(self):
        for name in ("delimiters", "stop"):
            given = getattr(self, name)
            texts = as_texts([given] if isinstance(given, str) else given, name)
            object.__setattr__(self, name, tuple(sorted(set(texts))))
        for name in ("max_steps", "max_new_tokens"):
            object.__setattr__(self, name, whole(name, getattr(self, name)))
        if self.tokens is not None:
            object.__setattr__(self, "tokens", whole("tokens", self.tokens))
        if self.stop_ids is not None:
            object.__setattr__(self, "stop_ids", tuple(sorted(set(self.stop_ids))))
        if not self.delimiters and self.tokens is None:
            raise ConfigError("a step has no end; give delimiters, or tokens a step, or both")
        if self.room is not None and (
                self.room.steps < self.max_steps or self.room.tokens < self.max_new_tokens):
            raise ConfigError(f"room is {self.room}, less than max_steps {self.max_steps} or "
                              f"max_new_tokens {self.max_new_tokens}; expected at least as much")

    @property
    def cap(self) -> int:
        """The most tokens of one step."""
        return min(self.tokens or self.max_new_tokens, self.max_new_tokens)

    @property
    def program(self) -> "Steps":
        """What the compiled programs depend on, its shapes; texts and limits reach them as data.

        >>> Steps("A:", stop="Q:", max_steps=3).program == Steps("\\n\\n", max_steps=3).program
        True
        """
        _, steps, tokens = self.room or (0, self.max_steps, self.max_new_tokens)
        return Steps("\n", max_steps=steps, max_new_tokens=tokens)


@dataclass(frozen=True)
class Answer:
    """One particle, or one beam.

    text: continues the prompt. tokens: everything drawn, a stop id included. logprob: their sum
    under the sampling distribution. score: the reward's last one; 0 for one that is no number, or
    outside [0, 1] where the weight needs that. log_weight: float, of the last set, -inf for a
    weight of zero, as such a score has. finish: "stop" after a stop id, "string" after a stop
    string, "length" after `max_new_tokens`, "steps" after `max_steps`, "failed" where the reward
    failed before the answer was at its end. step_scores: one a step. step_ends: how many of
    `tokens` each step had drawn by its end.
    """

    text: str
    tokens: tuple[int, ...]
    logprob: float
    score: float
    log_weight: float
    finish: str
    step_scores: tuple[float, ...]
    step_ends: tuple[int, ...]


@dataclass(frozen=True)
class SearchResult:
    """What a search made of one prompt.

    answers: one a particle. chosen: which of them is the answer; unless drawn, the first of the
    best scores among those of some weight, whatever the text. log_evidence: the log of the unbiased
    estimate of `E[prod_t w_t]`; NaN for beams, for `compat` and where tempering forgets. ess:
    (steps,), the effective size before each step's resampling. resampled: (steps,). ancestors:
    (steps, P). unique_roots: (steps,), first particles that still have offspring. tokens_drawn:
    tokens the model computed for this prompt, losers included, a copy's shared past once. steps:
    taken, one in which rows did no more than end included. row_utilisation: of the batch that this
    prompt ran in, the share of computed rows that drew a token. flags: "broken" where at some step
    all weights were zero or one was NaN, "failed" where the reward failed. failed: why it did,
    after its retries; the answers then end at the last step that has scores.
    """

    prompt: str
    answers: tuple[Answer, ...]
    chosen: int
    log_evidence: float
    ess: np.ndarray
    resampled: np.ndarray
    ancestors: np.ndarray
    unique_roots: np.ndarray
    tokens_drawn: int
    steps: int
    row_utilisation: float
    flags: tuple[str, ...] = ()
    failed: str | None = None

    @property
    def text(self) -> str:
        """The chosen answer's text."""
        return self.answers[self.chosen].text


OnResult = Callable[[int, SearchResult], Any]  # a prompt's number, and its result when it is over


def evidence(results: Sequence[SearchResult]) -> tuple[float, float]:
    """The log-evidence of one prompt from independent runs of it, and its standard error.

    `log mean_c Z_c`, and by the delta method `sd(Z_c) / (sqrt(C) mean(Z_c))`; NaN for one run.
    Raises: ShapeError without a result, or for results of several prompts; NumericsError for one
      that has no evidence, and for one whose reward failed: its weights stop before its end.
    """
    if len({result.prompt for result in results}) != 1:
        raise ShapeError(f"got results of {len({r.prompt for r in results})} prompts; expected "
                         "runs of one prompt with different keys")
    for number, result in enumerate(results):
        if result.failed is not None or math.isnan(result.log_evidence):
            why = "no evidence" if result.failed is None else f"a failed reward ({result.failed})"
            raise NumericsError(f"result {number} has {why}; expected whole runs of a particle "
                                "filter that keeps its weights; leave the others out")
    mean, error = standard_error(jnp.asarray([result.log_evidence for result in results]))
    return float(mean), float(error)
