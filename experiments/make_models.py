"""Makes the models that later experiments need, outside the wheel: sizes, checkpoints, siblings.

Command: python experiments/make_models.py --out experiments/results/make_models/cpu.json
Hardware: 2 CPU cores, 4 GB; a GPU shortens it.
Minutes: 111 of processor time in all, by --pace. The committed run took 81 (small), 80
  (large), 19, 10 and 18 (siblings), two at a time beside other work. A stopped run goes on where
  it was. What is finished is not made again, unless its recipe or its base has changed or a folder
  of it is gone. `--only NAME` makes one; several such may run at once.
Expected: every folder loads; all siblings beat the model they come from on their own skill (else
  they are named under `not_better`). Of 64 hard sums small gets 17 %, large 89 %

FOLDER/small/step_N is trained as the bundled model is. FOLDER/large/step_N is the bundled model
with a copy behind each of its layers, at first silent, trained on. Both leave six checkpoints, the
last their end. FOLDER/minus, times and recall are the bundled model fine-tuned on one skill each:
three-digit subtraction, products of larger numbers, and recall alone. Every checkpoint gets a
held-out loss, the last of each run a few problems of each kind. `--pace` makes nothing: it times
a few steps of each.
"""

import argparse
import hashlib
import json
import shutil
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments import _harness
from experiments.tiny_data import Mix
from experiments.tiny_training import (
    Recipe,
    described,
    fit,
    held_out_loss,
    init,
    model_config,
    pace,
    short_run,
    write_folder,
)
from experiments.train_tiny import LAST, LONG, RATE, SMOKE, curriculum
from jaxlm.core.tree import Params, flatten, map_with_path
from jaxlm.decode.generate import generate
from jaxlm.eval import arithmetic
from jaxlm.eval.arithmetic import Level
from jaxlm.eval.skills import share, solve_arithmetic, solve_recall
from jaxlm.hf.bundle import Bundle, load
from jaxlm.models.lm import LM, count_params

SMALL = dict(dim=96, layers=8, ffn=256)
SIZES = ("small", "large")
GROWN_STEPS = 500
MINUS = Level(terms=(3, 5), signs="-", number=(1, 299), max_total=999)
TIMES = Level(terms=(1, 2), products=(1, 1), factor=(20, 99), max_total=999)
SKILLS = {
    "minus": Mix(recall=0.0, levels=((MINUS, 1.0),)),
    "times": Mix(recall=0.0, levels=((TIMES, 1.0),)),
    "recall": Mix(recall=1.0, lengths=(64, 256)),
}
CHECKPOINTS, SIBLING_STEPS = 6, 300
PROBLEMS, DOCUMENTS, LENGTHS = 64, 24, (64, 256, 1024)


@dataclass(frozen=True)
class Part:
    """One model to make: what it depends on, in a few digits, and the folders that it leaves."""

    name: str
    digest: str
    folders: tuple[Path, ...]
    make: Callable[[], dict[str, Any]]

    @property
    def lost(self) -> list[Path]:
        """The folders that are not there."""
        return [folder for folder in self.folders if not (folder / "config.json").exists()]


def digest_of(*what: Any) -> str:
    """A short name for plain values."""
    return hashlib.sha256(json.dumps(_harness.plain(what)).encode()).hexdigest()[:12]


def grown(base: Bundle) -> tuple[LM, Params]:
    """The base with a copy behind each layer that adds nothing yet: the same function, twice as
    deep (block expansion, arXiv 2401.02415, section 3.2).

    Raises: ValueError where a layer has a bias, which a copy would add.
    """
    if biased := [path for path in flatten(base.params) if path.endswith("bias")]:
        raise ValueError(f"got {biased[0]} in the base; expected no biases: a copy would add it")
    silent = lambda path, leaf: leaf * (not path.endswith(("/o/kernel", "/down/kernel")))
    layers = base.lm.config.num_layers
    params = {name: leaf for name, leaf in base.params.items() if not name.startswith("layers_")}
    for i in range(layers):
        layer = base.params[f"layers_{i}"]
        params |= {f"layers_{2 * i}": layer, f"layers_{2 * i + 1}": map_with_path(silent, layer)}
    return LM(replace(base.lm.config, num_layers=2 * layers)), params


def late(step: int) -> Mix:
    """The end of the bundled model's curriculum: wide sums and recall, each sixth batch long."""
    return LONG if step % 6 == 5 else LAST


