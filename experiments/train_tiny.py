"""Trains the bundled model and writes it as a Hugging Face folder.

Command: python experiments/train_tiny.py --out experiments/results/train_tiny/cpu.json
Hardware: 2 CPU cores, 4 GB; a GPU shortens it.
Minutes: TODO; a stopped run goes on from the last checkpoint in --work.
Expected: TODO

Muon on packed rows of 4,096 tokens: first short recall and easy sums, then longer ones, and every
fifth batch recall at up to 1,024 tokens. Text that cannot be guessed weighs a twentieth.
"""

import argparse
import os
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")

from experiments import _harness
from experiments.tiny_data import Mix

MATCH = Mix((16, 128), recall=1.0, lengths=(48, 96), asking=(0.6, 0.8))
SHORT = Mix((16, 256), recall=0.35, lengths=(48, 256), asking=(0.3, 0.6))
SUMS = replace(SHORT, recall=0.2)
LONG = Mix((4, 1024), recall=1.0, lengths=(256, 1024), asking=(0.3, 0.5))
STEPS, DECAY = 1230, 530
SMOKE = Mix((2, 128), recall=0.5, lengths=(48, 96))


def curriculum(step: int) -> Mix:
    """Recall alone until it is learnt, then sums with it; later every sixth batch a long one."""
    if step < 440:
        return MATCH
    if step >= 650 and step % 6 == 5:
        return LONG
    return SHORT if step < 658 else SUMS


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Train, write the folder, report the run."""
    from experiments.tiny_training import Recipe, fit, model_config, write_folder
    from jaxlm.models.lm import LM, count_params

    lm, recipe = LM(model_config()), Recipe(curriculum, args.steps, args.decay, seed=args.seed)
    if args.smoke:
        lm = LM(model_config(dim=32, layers=2, ffn=64))
        recipe = Recipe(lambda step: SMOKE, steps=6, decay=2, warmup=2, seed=args.seed)
        scratch = Path(tempfile.mkdtemp())
        args.work, args.model = scratch / "work", scratch / "model"
    params, summary = fit(lm, recipe, args.work)
    write_folder(lm, params, args.model)
    size = sum(file.stat().st_size for file in args.model.iterdir())
    return {"parameters": count_params(lm), "folder_bytes": size, **summary}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What to write and for how long to train."""
    parser.add_argument("--model", type=Path, default=Path("build/tiny"),
                        help="folder to write; it ships as jaxlm/bundled/tiny")
    parser.add_argument("--work", type=Path, default=Path("build/train_tiny"),
                        help="folder of checkpoints")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--decay", type=int, default=DECAY, help="last steps, of falling rates")


if __name__ == "__main__":
    _harness.run(__file__, __doc__, measure, add_arguments)
