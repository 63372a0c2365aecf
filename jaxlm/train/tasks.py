"""Tasks learnt one after another, and how much of each is left at the end."""

import json
import pathlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm.core.errors import CheckpointError, ConfigError, DataError
from jaxlm.core.tree import flatten
from jaxlm.decode.choices import Choices
from jaxlm.hf.bundle import Bundle, load
from jaxlm.train import setup
from jaxlm.train.bases import bases_of, matrix, wide
from jaxlm.train.batches import Batches, place
from jaxlm.train.config import Config, changes, hash_of, settings
from jaxlm.train.data import open_examples
from jaxlm.train.evaluation import evaluate
from jaxlm.train.leak import leaks
from jaxlm.train.log import write_json
from jaxlm.train.loop import Fitted, train
from jaxlm.train.osft import Osft
from jaxlm.train.stopping import Stopped, leave_if_asked, listening
from jaxlm.train.tuning import Tuning


@dataclass(frozen=True)
class Task:
    """Files to learn from, and held-out ones to be judged by.

    Args: choices: all answers there are, as the files spell them (`completion`): the task is also
      judged by how often the right one is the likeliest of these.
    """

    name: str
    train: tuple[str, ...]
    eval: tuple[str, ...]
    choices: tuple[str, ...] = ()


@dataclass(frozen=True)
class Course:
    """What became of tasks learnt in turn.

    Args:
      accuracy: `a[i][j]` of task j after i tasks, from 0, the model as it came; whole answers.
      losses: the same of the loss.
      others: name of other held-out text -> perplexity after 0, 1, ... tasks.
      notes: what the tuning measured of itself at the end of each task; with `subspaces`, the
        shares of its change as `subspaces/protected_share`, `subspaces/free_share`.
      chosen: as `accuracy`, of the right answer being the likeliest of the task's choices; empty
        unless every task has some.
      measures: name -> what was asked of the model after 0, 1, ... tasks.
    """

    tasks: tuple[str, ...]
    accuracy: list[list[float]]
    losses: list[list[float]]
    others: dict[str, list[float]]
    notes: list[dict[str, float]]
    stopped: bool = False
    bundle: Bundle | None = field(default=None, repr=False)
    chosen: list[list[float]] = field(default_factory=list)
    measures: dict[str, list[float]] = field(default_factory=dict)

    @property
    def average(self) -> float:
        """`mean_j a[T][j]`."""
        return average_accuracy(self.accuracy)

    @property
    def backward(self) -> float:
        """Backward transfer."""
        return backward_transfer(self.accuracy)

    @property
    def forward(self) -> float:
        """Forward transfer."""
        return forward_transfer(self.accuracy)

    @property
    def forgetting(self) -> float:
        """Forgetting."""
        return forgetting(self.accuracy)


def average_accuracy(accuracy: Sequence[Sequence[float]]) -> float:
    """`mean_j a[T][j]`, of a matrix (T + 1, T) whose row i is after i tasks.

    >>> average_accuracy([[0, 0], [1.0, 0.5], [0.5, 1.0]])
    0.75
    """
    return float(np.mean(accuracy[-1]))


def backward_transfer(accuracy: Sequence[Sequence[float]]) -> float:
    """`1 / (T - 1) sum_{j < T} a[T][j] - a[j][j]`; negative where something is forgotten.

    Source: 1706.08840, equation 3.

    >>> backward_transfer([[0, 0], [1.0, 0.5], [0.5, 1.0]])
    -0.5
    """
    a = np.asarray(accuracy, float)
    learnt = np.diagonal(a[1:])  # task j just after it was learnt
    return float(np.mean((a[-1] - learnt)[:-1])) if len(learnt) > 1 else 0.0


def forward_transfer(accuracy: Sequence[Sequence[float]]) -> float:
    """`1 / (T - 1) sum_{j > 1} a[j - 1][j] - a[0][j]`: what the tasks before bring a new one.

    >>> forward_transfer([[0, 0], [1.0, 0.5], [0.5, 1.0]])
    0.5
    """
    a = np.asarray(accuracy, float)
    before = np.diagonal(a)  # task j just before it is learnt
    return float(np.mean((before - a[0])[1:])) if a.shape[1] > 1 else 0.0


def forgetting(accuracy: Sequence[Sequence[float]]) -> float:
    """`1 / (T - 1) sum_{j < T} max_{1 <= i < T} a[i][j] - a[T][j]`.

    Source: 1801.10112, equation 3.

    >>> forgetting([[0, 0], [1.0, 0.5], [0.5, 1.0]])
    0.5
    """
    a = np.asarray(accuracy, float)
    return float(np.mean((a[1:-1].max(0) - a[-1])[:-1])) if a.shape[1] > 1 else 0.0