def begun(name: str, args: argparse.Namespace) -> tuple[LM, Recipe, Params | None]:
    """A size's model, how it is trained, and what from where that is not from scratch."""
    lm, recipe, params = LM(model_config(**SMALL)), Recipe(curriculum, RATE, seed=args.seed), None
    if name == "large":
        lm, params = grown(load(args.base, dtype=jnp.float32))
        rate = tuple((step, 0.45 * share) for step, share in short_run(GROWN_STEPS))
        recipe = Recipe(late, rate, seed=args.seed + 1)  # other data than the base has seen
    if args.smoke:
        lm = lm if params else LM(model_config(dim=32, layers=2, ffn=64))
        recipe = Recipe(lambda step: SMOKE, short_run(CHECKPOINTS), seed=args.seed)
    return lm, recipe, params


def size(name: str, args: argparse.Namespace) -> Part:
    """One size, with checkpoints along its run."""
    lm, recipe, params = begun(name, args)
    at = [recipe.steps * i // CHECKPOINTS for i in range(1, CHECKPOINTS + 1)]
    digest = digest_of(described(lm, recipe, params), at)
    folders = {n: args.folder / name / f"step_{n}" for n in at}
    work = args.folder / ".work" / f"{name}-{digest}"
    part = Part(name, digest, tuple(folders.values()), lambda: make())

    def make() -> dict[str, Any]:
        marks = {n: partial(write_folder, lm, folder=folder) for n, folder in folders.items()}
        _, summary = fit(lm, recipe, work, params=params, marks=marks)
        if part.lost:  # the run went on behind them
            shutil.rmtree(work)
            _, summary = fit(lm, recipe, work, params=params, marks=marks)
        mix, opened = SMOKE if args.smoke else LAST, partial(load, dtype=jnp.float32)
        losses = {n: loss_of(opened(folder), mix, args.seed) for n, folder in folders.items()}
        return {"parameters": count_params(lm), "checkpoints": at, "held_out_loss": losses,
                "skills": skills(opened(folders[at[-1]]), args), **summary}

    return part


def sibling_recipe(name: str, seed: int, steps: int = SIBLING_STEPS, **change: Any) -> Recipe:
    """A short run on one skill at a fifth of the bundled model's rate."""
    mix = replace(SKILLS[name], **change)
    return Recipe(lambda step: mix, short_run(steps), lr=0.002, adam_lr=0.0006, seed=seed + 1)


def sibling(name: str, args: argparse.Namespace) -> Part:
    """The base, fine-tuned on one skill, and whether it got better at that."""
    base, recipe = load(args.base, dtype=jnp.float32), sibling_recipe(name, args.seed)
    if args.smoke:
        recipe = sibling_recipe(name, args.seed, steps=3, shape=(2, 128), lengths=(48, 96))
    digest = digest_of(described(base.lm, recipe, base.params))  # with a hash of the weights
    folder, work = args.folder / name, args.folder / ".work" / f"{name}-{digest}"

    def make() -> dict[str, Any]:
        params, summary = fit(base.lm, recipe, work, params=base.params)
        write_folder(base.lm, params, folder)
        found: dict[str, Any] = {}
        for when, bundle in (("before", base), ("after", load(folder, dtype=jnp.float32))):
            found[f"loss_{when}"] = loss_of(bundle, recipe.mix(0), args.seed)
            found[f"accuracy_{when}"] = own_skill(name, bundle, args)
        found["better"] = better(found)
        return found | {"skills": skills(load(folder, dtype=jnp.float32), args)} | summary

    return Part(name, digest, (folder,), make)


def better(found: dict[str, Any]) -> bool:
    """Whether a sibling beats its base at its own skill: by the loss, with no fewer answers right
    beyond the standard errors.

    >>> few, many = {"value": 0.25, "error": 0.05}, {"value": 0.5, "error": 0.06}
    >>> better({"loss_before": 1, "loss_after": 0.9, "accuracy_before": many,
    ...         "accuracy_after": few})
    False
    """
    before, after = found["accuracy_before"], found["accuracy_after"]
    error = float(np.hypot(before["error"], after["error"]))
    return bool(found["loss_after"] < found["loss_before"]
                and after["value"] >= before["value"] - error)


def loss_of(bundle: Bundle, mix: Mix, seed: int) -> float:
    """The held-out loss of a model as it was written, in bf16."""
    return held_out_loss(bundle.lm, bundle.params, mix, seed)


def asked(args: argparse.Namespace) -> tuple[int, int, tuple[int, ...]]:
    """Problems a level, documents a length, and the lengths."""
    return (2, 2, LENGTHS[:1]) if args.smoke else (PROBLEMS, DOCUMENTS, LENGTHS)


def skills(bundle: Bundle, args: argparse.Namespace) -> dict[str, Any]:
    """What of a few problems of every level and length is answered right, greedily."""
    problems, documents, lengths = asked(args)
    solve = partial(solve_arithmetic, bundle, problems=problems, samples=1, seed=args.seed)
    levels = list(arithmetic.LEVELS)[: 1 if args.smoke else None]
    return {"arithmetic": {level: asdict(solve(level).greedy) for level in levels},
            "recall": {n: asdict(solve_recall(bundle, n, documents=documents,
                                              seed=args.seed).accuracy) for n in lengths}}


def own_skill(name: str, bundle: Bundle, args: argparse.Namespace) -> dict[str, float]:
    """What of a sibling's own kind of problems is answered right, greedily."""
    problems, documents, lengths = asked(args)
    if SKILLS[name].recall:
        longest = max(n for n in lengths if n <= SKILLS[name].lengths[1])
        return asdict(solve_recall(bundle, longest, documents=documents, seed=args.seed).accuracy)
    rng, level = np.random.default_rng(args.seed), SKILLS[name].levels[0][0]
    drawn = [arithmetic.sample(rng, level, "test") for _ in range(problems)]
    answers = generate(bundle, [problem.prompt for problem in drawn], max_new_tokens=64)
    right = [arithmetic.check_steps(problem, answer.text).correct
             for problem, answer in zip(drawn, answers, strict=True)]
    return asdict(share(sum(right), problems))


def made(store: _harness.Resumable, part: Part) -> dict[str, Any]:
    """A part's findings; made now where it is not there whole, of this recipe and this base."""
    key = f"{part.name} {part.digest}"
    stale = [k for k in store.parts if k != key or part.lost]
    if stale:  # before their folders change
        for other in stale:
            del store.parts[other]
        _harness.write_json({"settings": store.settings, "parts": store.parts}, store.path)
    return store(key, part.make)


def paces(args: argparse.Namespace) -> dict[str, Any]:
    """The processor hours of everything, before any of it is made."""
    sizes = {name: pace(*begun(name, args)[:2]) for name in SIZES}
    return sizes | {name: pace(LM(model_config()), sibling_recipe(name, args.seed))
                    for name in SKILLS}


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Make what is asked for and is not there yet."""
    if args.pace:
        return {"pace": paces(args)}
    if not args.smoke:
        return make_all(args)
    with tempfile.TemporaryDirectory() as scratch:
        args.folder, args.base = Path(scratch), str(Path(scratch) / "base")
        lm = LM(model_config(dim=32, layers=2, ffn=64))
        write_folder(lm, init(lm, jax.random.key(args.seed)), Path(args.base))
        return make_all(args)


def store_of(name: str, args: argparse.Namespace) -> _harness.Resumable:
    """What is known of a finished part; a file each, so that several `--only` may run at once."""
    return _harness.Resumable(args.folder / ".work" / f"{name}.json", {"part": name})


def make_all(args: argparse.Namespace) -> dict[str, Any]:
    """The parts, one after another, and which siblings are no better than their base."""
    kinds = dict.fromkeys(SIZES, size) | dict.fromkeys(SKILLS, sibling)
    chosen = [args.only] if args.only else list(kinds)
    found = {name: made(store_of(name, args), kinds[name](name, args)) for name in chosen}
    worse = [name for name in chosen if not found[name].get("better", True)]
    if worse:
        print(f"no better than their base at their own skill: {', '.join(worse)}", file=sys.stderr)
    return found | {"not_better": worse}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Where to write, and what."""
    parser.add_argument("--folder", type=Path, default=Path("build/models"))
    parser.add_argument("--base", default="tiny", help="the model that the siblings start from")
    parser.add_argument("--pace", action="store_true", help="make nothing: measure what it costs")
    parser.add_argument("--only", choices=[*SIZES, *SKILLS])


if __name__ == "__main__":
    _harness.run(__file__, __doc__, measure, add_arguments)
