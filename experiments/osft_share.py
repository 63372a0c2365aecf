"""Why OSFT forgets what it forgets here: two tasks in turn, over the share u that may change.

A model pre-trained here (text_model.py) learns DBpedia and then AG News, both by OSFT with uniform
ranks and all else frozen, as in osft_continual.py, at two rates.

- `first_learnt`, `first_kept`, `second`: accuracy on DBpedia before and after AG News, on AG News.
- `choice_learnt`, `choice_kept`, `choice_chance`: how often the right one of DBpedia's labels is
  the likeliest of them, before and after AG News, and by chance: what is known, whatever is said.
- `input_free`: of the inputs of DBpedia's held-out texts to each projection, the share of their
  squared norm that lies outside of the directions protected in the second task: on that part the
  second task's updates act. `input_free_random`: of inputs without any direction of their own.
- `update_protected`: of what the first task changed, the share of the squared norm that the second
  task may not touch; `update_protected_random`: of a change without any direction of its own.

Command: python experiments/osft_share.py --out experiments/results/osft_share/cpu.json
Hardware: 2 CPU cores, 3 GB
Minutes: 15 of one core, and 12 once for the model; a stopped run goes on with the next course
Expected: `first_kept` about 0 at every u, though at u = 0.05 nearly all of `update_protected`;
    `choice_kept` above chance, but for u = 1 at the higher rate
"""

import argparse
import json
import tempfile
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments import _harness, text_model
from experiments.continual_tasks import WINDOW, Files, Sizes, prepare
from jaxlm.core.tree import flatten
from jaxlm.hf.bundle import Bundle
from jaxlm.train import Config, Data, Optimizer, Osft, Task, continual, setup
from jaxlm.train.bases import bases_of, matrix
from jaxlm.train.data import open_examples
from jaxlm.train.leak import leaks
from jaxlm.train.ranks import kept
from jaxlm.train.tasks import Asked

SEEDS, FIRST, SECOND = 3, "dbpedia", "ag"
RATES = (3e-3, 1e-3)  # what osft_continual.py chose for uniform ranks, and for other rows of OSFT
SHARES = {RATES[0]: (0.05, 0.25, 0.5, 1.0), RATES[1]: (0.25, 1.0)}
SIZES = Sizes(train=1000, test=200, other=1)
BATCHES, ASKED = 16, 100  # inputs looked at; samples of `choice`


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Every share with every seed, and means; finished courses are kept beside `--out`."""
    kept = (args.out or Path("osft_share.json")).with_suffix(".parts")
    if args.smoke:
        args.model = Path(tempfile.mkdtemp())
        kept = args.model / "parts"
    bundle = text_model.model(args.model, args.data, smoke=args.smoke)
    shares, seeds = ({RATES[0]: (0.5,)}, 1) if args.smoke else (SHARES, SEEDS)
    settings = [(u, rate) for rate, some in shares.items() for u in some]
    parts = _harness.Resumable(kept, {
        "model": str(args.model), "sizes": repr(SIZES), "versions": _harness.versions(),
        "sources": _harness.sources(Path(__file__))})
    runs: dict[str, list[dict[str, float]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for seed in range(seeds):
            files = prepare(Path(folder, f"texts{seed}"), args.data, bundle.tokenizer,
                            Sizes(8, 4, 1) if args.smoke else SIZES, seed)
            for u, rate in settings:
                name = f"{u:g}, {rate:g}"
                runs.setdefault(name, []).append(parts(f"{name}, seed {seed}", partial(
                    course, bundle, files, u, rate, seed, Path(folder, f"{seed}-{u}-{rate}"))))
    parts.done()
    mean = {name: {what: float(np.mean([one[what] for one in some])) for what in some[0]}
            for name, some in runs.items()}
    return {"by_share_and_rate": mean, "seeds": seeds, "runs": runs}


def course(
    bundle: Bundle, files: Files, u: float, rate: float, seed: int, out: Path
) -> dict[str, float]:
    """Learn one task, then the other; accuracies, and where the first lies in between."""
    tuning = Osft(unfreeze_ratio=u, others="freeze")
    config = Config(tuning=tuning, batch=4, epochs=1, seed=seed, export="none",
                    optimizer=Optimizer(rate=rate, schedule="linear"), data=Data(window=WINDOW))
    first, second = files.tasks[FIRST], files.tasks[SECOND]
    between = continual(config.replace(out=f"{out}/first"), [first], bundle=bundle)
    assert between.bundle is not None
    last = continual(config.replace(out=f"{out}/second"), [second], bundle=between.bundle,
                     others={FIRST: first.eval})
    rows = json.loads((out / "second" / "course.json").read_text())["rows"]
    before, after = (row["others"][FIRST]["accuracy"] for row in (rows[0], rows[-1]))
    assert last.bundle is not None
    known = [choice(made, first, config, out) for made in (between.bundle, last.bundle)]
    return {"first_learnt": before, "first_kept": after, "second": last.accuracy[-1][0],
            "choice_learnt": known[0], "choice_kept": known[1],
            "choice_chance": 1 / len(first.choices),
            **where(tuning, bundle, between.bundle, first, config)}


def choice(bundle: Bundle, task: Task, config: Config, out: Path) -> float:
    """How often the right answer is the likeliest of the task's own, by its first samples."""
    asked = Path(task.eval[0]).read_text().splitlines(keepends=True)[:ASKED]
    (path := out / "asked.jsonl").write_text("".join(asked))
    return Asked.of(bundle, config, replace(task, eval=(str(path),)))(bundle)


