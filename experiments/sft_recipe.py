"""Which settings of fine-tuning matter, and do its first steps tell how a run will end?

36 runs of a small pre-trained text model on 1,020 real instructions: three batches by three rates
by a constant rate, one after a warm-up, a linear and a cosine fall. All see the same samples
twice, so a large batch takes fewer steps. Quality is the loss on the answers of 255 held-out
instructions. The model has read the 1,020 once, among ten megabytes of other text; never the 255.

- `early_loss_spearman`, `early_gradnorm_spearman`: rank correlation over runs of the mean loss and
  gradient norm of the first steps with the final quality (2412.13337 saw a higher loss and a lower
  norm end better, so above and below 0). `_within`: among runs of one batch and one rate at a time,
  because both move the early numbers and the end. Runs of one batch and rate differ little at
  first, so that intervals and p draw and permute those of a batch and rate together.
- `compute_saved_fraction`, `regret`: had the worse half by `rank_runs` been stopped after these
  steps, of all runs and of those of one batch.
- `effects`: differences of the final loss between two values of a setting, paired over all else.
- `stacked_minus_phased`: the held-out loss of all samples shuffled together less that of three
  phases in turn, over seeds. The phases follow LAB's order (2403.01081): what is asked from
  knowledge, then what works on something given, then free writing.

Command: python experiments/sft_recipe.py --out experiments/results/sft_recipe/cpu.json
Hardware: 1 CPU core, 2 GB; the text model is made first where --folder has none
Minutes: 30 on a core, and text_model.py's; a stopped run goes on where it was
Expected: no early correlation whose interval leaves 0 out; third_quality_spearman near 0.7;
    stacked_minus_phased near -0.08 nats a token
"""

import argparse
import itertools
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from tqdm import tqdm

from experiments import _harness, text_model
from experiments.recipe_stats import Trace, correlation, paired, signal, stopped
from experiments.task_texts import instructions
from jaxlm.hf.bundle import Bundle
from jaxlm.train import Config, Data, Optimizer, fit

BATCHES, RATES, WARMUPS = (2, 8, 32), (1e-4, 5e-4, 2.5e-3), (0.0, 0.1)
Schedule = Literal["constant", "linear", "cosine"]
SCHEDULES = get_args(Schedule)
WINDOW, EPOCHS, SEEDS = 128, 2, 5
EARLY = (8, 4, 16, 0.1)  # steps that are looked at, the first for the headline; a share of the run
KEPT = 80  # steps of each run whose numbers are kept

PHASES = ("knowledge", "given", "writing")
ASKS = {"what", "who", "which", "where", "when", "why", "how", "is", "are", "name", "define",
        "list", "provide", "find", "identify", "give", "look", "explain", "describe"}
WRITES = {"generate", "create", "write", "compose", "design", "suggest", "make", "plan", "tell",
          "construct", "brainstorm", "come", "develop"}
LONG = 25  # words of an answer that is taken as written freely


def phase_of(chat: dict[str, Any]) -> str:
    """The phase of an instruction, by its form alone.

    "given": it has a second line, a text to work on, or asks for a given thing to be converted,
    translated and the like. Else "writing" where it asks for something to be made or its answer is
    long; else "knowledge".

    >>> turn = lambda role, text: {"role": role, "content": text}
    >>> phase_of({"messages": [turn("user", "Name a gas."), turn("assistant", "Neon.")]})
    'knowledge'
    >>> phase_of({"messages": [turn("user", "Convert 2 km to m."), turn("assistant", "2000")]})
    'given'
    """
    asked, answer = (turn["content"] for turn in chat["messages"])
    first = asked.split()[0].lower().strip("'\",.:")
    if "\n" in asked.strip() or first not in ASKS | WRITES and len(answer.split()) <= LONG:
        return "given"
    return "writing" if first in WRITES or len(answer.split()) > LONG else "knowledge"


@dataclass(frozen=True)
class Setting:
    """One run. `warmup` is a share of its steps."""

    batch: int
    rate: float
    warmup: float = 0.0
    schedule: Schedule = "constant"
    phased: bool = False
    seed: int = 0

    @property
    def name(self) -> str:
        """What its part is called."""
        return " ".join(f"{key}={value}" for key, value in asdict(self).items())


MIDDLE = Setting(8, 5e-4)  # where the two orders are compared, fixed beforehand


def grid() -> list[Setting]:
    """Every batch and rate by every schedule, and by a warm-up before a constant rate."""
    found = (Setting(*values)
             for values in itertools.product(BATCHES, RATES, WARMUPS, SCHEDULES))
    return [s for s in found if not (s.warmup and s.schedule != "constant")]


