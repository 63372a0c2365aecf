"""Accuracy of a model on the two tasks: every split, with its standard error.

Command: python experiments/eval_tiny.py --out experiments/results/eval_tiny/cpu.json
Hardware: 2 CPU cores.
Minutes: TODO
Expected: TODO

Test problems only. Arithmetic is generated freely and judged by the answer and by every step.
Recall counts a query when the greedy tokens of value and newline are all right, the queries
before it answered; documents differ, so the standard error is over documents.
"""

import argparse
import datetime
import json
import os
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jaxlm
from experiments import _harness
from experiments.tiny_card import card
from jaxlm.eval import arithmetic, recall

TEMPERATURES = {"greedy": 0.0, "t0.8": 0.8}
LENGTHS = (64, 128, 256, 512, 1024)
QUERIES = 4
NEW_TOKENS = 112  # the longest worked solution has 104


def accuracy(outcomes: np.ndarray) -> dict[str, float]:
    """Mean and standard error of independent outcomes, each in [0, 1]."""
    error = float(np.std(outcomes, ddof=1) / np.sqrt(len(outcomes)))
    return {"accuracy": float(np.mean(outcomes)), "standard_error": error, "n": len(outcomes)}


def arithmetic_split(bundle: jaxlm.Bundle, level: str, temperature: float, count: int,
                     seed: int) -> dict[str, Any]:
    """Answers right, and solutions sound in every step, on `count` test problems."""
    rng = np.random.default_rng([seed, 1])
    problems = [arithmetic.sample(rng, level, "test") for _ in range(count)]
    texts: list[str] = []
    for start in range(0, count, 100):
        part = problems[start: start + 100]
        made = jaxlm.generate(bundle, [p.prompt for p in part], max_new_tokens=NEW_TOKENS,
                              sampler=jaxlm.Temperature(temperature),
                              key=jax.random.key(seed + start), max_len=192)
        texts += [g.text for g in made]
    verdicts = [arithmetic.check_steps(p, t) for p, t in zip(problems, texts, strict=True)]
    sound = [v.sound for v in verdicts]
    steps = [np.mean(v.steps) if v.steps else 0.0 for v in verdicts]
    return {**accuracy(np.array([v.correct for v in verdicts], float)),
            "sound": float(np.mean(sound)), "steps_valid": float(np.mean(steps))}


def recall_length(bundle: jaxlm.Bundle, length: int, count: int, seed: int) -> dict[str, Any]:
    """The share of queries answered right, over `count` test documents of one length."""
    rng = np.random.default_rng([seed, 2])
    documents = [recall.sample(rng, length, QUERIES, "test") for _ in range(count)]
    top = jax.jit(lambda params, ids: jnp.argmax(bundle.lm.apply(params, ids).logits, -1))
    right = np.zeros((count, QUERIES))
    for row, document in enumerate(documents):
        ids = np.zeros((1, length), np.int32)
        encoded = bundle.tokenizer.encode(document.text)
        ids[0, : len(encoded)] = encoded
        guess = np.asarray(top(bundle.params, ids))[0]
        for query in range(QUERIES):
            at = len(bundle.tokenizer.encode(document.prompt(query)))
            text = bundle.tokenizer.decode(guess[at - 1: at + 2])
            right[row, query] = recall.check_answer(document, query, text)
    return {**accuracy(right.mean(1)), "pairs": len(documents[0].pairs)}


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """All splits."""
    bundle = jaxlm.load(args.model, dtype=jnp.float32)
    problems, documents = (4, 2) if args.smoke else (args.problems, args.documents)
    lengths = LENGTHS[:2] if args.smoke else LENGTHS
    metrics: dict[str, Any] = {"arithmetic": {}, "recall": {}}
    for level in arithmetic.LEVELS:
        metrics["arithmetic"][level] = {
            name: arithmetic_split(bundle, level, t, problems, args.seed)
            for name, t in TEMPERATURES.items()}
        print(level, metrics["arithmetic"][level], flush=True)
    for length in lengths:
        metrics["recall"][str(length)] = recall_length(bundle, length, documents, args.seed)
        print(length, metrics["recall"][str(length)], flush=True)
    if args.card and not args.smoke:
        write_card(args, bundle, metrics)
    return metrics


def write_card(args: argparse.Namespace, bundle: jaxlm.Bundle, metrics: dict[str, Any]) -> None:
    """README.md of the model, from these metrics and the result of the training."""
    train = json.loads((_harness.RESULTS / "train_tiny" / "cpu.json").read_text())
    cores = f"{os.cpu_count()} cores of a shared machine"
    text = card(train, {"metrics": metrics}, bundle.lm.config.vocab_size, cores,
                f"{datetime.date.today()}")
    args.card.write_text(text)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Which model, and how many problems."""
    parser.add_argument("--model", default="tiny", help="'tiny', a folder or a hub id")
    parser.add_argument("--card", type=Path, help="also write the model card to this file")
    parser.add_argument("--problems", type=int, default=400, help="per level and temperature")
    parser.add_argument("--documents", type=int, default=100, help="per length")


if __name__ == "__main__":
    _harness.run(__file__, __doc__, measure, add_arguments)