def where(
    tuning: Osft, old: Bundle, new: Bundle, task: Task, config: Config
) -> dict[str, float]:
    """Shares of a task's inputs and of its change, by the directions that `new` protects."""
    _, frozen = tuning.start(new.lm, new.params, jax.random.key(0))
    was, now = flatten(old.params), flatten(new.params)
    change = {path: (matrix(path, now[path]) - matrix(path, was[path]), matrix(path, now[path]),
                     basis) for path, basis in bases_of(frozen).items()}
    noise = {path: (jax.random.normal(jax.random.key(i), x.shape), w, basis)
             for i, (path, (x, w, basis)) in enumerate(change.items())}
    sides = {path: share_of(tuning, w) for path, (_, w, _) in change.items()}
    share = lambda some: float(leaks(some)["protected_share"]) if some else 0.0
    inputs = {path: free_inputs(x, *sides[path]) for path, x in taps(new, task, config).items()
              if path in sides}
    return {"update_protected": share(change), "update_protected_random": share(noise),
            "input_free": float(np.mean(list(inputs.values()))) if inputs else 1.0,
            "input_free_random": float(np.mean([1 - k / len(u) for u, k in sides.values()]))
            if sides else 1.0}


def share_of(tuning: Osft, w: jax.Array) -> tuple[np.ndarray, int]:
    """The left singular vectors of a matrix (inputs, outputs), and how many are protected."""
    return (np.linalg.svd(np.asarray(w, np.float64), full_matrices=False)[0],
            kept(min(w.shape), 1 - tuning.unfreeze_ratio))


def free_inputs(x: np.ndarray, u: np.ndarray, k: int) -> float:
    """The share of `||x||^2` outside of the first k columns of u; x (tokens, inputs)."""
    return 1 - float(((x @ u[:, :k])**2).sum() / (x**2).sum())


def taps(bundle: Bundle, task: Task, config: Config) -> dict[str, np.ndarray]:
    """Path of a kernel -> its inputs (tokens, inputs) on a task's held-out texts."""
    examples = open_examples(list(task.eval), setup.reader(bundle, config), WINDOW)
    found: dict[str, list[np.ndarray]] = {}
    batches = setup.plain(examples, config, None, packed=True)
    for batch in (batches[i] for i in range(min(len(batches), BATCHES))):
        tokens, segments = (jnp.asarray(batch[name]) for name in ("tokens", "segments"))
        made = bundle.lm.apply(bundle.params, tokens[:, :-1], logits_at=None, want=("taps",),
                               segments_BT=segments, positions_BT=jnp.asarray(batch["positions"]))
        for name, (x, _) in (made.taps or {}).items():
            flat = np.asarray(x, np.float64).reshape(*segments.shape, -1)
            found.setdefault(f"{name}/kernel", []).append(flat[np.asarray(segments) > 0])
    return {path: np.concatenate(some) for path, some in found.items()}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Where the model is kept."""
    parser.add_argument("--model", type=Path, default=Path("build/text_model"),
                        help="the folder of text_model.py; trained there if it is not yet")


if __name__ == "__main__":
    _harness.run(__file__, __doc__, measure, add_arguments)