@dataclass(frozen=True)
class Files:
    """jsonl files: the phases' samples, and held-out ones."""

    train: tuple[str, ...]
    held_out: str
    samples: dict[str, int]


def write_files(folder: Path, data: Path, few: int | None = None) -> Files:
    """The instructions by phase, and those held out."""
    train, held_out = (part[:few] for part in instructions(data))
    phases = {phase: [chat for chat in train if phase_of(chat) == phase] for phase in PHASES}
    paths = [text_model.write_lines(lines, folder / f"{i}_{phase}.jsonl")
             for i, (phase, lines) in enumerate(phases.items())]
    return Files(tuple(paths), text_model.write_lines(held_out, folder / "held_out.jsonl"),
                 {phase: len(lines) for phase, lines in phases.items()}
                 | {"held_out": len(held_out)})


def config_of(setting: Setting, files: Files, out: str, epochs: int, steps: int) -> Config:
    """A run as the trainer takes it; `steps` are those that the epochs make."""
    return Config(
        out=out, data=Data(files.train, (files.held_out,), WINDOW, phased=setting.phased),
        optimizer=Optimizer(rate=setting.rate, schedule=setting.schedule,
                            warmup=round(setting.warmup * steps)),
        batch=setting.batch, epochs=epochs, evaluate_every=max(1, steps // 3), seed=setting.seed,
        export="none")


def train(bundle: Bundle, setting: Setting, files: Files, epochs: int, rows: int) -> dict[str, Any]:
    """One run: its first steps, held-out losses through it, the last and the lowest of them."""
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as out:
        config = config_of(setting, files, out, epochs, -(-rows // setting.batch))
        fitted = fit(bundle, config)
        if fitted.stopped:
            raise SystemExit("stopped; the same command goes on with this run")
    steps = [row for row in fitted.history if "loss" in row]
    held_out = [row["eval/loss"] for row in fitted.history if "eval/loss" in row]
    return {**asdict(setting), "steps": fitted.step, "final": held_out[-1], "best": min(held_out),
            "held_out": held_out, "token_accuracy": fitted.evaluation["token_accuracy"],
            "loss": [row["loss"] for row in steps[:KEPT]],
            "grad_norm": [row["grad_norm"] for row in steps[:KEPT]],
            "seconds": time.perf_counter() - began}


def rows_of(bundle: Bundle, files: Files, epochs: int) -> int:
    """Rows that the samples fill, about: all samples shuffled together, every epoch."""
    from jaxlm.train.setup import sources

    return len(sources(bundle, config_of(replace(MIDDLE, batch=1), files, "", epochs, 4),
                       None).train)


def effects(runs: Sequence[dict[str, Any]], key: str = "final") -> dict[str, dict[str, float]]:
    """The second value's loss less the first's, for two values of each setting, else the same."""
    found = {}
    for factor, values in (("batch", BATCHES), ("rate", RATES), ("warmup", WARMUPS),
                           ("schedule", SCHEDULES)):
        others = [f for f in ("batch", "rate", "warmup", "schedule") if f != factor]
        at = {(run[factor], *(run[f] for f in others)): run[key] for run in runs}
        cells = sorted({where[1:] for where in at}, key=str)
        for a, b in itertools.combinations(values, 2):
            both = [cell for cell in cells if (a, *cell) in at and (b, *cell) in at]
            if len(both) > 1:
                found[f"{factor} {b} - {a}"] = paired([at[a, *c] for c in both],
                                                      [at[b, *c] for c in both])
    return found


def best_of(runs: Sequence[dict[str, Any]], factor: str, key: str = "final") -> dict[str, Any]:
    """The best run of each value of a setting, all else free."""
    found = {}
    for value in dict.fromkeys(run[factor] for run in runs):
        best = min((run for run in runs if run[factor] == value), key=lambda run: run[key])
        found[str(value)] = {name: best[name] for name in (
            "batch", "rate", "warmup", "schedule", "steps", "final", "best", "token_accuracy")}
    return found


def means(runs: Sequence[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """The mean final loss by rate: of a batch's runs, and of a schedule's."""
    found: dict[str, dict[str, float]] = {}
    for run in runs:
        of = f"{run['schedule']}{' after a warm-up' if run['warmup'] else ''}"
        for row in (f"batch {run['batch']}", of):
            same = [other["final"] for other in runs if other["rate"] == run["rate"] and (
                other["batch"] == run["batch"] if row != of else
                (other["schedule"], other["warmup"]) == (run["schedule"], run["warmup"]))]
            found.setdefault(row, {})[str(run["rate"])] = float(np.mean(same))
    return found


def signals(runs: Sequence[dict[str, Any]], seed: int) -> dict[str, Any]:
    """What the first steps tell, at each window; the headline's window is spread out on top."""
    names = [Setting(run["batch"], run["rate"], run["warmup"], run["schedule"]).name
             for run in runs]
    traces = {name: Trace(run["loss"], run["grad_norm"], run["steps"], run["final"])
              for name, run in zip(names, runs, strict=True)}
    groups = {by: [run[by] for run in runs] for by in ("batch", "rate")}
    blocks = [(run["batch"], run["rate"]) for run in runs]
    found = {f"window {window}": signal(traces, groups, blocks, window, seed) for window in EARLY}
    apart = {}
    for batch in dict.fromkeys(groups["batch"]):
        mine = {name: traces[name] for name, at in zip(names, groups["batch"], strict=True)
                if at == batch}
        own = [block for block in blocks if block[0] == batch]
        apart[str(batch)] = signal(mine, {}, own, EARLY[0], seed)
    third = correlation([-run["held_out"][0] for run in runs], [-run["final"] for run in runs],
                        (), blocks, seed)
    first = found[f"window {EARLY[0]}"]
    ends = {name: trace.final for name, trace in traces.items()}
    order = sorted(names, key=lambda name: runs[names.index(name)]["held_out"][0])
    cost = {name: 1 - max(1, t.steps // 3) / t.steps for name, t in traces.items()}
    return {"windows": found, "of_one_batch": apart, "third_quality_spearman": third,
            "by_third_quality": stopped(order, ends, cost)} | {
        key: first[key]["rho"] for key in ("early_loss_spearman", "early_gradnorm_spearman",
                                           "rank_runs_spearman")} | {
        key: first[key] for key in ("compute_saved_fraction", "regret", "regret_at_random")}


def orders(keep: Callable[[Setting], dict[str, Any]], seeds: int) -> dict[str, Any]:
    """Stacked and phased from the same seeds: each sample as often in both."""
    both = {phased: [keep(replace(MIDDLE, phased=phased, seed=1 + i)) for i in range(seeds)]
            for phased in (False, True)}
    last = {phased: [run["final"] for run in runs] for phased, runs in both.items()}
    found = paired(last[True], last[False])
    return {"stacked_minus_phased": found["mean"], "orders": found | {
        "stacked": last[False], "phased": last[True], "setting": asdict(MIDDLE),
        "best": paired([run["best"] for run in both[True]], [run["best"] for run in both[False]]),
        "stacked_spread": float(np.std(last[False], ddof=1))}}


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """All runs, then what they say."""
    if args.smoke:
        args.folder = Path(tempfile.mkdtemp())
    bundle = text_model.model(args.folder, args.data, smoke=args.smoke)
    few, epochs, seeds = (48, 1, 2) if args.smoke else (None, EPOCHS, SEEDS)
    files = write_files(args.folder / "instructions", args.data, few)
    rows = rows_of(bundle, files, epochs)
    keep = _harness.Resumable(args.folder / "sft_recipe.json", {
        "epochs": epochs, "samples": files.samples, "rows": rows})
    settings = grid()
    if args.smoke:
        settings = [s for s in settings if s.batch > 2 and s.schedule != "linear"
                    and s.rate == RATES[1]]
    bar = tqdm(total=len(settings) + 2 * seeds, desc="runs", disable=None)

    def one(setting: Setting) -> dict[str, Any]:
        run = keep(setting.name, lambda: train(bundle, setting, files, epochs, rows))
        bar.update()
        return run

    runs = [one(setting) for setting in settings]
    ordered = orders(one, seeds)
    return {"samples": files.samples, "epochs": epochs, "rows": rows, "runs_count": len(runs),
            "steps": {str(run["batch"]): run["steps"] for run in runs}, "early_window": EARLY[0],
            **signals(runs, args.seed), **ordered,
            "effects": effects(runs), "effects_best": effects(runs, "best"),
            "mean_by_rate": means(runs),
            **{f"best_by_{factor}": best_of(runs, factor)
               for factor in ("batch", "rate", "schedule")}, "runs": [table(run) for run in runs]}


def table(run: dict[str, Any]) -> dict[str, Any]:
    """A run as the result lists it: the means of its first steps in place of each of them."""
    apart = ("loss", "grad_norm", "seconds")
    return {key: value for key, value in run.items() if key not in apart} | {
        f"early_{key}": float(np.mean(run[key][:EARLY[0]])) for key in apart[:2]}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Where the text model and the finished runs are."""
    parser.add_argument("--folder", type=Path, default=Path("build/text_model"))


if __name__ == "__main__":
    _harness.run(__file__, __doc__, measure, add_arguments)
