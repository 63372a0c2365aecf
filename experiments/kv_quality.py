"""What a quantised cache costs in quality: likelihood, divergence, recall, arithmetic.

Small real models read text of their own kind through every cache: the first half as a prompt, the
second in pieces of 8 tokens, so that every piece looks back at codes. Reported of the second half:
perplexity, divergence of the next token's distribution from full precision's, the L1 distance of
the two, the relative error of logits, and how often the likeliest token is another; and bytes a
cached token, everything counted at 4,096 tokens. The bundled model, where it is there, also
answers held-out arithmetic and recall problems, the same ones for every kind, greedily; drops are
paired, with a 95% interval. Three seeds draw three texts. `best_share`: of all (model, seed, bits),
how often SQuat's divergence is the least among kinds of equal bytes, or within 2% of it.

Command: python experiments/kv_quality.py --out experiments/results/kv_quality/cpu.json
Hardware: 2 CPU cores
Minutes: 30; goes on where it was stopped
Expected: recall_drop_points and arithmetic_drop_points at most 2 (2 bits); best_share 0.8
"""

import argparse
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments._harness import Resumable, run
from jaxlm.cache.dense import Dense
from jaxlm.cache.parse import parse_cache
from jaxlm.core.errors import JaxlmError
from jaxlm.core.tree import Params
from jaxlm.decode.samplers import Greedy
from jaxlm.decode.state import extend, prefill
from jaxlm.eval.skills import solve_arithmetic, solve_recall
from jaxlm.eval.tune_cache import layer_bytes
from jaxlm.hf.bundle import Bundle, load
from jaxlm.models.lm import LM

KINDS = ("dense", "kivi8", "squat8", "kivi4", "squat4", "kivi2", "squat2", "squat2:rope=before",
         "kivi2:shrinks=1.0")
PIECE, SEEDS = 8, 3


@partial(jax.jit, static_argnames=("lm", "kind"))
def read_through(lm: LM, params: Params, tokens_BT: jax.Array, kind: Any) -> jax.Array:
    """Next-token logits of the second half, read in pieces through the cache, (B, T/2, V)."""
    batch, time = tokens_BT.shape
    half = time // 2 // PIECE * PIECE
    keys = jax.random.split(jax.random.key(0), batch)
    state = prefill(lm, params, Greedy(), tokens_BT[:, :half], jnp.full(batch, half), kind, time,
                    keys)
    pieces = tokens_BT[:, half:].reshape(batch, -1, PIECE).swapaxes(0, 1)

    def read(state, piece):
        return extend(lm, params, state, piece, jnp.full(batch, PIECE), "all")

    _, logits = jax.lax.scan(read, state, pieces)
    return logits.swapaxes(0, 1).reshape(batch, time - half, -1)


def distances(exact: jax.Array, rough: jax.Array, tokens_BT: jax.Array) -> dict[str, float]:
    """Of one kind's logits from full precision's, over the second half."""
    log_p, log_q = jax.nn.log_softmax(exact), jax.nn.log_softmax(rough)
    p, q = jnp.exp(log_p), jnp.exp(log_q)
    target = tokens_BT[:, -exact.shape[1]:][:, 1:, None]
    gained = jnp.take_along_axis(log_q[:, :-1], target, axis=-1)
    return {
        "perplexity": float(jnp.exp(-jnp.mean(gained))),
        "divergence": float(jnp.mean(jnp.sum(p * (log_p - log_q), -1))),
        "softmax_l1": float(jnp.mean(jnp.sum(jnp.abs(p - q), -1))),
        "logit_error": float(jnp.linalg.norm(rough - exact) / jnp.linalg.norm(exact)),
        "argmax_changed": float(jnp.mean(jnp.argmax(p, -1) != jnp.argmax(q, -1))),
    }


def likelihood(bundle: Bundle, ids: list[int], kind: str, seed: int, rows: int,
               time: int) -> dict[str, float]:
    """Distances on `rows` windows drawn from a text."""
    starts = np.random.default_rng(seed).integers(0, len(ids) - time, rows)
    tokens = jnp.asarray([ids[start: start + time] for start in starts], jnp.int32)
    exact = read_through(bundle.lm, bundle.params, tokens, Dense())
    rough = read_through(bundle.lm, bundle.params, tokens, parse_cache(kind))
    return distances(exact, rough, tokens)


