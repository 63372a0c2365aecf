"""Any Python callable as a reward: in batches, within a time, and again when it fails."""

import queue
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from jaxlm.core.errors import ConfigError, whole
from jaxlm.rewards.host import Failures, HostReward

Scores = Callable[[list[str], list[str]], Sequence[float]]


@dataclass(frozen=True)
class TextReward(HostReward):
    """`function(prompts, answers) -> scores` from 0 to 1, called on the host between steps.

    Args:
      function: takes equally many prompts and answers so far.
      timeout_s: seconds a call may take.
      retries: calls after a first one that raised, hung, or gave other than a number a text.
      batch: texts a call.
      wait_s: seconds before the first retry, twice as many before each later one.

    A batch that failed to the end is tried once more prompt by prompt, so that one bad problem does
    not take others with it; the rest is raised as `RewardError`. NaN is passed on, and a number
    outside 0 to 1 (an infinity too) becomes NaN, with a warning: a search flags the problem.
    A call that hangs is left behind in its thread, for Python cannot end one; a function that may
    hang for good should have a time-out of its own.

    Example:
      >>> from jaxlm.rewards import Prompts, Rows
      >>> brief = TextReward(lambda prompts, answers: [1 / (1 + len(a)) for a in answers])
      >>> carry = brief.init(Prompts(None, None, ["Say yes:"]), particles=2, slots=8)
      >>> scores, carry = brief.score(carry, Rows(None, None, None, None, ["y", "yes"]))
      >>> scores.tolist()
      [0.5, 0.25]
    """

    function: Scores
    timeout_s: float = 60.0
    retries: int = 2
    batch: int = 64
    wait_s: float = 0.5

    def __post_init__(self):
        whole("retries", self.retries, 0)
        whole("batch", self.batch)
        if not callable(self.function):
            raise ConfigError(f"function is {self.function!r}; expected a callable")
        if not (self.timeout_s > 0 and self.wait_s >= 0):
            raise ConfigError(f"timeout_s is {self.timeout_s!r} and wait_s {self.wait_s!r}; "
                              "expected seconds above 0, and from 0")

    def values(
        self, prompts: Sequence[str], answers: Sequence[str], numbers: Sequence[int]
    ) -> tuple[np.ndarray, Failures]:
        """Scores by batches; NaN where a prompt failed."""
        scores, failed = np.full(len(answers), np.nan), Failures()
        for first in range(0, len(answers), self.batch):
            part = list(range(first, min(first + self.batch, len(answers))))
            reason = self._try(part, prompts, answers, scores, self.retries + 1)
            if reason is None:
                continue
            of = {n: [i for i in part if numbers[i] == n] for n in {numbers[i] for i in part}}
            for number, own in of.items():
                again = reason if len(of) == 1 else self._try(own, prompts, answers, scores, 1)
                failed |= {} if again is None else {number: again}
        return scores, failed

    def _try(
        self, part: list[int], prompts: Sequence[str], answers: Sequence[str], scores: np.ndarray,
        tries: int,
    ) -> str | None:
        """Fill `scores[part]` in so many tries; what went wrong in the last, if all failed."""
        given = [prompts[i] for i in part], [answers[i] for i in part]
        reason = None
        for number in range(tries):
            if number:
                time.sleep(self.wait_s * 2 ** (number - 1))
            try:
                scores[part] = checked(within(self.timeout_s, self.function, *given), len(part))
                return None
            except Exception as error:  # whatever a user's function raises
                reason = f"{type(error).__name__}: {error}"
        return reason


def checked(values: Any, count: int) -> np.ndarray:
    """The numbers of a call, one a text.

    >>> checked([0.5, np.float32(1)], 2)
    array([0.5, 1. ])
    """
    given = np.asarray(values, object).reshape(-1)
    if wrong := [value for value in given if value is None or isinstance(value, str | bytes)]:
        raise ValueError(f"got {wrong[0]!r} among the scores; expected a number a text")
    found = np.asarray(values, np.float64)  # which would take None for NaN, and read texts
    if found.shape != (count,):
        raise ValueError(f"got values of shape {found.shape} for {count} texts; expected one each")
    return found


def within(seconds: float, function: Callable[..., Any], *args: Any) -> Any:
    """`function(*args)` in a thread of its own; TimeoutError when it takes longer.

    >>> within(5.0, max, 1, 2)
    2
    """
    answer: queue.SimpleQueue = queue.SimpleQueue()

    def work() -> None:
        try:
            answer.put((function(*args), None))
        except BaseException as error:  # SystemExit too: it would end this thread unseen
            answer.put((None, error))

    threading.Thread(target=work, daemon=True).start()
    try:
        value, error = answer.get(timeout=seconds)
    except queue.Empty:
        raise TimeoutError(f"no answer within {seconds:g} s") from None
    if isinstance(error, Exception):
        raise error
    if error is not None:
        raise RuntimeError(f"{type(error).__name__} in the reward: {error}")
    return value