@listening()
def continual(
    config: Config, tasks: Sequence[Task], *, bundle: Bundle | None = None,
    tunings: Sequence[Tuning] | None = None, replay: bool = False,
    others: Mapping[str, Sequence[str]] | None = None,
    measures: Mapping[str, Callable[[Bundle], float]] | None = None,
    subspaces: Osft | None = None,
) -> Course:
    """Learn tasks in turn, the tuning started anew at each, and judge every task after each.

    Args:
      config: of every task, but for its files; `config.out` gets a folder a task, and
        `course.json`. `steps` or `epochs` are those of one task.
      bundle: the model to begin with; default `config.model`.
      tunings: one a task, where they differ; default `config.tuning` for all. OSFT's scheduled
        ranks are told which task it is, unless `tasks` is set.
      replay: mix `config.data.replay_share` of the earlier tasks' samples into each.
      others: name -> jsonl files of held-out text whose perplexity is followed.
      measures: name -> a function of the model, asked when the tasks are judged: what else should
        not be lost.
      subspaces: measure how much of each task's change lies in the subspaces that this would have
        protected, whatever the tuning is; an SVD a task.
    Returns: Course; `stopped` where a SIGTERM came, and the same call goes on.
    Raises: as `fit`; `jaxlm.train.stopping.Stopped` where a SIGTERM came before the first task;
      CheckpointError where `config.out` holds a course of another model, tasks or settings.
    """
    if len({task.name for task in tasks}) < len(tasks) or not tasks:
        raise ConfigError(f"tasks are {[t.name for t in tasks]}; expected one or more, each with "
                          "a name of its own")
    if tunings is not None and len(tunings) != len(tasks):
        raise ConfigError(f"got {len(tunings)} tunings for {len(tasks)} tasks; expected one each")
    mesh = setup.mesh_of(config)
    bundle = load(config.model, mesh=mesh) if bundle is None else bundle
    judge = Judge(bundle, config, mesh, tasks, dict(others or {}), dict(measures or {}))
    judged = Judged(pathlib.Path(config.out).expanduser() / "course.json", {
        **settings(config), "steps": config.steps, "epochs": config.epochs,
        "tasks": [{name: value for name, value in asdict(t).items() if value} for t in tasks],
        "tunings": [str(t) for t in tunings or ()], "replay": replay,
        **({"measures": sorted(measures)} if measures else {}),
        "the model's weights": setup.weights_hash(bundle.params), **judge.digests})
    judged.add(0, judge, bundle)
    previous, notes, stopped = None, [], False
    for number in range(len(tasks)):
        own = _of_task(config, tasks, number, tunings, replay)
        try:
            batches = judge.calibration(tasks[:number], own)
            fitted = train(partial(replace, bundle), own, previous, batches,  # the same arrays
                           start=hash_of([judged.about, number]))
            if stopped := fitted.stopped:
                break
            notes.append(_notes(fitted) | (moved(bundle, fitted.bundle, subspaces)
                                           if subspaces is not None else {}))
            bundle, previous = fitted.bundle, fitted.tuned
            judged.add(number + 1, judge, bundle)
        except Stopped:
            stopped = True
            break
    rows, each = judged.rows, lambda what: [
        [row["tasks"][task.name][what] for task in tasks] for row in judged.rows]
    return Course(
        tuple(task.name for task in tasks),
        each("accuracy"), each("loss"),
        {name: [row["others"][name]["perplexity"] for row in rows] for name in others or {}},
        notes, stopped, bundle, each("chosen") if all(task.choices for task in tasks) else [],
        {name: [row["measures"][name] for row in rows] for name in measures or {}})


def _of_task(
    config: Config, tasks: Sequence[Task], number: int, tunings: Sequence[Tuning] | None,
    replay: bool,
) -> Config:
    """The settings of one task."""
    earlier = tuple(file for task in tasks[:number] for file in task.train) if replay else ()
    task = tasks[number]
    data = replace(config.data, train=task.train, eval=task.eval, replay=earlier,
                   calibration=() if number else config.data.calibration)
    tuning = config.tuning if tunings is None else tunings[number]
    if isinstance(tuning, Osft) and tuning.ranks == "scheduled" and tuning.tasks == 1:
        tuning = replace(tuning, task=number + 1, tasks=len(tasks))
    return config.replace(data=data, tuning=tuning,
                          out=str(pathlib.Path(config.out) / f"{number:02}_{task.name}"))


def _notes(fitted: Fitted) -> dict[str, float]:
    """What the tuning measured, of the last evaluation."""
    common = {"loss", "perplexity", "accuracy", "token_accuracy"}
    return {name: value for name, value in fitted.evaluation.items() if name not in common}


def moved(old: Bundle, new: Bundle, subspaces: Osft) -> dict[str, float]:
    """`subspaces/protected_share` and `subspaces/free_share` of what became of a model's weights,
    by the subspaces that OSFT would protect of it as it was; see `jaxlm.train.leak.leaks`."""
    _, frozen = subspaces.start(old.lm, old.params, jax.random.key(0))
    found = _moved(old.params, new.params, {"bases": frozen.get("bases", {})})
    return {f"subspaces/{name}": float(found[name])
            for name in ("protected_share", "free_share") if name in found}


