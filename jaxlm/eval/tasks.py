"""Problems with a known answer, read from JSON lines: arithmetic, GSM8K, MATH-500, and your own."""

import json
import lzma
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from jaxlm.core.errors import ConfigError, whole
from jaxlm.eval import arithmetic
from jaxlm.hf.tokenizer import Tokenizer
from jaxlm.rewards.answers import extract

BOXED = "Please reason step by step, and put your final answer within \\boxed{}."


@dataclass(frozen=True)
class Problem:
    """id: of the line's "id" or "unique_id", else its number. gold: the right answer, or None where
    the line has none: such a problem is answered, not judged. question: what is asked, without what
    the prompt puts around it; None: the prompt. chat: the prompt is a chat, begin mark and all."""

    id: str
    prompt: str
    gold: str | None
    question: str | None = None
    chat: bool = False


@dataclass(frozen=True)
class Task:
    """How problems of a kind are asked and read.

    fields: names of the question and of the answer. how: of `answers.extract`, for what a model
    writes; gold_how: for the answer field. ask: question -> user's words; None: it is the prompt.
    delimiters: what ends a step. symbolic: whether answers are compared by math-verify.
    """

    fields: tuple[str, str]
    how: str
    gold_how: str | None = None
    ask: Callable[[str], str] | None = None
    delimiters: tuple[str, ...] = ("\n\n",)
    symbolic: bool = False


ANSWER_LINE = r"(?m)^A:([0-9]{1,9})$"
TASKS = {
    "prompt": Task(("prompt", "answer"), "auto", delimiters=("\n",)),
    "arithmetic": Task(("prompt", "answer"), ANSWER_LINE, delimiters=("\n",)),
    "math": Task(("problem", "answer"), "boxed", None, lambda text: f"{text}\n{BOXED}",
                 symbolic=True),
    "gsm8k": Task(("question", "answer"), "auto", "####", lambda text: f"{text}\n{BOXED}"),
}


@dataclass(frozen=True)
class Data:
    """task: its name. wrong: (line, what is wrong with it), lines that were left out."""

    task: str
    problems: tuple[Problem, ...]
    wrong: tuple[tuple[int, str], ...] = ()


def task_of(record: dict[str, Any]) -> str:
    """The task that a line's fields tell: prompt, problem or question.

    >>> task_of({"question": "1+1?", "answer": "#### 2"})
    'gsm8k'
    """
    if isinstance(prompt := record.get("prompt"), str):
        return "arithmetic" if prompt.startswith("Q:") and prompt.endswith("=\n") else "prompt"
    for name in ("math", "gsm8k"):
        if TASKS[name].fields[0] in record:
            return name
    raise ValueError(f"it has fields {sorted(record)}; expected a prompt, a problem or a question")


def read(
    path: str | os.PathLike, tokenizer: Tokenizer | None = None, task: str | None = None,
    limit: int | None = None,
) -> Data:
    """Problems of a file of JSON lines, or of one compressed as .xz.

    A line that is wrong is left out and reported with its number.

    Args:
      tokenizer: its chat template, where it has one, wraps the user's words.
      task: a name in `TASKS`; default by the fields of the first good line.
      limit: the first so many problems.
    Raises: ConfigError for a file that cannot be read, an unknown task, a limit below 1, or without
      any good line.
    """
    if limit is not None:
        whole("limit", limit)
    if task is not None and task not in TASKS:
        raise ConfigError(f"task is {task!r}; expected one of {', '.join(TASKS)}")
    problems: list[Problem] = []
    wrong: list[tuple[int, str]] = []
    seen: set[str] = set()
    for number, line in lines(path):
        if limit is not None and len(problems) >= limit:
            break
        try:
            record = json.loads(line)
            if not isinstance(record, dict):
                raise ValueError(f"it holds {type(record).__name__}; expected an object")
            task = task or task_of(record)
            problem = problem_of(record, number, TASKS[task], tokenizer)
            if problem.id in seen:
                raise ValueError(f"the id {problem.id!r} came before; expected each once")
        except ValueError as error:  # json.JSONDecodeError is one
            wrong.append((number, str(error)))
            continue
        seen.add(problem.id)
        problems.append(problem)
    if not problems or task is None:
        first = f"; line {wrong[0][0]}: {wrong[0][1]}" if wrong else ""
        raise ConfigError(f"{path} holds no problem that can be read{first}")
    return Data(task, tuple(problems), tuple(wrong))


