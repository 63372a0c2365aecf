"""Multi-step arithmetic with worked steps, one step a line, which a program can check.

A problem is a sum of signed terms, each a number or a product. The worked solution walks it from
left to right with a running total; a product is worked out before it is added:

    Q:37+8*6-16=
    8*6=48
    37+48=85
    85-16=69
    A:69

Every total stays in 0 ... `max_total`. Training and test problems never meet: `split_of` assigns
each expression to one side by its checksum.
"""

from __future__ import annotations

import re
import zlib
from dataclasses import dataclass

import numpy as np

_STEP = re.compile(r"([0-9]{1,9})([-+*])([0-9]{1,9})=([0-9]{1,9})")
_ANSWER = re.compile(r"A:([0-9]{1,9})")
_APPLY = {"+": lambda x, y: x + y, "-": lambda x, y: x - y, "*": lambda x, y: x * y}


@dataclass(frozen=True)
class Level:
    """How hard a problem is: inclusive ranges of its terms, products, numbers and totals."""

    terms: tuple[int, int]
    products: tuple[int, int] = (0, 0)
    number: tuple[int, int] = (1, 99)
    factor: tuple[int, int] = (2, 99)
    multiplier: tuple[int, int] = (2, 9)
    max_total: int = 199
    signs: str = "+-"

    def __post_init__(self) -> None:
        for name in ("terms", "products", "number", "factor", "multiplier"):
            low, high = getattr(self, name)
            if not 0 <= low <= high:
                raise ValueError(f"Level.{name} must be 0 <= low <= high, got {(low, high)}")
        if self.terms[0] < 1 or self.products[1] > self.terms[0]:
            raise ValueError(f"Level needs at least one term and no more products than terms, "
                             f"got terms={self.terms}, products={self.products}")
        smallest = max(self.number[0], self.factor[0] * self.multiplier[0] * bool(self.products[1]))
        if smallest > self.max_total:
            raise ValueError(f"Level.max_total={self.max_total} is below the smallest term "
                             f"{smallest}; raise it")
        if not self.signs or set(self.signs) - set("+-"):
            raise ValueError(f"Level.signs must be '+', '-' or '+-', got {self.signs!r}")


LEVELS = {
    "easy": Level(terms=(2, 3), max_total=99),
    "medium": Level(terms=(3, 4), products=(1, 1), factor=(2, 9), max_total=99),
    "hard": Level(terms=(7, 8), products=(2, 2), factor=(2, 19), max_total=199),
}


@dataclass(frozen=True)
class Problem:
    """A signed sum: `signs[i]` goes before `terms[i]`, a tuple of one number or two factors."""

    signs: tuple[str, ...]
    terms: tuple[tuple[int, ...], ...]

    @property
    def expression(self) -> str:
        """The sum as text, for example `37+8*6-16`."""
        products = ["*".join(map(str, term)) for term in self.terms]
        return "".join(s + p for s, p in zip(self.signs, products, strict=True))[1:]

    @property
    def prompt(self) -> str:
        """What the model is given: the question and the end of its line."""
        return f"Q:{self.expression}=\n"

    @property
    def plan(self) -> tuple[tuple[str | int, str, str | int], ...]:
        """Steps as (left, operator, right): a number of the problem as text, or a step's index."""
        steps: list[tuple[str | int, str, str | int]] = []
        total: str | int | None = None
        for sign, term in zip(self.signs, self.terms, strict=True):
            value: str | int = str(term[0])
            if len(term) == 2:
                steps.append((str(term[0]), "*", str(term[1])))
                value = len(steps) - 1
            if total is not None:
                steps.append((total, sign, value))
                value = len(steps) - 1
            total = value
        return tuple(steps)

    @property
    def steps(self) -> tuple[tuple[str, str, str, str], ...]:
        """The right steps in order, as (left, operator, right, result)."""
        done: list[tuple[str, str, str, str]] = []
        for left, op, right in self.plan:
            x, y = (done[v][3] if isinstance(v, int) else v for v in (left, right))
            done.append((x, op, y, str(_APPLY[op](int(x), int(y)))))
        return tuple(done)

    @property
    def answer(self) -> int:
        """The value of the expression."""
        return int(self.steps[-1][3]) if self.steps else self.terms[0][0]

    @property
    def solution(self) -> str:
        """The worked steps and the answer, one a line."""
        lines = ["{}{}{}={}".format(*step) for step in self.steps]
        return "\n".join([*lines, f"A:{self.answer}"]) + "\n"


