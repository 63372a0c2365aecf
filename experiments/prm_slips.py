"""Worked arithmetic with slips made on purpose: rows to train a reward model on, at no cost.

A problem of the train side is worked line by line; some lines get a wrong result, or a number of
the problem copied wrongly, and what comes after follows from what is written, as in a model's own
answers. The labels are those of the exact checker.
"""

import numpy as np

from experiments.prm_data import Rollout
from experiments.tiny_tokenizer import BOS, encode
from jaxlm.eval import arithmetic
from jaxlm.eval.arithmetic import Problem
from jaxlm.eval.arithmetic_reward import problem_of, step_verdicts

OPERATORS = {"+": int.__add__, "-": int.__sub__, "*": int.__mul__}
MOST = 299  # no total is written above this, nor below 0
COPIED = 0.15  # of wrong lines: those where it is an operand that is wrong


def slip(rng: np.random.Generator, value: int) -> int:
    """Another number: a carry missed, a small miscount, a wrong digit, or any number at all.

    Slips of every size, since what tells 40 from 50 is learnt after what tells 40 from 150.
    """
    kind, new = rng.choice(4, p=(0.35, 0.15, 0.25, 0.25)), value
    while new == value or new < 0:
        digits = list(str(value))
        digits[rng.integers(len(digits))] = str(rng.integers(10))
        new = (value + int(rng.choice((-10, 10))), value + int(rng.choice((-20, -2, -1, 1, 2, 20))),
               int("".join(digits)), int(rng.integers(200)))[kind]
        kind = rng.choice(4)
    return new


def worked(rng: np.random.Generator, problem: Problem, wrong_S: np.ndarray) -> str | None:
    """The steps of a problem, one a line, those of `wrong_S` wrong; None if a total leaves range.

    >>> worked(np.random.default_rng(0), problem_of("Q:37+8*6=\\n"), np.zeros(2, bool))
    '8*6=48\\n37+48=85\\n'
    """
    numbers, results, text = [n for term in problem.terms for n in term], [], ""
    for (left, op, right), wrong in zip(problem.plan, wrong_S, strict=True):
        x, y = (results[v] if isinstance(v, int) else int(v) for v in (left, right))
        others = [n for n in numbers if n != y]
        copied = bool(wrong and others and rng.random() < COPIED)
        y = int(rng.choice(others)) if copied else y
        result = OPERATORS[op](x, y)
        if wrong and not copied and result >= 0:
            result = slip(rng, result)
        if not 0 <= result <= MOST:
            return None
        results.append(result)
        text += f"{x}{op}{y}={result}\n"
    return text


def gaps(problem: Problem, answer: str) -> np.ndarray:
    """By how much each line's result is off, as sign(e) log(1 + |e|) / 2: float32, one a step.

    >>> gaps(problem_of("Q:37+8*6=\\n"), "8*6=48\\n37+48=75\\n").tolist()
    [0.0, -1.19...]
    """
    results, found = [], []
    for (left, op, right), line in zip(problem.plan, answer.splitlines(), strict=False):
        x, y = (results[v] if isinstance(v, int) else int(v) for v in (left, right))
        results.append(int(line.partition("=")[2]))
        off = results[-1] - OPERATORS[op](x, y)
        found.append(np.sign(off) * np.log1p(abs(off)) / 2)
    return np.array(found, np.float32)


def drawn(rng: np.random.Generator, level: str, dense: bool) -> Rollout:
    """A worked problem of the train side.

    dense: every line is wrong with chance 1/2, and there is no answer line. Else every other
    problem has one wrong line, at a random place, and the answer is the last result.
    """
    while True:
        problem = arithmetic.sample(rng, level, "train")
        count = len(problem.plan)
        wrong_S = rng.random(count) < 0.5
        if not dense:
            wrong_S = (np.arange(count) == rng.integers(count)) & (rng.random() < 0.5)
        text = worked(rng, problem, wrong_S)
        if text is not None:
            answer = "" if dense else "A:" + text.rpartition("=")[2]
            return Rollout(problem.prompt, text + answer)


def slips_batch(
    rng: np.random.Generator, rows: int, width: int, dense: bool, level: str = "hard"
) -> dict[str, np.ndarray]:
    """Rows of `drawn`, cut to `width`.

    Returns: int32 tokens, int32 labels (of each line, at its newline; -1 elsewhere), and float32
    gaps (0 where no step ends), each (rows, width).
    """
    tokens = np.zeros((rows, width), np.int32)
    labels, off = np.full((rows, width), -1, np.int32), np.zeros((rows, width), np.float32)
    for row in range(rows):
        made = drawn(rng, level, dense)
        ids = np.array([BOS, *encode(made.prompt + made.answer)])[:width]
        ends = np.flatnonzero(ids == encode("\n")[0])[1:]  # the first ends the question
        tokens[row, : len(ids)] = ids
        labels[row, ends] = step_verdicts(made.prompt, made.answer)[: len(ends)]
        off_S = gaps(problem_of(made.prompt), made.answer)[: len(ends)]
        off[row, ends[: len(off_S)]] = off_S
    return {"tokens": tokens, "labels": labels, "gaps": off}