def lines(path: str | os.PathLike) -> Iterator[tuple[int, str]]:
    """Lines with something on them, numbered from 1."""
    opened = lzma.open if str(path).endswith(".xz") else open
    try:
        with opened(path, "rb") as file:
            for number, raw in enumerate(file, 1):
                if raw.strip():
                    yield number, raw.decode(errors="surrogateescape")
    except (OSError, lzma.LZMAError) as error:
        raise ConfigError(f"cannot read {path}: {error}") from error


def problem_of(
    record: dict[str, Any], number: int, task: Task, tokenizer: Tokenizer | None
) -> Problem:
    """One line as a problem; ValueError says what is wrong."""
    question, gold = record.get(task.fields[0]), record.get(task.fields[1])
    if not isinstance(question, str) or not question.strip():
        raise ValueError(f"{task.fields[0]} is {question!r}; expected a text")
    question.encode()  # bytes that are no UTF-8 raise a UnicodeEncodeError, which is a ValueError
    if gold is None and isinstance(worked := record.get("solution"), str):
        gold = extract(worked, "boxed")  # MATH as it was published
    if gold is not None and (isinstance(gold, bool) or not isinstance(gold, str | int | float)):
        raise ValueError(f"{task.fields[1]} is {gold!r}; expected a text or a number")
    gold = None if gold is None else str(gold)
    if gold is not None and task.gold_how is not None:
        gold = extract(gold, task.gold_how)
        if gold is None:
            raise ValueError(f"{task.fields[1]} has no final answer after {task.gold_how}")
    name = record.get("id", record.get("unique_id", number))
    if task.ask is None:
        return Problem(str(name), question, gold)
    prompt, chat = ask(task.ask(question), tokenizer)
    return Problem(str(name), prompt, gold, question, chat)


def ask(words: str, tokenizer: Tokenizer | None) -> tuple[str, bool]:
    """The prompt: the user's words in the model's chat template, if it has one, and whether."""
    if tokenizer is None:
        return words + "\n\n", False
    try:
        return tokenizer.chat([{"role": "user", "content": words}]), True
    except ValueError:  # it has no template
        return words + "\n\n", False


def held_out(level: str, count: int, seed: int = 0) -> Data:
    """Sums that the bundled model never saw, of one of `arithmetic.LEVELS`; `seed` draws them.

    >>> held_out("easy", 2).problems[0].id
    'easy-0-0'
    """
    if level not in arithmetic.LEVELS:
        raise ConfigError(f"level is {level!r}; expected one of {', '.join(arithmetic.LEVELS)}")
    rng = np.random.default_rng([seed, list(arithmetic.LEVELS).index(level)])
    made = [arithmetic.sample(rng, level, "test") for _ in range(count)]
    return Data("arithmetic", tuple(
        Problem(f"{level}-{seed}-{i}", one.prompt, str(one.answer)) for i, one in enumerate(made)))


def open_data(
    source: str, tokenizer: Tokenizer | None = None, task: str | None = None,
    limit: int | None = None, seed: int = 0,
) -> Data:
    """A file; or a name: a level of the sums, drawn by `seed`, "math500" or "gsm8k" under
    `JAXLM_DATA`."""
    known = {"math500": "math/math500_from_tora.jsonl.xz", "gsm8k": "gsm8k/test.jsonl.xz"}
    if not Path(source).exists():
        if source in arithmetic.LEVELS:
            return held_out(source, 100 if limit is None else whole("limit", limit), seed)
        if source in known:
            root = os.environ.get("JAXLM_DATA")
            if not root:
                raise ConfigError(f"{source} is read from the folder that JAXLM_DATA names; set it "
                                  "(experiments/get_data.py fetches the data)")
            return read(Path(root).expanduser() / known[source], tokenizer, task, limit)
    return read(source, tokenizer, task, limit)
