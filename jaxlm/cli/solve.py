"""`jaxlm solve`: problems with known answers, by a search; resumable."""

import os
from contextlib import ExitStack
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import tyro

from jaxlm.cli.options import Loading, columns, note, open_model
from jaxlm.core.errors import ConfigError, whole
from jaxlm.eval import solve as solving
from jaxlm.eval.named_reward import open_reward
from jaxlm.eval.tasks import TASKS, Task, open_data
from jaxlm.hf.bundle import Bundle, load
from jaxlm.search.base import Steps
from jaxlm.search.methods import METHODS, Request, method

HEAD = ["method", "budget", "problems", "failed", "unanswered", "unjudged", "accuracy", "tokens",
        "seconds"]
DataSource = Annotated[str, tyro.conf.arg(metavar="FILE.jsonl")]
Out = Annotated[Path, tyro.conf.arg(metavar="RESULTS.jsonl")]


def run(
    model: str, data: DataSource, out: Out, method: tuple[str, ...] = ("particle-filter",),
    particles: tuple[int, ...] = (32,), prm: str | None = None, aggregate: str = "last",
    task: str | None = None, limit: int | None = None, batch: int = 8, rows: int | None = None,
    temperature: float = 0.8, max_steps: int = 40, max_new_tokens: int | None = None,
    delimiter: tuple[str, ...] | None = None, step_tokens: int | None = None,
    stop: tuple[str, ...] = (), cache: str = "dense", memory_mb: int | None = None, seed: int = 0,
    data_seed: int = 0, retry_failed: bool = False, loading: Loading = Loading(),
) -> None:
    """Answer the problems of a file, and say how many are right; a stopped run goes on.

    Args:
      model: a model folder, a hub id such as org/name, or "tiny", the bundled model.
      data: a file of JSON lines with fields prompt, problem or question, and answer; or
        easy, medium or hard (sums for the bundled model), math500 or gsm8k (from JAXLM_DATA).
      out: JSON lines, a record a problem, written as each is done; plot beside it as .png. A
        problem whose text or right answer has changed since its record is solved anew.
      method: greedy, particle-filter, best-of-n, self-consistency, ...; several for a comparison.
      particles: answers a problem; several for a curve.
      prm: the reward: arithmetic, the exact checker of the sums (arithmetic:0.1 errs in a tenth of
        its verdicts); a process reward model's folder or hub id; or module:function, a Python
        function (prompts, answers) -> scores from 0 to 1.
      aggregate: of a process reward model's step scores: prod, min, last or model.
      task: prompt, arithmetic, math or gsm8k; default by the fields.
      limit: the first so many problems.
      batch: problems together; one that is done makes room for the next. The methods of chains and
        of several temperatures take a batch after another.
      rows: answers computed in an iteration, of batch x particles; with fewer than all, none idles
        while others wait for the slowest of their problem. Default all.
      temperature: of the sampling.
      max_steps: of an answer.
      max_new_tokens: of an answer; default 112 for the sums, else 1024.
      delimiter: texts that end a step, as $'\\n\\n' in bash; default an empty line, for prompts and
        sums a line's end; given without any, --step-tokens alone ends steps.
      step_tokens: the most tokens of a step; default no bound but the answer's.
      stop: texts that end an answer, beside the model's own stop tokens; they are cut off.
      cache: how keys and values are kept, as in `jaxlm generate`.
      memory_mb: that model, reward and answers may take; more is refused before any compute.
        Default what the device has, of a CPU what its host has left.
      seed: of the sampling; with a problem's id it fixes its answer.
      data_seed: of the problems that easy, medium and hard draw.
      retry_failed: solve again what failed in an earlier run, or could not be judged.
      loading: how a model is loaded.
    """
    jobs = jobs_of(method, particles, prm)
    check(seed, data_seed, limit=limit, batch=batch, rows=rows, max_steps=max_steps,
          memory_mb=memory_mb, max_new_tokens=max_new_tokens, step_tokens=step_tokens)
    reading_as = dict[str, Any](ignore_fields=loading.ignore_fields,
                                check_tokenizer=loading.check_tokenizer)
    bundle = open_model(model, loading)
    found = open_data(data, bundle.tokenizer, task, limit, data_seed)
    for line, reason in found.wrong:
        note(f"{data} line {line} is left out: {reason}")
    steps = steps_of(found.task, delimiter, step_tokens, max_steps, max_new_tokens, stop)
    settings = {"model": model, "data": data, "task": found.task, "prm": prm, "seed": seed,
                "data_seed": data_seed, "aggregate": aggregate, "temperature": temperature,
                "steps": asdict(steps), "cache": cache, "dtype": loading.dtype}
    with ExitStack() as stack:
        request = Request(
            bundle, reward_of(prm, bundle, found.task, aggregate, max_steps, reading_as),
            temperature=temperature, steps=steps, cache=cache, rows=rows,
            memory=None if memory_mb is None else memory_mb << 20,
            **reading(TASKS[found.task], stack))
        results = solving.Results(out, settings)
        stack.callback(results.close)
        solve_all(found.problems, request, jobs, results, seed, batch, retry_failed)
    show(solving.records_of(results, found.problems), jobs, out)