def split_of(expression: str) -> str:
    """The side an expression belongs to, 'test' (one in eight) or 'train', by its CRC-32."""
    return "test" if zlib.crc32(expression.encode()) % 8 == 0 else "train"


def _draw(rng: np.random.Generator, level: Level) -> Problem:
    integer = lambda bounds: int(rng.integers(bounds[0], bounds[1] + 1))
    count = integer(level.terms)
    is_product = np.zeros(count, bool)
    is_product[rng.permutation(count)[: integer(level.products)]] = True
    signs: list[str] = []
    terms: list[tuple[int, ...]] = []
    total = 0
    while len(terms) < count:
        product = bool(is_product[len(terms)])
        term = ((integer(level.factor), integer(level.multiplier)) if product
                else (integer(level.number),))
        value = int(np.prod(term))
        sign = level.signs[int(rng.integers(len(level.signs)))] if terms else "+"
        if not 0 <= _APPLY[sign](total, value) <= level.max_total:
            if rng.random() < 0.02:  # a dead end, such as a total of 0 with only '-' left
                signs, terms, total = [], [], 0
            continue
        signs.append(sign)
        terms.append(term)
        total = _APPLY[sign](total, value)
    return Problem(tuple(signs), tuple(terms))


def sample(rng: np.random.Generator, level: str | Level, split: str = "train") -> Problem:
    """Draws one problem of a level from one side of the split.

    Args:
      rng: NumPy generator; the same state gives the same problem.
      level: a name in `LEVELS`, or a `Level`.
      split: 'train' or 'test'.

    Returns:
      A `Problem` whose running total stays in [0, max_total].

    Raises:
      ValueError: an unknown level or split.

    Example:
      >>> problem = sample(np.random.default_rng(0), "medium")
      >>> check_steps(problem, problem.solution).correct
      True
    """
    if split not in ("train", "test"):
        raise ValueError(f"split must be 'train' or 'test', got {split!r}")
    if isinstance(level, str):
        if level not in LEVELS:
            raise ValueError(f"unknown level {level!r}; known: {', '.join(LEVELS)}")
        level = LEVELS[level]
    while True:
        problem = _draw(rng, level)
        if split_of(problem.expression) == split:
            return problem


@dataclass(frozen=True)
class Verdict:
    """What a program can say of a worked solution.

    `steps[i]` is whether line i (answer line excluded) follows from the problem and from the
    results written above it; `answered` whether an answer line was reached; `correct` whether the
    answer is right; `sound` whether every step is valid, none is missing and the answer is right.
    """

    steps: tuple[bool, ...]
    answered: bool
    correct: bool
    sound: bool


def check_steps(problem: Problem, text: str) -> Verdict:
    """Checks a worked solution line by line, without running or evaluating any of it.

    A step is valid when it is the next step of the problem, its operands are the problem's own or
    the results written above (right or wrong), and its arithmetic is right. So a slip makes one
    step invalid and what rightly follows from it valid, but the answer wrong. A line that is no
    step, or is one too many, is invalid. A last line without its newline counts only when it is an
    answer; text after the answer line is ignored.

    Args:
      problem: what was asked.
      text: what was written after `problem.prompt`; may be unfinished.

    Returns:
      The `Verdict`.

    Example:
      >>> slip = check_steps(Problem(("+", "-"), ((37,), (16,))), "37-16=20\\nA:20\\n")
      >>> slip.steps, slip.answered, slip.correct
      ((False,), True, False)
    """
    plan = problem.plan
    valid: list[bool] = []
    results: list[str] = []
    for line in text.split("\n"):
        if answer := _ANSWER.fullmatch(line):
            correct = answer[1] == str(problem.answer)
            sound = correct and all(valid) and len(valid) == len(plan)
            return Verdict(tuple(valid), True, correct, sound)
        if len(results) == text.count("\n"):
            break  # what follows the last newline is unfinished, or nothing
        step = _STEP.fullmatch(line)
        results.append(step[4] if step else "?")
        if step is None or len(results) > len(plan):
            valid.append(False)
            continue
        left, op, right = plan[len(results) - 1]
        x, y = (results[v] if isinstance(v, int) else v for v in (left, right))
        follows = (step[1], step[2], step[3]) == (x, op, y)
        valid.append(follows and step[4] == str(_APPLY[op](int(x), int(y))))
    return Verdict(tuple(valid), False, False, False)
