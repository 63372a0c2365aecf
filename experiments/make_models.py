"""Makes the models that later experiments need, outside the wheel: sizes, checkpoints, siblings.

Command: python experiments/make_models.py --out experiments/results/make_models/cpu.json
Hardware: 2 CPU cores, 4 GB; a GPU shortens it.
Minutes: 5.3 processor hours in all (small 1.0, large 3.5, each sibling 0.3), so 2.7 hours on 2 idle
  cores at the least, by `--pace`, which times a few steps of each and makes nothing; `--only NAME`
  makes one. A stopped run goes on where it was; what is finished is not made again.
Expected: every folder loads; siblings beat the model they come from on their own skill's loss. Not
  run whole yet: only `--smoke` and `--pace` were

FOLDER/small/step_N and FOLDER/large/step_N are trained as the bundled model is, six checkpoints
along each run, the last its end. FOLDER/minus, times and recall are the bundled model fine-tuned
on one skill each: three-digit subtraction, products of larger numbers, and recall alone.
"""

import argparse
import tempfile
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import jax.numpy as jnp

from experiments import _harness
from experiments.tiny_data import Mix
from experiments.tiny_training import (
    Recipe,
    fit,
    held_out_loss,
    model_config,
    pace,
    short_run,
    write_folder,
)
from experiments.train_tiny import RATE, SMOKE, curriculum
from jaxlm.eval.arithmetic import Level
from jaxlm.hf.bundle import load
from jaxlm.models.lm import LM, count_params

SIZES = {"small": dict(dim=96, layers=8, ffn=256), "large": dict(dim=256, layers=12, ffn=704)}
MINUS = Level(terms=(3, 5), signs="-", number=(1, 299), max_total=999)
TIMES = Level(terms=(1, 2), products=(1, 1), factor=(20, 99), max_total=999)
SKILLS = {
    "minus": Mix(recall=0.0, levels=((MINUS, 1.0),)),
    "times": Mix(recall=0.0, levels=((TIMES, 1.0),)),
    "recall": Mix(recall=1.0, lengths=(64, 256)),
}
CHECKPOINTS, SIBLING_STEPS = 6, 300


def make_size(name: str, folder: Path, smoke: bool, seed: int) -> dict[str, Any]:
    """One size, trained as the bundled model is, with checkpoints along the run."""
    lm, recipe = LM(model_config(**SIZES[name])), Recipe(curriculum, RATE, seed=seed)
    if smoke:
        lm = LM(model_config(dim=32, layers=2, ffn=64))
        recipe = Recipe(lambda step: SMOKE, short_run(CHECKPOINTS), seed=seed)
    at = [recipe.steps * i // CHECKPOINTS for i in range(1, CHECKPOINTS + 1)]
    marks = {n: partial(write_folder, lm, folder=folder / name / f"step_{n}") for n in at}
    _, summary = fit(lm, recipe, folder / ".work" / name, marks=marks)
    return {"parameters": count_params(lm), "checkpoints": at, **summary}


def sibling_recipe(name: str, seed: int, steps: int = SIBLING_STEPS, **change: Any) -> Recipe:
    """A short run on one skill at a fifth of the bundled model's rate."""
    mix = replace(SKILLS[name], **change)
    return Recipe(lambda step: mix, short_run(steps), lr=0.002, adam_lr=0.0006, seed=seed + 1)


def make_sibling(name: str, base: str, folder: Path, smoke: bool, seed: int) -> dict[str, Any]:
    """The bundled model, fine-tuned on one skill."""
    bundle, recipe = load(base, dtype=jnp.float32), sibling_recipe(name, seed)
    if smoke:
        recipe = sibling_recipe(name, seed, steps=3, shape=(2, 128), lengths=(48, 96))
    mix = recipe.mix(0)
    params, summary = fit(bundle.lm, recipe, folder / ".work" / name, params=bundle.params)
    write_folder(bundle.lm, params, folder / name)
    return {"loss_before": held_out_loss(bundle.lm, bundle.params, mix, seed),
            "loss_after": held_out_loss(bundle.lm, params, mix, seed), **summary}


def paces(seed: int) -> dict[str, Any]:
    """The processor hours of everything, before any of it is made."""
    sizes = {name: pace(LM(model_config(**SIZES[name])), Recipe(curriculum, RATE, seed=seed))
             for name in SIZES}
    return sizes | {name: pace(LM(model_config()), sibling_recipe(name, seed)) for name in SKILLS}


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Make what is asked for and is not there yet."""
    if args.pace:
        return {"pace": paces(args.seed)}
    if args.smoke:
        args.folder = Path(tempfile.mkdtemp())
    made = _harness.Resumable(args.folder / "made.json", {"seed": args.seed, "base": args.base})
    makers = {name: partial(make_size, name) for name in SIZES}
    makers |= {name: partial(make_sibling, name, args.base) for name in SKILLS}
    chosen = [args.only] if args.only else list(makers)
    return {name: made(name, partial(makers[name], args.folder, args.smoke, args.seed))
            for name in chosen}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Where to write, and what."""
    parser.add_argument("--folder", type=Path, default=Path("build/models"))
    parser.add_argument("--base", default="tiny", help="the model that the siblings start from")
    parser.add_argument("--pace", action="store_true", help="make nothing: measure what it costs")
    parser.add_argument("--only", choices=[*SIZES, *SKILLS])


if __name__ == "__main__":
    _harness.run(__file__, __doc__, measure, add_arguments)
