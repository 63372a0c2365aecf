"""The exact checker of the arithmetic task as a reward: which steps of a growing text are right."""

import re

from jaxlm.core.errors import ShapeError
from jaxlm.eval.arithmetic import Problem, check_steps
from jaxlm.rewards.check import StepChecker

_QUESTION = re.compile(r"Q:([0-9]+(?:\*[0-9]+)?(?:[-+][0-9]+(?:\*[0-9]+)?)*)=\n")
_TERM = re.compile(r"([-+]?)([0-9]+)(?:\*([0-9]+))?")


def problem_of(prompt: str) -> Problem:
    """The problem that a prompt asks: the inverse of `Problem.prompt`.

    Raises: ShapeError for a text that is no such prompt.

    >>> problem_of("Q:37+8*6-16=\\n").answer
    69
    """
    found = _QUESTION.fullmatch(prompt)
    if found is None:
        raise ShapeError(
            f"prompt {prompt!r} is no arithmetic problem; expected a text like 'Q:37+8*6-16=\\n'")
    parts = _TERM.findall(found[1])
    terms = tuple(tuple(int(number) for number in part[1:] if number) for part in parts)
    return Problem(tuple(part[0] or "+" for part in parts), terms)


def step_verdicts(prompt: str, answer: str) -> tuple[bool, ...]:
    """Whether each line of a worked answer is right; the answer line, when every one before it is
    too and none is missing.

    >>> step_verdicts("Q:37+8*6-16=\\n", "8*6=48\\n37+48=86\\n86-16=70\\nA:70\\n")
    (True, False, True, False)
    """
    verdict = check_steps(problem_of(prompt), answer)
    return (*verdict.steps, verdict.sound) if verdict.answered else verdict.steps


def arithmetic_reward(noise: float = 0.0, *, margin: float = 0.01, key: int = 0) -> StepChecker:
    """The exact checker as a reward of growing answers: `StepChecker` over `step_verdicts`.

    Args: as of `StepChecker`; with `noise`, so many of its verdicts are wrong.
    """
    return StepChecker(step_verdicts, margin, noise, key, takes=problem_of)
