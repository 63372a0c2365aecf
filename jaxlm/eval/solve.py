"""Problems solved in a queue, each kept on disk as soon as it is done.

The file of results is JSON lines: first what the run depends on, then a record a problem, method
and budget. A stopped run, killed too, goes on where it was: a last line that was cut is dropped.
A record counts for the problem it was made of alone, not for another that has its id since.
"""

import hashlib
import json
import math
import os
import time
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from jaxlm.core.errors import ConfigError, NumericsError, ShapeError, TokenizerError
from jaxlm.decode.generate import Prompt
from jaxlm.eval.skills import Share, share
from jaxlm.eval.tasks import Problem
from jaxlm.rewards.base import RewardError
from jaxlm.search.methods import Request, Solution, method

ONE_PROBLEM_S = (RewardError, NumericsError, ShapeError, TokenizerError)  # not all problems' fault
UNJUDGED = "unjudged"  # flag: the comparison with the right answer was given up
Record = dict[str, Any]


@dataclass(frozen=True)
class Job:
    """One method at one budget."""

    method: str
    particles: int


class Results:
    """A file of results that only grows.

    Args: settings: what records depend on; a file made with others is refused.
    Raises: ConfigError for such a file, or for one that holds something else.
    """

    def __init__(self, path: str | os.PathLike, settings: Record):
        """Open the file, or begin it."""
        self.path, self.records = Path(path), dict[tuple, Record]()
        settings = json.loads(json.dumps(settings))  # as a file gives them back
        held = self.path.read_bytes() if self.path.exists() else b""
        whole = held[:held.rfind(b"\n") + 1]
        if held and not whole and not held.startswith(b'{"settings"'):
            raise ConfigError(f"{path} holds something else than results; name another file")
        parsed = [self._parse(number, line) for number, line in enumerate(whole.splitlines(), 1)]
        if parsed and parsed[0].get("settings") != settings:
            raise ConfigError(f"{path} was made with {parsed[0].get('settings')}, this run has "
                              f"{settings}; name another file, or delete it")
        for record in parsed[1:]:
            self.records[key_of(record)] = record
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = open(self.path, "r+b" if self.path.exists() else "w+b")
        self._file.truncate(len(whole))
        self._file.seek(len(whole))
        if not parsed:
            self._write({"settings": settings})

    def _parse(self, number: int, line: bytes) -> Record:
        """One whole line."""
        try:
            found = json.loads(line)
            if not isinstance(found, dict) or not {"settings", "id"} & set(found):
                raise ValueError("no record")
        except ValueError as error:
            raise ConfigError(f"{self.path} line {number} is no result ({error}); mend the line, "
                              "or name another file") from error
        return found

    def add(self, record: Record) -> None:
        """Keep one record, on the disk before this returns."""
        self.records[key_of(record)] = record
        self._write(record)

    def _write(self, value: Record) -> None:
        self._file.write(json.dumps(value, allow_nan=False).encode() + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def key_of(record: Record) -> tuple[str, int, str]:
    """What a record is of."""
    return record["method"], record["particles"], record["id"]


def digest(problem: Problem) -> str:
    """What stands for a problem's texts, its right answer too: an id may be no more than a line's
    number."""
    texts = [problem.prompt, problem.question, problem.gold, problem.chat]
    return hashlib.sha256(json.dumps(texts).encode()).hexdigest()[:16]


def records_of(results: Results, problems: Sequence[Problem]) -> list[Record]:
    """The records of these problems, as their texts are now."""
    now = {problem.id: digest(problem) for problem in problems}
    return [record for record in results.records.values()
            if now.get(record["id"]) == record.get("problem", "")]


def key_for(seed: int, problem: Problem) -> jax.Array:
    """A problem's own random key: neither its place nor its batch matters."""
    return jax.random.fold_in(jax.random.key(seed), zlib.crc32(problem.id.encode()))


def solve(
    problems: Sequence[Problem], request: Request, job: Job, results: Results, *, seed: int = 0,
    batch: int = 8, retry_failed: bool = False, tick: Callable[[int], Any] = lambda count: None,
) -> None:
    """Solve what `results` does not hold yet, and what it holds of another text under the same id.

    Args:
      batch: problems together; one that is done makes room for the next. They may be fewer when the
        rest is.
      retry_failed: solve again what failed before, or could not be judged.
      tick: called with the number of problems that were done.
    Raises: ConfigError, DeviceError: what is wrong for every problem. A problem whose reward fails,
      that does not fit the model, or that gives NaN, is recorded as failed.
    """
    made = method(job.method, request.reward)
    request = replace(request, particles=job.particles)
    done = {key_of(record) for record in records_of(results, problems)
            if not (retry_failed and ("failed" in record or UNJUDGED in record["flags"]))}
    left = [p for p in problems if (job.method, job.particles, p.id) not in done]
    tick(len(problems) - len(left))
    last = time.perf_counter()

    def keep(problem: Problem, found: Solution | str) -> None:
        nonlocal last
        now = time.perf_counter()
        results.add(record_of(request, job, problem, found, now - last, seed))
        last = now
        tick(1)

    attempt(made.run, request, left, seed, batch, keep)


def attempt(
    run: Callable[..., list[Solution]], request: Request, problems: Sequence[Problem], seed: int,
    batch: int, keep: Callable[[Problem, Solution | str], None],
) -> None:
    """Give `keep` each problem as soon as it is done, with its solution or why there is none.

    A problem that fails takes no other with it: the `batch` that ran then is done again, and if
    it fails too, one problem after another; what waited behind it goes on as a queue.
    One that does not fit the model is an error before any compute, and looked for by halves.
    """
    parts = [list(problems)] if problems else []
    while parts:
        part = parts.pop()
        waiting = dict(enumerate(part))

        def tell(number: int, found: Solution) -> None:
            keep(waiting.pop(number), found)  # noqa: B023

        try:
            found = run(
                replace(request, at_once=min(batch, len(part)), on_solution=tell,
                        questions=[problem.question or problem.prompt for problem in part]),
                [prompt_of(problem, request) for problem in part],
                jnp.stack([key_for(seed, problem) for problem in part]))
            for number in sorted(waiting):  # where the method did not tell as they were done
                tell(number, found[number])
        except ONE_PROBLEM_S as error:
            left = list(waiting.values())
            if len(left) == 1:
                keep(left[0], f"{type(error).__name__}: {error}")
            elif len(left) > batch:
                cut = len(left) // 2 if isinstance(error, ShapeError) else batch
                parts += [left[cut:], left[:cut]]
            else:
                parts += [[problem] for problem in reversed(left)]


def prompt_of(problem: Problem, request: Request) -> Prompt:
    """What the model reads: a chat has its begin mark already."""
    return request.bundle.tokenizer.encode(problem.prompt, special=False) if problem.chat else (
        problem.prompt)


def record_of(
    request: Request, job: Job, problem: Problem, found: Solution | str, spent: float, seed: int
) -> Record:
    """One line of the results; `seconds` since the line before, so that their mean is a problem's
    share of the time."""
    head = {"id": problem.id, "problem": digest(problem), "method": job.method,
            "particles": job.particles, "seed": seed, "seconds": round(spent, 4)}
    if isinstance(found, str):
        return {**head, "failed": found}
    if found.failed is not None:
        return {**head, "failed": f"the reward failed: {found.failed}"}
    number = lambda x: x if math.isfinite(x) else None
    gold, answer = problem.gold, found.answer
    verdict = False if gold is None or answer is None else request.equal(gold, answer)
    flags = [*found.flags, *([UNJUDGED] if verdict is None else [])]
    right = None if gold is None else bool(verdict)
    return {**head, "answer": answer, "gold": gold, "correct": right,
            "score": number(found.score), "log_evidence": number(found.log_evidence),
            "ess": [round(size, 3) for size in found.ess], "tokens": found.tokens,
            "flags": flags, "text": found.text}


@dataclass(frozen=True)
class Row:
    """A line of the summary. unjudged: whose comparison with the right answer was given up.
    accuracy: None where no problem has a known answer; a failed problem counts as wrong, as does
    one that could not be judged."""

    method: str
    particles: int
    problems: int
    failed: int
    unanswered: int
    unjudged: int
    accuracy: Share | None
    tokens: float
    seconds: float


def summary(records: Sequence[Record]) -> list[Row]:
    """A row for each method and budget, in order of appearance."""
    groups: dict[tuple[str, int], list[Record]] = {}
    for record in records:
        groups.setdefault((record["method"], record["particles"]), []).append(record)
    rows = []
    for (name, particles), group in groups.items():
        fine = [record for record in group if "failed" not in record]
        judged = len(group) - sum(record["correct"] is None for record in fine)
        right = sum(record["correct"] is True for record in fine)
        known = any(record["correct"] is not None for record in fine)
        mean = lambda field, some: sum(r[field] for r in some) / max(len(some), 1)
        rows.append(Row(
            name, particles, len(group), len(group) - len(fine),
            sum(record["answer"] is None for record in fine),
            sum(UNJUDGED in record["flags"] for record in fine),
            share(right, judged) if known else None, mean("tokens", fine), mean("seconds", group)))
    return rows


def budget_plot(rows: Sequence[Row]) -> bytes | None:
    """Accuracy against the budget, a line a method, as a PNG; None where nothing was judged."""
    from jaxlm.eval.plots import LIGHT, plot

    judged = [row for row in rows if row.accuracy is not None]
    if not judged:
        return None

    def drawing(axes, colours):
        palette = (*LIGHT["series"], "#c92a2a", "#868e96", "#364fc7", "#d6336c")
        for i, name in enumerate(dict.fromkeys(row.method for row in judged)):
            mine = sorted((row for row in judged if row.method == name), key=lambda r: r.particles)
            shares = [row.accuracy for row in mine if row.accuracy is not None]
            axes.errorbar([row.particles for row in mine], [s.value for s in shares],
                          [s.error for s in shares], label=name, marker="o", markersize=3.5,
                          capsize=2, color=palette[i % len(palette)])
        ticks = sorted({row.particles for row in judged})
        axes.set_xscale("log", base=2)
        axes.set_xticks(ticks, [str(tick) for tick in ticks])
        axes.minorticks_off()
        axes.set_ylim(0, 1.03)
        axes.set_xlabel("answers a problem")
        axes.set_ylabel("share right")
        axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))

    return plot(drawing, "Accuracy against budget (bars: one standard error)", (7.2, 3.8)).light
