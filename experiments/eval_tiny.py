"""Accuracy of a model on the two tasks: every split, with its standard error.

Command: python experiments/eval_tiny.py --out experiments/results/eval_tiny/cpu.json
Hardware: 2 CPU cores.
Minutes: 8
Expected: at temperature 0.8, 98 % on easy and medium sums; on hard ones 61 % for one sample, 86 %
  for any of 4, 97 % for any of 16; recall 99 % up to 512 tokens, 89 % at 1,024

Test problems only, written freely. An arithmetic solution is sound when its answer and every
step are right.
"""

import argparse
import datetime
import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

import jaxlm
from experiments import _harness
from experiments.tiny_card import card
from jaxlm.eval import arithmetic
from jaxlm.eval.skills import any_of, share, solve_arithmetic, solve_recall

LENGTHS = (64, 128, 256, 512, 1024)
FEW = 4  # the samples of a small search


def arithmetic_level(bundle: jaxlm.Bundle, level: str, problems: int, samples: int,
                     seed: int) -> dict[str, Any]:
    """Answers right greedily and at temperature 0.8, and what a search could win.

    `greedy_first_slips[i]`: how many greedy solutions go wrong first in step i.
    """
    result = solve_arithmetic(bundle, level, problems=problems, samples=samples, seed=seed)
    sound = share(sum(a.verdict.sound for a in result.attempts), problems)
    slips = [a.verdict.steps.index(False) for a in result.attempts if not all(a.verdict.steps)]
    found = {f"t0.8_any{n}": asdict(any_of(result.right_RP, n)) for n in (FEW, samples)}
    return {"problems": problems, "samples": samples, "greedy": asdict(result.greedy),
            "greedy_sound": asdict(sound), "greedy_steps": asdict(result.steps),
            "t0.8": asdict(result.sampled), "t0.8_majority": asdict(result.majority),
            **found, "greedy_first_slips": np.bincount(np.array(slips, int)).tolist()}


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """All splits."""
    bundle = jaxlm.load(args.model, dtype=jnp.float32)
    problems, samples, documents = args.problems, args.samples, args.documents
    lengths = LENGTHS
    if args.smoke:
        problems, samples, documents, lengths = 4, FEW, 2, LENGTHS[:1]
    metrics: dict[str, Any] = {"arithmetic": {}, "recall": {}}
    for level in arithmetic.LEVELS:
        metrics["arithmetic"][level] = arithmetic_level(bundle, level, problems, samples, args.seed)
        print(level, metrics["arithmetic"][level], flush=True)
    for length in lengths:
        result = solve_recall(bundle, length, documents=documents, seed=args.seed)
        metrics["recall"][str(length)] = {"documents": documents, **asdict(result.accuracy)}
        print(length, metrics["recall"][str(length)], flush=True)
    if args.card and not args.smoke:
        write_card(args.card, bundle, metrics)
    return metrics


def write_card(path: Path, bundle: jaxlm.Bundle, metrics: dict[str, Any]) -> None:
    """README.md of the bundled model, from these metrics and the result of its training."""
    train = json.loads((_harness.RESULTS / "train_tiny" / "cpu.json").read_text())
    path.write_text(card(train, metrics, bundle.lm.config.vocab_size,
                         f"{os.cpu_count()} cores, shared with other work",
                         str(datetime.date.today())))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Which model, and how many problems."""
    parser.add_argument("--model", default="tiny", help="'tiny', a folder or a hub id")
    parser.add_argument("--card", type=Path, help="also write the model card to this file")
    parser.add_argument("--problems", type=int, default=250, help="per level")
    parser.add_argument("--samples", type=int, default=16,
                        help=f"per problem, at temperature 0.8; at least {FEW}")
    parser.add_argument("--documents", type=int, default=100, help="per length")


if __name__ == "__main__":
    _harness.run(__file__, __doc__, measure, add_arguments)
