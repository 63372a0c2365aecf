"""Does masking tokens of worked solutions help a model that learns from few of them?

The bundled model is tuned on sums of a kind that it has not seen: four or five numbers of 50 to 99,
so that totals pass the 299 that it has seen at most. It learns from a few of
them with their worked steps, once reading the solutions as they are and once with a share of their
tokens masked in what it reads, not in what it is to say (`data.mask_thoughts`; 2403.02178, which
saw it help with word problems, whose tokens are words; here they are digits). All runs take as many
steps, some nine times over the sums. Judged by held-out sums: the share of whole worked solutions
that greedy decoding would write as they should be.

- `accuracy`: by share masked, the mean over seeds after each third of the run.
- `gain_points`: with masking less without, at the end, paired over seeds, in points, with Student's
  interval.

Command: python experiments/masked_thought.py --out experiments/results/masked_thought/cpu.json
Hardware: 1 CPU core, 2 GB
Minutes: 15 on a core; a stopped run goes on where it was
Expected: masking loses: about two in three right without, one in five with a fifth masked
"""

import argparse
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

import jaxlm
from experiments import _harness
from experiments.recipe_stats import paired
from experiments.text_model import write_lines
from jaxlm.eval.arithmetic import Level, sample
from jaxlm.hf.bundle import Bundle
from jaxlm.train import Config, Data, Optimizer, fit

LEVEL = Level(terms=(4, 5), number=(50, 99), signs="+", max_total=499)
SHARES: tuple[float, ...] = (0.0, 0.2, 0.4)
SAMPLES, TEST = 128, 256
STEPS, WINDOW, ROWS, RATE = 72, 128, 8, 3e-4



def sums(count: int, split: str, seed: int) -> list[dict[str, str]]:
    """Different sums with their worked solutions, as lines of a data file.

    >>> sums(1, "test", 0)[0]["completion"].splitlines()[-1][:2]
    'A:'
    """
    rng = np.random.default_rng([seed, split == "test"])
    found: dict[str, str] = {}
    while len(found) < count:
        problem = sample(rng, LEVEL, split)
        found[problem.prompt] = problem.solution
    return [{"prompt": prompt, "completion": found[prompt]} for prompt in found]


def train(bundle: Bundle, share: float, count: int, seed: int, steps: int, test: int,
          ) -> dict[str, Any]:
    """One run: accuracy and loss on held-out sums, after each third of it."""
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        lines = write_lines(sums(count, "train", seed), folder / "train.jsonl")
        held_out = write_lines(sums(test, "test", 0), folder / "test.jsonl")
        fitted = fit(bundle, Config(
            out=str(folder / "run"), batch=ROWS, steps=steps, seed=seed, export="none",
            data=Data((lines,), (held_out,), WINDOW, mask_thoughts=share),
            optimizer=Optimizer(rate=RATE, warmup=2),
            evaluate_every=max(1, steps // 3)))
        if fitted.stopped:
            raise SystemExit("stopped; the same command goes on with this run")
    rows = [row for row in fitted.history if "eval/loss" in row]
    return {"accuracy": [row["eval/accuracy"] for row in rows],
            "loss": [row["eval/loss"] for row in rows], "step": [row["step"] for row in rows],
            "seconds": time.perf_counter() - began}


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """All runs, then differences over seeds."""
    shares, count, steps, test = SHARES, SAMPLES, STEPS, TEST
    if args.smoke:
        args.folder, args.seeds = Path(tempfile.mkdtemp()), 2
        shares, count, steps, test = SHARES[:2], 16, 3, 16
    bundle = jaxlm.load("tiny", dtype=jnp.float32)
    keep = _harness.Resumable(args.folder / "masked_thought.json", {
        "samples": count, "steps": steps, "rate": RATE, "rows": ROWS, "test": test})
    runs: dict[float, list[dict[str, Any]]] = {share: [] for share in shares}
    cases = [(args.seed + i, share) for i in range(args.seeds) for share in shares]
    for seed, share in tqdm(cases, desc="runs", disable=None):
        compute = partial(train, bundle, share, count, seed, steps, test)
        runs[share].append(keep(f"share={share} seed={seed}", compute))
    last = {share: [100 * run["accuracy"][-1] for run in some] for share, some in runs.items()}
    return {"level": repr(LEVEL), "samples": count, "test": test, "steps": steps, "rate": RATE,
            "accuracy": {f"share {share}": np.mean([run["accuracy"] for run in some], 0)
                         for share, some in runs.items()},
            "gain_points": {f"share {share}": paired(last[0.0], last[share])
                            for share in shares if share},
            "runs": {f"share {share}": [{key: run[key] for key in ("step", "accuracy", "loss")}
                                        for run in some] for share, some in runs.items()}}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """How often, and where finished runs are kept."""
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--folder", type=Path, default=Path("build/masked_thought"))


if __name__ == "__main__":
    _harness.run(__file__, __doc__, measure, add_arguments)
