"""Makes the models that later experiments need, outside the wheel: sizes, checkpoints, siblings.

Command: python experiments/make_models.py --out experiments/results/make_models/cpu.json
Hardware: 2 CPU cores, 4 GB; a GPU shortens it.
Minutes: about 5 hours in all on 2 idle cores, by the bundled run's time a token; `--only NAME`
  makes one. A stopped run goes on where it was; what is finished is not made again.
Expected: every folder loads; siblings beat the model they come from on their own skill's loss.

FOLDER/small and FOLDER/large are trained as the bundled model is, FOLDER/SIZE/step_N are six
checkpoints along the run. FOLDER/minus, times and recall are the bundled model fine-tuned on one
skill each: subtraction alone, products of larger numbers, and recall alone.
"""

import argparse
import os
import tempfile
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")

from experiments import _harness
from experiments.tiny_data import Mix
from experiments.train_tiny import SMOKE, STEPS, curriculum
from jaxlm.eval.arithmetic import Level

SIZES = {"small": dict(dim=96, layers=8, ffn=256), "large": dict(dim=256, layers=12, ffn=704)}
MINUS = Level(terms=(3, 5), signs="-", max_total=99)
TIMES = Level(terms=(1, 2), products=(1, 1), factor=(20, 99), max_total=999)
SKILLS = {
    "minus": Mix(recall=0.0, levels=((MINUS, 1.0),)),
    "times": Mix(recall=0.0, levels=((TIMES, 1.0),)),
    "recall": Mix(recall=1.0, lengths=(64, 256)),
}
CHECKPOINTS, SIBLING_STEPS = 6, 300


@dataclass(frozen=True)
class Plan:
    """How long each kind of run is."""

    steps: int = STEPS
    sibling_steps: int = SIBLING_STEPS

    @property
    def marks(self) -> list[int]:
        """The steps after which a size's checkpoints are written; the last is the end."""
        return [self.steps * i // CHECKPOINTS for i in range(1, CHECKPOINTS + 1)]


def make_size(name: str, folder: Path, plan: Plan, smoke: bool, seed: int) -> dict[str, Any]:
    """One size, with checkpoints along the run."""
    from experiments.tiny_training import Recipe, fit, model_config, write_folder
    from jaxlm.models.lm import LM, count_params

    shape = dict(dim=32, layers=2, ffn=64) if smoke else SIZES[name]
    lm = LM(model_config(**shape))
    recipe = Recipe((lambda step: SMOKE) if smoke else curriculum, plan.steps, plan.steps * 2 // 5,
                    warmup=min(40, plan.steps // 3), seed=seed)
    marks = {n: partial(write_folder, lm, folder=folder / name / f"step_{n}") for n in plan.marks}
    params, summary = fit(lm, recipe, folder / ".work" / name, marks=marks)
    write_folder(lm, params, folder / name / "final")
    return {"parameters": count_params(lm), "checkpoints": plan.marks, **summary}


def make_sibling(name: str, base: str, folder: Path, plan: Plan, smoke: bool,
                 seed: int) -> dict[str, Any]:
    """The bundled model, fine-tuned on one skill at a tenth of the rate it was trained with."""
    import jax.numpy as jnp

    from experiments.tiny_training import Recipe, fit, held_out_loss, write_folder
    from jaxlm.hf.bundle import load

    bundle = load(base, dtype=jnp.float32)
    mix = SKILLS[name]
    if smoke:
        mix = Mix((2, 128), mix.recall, (48, 96), mix.levels)
    recipe = Recipe(lambda step: mix, plan.sibling_steps, plan.sibling_steps // 2, warmup=2,
                    lr=0.002, adam_lr=0.0003, seed=seed + 1)
    params, summary = fit(bundle.lm, recipe, folder / ".work" / name, params=bundle.params)
    write_folder(bundle.lm, params, folder / name)
    losses = {"loss_before": held_out_loss(bundle.lm, bundle.params, mix, seed),
              "loss_after": held_out_loss(bundle.lm, params, mix, seed)}
    return {**losses, **summary}


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Make what is asked for and is not there yet."""
    plan = Plan()
    if args.smoke:
        plan, args.folder = Plan(CHECKPOINTS, 2), Path(tempfile.mkdtemp())
    settings = {"steps": plan.steps, "sibling_steps": plan.sibling_steps, "seed": args.seed,
                "base": str(args.base)}
    part = _harness.Resumable(args.folder / "made.json", settings)
    makers = {name: partial(make_size, name) for name in SIZES}
    makers |= {name: partial(make_sibling, name, args.base) for name in SKILLS}
    chosen = [args.only] if args.only else list(makers)
    return {name: part(name, lambda name=name: makers[name](args.folder, plan, args.smoke,
                                                            args.seed))
            for name in chosen}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Where to write, and what."""
    parser.add_argument("--folder", type=Path, default=Path("build/models"))
    parser.add_argument("--base", default="tiny", help="the model that the siblings start from")
    parser.add_argument("--only", choices=[*SIZES, *SKILLS])


if __name__ == "__main__":
    _harness.run(__file__, __doc__, measure, add_arguments)