def token_bytes(lm: LM, kind: str, slots: int = 4096) -> float:
    """Bytes of all layers' caches a token."""
    layers = range(lm.config.num_layers)
    return sum(layer_bytes(lm, layer, parse_cache(kind), slots) for layer in layers) / slots


def accuracy(bundle: Bundle, kind: str, seed: int, problems: int) -> dict[str, list[bool]]:
    """Right or wrong, problem by problem, of the bundled model."""
    cache = parse_cache(kind)
    arithmetic = solve_arithmetic(bundle, "medium", problems=problems, samples=1, seed=seed,
                                  cache=cache)
    recall = [solve_recall(bundle, length, documents=problems // 4, seed=seed, cache=cache)
              for length in (128, 256, 384, 512)]
    return {"arithmetic": [attempt.verdict.correct for attempt in arithmetic.attempts],
            "recall": [found.accuracy.value for found in recall]}


def drop(exact: list, rough: list) -> dict[str, float]:
    """Points of accuracy lost, paired, and half the width of a 95% interval."""
    lost = 100 * (np.asarray(exact, float) - np.asarray(rough, float))
    return {"points": lost.mean(), "interval": 1.96 * lost.std(ddof=1) / np.sqrt(len(lost))}


def best_share(rows: list[dict[str, Any]]) -> float:
    """How often SQuat is best or within 2% of it among kinds of the same bits."""
    cells: dict[tuple, dict[str, float]] = {}
    for row in rows:
        bits = row["kind"].split(":")[0][-1]
        if row["kind"] != "dense":
            cells.setdefault((row["model"], row["seed"], bits), {})[row["kind"]] = row["divergence"]
    wins = [cell[f"squat{bits}"] <= 1.02 * min(cell.values())
            for (_, _, bits), cell in cells.items() if f"squat{bits}" in cell]
    return float(np.mean(wins)) if wins else 0.0


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """A table of (model, seed, kind), and the bundled model's drops."""
    seeds = range(args.seed, args.seed + (1 if args.smoke else SEEDS))
    kinds = ("kivi2", "squat2") if args.smoke else KINDS
    rows_of_text, time = (2, 64) if args.smoke else (8, 256)
    kept = Resumable(Path(args.parts), {"smoke": args.smoke, "seed": args.seed})
    text = (args.text or args.data / "text" / "tinystories_cs336_sample.txt").read_text()
    rows = []
    for folder in sorted(path for path in (args.data / "models").iterdir() if path.is_dir()):
        bundle = load(folder)
        ids = bundle.tokenizer.encode(text.replace("<|endoftext|>", ""))
        for seed in seeds:
            for kind in kinds:
                key = f"{folder.name} {seed} {kind}"
                found = kept(key, lambda b=bundle, i=ids, k=kind, s=seed: likelihood(
                    b, i, k, s, rows_of_text, min(time, b.lm.config.max_len)))
                rows.append({"model": folder.name, "seed": seed, "kind": kind,
                             "bytes_per_token": token_bytes(bundle.lm, kind), **found})
    metrics: dict[str, Any] = {"rows": rows, "best_share": best_share(rows)}
    try:
        bundled = load("tiny")
    except JaxlmError as error:
        print(f"the bundled model is left out: {error}")
        return metrics
    problems = 16 if args.smoke else args.problems
    answers = {kind: [kept(f"tiny {seed} {kind}", lambda k=kind, s=seed: accuracy(
        bundled, k, s, problems)) for seed in seeds] for kind in ("dense", "squat2", "squat4")}
    for kind, name in (("squat2", ""), ("squat4", "_4bit")):
        for skill in ("recall", "arithmetic"):
            exact, rough = ([x for part in answers[cache] for x in part[skill]]
                            for cache in ("dense", kind))
            metrics[f"{skill}_drop{name}"] = drop(exact, rough)
            metrics[f"{skill}_drop_points{name}"] = metrics[f"{skill}_drop{name}"]["points"]
    return metrics


def arguments(parser: argparse.ArgumentParser) -> None:
    """Text, problems, and where finished parts are kept."""
    parser.add_argument("--text", type=Path, help="UTF-8 text of the models' kind")
    parser.add_argument("--problems", type=int, default=700, help="a seed; three seeds")
    parser.add_argument("--parts", default="kv_quality.parts.json")


if __name__ == "__main__":
    run(__file__, __doc__, measure, arguments)
