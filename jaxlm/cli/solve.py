"""`jaxlm solve`: problems with known answers, by a search; resumable."""

import os
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, Any

import tyro

from jaxlm.cli.options import Device, Dtype, columns, note, open_model
from jaxlm.core.errors import ConfigError, whole
from jaxlm.eval import solve as solving
from jaxlm.eval.named_reward import open_reward
from jaxlm.eval.tasks import TASKS, Task, open_data
from jaxlm.hf.bundle import Bundle, load
from jaxlm.search.base import Steps
from jaxlm.search.methods import METHODS, Request, method

HEAD = ["method", "budget", "problems", "failed", "unanswered", "accuracy", "tokens", "seconds"]
DataSource = Annotated[str, tyro.conf.arg(metavar="FILE.jsonl")]
Out = Annotated[Path, tyro.conf.arg(metavar="RESULTS.jsonl")]


def run(
    model: str, data: DataSource, out: Out, method: tuple[str, ...] = ("particle-filter",),
    particles: tuple[int, ...] = (32,), prm: str | None = None, aggregate: str = "last",
    task: str | None = None, limit: int | None = None, batch: int = 8, rows: int | None = None,
    temperature: float = 0.8, max_steps: int = 40, max_new_tokens: int | None = None,
    cache: str = "dense", seed: int = 0, retry_failed: bool = False,
    device: Device | None = None, dtype: Dtype | None = None,
) -> None:
    """Answer the problems of a file, and say how many are right; a stopped run goes on.

    Args:
      model: a model folder, a hub id such as org/name, or "tiny", the bundled model.
      data: a file of JSON lines with fields prompt, problem or question, and answer; or
        easy, medium or hard (sums for the bundled model), math500 or gsm8k (from JAXLM_DATA).
      out: JSON lines, a record a problem, written as each is done; plot beside it as .png.
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
      cache: how keys and values are kept, as in `jaxlm generate`.
      seed: of the sampling; with a problem's id it fixes its answer.
      retry_failed: solve again what failed in an earlier run.
      device: where to run; default what jax finds.
      dtype: of the parameters; default float32 on a CPU, the checkpoint's own elsewhere.
    """
    jobs = jobs_of(method, particles, prm)
    for name, number in (("batch", batch), ("rows", rows)):
        if number is not None:
            whole(name, number)
    bundle = open_model(model, device, dtype)
    found = open_data(data, bundle.tokenizer, task, limit, seed)
    for line, reason in found.wrong:
        note(f"{data} line {line} is left out: {reason}")
    kind = TASKS[found.task]
    most = max_new_tokens or (112 if found.task == "arithmetic" else 1024)
    settings = {"model": model, "data": data, "task": found.task, "prm": prm, "seed": seed,
                "aggregate": aggregate, "temperature": temperature, "max_steps": max_steps,
                "max_new_tokens": most, "cache": cache, "dtype": dtype}
    with ExitStack() as stack:
        request = Request(
            bundle, reward_of(prm, bundle, found.task, aggregate, max_steps),
            temperature=temperature,
            steps=Steps(kind.delimiters, max_steps=max_steps, max_new_tokens=most), cache=cache,
            rows=rows, **reading(kind, stack))
        results = solving.Results(out, settings)
        stack.callback(results.close)
        solve_all(found.problems, request, jobs, results, seed, batch, retry_failed)
    names = {problem.id for problem in found.problems}
    asked = [record for (name, count, _), record in results.records.items()
             if record["id"] in names and solving.Job(name, count) in jobs]
    show(asked, results, out)


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


def reward_of(
    prm: str | None, bundle: Bundle, task: str, aggregate: str, max_steps: int
) -> Any:
    """The reward that --prm names."""
    if prm is None:
        return None
    if prm.partition(":")[0] == "arithmetic" and task != "arithmetic":
        raise ConfigError(f"--prm arithmetic knows the sums alone, and the task is {task}; name a "
                          "process reward model, or a function as module:function")
    return open_reward(prm, bundle, load, aggregate, max_steps)


def reading(kind: Task, stack: ExitStack) -> dict[str, Any]:
    """How final answers are taken out and compared."""
    from jaxlm.rewards.answers import Judge, extract, same

    take = lambda text: extract(text, kind.how)
    return {"extract": take, "equal": stack.enter_context(Judge()) if kind.symbolic else same}


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


def show(records: list[dict[str, Any]], results: solving.Results, out: Path) -> None:
    """The table on stdout, and the plot of everything in the file."""
    rows = solving.summary(records)
    percent = lambda share: "-" if share is None else (
        f"{100 * share.value:.1f} ± {100 * share.error:.1f} %")
    print(columns([HEAD, *([r.method, r.particles, r.problems, r.failed, r.unanswered,
                            percent(r.accuracy), round(r.tokens), round(r.seconds, 2)]
                           for r in rows)]))
    for record in records:
        if "failed" in record:
            note(f"problem {record['id']} failed: {record['failed']}")
    drawn = solving.budget_plot(solving.summary(list(results.records.values())))
    if drawn is not None:
        picture = out.with_suffix(".png")
        temporary = picture.with_name(f".{picture.name}.{os.getpid()}")
        temporary.write_bytes(drawn)
        os.replace(temporary, picture)
        note(f"{out} and {picture} written")
