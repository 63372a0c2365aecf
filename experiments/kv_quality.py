"""What a quantised cache costs in quality: likelihood, look-ups, worked arithmetic.

Likelihood: small real models read text of their own kind through every cache, a prompt and then
pieces of 8 tokens, so that every piece looks back at codes. Against full precision: perplexity,
divergence of the next token's distribution, L1 distance of the two, relative error of logits, how
often the likeliest token is another; and the divergence against tokens read since a prompt of 32.
Answers, of the bundled model, greedily, the same problems for every kind: `recall` and `arithmetic`
(the hard split) are prompts read at once, as papers do it (the prompt attends to itself in full
precision); `coded` is the share of a text that lies in codes when its answer ends. `lookup` and
`passkey` (1,024 tokens, by depth) ask only after the context was coded, which is harder. Drops in
points are paired with full precision; intervals are 95%, from 2,000 resamplings of problems (of
documents where one has several questions); lost and won are the problems that changed, with the
exact two-sided p of their difference. `best_share`: of all (text, seed, bits), how often SQuat's
divergence is less than that of every rival of no more bytes, or surely at most a tenth above the
best of them; `best_share_rotated`: that of SQuat after a rotation. SQuat has four blocks
of channels at least (with one it is KIVI): of 2 and 4 channels on the models with narrow heads, of
16, the default, on the bundled one.

Command: python experiments/kv_quality.py --out experiments/results/kv_quality/cpu.json
Hardware: 2 CPU cores, 10 GB
Minutes: 70 of one core for likelihood, 3 for the look-ups of a kind and 20 for its recall and
  sums; goes on where it was stopped; halves (`--only`) and tasks (`--tasks`) may run beside each
  other, each with its own --parts, and `--other` puts results together
Expected: recall_drop_points 1.0, arithmetic_drop_points 10.4 (wanted: at most 2), at 4 bits 0.0 and
  0.2 (wanted: at most 0.5); best_share 0.31, rotated 0.36 (wanted: 0.8; most cases are open)
"""

import argparse
import json
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments._harness import Resumable, run, sources, versions
from experiments.kv_stats import best_share, drop, reached
from jaxlm.cache.dense import Dense
from jaxlm.cache.parse import parse_cache
from jaxlm.cache.squat import Squat
from jaxlm.core.errors import ConfigError
from jaxlm.core.tree import Params
from jaxlm.decode.generate import decode_jit, generate, prefill_jit, prepare
from jaxlm.decode.samplers import Greedy
from jaxlm.decode.state import Kinds, extend, prefill
from jaxlm.eval import arithmetic, recall
from jaxlm.eval.tune_cache import front, layer_bytes, tables
from jaxlm.hf.bundle import Bundle, load
from jaxlm.models.lm import LM

METHODS = ("squat", "rsquat", "kivi", "rkivi", "turboquant", "policy")
BITS = (2, 4, 8)
VARIANTS = ("turboquant4v2", "squat2:rope=before", "squat2:scales=int8", "squat2:half_life=256",
            "kivi2:shrinks=1.0")
DRIFTS = ("squat2", "squat2:half_life=256", "rsquat2", "kivi2", "rkivi2", "turboquant2")
PIECE, SEEDS, BATCH = 8, 3, 128
LOOKUPS = {"lookup": ((256, 160), (512, 96)), "passkey": ((1024, 256),)}  # (length, documents)
QUESTIONS = 8  # a document
TASKS = ("recall", "arithmetic")
LENGTHS = {"recall": range(4), "arithmetic": range(1)}  # batches of other lengths
Kind = Any  # a CacheKind, or one a layer


@partial(jax.jit, static_argnames=("lm", "kind", "prompt"))
def read_through(lm: LM, params: Params, tokens_BT: jax.Array, kind: Kind,
                 prompt: int) -> jax.Array:
    """Next-token logits of what follows a prompt, read in pieces through the cache, (B, T', V)."""
    batch, time = tokens_BT.shape
    keys = jax.random.split(jax.random.key(0), batch)
    state = prefill(lm, params, Greedy(), tokens_BT[:, :prompt], jnp.full(batch, prompt), kind,
                    time, keys)
    pieces = tokens_BT[:, prompt:].reshape(batch, -1, PIECE).swapaxes(0, 1)

    def read(state, piece):
        return extend(lm, params, state, piece, jnp.full(batch, PIECE), "all")

    _, logits = jax.lax.scan(read, state, pieces)
    return logits.swapaxes(0, 1).reshape(batch, time - prompt, -1)