def check(seed: int, data_seed: int, **counts: int | None) -> None:
    """ConfigError for a seed that none can start from, and for a count that is given and no whole
    number of at least 1."""
    whole("--seed", seed, -2**63, 2**63 - 1)
    whole("--data-seed", data_seed, 0)
    for name, number in counts.items():
        if number is not None:
            whole(name, number)


def jobs_of(names: tuple[str, ...], particles: tuple[int, ...], prm: str | None
            ) -> list[solving.Job]:
    """Every method at every budget; those that take none, once. Checked before a model is read, a
    budget that a method cannot share out too."""
    jobs = []
    for name in names:
        made = method(name, None if prm is None else object())  # type: ignore[arg-type]
        for count in [1] if made.single else particles:
            job = solving.Job(name, whole("particles", count))
            made.check(job.particles)
            jobs.append(job)
    if not jobs:
        raise ConfigError(f"nothing to do; --method takes some of {', '.join(METHODS)}")
    return list(dict.fromkeys(jobs))


def steps_of(
    task: str, delimiter: tuple[str, ...] | None, step_tokens: int | None, max_steps: int,
    max_new_tokens: int | None, stop: tuple[str, ...],
) -> Steps:
    """Where steps and answers end; what is not given is the task's."""
    if max_new_tokens is None:
        max_new_tokens = 112 if task == "arithmetic" else 1024
    return Steps(TASKS[task].delimiters if delimiter is None else delimiter, step_tokens,
                 max_steps, max_new_tokens, stop)


def reward_of(
    prm: str | None, bundle: Bundle, task: str, aggregate: str, max_steps: int,
    reading_as: dict[str, Any],
) -> Any:
    """The reward that --prm names."""
    if prm is None:
        return None
    if prm.partition(":")[0] == "arithmetic" and task != "arithmetic":
        raise ConfigError(f"--prm arithmetic knows the sums alone, and the task is {task}; name a "
                          "process reward model, or a function as module:function")
    return open_reward(prm, bundle, partial(load, **reading_as), aggregate, max_steps)


def reading(kind: Task, stack: ExitStack) -> dict[str, Any]:
    """How final answers are taken out and compared."""
    from jaxlm.rewards.answers import Judge, extract, same

    take = lambda text: extract(text, kind.how)
    if not kind.symbolic:
        return {"extract": take, "equal": same}
    judge = stack.enter_context(Judge())
    stack.callback(lambda: tell_given_up(judge))
    return {"extract": take, "equal": judge}


def tell_given_up(judge: Any) -> None:
    """How many comparisons took too long, if any: in votes they leave no other trace."""
    if judge.timeouts:
        note(f"{judge.timeouts} comparisons of answers, those of votes too, were given up after "
             f"{judge.timeout:g} s: they count as different")


def solve_all(
    problems: Any, request: Request, jobs: list[solving.Job], results: solving.Results, seed: int,
    batch: int, retry_failed: bool,
) -> None:
    """All methods and budgets, under one bar."""
    from tqdm import tqdm  # comes with huggingface_hub

    total = len(problems) * len(jobs)
    with tqdm(total=total, disable=None, unit="problem") as bar:  # None: only on a terminal
        for job in jobs:
            bar.set_description(f"{job.method}, {job.particles}")
            solving.solve(problems, request, job, results, seed=seed, batch=batch,
                          retry_failed=retry_failed, tick=bar.update)


def show(records: list[solving.Record], jobs: list[solving.Job], out: Path) -> None:
    """The table of these jobs on stdout, and the plot of all that the file has of the problems."""
    asked = [r for r in records if solving.Job(r["method"], r["particles"]) in jobs]
    rows = solving.summary(asked)
    percent = lambda share: "-" if share is None else (
        f"{100 * share.value:.1f} ± {100 * share.error:.1f} %")
    print(columns([HEAD, *([r.method, r.particles, r.problems, r.failed, r.unanswered, r.unjudged,
                            percent(r.accuracy), round(r.tokens), round(r.seconds, 2)]
                           for r in rows)]))
    for record in asked:
        if "failed" in record:
            note(f"problem {record['id']} failed: {record['failed']}")
    drawn = solving.budget_plot(solving.summary(records))
    if drawn is not None:
        picture = out.with_suffix(".png")
        temporary = picture.with_name(f".{picture.name}.{os.getpid()}")
        temporary.write_bytes(drawn)
        os.replace(temporary, picture)
        note(f"{out} and {picture} written")
