"""Does it forget less? Five tasks of real text in turn, fourteen ways of tuning, one table.

Command: python experiments/osft_continual.py --out experiments/results/osft_continual/cpu.json
Hardware: 2 CPU cores, 3 GB.
Minutes: 110 of one core, and 6 to 12 once for the model; a stopped run goes on where it was, and a
    second process with the same command takes a share of the courses
Expected: `accuracy` of replay 0.29, of EWC 0.15, of all others in turn about 0.1; `chosen_accuracy`
    of EWC 0.35, of replay 0.31, of all others 0.26 to 0.29

A model pre-trained here (text_model.py) learns AG News, Amazon, DBpedia, SST-2 and Yelp in three
orders, named after the published ones that they are variants of, with three seeds: of the samples,
their order and what starts at random. The answer is the label's text, right when all of it is the
likeliest (greedy decoding gives it then: the two are one measure); `chosen_`: when it is the
likeliest of its task's labels. Each row's rate is the best of three to five by the average of that
on validation parts, in another order with another seed.

- `accuracy`, `backward`, `forward`, `forgetting`: mean over the courses with a 95 % interval.
- `learnt`: accuracy on each task just after it; `lost_share`: what of that, above chance where
  answers are chosen, is lost at the end, of all courses of a row together.
- `accuracy_minus_olora_points`, `forgetting_minus_olora_points`: paired over the courses; the same
  against `matrices`, the row "full, matrices alone"; against `same_rate`, that row at the rate of
  the OSFT row, which then differs in the subspaces alone; against `replay`. `_over_seeds`: with
  intervals of three seeds' means, for the courses of a seed share texts.
- `osft_forgets_least`: whether an OSFT row forgets less than every other, that is no reference.
- `general`: perplexity and token accuracy of Wikipedia and of instructions' answers, `format` of
  the replies, before and after; the share of the updates in protected and free subspaces, and of
  every row's in those that OSFT with uniform ranks would have protected.
"""

import argparse
import fcntl
import hashlib
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats
from tqdm import tqdm

from experiments import _harness, text_model
from experiments.continual_courses import Length, course
from experiments.continual_rows import ROWS
from experiments.continual_tasks import ORDERS, TUNING_ORDER, Files, Sizes, prepare
from experiments.task_texts import SOURCES
from jaxlm.core.device import enable_compilation_cache
from jaxlm.hf.bundle import Bundle
from jaxlm.train.tasks import backward_transfer, forgetting, forward_transfer

SEEDS, TUNING_SEED = 3, 100
FURTHER = 2  # times that rates beyond an edge are tried
SIZES, LENGTH = Sizes(train=1000, test=80, other=30), Length(epochs=1)
HEADLINE, OTHER = "osft importance", "olora"  # compared; chosen before any course was run
AGAINST = {OTHER: OTHER, "matrices": "full, matrices alone",
           "same_rate": "full, matrices alone, {rate:g}", "replay": "replay"}
REFERENCES = ("alone", "joint")
ANY = "any"  # the order of what has none


@dataclass(frozen=True)
class Cell:
    """One course: a row of the table, an order by its name, a seed, a rate."""

    row: str
    order: str
    seed: int
    rate: float

    @property
    def key(self) -> str:
        """A name for its file."""
        return f"{self.row}, {self.order}, seed {self.seed}, rate {self.rate:g}"