def distances(exact: jax.Array, rough: jax.Array, tokens_BT: jax.Array) -> dict[str, Any]:
    """Of one kind's logits from full precision's; `by_row` is the divergence of each text."""
    log_p, log_q = jax.nn.log_softmax(exact), jax.nn.log_softmax(rough)
    p, q = jnp.exp(log_p), jnp.exp(log_q)
    target = tokens_BT[:, -exact.shape[1]:][:, 1:, None]
    gained = jnp.take_along_axis(log_q[:, :-1], target, axis=-1)
    divergence = jnp.sum(p * (log_p - log_q), -1)
    return {
        "perplexity": float(jnp.exp(-jnp.mean(gained))),
        "divergence": float(jnp.mean(divergence)),
        "softmax_l1": float(jnp.mean(jnp.sum(jnp.abs(p - q), -1))),
        "logit_error": float(jnp.linalg.norm(rough - exact) / jnp.linalg.norm(exact)),
        "argmax_changed": float(jnp.mean(jnp.argmax(p, -1) != jnp.argmax(q, -1))),
        "by_row": np.asarray(divergence.mean(1)),
    }


def drift(exact: jax.Array, rough: jax.Array, every: int = 32) -> list[float]:
    """The mean divergence of each `every` tokens."""
    log_p, log_q = jax.nn.log_softmax(exact), jax.nn.log_softmax(rough)
    each = jnp.sum(jnp.exp(log_p) * (log_p - log_q), -1).mean(0)
    return [float(each[i:i + every].mean()) for i in range(0, len(each) - every + 1, every)]


