"""One course of the continual-learning table: a row, an order, a seed and a rate."""

import json
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from experiments.continual_rows import Row
from experiments.continual_tasks import WINDOW, Files, Format
from jaxlm.hf.bundle import Bundle
from jaxlm.train import Config, Course, Data, Optimizer, Osft, Task, continual
from jaxlm.train.tasks import Asked

HALF = Osft()  # the subspaces that every row's updates are measured by, whatever it protects


@dataclass(frozen=True)
class Length:
    """How long a task is learnt."""

    epochs: int
    batch: int = 4
    calibration: int = 64


def course(
    row: Row, bundle: Bundle, files: Files, order: tuple[str, ...], rate: float, seed: int,
    length: Length,
) -> dict[str, Any]:
    """Learn the tasks of an order; what `continual` judged, as JSON has it.

    Returns: `accuracy` (T + 1, T), of the row's kind "alone" the diagonal of it in one line, of
      "joint" its last line; `chosen` alike; `format`, `others`, `notes`, `seconds`.
    """
    began = time.perf_counter()
    tasks = [files.tasks[name] for name in order]
    with tempfile.TemporaryDirectory() as out:
        config = Config(
            out=out, tuning=row.tuning, batch=length.batch, epochs=length.epochs, seed=seed,
            export="none", optimizer=Optimizer(rate=rate, schedule="linear"),
            data=Data(window=WINDOW, calibration_samples=length.calibration,
                      calibration=(files.general,) if row.calibrated else ()))
        found = {"course": _course, "alone": _alone, "joint": _joint}[row.kind](
            row, bundle, files, tasks, config)
    return found | {"order": list(order), "seed": seed, "rate": rate,
                    "seconds": time.perf_counter() - began}


def whole(made: Course) -> Course:
    """The course, unless a SIGTERM ended it early: it is begun anew another time."""
    if made.stopped:
        raise SystemExit("stopped; courses that were done are kept, the same command goes on")
    return made


def _course(
    row: Row, bundle: Bundle, files: Files, tasks: list[Task], config: Config
) -> dict[str, Any]:
    made = whole(continual(config, tasks, bundle=bundle, tunings=row.tunings(len(tasks)),
                           replay=row.replay, others=files.others,
                           measures={"format": Format(files.asked)},
                           subspaces=HALF))
    judged = json.loads((Path(config.out) / "course.json").read_text())["rows"]
    return {"accuracy": made.accuracy, "chosen": made.chosen, "notes": made.notes,
            "format": made.measures["format"], "others": _others(judged)}


def _others(judged: list[dict[str, Any]]) -> dict[str, dict[str, list[float]]]:
    """name -> perplexity and token accuracy after 0, 1, ... tasks."""
    return {name: {what: [one["others"][name][what] for one in judged]
                   for what in ("perplexity", "token_accuracy")}
            for name in judged[0]["others"]}


def _alone(
    row: Row, bundle: Bundle, files: Files, tasks: list[Task], config: Config
) -> dict[str, Any]:
    """A model for each task, which is judged by that alone."""
    made = [whole(continual(config.replace(out=f"{config.out}/{task.name}"), [task],
                            bundle=bundle)) for task in tasks]
    return {"accuracy": [[one.accuracy[-1][0] for one in made]],
            "chosen": [[one.chosen[-1][0] for one in made]], "notes": [], "others": {}}


def _joint(
    row: Row, bundle: Bundle, files: Files, tasks: list[Task], config: Config
) -> dict[str, Any]:
    """All tasks mixed; each is judged as held-out text beside."""
    train = tuple(file for task in tasks for file in task.train)
    mixed = Task("all", train, tasks[0].eval)
    others = {task.name: task.eval for task in tasks} | files.others
    made = whole(continual(config, [mixed], bundle=bundle, others=others, measures={
        task.name: Asked.of(bundle, config, task) for task in tasks}))
    chosen = [list(line) for line in zip(*(made.measures[task.name] for task in tasks),
                                         strict=True)]
    judged = json.loads((Path(config.out) / "course.json").read_text())["rows"]
    accuracy = [[one["others"][task.name]["accuracy"] for task in tasks] for one in judged]
    kept = {name: value for name, value in _others(judged).items() if name in files.others}
    return {"accuracy": accuracy, "chosen": chosen, "notes": [], "others": kept}