@jax.jit  # one program: operation by operation, several processes could wait for each other
def _moved(old: Any, new: Any, frozen: Any) -> dict[str, jax.Array]:
    was, now = flatten(old), flatten(new)
    pair = lambda path: (wide(matrix(path, now[path])), wide(matrix(path, was[path])))
    return leaks({path: (pair(path)[0] - pair(path)[1], pair(path)[1], basis)
                  for path, basis in bases_of(frozen).items()})


class Judge:
    """Every task's held-out samples, tokenised once."""

    def __init__(
        self, bundle: Bundle, config: Config, mesh: Any, tasks: Sequence[Task],
        others: dict[str, Sequence[str]], measures: dict[str, Callable[[Bundle], float]],
    ):
        self.choices = {task.name: Asked.of(bundle, config, task) for task in tasks if task.choices}
        self.measures = measures
        self.bundle, self.config, self.mesh = bundle.replace(params={}), config, mesh
        self.tasks = {task.name: self._open(task.eval) for task in tasks}
        self.others = {name: self._open(files) for name, files in others.items()}

    @property
    def digests(self) -> dict[str, str]:
        """What tells the held-out files from others."""
        return {f"the held-out text of {what} {name!r}": batches.examples.digest[:16]
                for what, found in (("task", self.tasks), ("others", self.others))
                for name, batches in found.items()}

    def _open(self, files: Sequence[str], **how: Any) -> Batches:
        data = self.config.data
        examples = open_examples(files, setup.reader(self.bundle, self.config), data.window,
                                 data.long, setup.line_by_line)
        return setup.plain(examples, self.config, self.mesh, **{"packed": data.pack, **how})

    def __call__(self, bundle: Bundle) -> dict[str, Any]:
        """One row of the course. Raises: Stopped after a SIGTERM."""
        dtype = jnp.dtype(self.config.dtype)
        lm = setup.training_lm(bundle, self.config, self.mesh)

        def each(found: dict[str, Batches]) -> dict[str, dict[str, float]]:
            row = {}
            for name, batches in found.items():
                leave_if_asked()
                row[name] = evaluate(lm, bundle.params, batches, self.mesh, dtype)
            return row

        row: dict[str, Any] = {"tasks": each(self.tasks), "others": each(self.others)}
        for name, asked in self.choices.items():
            leave_if_asked()
            row["tasks"][name]["chosen"] = asked(bundle)
        if self.measures:
            row["measures"] = {name: float(of(bundle)) for name, of in self.measures.items()}
        return row

    def calibration(
        self, earlier: Sequence[Task], config: Config
    ) -> list[dict[str, Any]] | None:
        """Samples of the task before, one a row; before the first those that the settings name."""
        if not earlier:
            return None if config.data.calibration else []
        found = self._open(earlier[-1].train, packed=False, most=config.data.calibration_samples)
        return [place(found[i], config.rows, self.mesh) for i in range(len(found))]


@dataclass(frozen=True)
class Asked:
    """A task's held-out questions, each with all of its choices."""

    choices: Choices
    right_N: np.ndarray

    @classmethod
    def of(cls, bundle: Bundle, config: Config, task: Task) -> "Asked":
        """Raises: DataError for a sample whose answer is none of the choices."""
        prompts, right, known = [], [], list(task.choices)
        for file in task.eval:
            text = pathlib.Path(file).expanduser().read_text(encoding="utf-8")
            for number, line in enumerate(text.splitlines(), 1):
                record = json.loads(line) if line.strip() else None
                if record is None:
                    continue
                if record.get("completion") not in known or "prompt" not in record:
                    raise DataError(f"{file}:{number} has completion {record.get('completion')!r}; "
                                    f"expected one of task {task.name!r}'s choices {known}")
                prompts.append(record["prompt"])
                right.append(known.index(record["completion"]))
        end = setup.reader(bundle, config).end_id
        return cls(Choices.encode(bundle, prompts, known, end), np.array(right))

    def __call__(self, bundle: Bundle) -> float:
        """How often the right choice is the likeliest."""
        return float((self.choices.logprobs(bundle).argmax(1) == self.right_N).mean())


class Judged:
    """Rows of a course on disk, so that a resumed one judges nothing twice.

    Args: about: what the rows depend on; CheckpointError where those of the file are of another.
    """

    def __init__(self, path: pathlib.Path, about: dict[str, Any]):
        self.path, self.about = path, json.loads(json.dumps(about))
        self.rows: list[dict[str, Any]] = []
        if path.exists():
            found = json.loads(path.read_text(encoding="utf-8"))
            then = found.get("about")
            if listed := ("an earlier version wrote it" if then is None else
                          changes(then, self.about)):
                raise CheckpointError(f"{path} is of another model, or of other tasks or settings: "
                                      f"{listed}; choose another `out`, or remove the folder")
            self.rows = found["rows"]

    def add(self, number: int, judge: Judge, bundle: Bundle) -> None:
        """Row `number`, unless it is there."""
        if len(self.rows) <= number:
            self.rows.append(judge(bundle))
            write_json(self.path, {"about": self.about, "rows": self.rows})