def texts(args: argparse.Namespace) -> list[tuple[str, Bundle, Callable[[int], jax.Array]]]:
    """(name, model, rows of a seed) of text that the model was made for."""
    rows, time = (2, 64) if args.smoke else (16, 256)
    story = (args.text or args.data / "text" / "tinystories_cs336_sample.txt").read_text()
    story = story.replace("<|endoftext|>", "")
    found = []
    for folder in sorted(path for path in (args.data / "models").iterdir() if path.is_dir()):
        bundle = load(folder)
        ids, length = bundle.tokenizer.encode(story), min(time, bundle.lm.config.max_len)

        def windows(seed, ids=ids, length=length):
            starts = np.random.default_rng(seed).integers(0, len(ids) - length, rows)
            return jnp.asarray([ids[start: start + length] for start in starts], jnp.int32)

        found.append((folder.name, bundle, windows))
        if args.smoke:
            return found
    bundle = load("tiny")

    def pairs(seed):
        rng = np.random.default_rng([seed, 1])
        made = [recall.sample(rng, 2 * time, time // 16, "test").text for _ in range(rows)]
        return jnp.asarray([bundle.tokenizer.encode(text)[-time:] for text in made], jnp.int32)

    def sums(seed):
        rng, size, made = np.random.default_rng([seed, 2]), 96, []
        while len(made) < 4 * rows:  # few tokens carry all of their divergence
            problem = arithmetic.sample(rng, "hard", "test")
            ids = bundle.tokenizer.encode(problem.prompt + problem.solution)
            made += [ids[:size]] if len(ids) >= size else []
        return jnp.asarray(made, jnp.int32)

    return [*found, ("tiny, recall", bundle, pairs), ("tiny, arithmetic", bundle, sums)]


def likelihoods(args: argparse.Namespace, kept: Resumable) -> dict[str, Any]:
    """A table of (text, seed, kind), best_share, and divergence against tokens read."""
    rows, curves = [], []
    for name, bundle, draw in texts(args):
        kinds = {} if args.smoke else policies(bundle, draw(1000))
        for kind in ("kivi2",) if args.smoke else args.kinds:
            try:
                kinds[kind] = in_blocks(parse_cache(kind), bundle.lm.config.head_dim)
            except ConfigError as error:
                print(f"{kind} is left out: {error}")
        for seed in range(args.seed, args.seed + (1 if args.smoke else SEEDS)):
            found, drifts = compare(bundle, draw(seed), kinds, kept, f"{name} {seed}")
            for kind, values in found.items():
                rows.append({"text": name, "seed": seed, "kind": kind, "bytes_per_token":
                             token_bytes(bundle.lm, kinds[kind]), **values})
            curves += [{"text": name, "seed": seed, "kind": kind, "divergence": values}
                       for kind, values in drifts.items()]
            print(name, seed, {kind: f"{values['divergence']:.2g}" for kind, values
                               in found.items()}, flush=True)
        jax.clear_caches()  # of memory mappings, which programs take, a process has 65,530
    share, cells = best_share(rows, BITS)
    rotated, rotated_cells = best_share(rows, BITS, "rsquat")
    return {"rows": [{k: v for k, v in row.items() if k != "by_row"} for row in rows],
            "best_share": share, "best_cells": cells, "best_share_rotated": rotated,
            "best_cells_rotated": rotated_cells, "drift": curves}


def in_blocks(kind: Kind, head_dim: int) -> Kind:
    """SQuat with four blocks of channels at least: with one it is KIVI."""
    return replace(kind, block=min(kind.block, head_dim // 4)) if isinstance(kind, Squat) else kind


def compare(bundle: Bundle, tokens: jax.Array, kinds: dict[str, Kind], kept: Resumable,
            label: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Of each kind: distances over the second half; the drift of some after a prompt of 32."""
    read = partial(read_through, bundle.lm, bundle.params, tokens)
    half = tokens.shape[1] // 2 // PIECE * PIECE
    exact = {at: read(Dense(), at) for at in (32, half)}
    found = {kind: kept(f"{label} {kind}", lambda c=cache: distances(
        exact[half], read(c, half), tokens)) for kind, cache in kinds.items()}
    drifts = {kind: kept(f"drift {label} {kind}", lambda k=kind: drift(
        exact[32], read(kinds[k], 32))) for kind in DRIFTS if kind in kinds}
    return found, drifts


def policies(bundle: Bundle, tokens: jax.Array) -> dict[str, Kinds]:
    """KIVI's bits chosen layer by layer within the bytes of squat4 and squat8, after KVTuner."""
    names = ("kivi2", "kivi2v4", "kivi4v2", "kivi4", "kivi8v4", "kivi4v8", "kivi8")
    kinds = [parse_cache(name) for name in names]
    errors_CL, bytes_CL = tables(bundle.lm, bundle.params, tokens, kinds, 4096)
    layers = range(bundle.lm.config.num_layers)
    of = lambda table_CL, choice: sum(table_CL[c, i] for i, c in zip(layers, choice, strict=True))
    best = {}
    for bits in (4, 8):
        room = 4096 * token_bytes(bundle.lm, parse_cache(f"squat{bits}"))
        fit = [choice for choice in front(errors_CL, bytes_CL) if of(bytes_CL, choice) <= room]
        if fit:
            chosen = min(fit, key=partial(of, errors_CL))
            best[f"policy{bits}"] = tuple(kinds[c] for c in chosen)
    return best


def token_bytes(lm: LM, kind: Kind, slots: int = 4096) -> float:
    """Bytes of all layers' caches a token, everything counted at 4,096 tokens."""
    layers = range(lm.config.num_layers)
    kinds = kind if isinstance(kind, tuple) else (kind,) * len(layers)
    return sum(layer_bytes(lm, layer, kinds[layer], slots) for layer in layers) / slots


@partial(jax.jit, static_argnames=("lm", "kind"))
def looked_up(lm: LM, params: Params, context_BT: jax.Array, asked_BT: jax.Array,
              kind: Kind) -> jax.Array:
    """The likeliest next tokens of questions read after their context was coded, (B, T)."""
    batch, time = context_BT.shape
    keys = jax.random.split(jax.random.key(0), batch)
    state = prefill(lm, params, Greedy(), context_BT, jnp.full(batch, time), kind,
                    time + asked_BT.shape[1], keys)
    _, logits = extend(lm, params, state, asked_BT, jnp.full(batch, asked_BT.shape[1]), "all")
    return jnp.argmax(logits, -1)


def look_up(bundle: Bundle, cache: Kind, length: int, documents: int, seed: int) -> dict[str, Any]:
    """Right or wrong by document and question, and how deep in the context the pair stood."""
    rng = np.random.default_rng([seed, length])
    drawn = [recall.sample(rng, length, QUESTIONS, "test") for _ in range(documents)]
    encode = bundle.tokenizer.encode
    split = [(encode(d.context), encode(d.text)[len(encode(d.context)):]) for d in drawn]
    right = []
    for at in range(0, documents, 32):
        context, asked = (jnp.asarray(x) for x in zip(*split[at:at + 32], strict=True))
        said = looked_up(bundle.lm, bundle.params, context, asked, cache)
        hit = np.asarray(said[:, :-1] == asked[:, 1:]).reshape(len(asked), -1)
        digits = recall.QUERY_TOKENS * np.arange(QUESTIONS)[:, None] + [2, 3]
        right += hit[:, digits].all(-1).tolist()
    return {"right": right, "depth": [[i / len(d.pairs) for i in d.queries] for d in drawn]}


def answers(bundle: Bundle, cache: Kind, task: str, batch: int, seed: int) -> list[bool]:
    """Right or wrong, problem by problem, of BATCH prompts read at once."""
    prompts, room, more, right = asked(task, batch, seed)
    said = generate(bundle, prompts, max_new_tokens=more, max_len=room, cache=cache)
    return [right(i, answer.text) for i, answer in enumerate(said)]


def asked(task: str, batch: int, seed: int) -> tuple[list[str], int, int, Callable]:
    """Prompts, tokens in all, new ones at most, and whether the i-th answer is right."""
    rng = np.random.default_rng([seed, batch, len(task)])
    if task == "recall":
        length = (128, 256, 384, 512)[batch % 4]
        documents = [recall.sample(rng, length, 1, "test") for _ in range(BATCH)]
        return ([d.prompt(0) for d in documents], length + 3, 3,
                lambda i, text: recall.check_answer(documents[i], 0, text))
    problems = [arithmetic.sample(rng, "hard", "test") for _ in range(BATCH)]
    return ([p.prompt for p in problems], 160, 112,
            lambda i, text: arithmetic.check_steps(problems[i], text).correct)


def coded_share(bundle: Bundle, cache: Kind, task: str, batch: int, seed: int) -> float:
    """Of a text's tokens, those that lie in codes when its answer ends."""
    prompts, room, more, _ = asked(task, batch, seed)
    job = prepare(bundle, prompts, more, None, None, room)
    kinds = (cache,) * bundle.lm.config.num_layers
    state = prefill_jit(bundle.lm, bundle.params, Greedy(), job.tokens_BT, job.lengths_B, kinds,
                        job.slots, job.keys_B)
    state = decode_jit(bundle.lm, bundle.params, Greedy(), state, job.stop, more)
    return float((state.caches[0]["packed_B"] / state.length_B).mean())


def accuracies(args: argparse.Namespace, kept: Resumable) -> dict[str, Any]:
    """The bundled model's answers through every kind, and the paired drops."""
    bundle, metrics = load("tiny"), {}
    kinds = ("dense", "kivi2") if args.smoke else ("dense", *args.drops)
    found: dict[tuple[str, str], list] = {}
    depths = {}
    for task, parts in LOOKUPS.items():
        for kind in kinds if task in args.tasks else ():
            made = [kept(f"{task} {length} {kind}",
                         lambda n=length, d=documents, k=kind: look_up(
                             bundle, parse_cache(k), 64 if args.smoke else n,
                             2 if args.smoke else d, args.seed))
                    for length, documents in parts]
            found[task, kind] = [row for part in made for row in part["right"]]
            depths[task] = [row for part in made for row in part["depth"]]
            print(task, kind, np.mean(found[task, kind]), flush=True)
    coded = {}
    for task in TASKS:
        for kind in kinds if task in args.tasks else ():
            right = [[ok] for part in range(0 if args.smoke else args.batches) for ok in kept(
                f"{task} {part} {kind}",
                lambda t=task, p=part, k=kind: answers(bundle, parse_cache(k), t, p, args.seed))]
            if right:
                found[task, kind] = right
                print(task, kind, np.mean(right), flush=True)
            jax.clear_caches()
            if right and kind != "dense":
                coded[task, kind] = np.mean([kept(
                    f"coded {task} {part} {kind}", lambda t=task, p=part, k=kind: coded_share(
                        bundle, parse_cache(k), t, p, args.seed)) for part in LENGTHS[task]])
    metrics["answers"] = [{"task": task, "kind": kind, "accuracy": float(np.mean(right)),
                           "coded": coded.get((task, kind)), **drop(found[task, "dense"], right)}
                          for (task, kind), right in found.items()]
    if "passkey" in args.tasks:
        fifth = np.minimum(5 * np.asarray(depths["passkey"]), 4).astype(int)
        metrics["passkey_by_depth"] = [
            {"kind": kind, **{f"fifth {i + 1}": float(np.asarray(found["passkey", kind])[
                fifth == i].mean()) for i in range(5) if (fifth == i).any()}} for kind in kinds]
    return metrics


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Whichever halves were asked for."""
    kept = Resumable(Path(args.parts), {
        "smoke": args.smoke, "seed": args.seed, "text": str(args.text), "versions": versions(),
        "sources": sources(Path(__file__))})
    metrics: dict[str, Any] = {}
    if args.only != "likelihood":
        metrics |= accuracies(args, kept)
    if args.only != "answers":
        metrics |= likelihoods(args, kept)
    if args.other:
        metrics = beside_earlier(json.loads(args.other.read_text()), metrics)
    return metrics | reached(metrics.get("answers", ()))


def beside_earlier(earlier: dict[str, Any], metrics: dict[str, Any]) -> dict[str, Any]:
    """What was not measured now, from an earlier result; `earlier` says what, and of which commit,
    where that result was itself put together, too."""
    of = lambda row: f"{row['task']} {row['kind']}"
    new = metrics.get("answers", [])
    old = [row for row in earlier["metrics"].get("answers", ()) if of(row) not in map(of, new)]
    taken = [name for name in earlier["metrics"] if name not in metrics and name != "earlier"]
    found = {name: earlier["metrics"][name] for name in taken} | metrics
    order = [*LOOKUPS, *TASKS]
    return found | {
        "answers": sorted([*new, *old], key=lambda row: order.index(row["task"])),
        "earlier": [*earlier["metrics"].get("earlier", ()), {
            "commit": earlier["commit"], "command": earlier["command"],
            "answers": [of(row) for row in old], "metrics": taken}]}


def arguments(parser: argparse.ArgumentParser) -> None:
    """Text, problems, and where finished parts are kept."""
    kinds = [f"{method}{bits}" for bits in BITS for method in METHODS if method != "policy"]
    parser.add_argument("--text", type=Path, help="UTF-8 text of the models' kind")
    parser.add_argument("--kinds", nargs="+", default=[*kinds, *VARIANTS])
    parser.add_argument("--drops", nargs="+", default=[
        f"{method}{bits}" for bits in (2, 4) for method in METHODS if method != "policy"])
    parser.add_argument("--batches", type=int, default=16, help=f"of {BATCH} problems a task")
    parser.add_argument("--only", choices=["likelihood", "answers"], help="one half")
    parser.add_argument("--tasks", nargs="+", default=[*LOOKUPS, *TASKS],
                        choices=[*LOOKUPS, *TASKS], help="of the answers")
    parser.add_argument("--other", type=Path, help="an earlier result, for what is not asked now")
    parser.add_argument("--parts", default="kv_quality.parts.json")


if __name__ == "__main__":
    run(__file__, __doc__, measure, arguments)