class Courses:
    """Computes cells; each is kept in a file of its own, so that processes can share the work."""

    def __init__(self, bundle: Bundle, args: argparse.Namespace):
        self.bundle, self.data, self.work = bundle, args.data, args.work
        self.sizes, self.length = (Sizes(8, 4, 2), Length(1)) if args.smoke else (SIZES, LENGTH)
        weights = (args.model / "model" / "model.safetensors").read_bytes()
        self.about = {"model": hashlib.sha256(weights).hexdigest(), "sizes": asdict(self.sizes),
                      "length": asdict(self.length)}
        self.files: dict[int, Files] = {}

    def __call__(self, cell: Cell, wait: bool = True) -> dict[str, Any] | None:
        """The course of a cell; None where another process is at it and is not waited for."""
        path = self.work / "courses" / f"{cell.key}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path.with_suffix(".lock"), "w") as lock:
            try:  # let go of by the system, however this process ends
                fcntl.flock(lock, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            except BlockingIOError:
                return None
            stored = _harness.Resumable(path, self.about | {"row": str(ROWS[cell.row])})
            return stored("course", lambda: self._run(cell))

    def all(self, cells: list[Cell], words: str) -> dict[Cell, dict[str, Any]]:
        """The courses of all cells, shared with other processes in the same folder."""
        for cell in tqdm(cells, desc=words, disable=None):
            self(cell, wait=False)
        return {cell: found for cell in cells if (found := self(cell))}

    def _run(self, cell: Cell) -> dict[str, Any]:
        seed, row = cell.seed, ROWS[cell.row]
        if seed not in self.files:
            judged = "validation" if seed == TUNING_SEED else "test"
            self.files[seed] = prepare(self.work / "texts" / str(seed), self.data,
                                       self.bundle.tokenizer, self.sizes, seed, judged)
        order = (ORDERS | {"tuning": TUNING_ORDER, ANY: tuple(SOURCES)})[cell.order]
        found = course(row, self.bundle, self.files[seed], order, cell.rate, seed, self.length)
        found["chance"] = {name: 1 / len(self.files[seed].tasks[name].choices) for name in order}
        return {name: rounded(value) for name, value in found.items()}


def rounded(value: Any, digits: int = 6) -> Any:
    """Numbers to so many significant digits, in lists and dicts."""
    if isinstance(value, dict):
        return {key: rounded(item, digits) for key, item in value.items()}
    if isinstance(value, list):
        return [rounded(item, digits) for item in value]
    return float(f"{value:.{digits}g}") if isinstance(value, float) else value


def tuned(run: "Courses", rows: Iterable[str]) -> dict[Cell, dict[str, Any]]:
    """Every row at its rates, and beyond an edge that is the best, at most `FURTHER` times."""
    found = run.all(tuning_cells(rows), "rates")
    for _ in range(FURTHER):
        best = best_rates(found)
        further = {row: ROWS[row].beyond(rate, [cell.rate for cell in found if cell.row == row])
                   for row, rate in best.items()}
        if not any(further.values()):
            break
        found |= run.all([Cell(row, "tuning", TUNING_SEED, rate)
                          for row, rate in further.items() if rate], "rates beyond")
    return found


def tuning_cells(rows: Iterable[str]) -> list[Cell]:
    """Every row at each of its rates, in an order and with a seed that are not scored."""
    return [Cell(row, "tuning", TUNING_SEED, rate) for row in rows for rate in ROWS[row].rates
            if len(ROWS[row].rates) > 1]


def scored_cells(
    rates: dict[str, float], orders: Iterable[str], seeds: Iterable[int]
) -> list[Cell]:
    """Every row in each order with each seed; what does not depend on the order, once a seed."""
    return [Cell(row, order, seed, rate) for seed in seeds for row, rate in rates.items()
            for order in (orders if ROWS[row].kind == "course" else (ANY,))]


def average(found: dict[str, Any], score: str = "accuracy") -> float:
    """Average of a score over the tasks at the end of a course."""
    return float(np.mean(found[score][-1]))


def best_rates(tuned: dict[Cell, dict[str, Any]]) -> dict[str, float]:
    """The rate of each row with the best average of chosen answers; of equals the lowest.

    Whole answers do not tell rates apart: of them nearly all but those of the newest task are lost.
    """
    best: dict[str, Cell] = {}
    for cell in sorted(tuned, key=lambda cell: cell.rate):
        if cell.row not in best or (
                average(tuned[cell], "chosen") > average(tuned[best[cell.row]], "chosen")):
            best[cell.row] = cell
    return {row: cell.rate for row, cell in best.items()}


def interval(values: Iterable[float]) -> dict[str, float]:
    """Mean, 95 % interval by Student's t, and standard deviation of a few values.

    >>> {name: round(value, 2) for name, value in interval([1.0, 2.0, 3.0]).items()}
    {'mean': 2.0, 'low': -0.48, 'high': 4.48, 'sd': 1.0}
    """
    x = np.asarray(list(values), float)
    sd = float(x.std(ddof=1)) if len(x) > 1 else 0.0
    half = float(stats.t.ppf(0.975, len(x) - 1)) * sd / len(x)**0.5 if len(x) > 1 else 0.0
    return {"mean": float(x.mean()), "low": float(x.mean() - half),
            "high": float(x.mean() + half), "sd": sd}


def summary(scored: dict[Cell, dict[str, Any]]) -> dict[str, Any]:
    """The table: of each metric the rows' means and intervals, and what is paired."""
    rows = list(dict.fromkeys(cell.row for cell in scored))
    turns = [row for row in rows if ROWS[row].kind == "course"]
    of = lambda row: [found for cell, found in scored.items() if cell.row == row]
    values = scores(scored, rows, turns, "accuracy", "")
    values |= scores(scored, rows, turns, "chosen", "chosen_")
    found: dict[str, Any] = {}
    for name, by in values.items():
        spread = {row: interval(x) for row, x in by.items()}
        found[name] = {row: one["mean"] for row, one in spread.items()}
        found[f"{name}_spread"] = spread
    for score, prefix in (("accuracy", ""), ("chosen", "chosen_")):
        chances = lambda row: [[one["chance"][task] for task in one["order"]] for one in of(row)]
        found[f"{prefix}lost_share"] = {row: lost_share(
            [one[score] for one in of(row)], chances(row) if prefix else ()) for row in turns}
    rates = {cell.row: cell.rate for cell in scored}
    return found | paired(values, turns, rates) | {"general": general(scored, turns)}


def scores(
    scored: dict[Cell, dict[str, Any]], rows: list[str], turns: list[str], score: str, prefix: str
) -> dict[str, dict[str, list[float]]]:
    """What is made of one of the two scores: metric -> row -> a value a course."""
    of = lambda row: [found for cell, found in scored.items() if cell.row == row]
    found = {f"{prefix}accuracy": {row: [average(one, score) for one in of(row)] for row in rows}}
    figures: dict[str, Callable[[dict[str, Any]], float]] = {
        "forgetting": lambda one: forgetting(one[score]),
        "backward": lambda one: backward_transfer(one[score]),
        "forward": lambda one: forward_transfer(one[score]),
        "learnt": lambda one: learnt(one[score])}
    return found | {prefix + name: {row: [figure(one) for one in of(row)] for row in turns}
                    for name, figure in figures.items()}


def learnt(accuracy: list[list[float]]) -> float:
    """Mean accuracy on each task but the last, just after it was learnt.

    >>> learnt([[0.0, 0.0], [0.5, 0.0], [0.25, 1.0]])
    0.5
    """
    return float(np.mean([accuracy[j + 1][j] for j in range(len(accuracy[0]) - 1)]))


def lost_share(
    matrices: Sequence[list[list[float]]], chances: Sequence[Sequence[float]] = ()
) -> float:
    """What of `learnt`, less chance, is gone at the end, of some courses together; 0 of nothing.

    Not course by course: where little more than chance was learnt, a share of it says nothing.

    >>> lost_share([[[0.0, 0.0], [0.5, 0.0], [0.25, 1.0]]])
    0.5
    >>> lost_share([[[0.25, 0.25], [0.75, 0.25], [0.5, 1.0]]], [[0.25, 0.25]])
    0.5
    """
    by_chance = np.mean([chance[:-1] for chance in chances]) if len(chances) else 0.0
    had = float(np.mean([learnt(one) for one in matrices]) - by_chance)
    return -float(np.mean([backward_transfer(one) for one in matrices])) / had if had > 0 else 0.0


def paired(
    values: dict[str, dict[str, list[float]]], turns: list[str], rates: dict[str, float]
) -> dict[str, Any]:
    """Differences of the same courses, in points: every row and some others; who forgets least.

    `same_rate`: of OSFT's rows alone, with the control at the rate of the row. The rows of a metric
    are by seed and then by order: `over_seeds` has the interval of the three seeds' means.
    """
    found: dict[str, Any] = {}
    for name in ("accuracy", "forgetting", "chosen_accuracy", "chosen_forgetting"):
        by = values[name]
        for short, other in AGAINST.items():
            pairs = {row: other.format(rate=rates[row]) for row in turns
                     if short != "same_rate" or row.startswith("osft")}
            gaps = {row: 100 * (np.array(by[row]) - np.array(by[to])) for row, to in pairs.items()
                    if to in by and to != row}
            if not gaps:
                continue
            found[f"{name}_minus_{short}"] = {row: interval(x) for row, x in gaps.items()}
            found[f"{name}_minus_{short}_over_seeds"] = {
                row: interval(x.reshape(-1, len(ORDERS)).mean(1)) for row, x in gaps.items()
                if len(x) % len(ORDERS) == 0}
            if HEADLINE in gaps:
                found[f"{name}_minus_{short}_points"] = float(gaps[HEADLINE].mean())
    for prefix in ("", "chosen_"):
        means = {row: float(np.mean(values[f"{prefix}forgetting"][row])) for row in turns}
        least = min(means, key=means.__getitem__)
        found |= {f"{prefix}least_forgetting": least,
                  f"{prefix}osft_forgets_least": least.startswith("osft")}
    return found | {"headline": HEADLINE}


def general(scored: dict[Cell, dict[str, Any]], turns: list[str]) -> dict[str, Any]:
    """Other held-out text before and after the courses, and where the updates lie.

    Perplexities spread over orders of magnitude: their mean is the geometric one.
    """
    found: dict[str, Any] = {}
    for row in turns:
        mine = [one for cell, one in scored.items() if cell.row == row]
        for text in mine[0]["others"]:
            for what in mine[0]["others"][text]:
                ends = np.array([[one["others"][text][what][i] for i in (0, -1)] for one in mine])
                mean = stats.gmean if what == "perplexity" else np.mean
                before, after = map(float, mean(ends, axis=0))
                found.setdefault(f"{text}_{what}", {})[row] = {"before": before, "after": after}
        ends = np.array([[one["format"][i] for i in (0, -1)] for one in mine]).mean(0)
        found.setdefault("format", {})[row] = dict(zip(("before", "after"), map(float, ends),
                                                       strict=True))
        for name in ("protected_share", "free_share", "leak_left", "leak_right",
                     "subspaces/protected_share"):
            seen = [note[name] for one in mine for note in one["notes"] if name in note]
            if seen:
                worst = max if name.startswith("leak") else np.mean
                found.setdefault(name, {})[row] = float(worst(seen))
    return found


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """The rates, then the table."""
    if args.smoke:
        args.work = args.model = Path(tempfile.mkdtemp())
    enable_compilation_cache(args.work / "programs")
    bundle = text_model.model(args.model, args.data, smoke=args.smoke)
    run = Courses(bundle, args)
    rows = [OTHER, HEADLINE, "joint"] if args.smoke else list(ROWS)
    orders, seeds = (["tuning"], (0,)) if args.smoke else (list(ORDERS), range(args.seeds))
    tried = {} if args.smoke else tuned(run, rows)
    rates = {row: ROWS[row].rates[0] for row in rows} | best_rates(tried)
    scored = run.all(scored_cells(rates, orders, seeds), "courses")
    return summary(scored) | {
        "rates": rates, "rates_tried": {row: sorted(cell.rate for cell in tried if cell.row == row)
                                         or ROWS[row].rates for row in rows},
        "tuning_chosen": {cell.key: average(one, "chosen") for cell, one in tried.items()},
        "tuning_accuracy": {cell.key: average(one) for cell, one in tried.items()},
        "settings": run.about | {"orders": ORDERS, "tuning_order": TUNING_ORDER,
                                  "seeds": list(seeds)},
        "courses": {cell.key: one for cell, one in scored.items()}}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Where it works, and which part of it."""
    parser.add_argument("--work", type=Path, default=Path("build/osft_continual"),
                        help="the texts, and each course once it is done")
    parser.add_argument("--seeds", type=int, default=SEEDS, help="how many, from 0 on")
    parser.add_argument("--model", type=Path, default=Path("build/text_model"),
                        help="the folder of text_model.py; trained there if it is not yet")


if __name__ == "__main__":
    _harness.run(__file__, __doc__, measure, add_arguments)
