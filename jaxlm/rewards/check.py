"""An exact checker of steps as a reward, with errors put in on purpose where a study needs them."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from jaxlm.core.errors import ConfigError
from jaxlm.rewards.host import Failures, HostReward


@dataclass(frozen=True)
class StepChecker(HostReward):
    """1 - margin while every step so far is right, margin once one is wrong.

    Args:
      check: (prompt, answer so far) -> a verdict for each of its steps.
      margin: from 0 up to 0.5; above 0, so that odds and logarithms stay finite.
      noise: how often the verdict on a text is turned round, 0 to 1. Which texts is a function of
        the text and `key` alone, whatever the order, the batch or the machine; two texts, such as
        an answer and the same with one more step, are independent.
      key: another number, other texts.
      takes: of a prompt, raises ShapeError where the checker cannot read it; None: it reads all.

    Example:
      >>> from jaxlm.rewards import Prompts, Rows
      >>> small = StepChecker(lambda prompt, answer: [len(s) < 4 for s in answer.split()])
      >>> carry = small.init(Prompts(None, None, ["Count:"]), particles=2, slots=8)
      >>> rows = Rows(None, None, None, None, ["one two", "one three"])
      >>> small.score(carry, rows)[0].tolist()
      [0.99..., 0.00...]
    """

    check: Callable[[str, str], Sequence[bool]]
    margin: float = 0.01
    noise: float = 0.0
    key: int = 0
    takes: Callable[[str], Any] | None = None

    def __post_init__(self):
        if not (0 <= self.margin < 0.5 and 0 <= self.noise <= 1):
            raise ConfigError(f"margin is {self.margin!r} and noise {self.noise!r}; expected 0 to "
                              "below 0.5, and 0 to 1")

    def check_prompt(self, prompt: str) -> None:
        """ShapeError for a prompt that cannot be read: to be known before a search."""
        if self.takes is not None:
            self.takes(prompt)

    def values(
        self, prompts: Sequence[str], answers: Sequence[str], numbers: Sequence[int]
    ) -> tuple[np.ndarray, Failures]:
        """The verdicts as scores; a prompt that the checker cannot read fails."""
        scores, failed = np.full(len(answers), np.nan), Failures()
        pairs = zip(numbers, prompts, answers, strict=True)
        for i, (number, prompt, answer) in enumerate(pairs):
            try:
                right = all(self.check(prompt, answer))
            except Exception as error:  # whatever a user's function raises
                failed[number] = f"{type(error).__name__}: {error}"
                continue
            turned = uniform(self.key, prompt, answer) < self.noise
            scores[i] = 1 - self.margin if right != turned else self.margin
        return scores, failed


def uniform(key: int, *texts: str) -> float:
    """A number from 0 to 1 that belongs to some texts and a key.

    >>> uniform(0, "a") == uniform(0, "a"), uniform(0, "a") == uniform(1, "a")
    (True, False)
    """
    digest = hashlib.blake2b(digest_size=8, key=str(key).encode())
    for text in texts:
        data = text.encode(errors="surrogatepass")
        digest.update(len(data).to_bytes(8, "little") + data)
    return int.from_bytes(digest.digest(), "little") / 2**64
