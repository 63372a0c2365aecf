"""Trains a small process reward model for the bundled model, on its own labelled rollouts.

Command: python experiments/train_prm.py --out experiments/results/train_prm/cpu.json
Hardware: 2 CPU cores, 4 GB.
Minutes: some 37, 11 of them for the answers, on one core beside other work (by the clock, the
  committed run in two sittings); a stopped run goes on.
Expected: first errors told from right lines with an area of 0.86 under the curve, but not good
  enough to search by: the best of 16 by its score is right in 50 % of problems, one sample in 64 %,
  and the one whose lines the model itself held likeliest in 78 % (see docs/rewards.md).

The bundled model answers problems of the train side, and the exact checker labels each line. Two
new layers over the frozen model, with a token-classification head, learn the labels. A wrong line
is most often one with a token that the model held unlikely itself; but whether the token that came
was the one expected is a product over two positions, which one label a line teaches slowly, as few
lines are wrong. So in half the rows of a batch a fifth of the answers' digits are others, without
labels, and every token of an answer has targets of its own: the log-probability that the frozen
model gave it, and the lowest in its line so far, read from the same hidden state by weights that
are thrown away at the end. The reward model is written as a Hugging Face folder that jaxlm.load,
jaxlm.rewards.process_reward and transformers read.
"""

import argparse
import os
import tempfile
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from scipy.stats import rankdata
from tqdm import tqdm

import jaxlm
from experiments import _harness
from experiments.prm_data import Rollout, by_width, in_order, rollouts, rows_of, width_of
from experiments.tiny_data import Mix
from experiments.tiny_tokenizer import encode
from experiments.tiny_training import Recipe, init, optimiser, short_run
from jaxlm.core.tree import Params
from jaxlm.eval.arithmetic_reward import problem_of
from jaxlm.eval.skills import any_of, clustered, final_answer, majority, share
from jaxlm.hf.bundle import Bundle
from jaxlm.models.lm import LM
from jaxlm.train.step import Objective, init_state, train_step

ROWS = 32  # rollouts of a training batch, and scored together
LEAST = -6.0  # a token less likely than e^LEAST counts as of e^LEAST
SAMPLES = 4  # answers to each problem of the train side
CORRUPTED = 0.2  # of the digits in half the rows
NEWLINE, DIGITS = encode("\n")[0], np.array(encode("0123456789"))


def objective_of(bundle: Bundle, lm: LM) -> Objective:
    """Cross-entropy of the labels, a mean over the labelled newlines, and the squared error of the
    two `doubts` as read by `params["doubt"]`, a mean over the answers' tokens."""
    base = bundle.params

    def objective(params, batch, key):
        tokens_BT, labels_BT = batch["tokens"], batch["labels"]
        final_BTD = lm.apply(base | params, tokens_BT, logits_at=None).final
        loss = mean(optax.softmax_cross_entropy_with_integer_labels(
            lm.head(params, final_BTD), jnp.maximum(labels_BT, 0)), labels_BT >= 0)
        doubts_BT2, answer_BT = doubts(bundle, tokens_BT)
        read_BT2 = final_BTD @ params["doubt"]["w"] + params["doubt"]["b"]
        doubt = mean(jnp.mean((read_BT2 - doubts_BT2) ** 2, -1), answer_BT)
        return loss + doubt, {"loss": loss, "doubt": doubt}

    return objective


def doubts(bundle: Bundle, tokens_BT: jax.Array) -> tuple[jax.Array, jax.Array]:
    """A token's log-probability under the bundle, at least LEAST, and the lowest of its line so
    far, (B, T, 2); and which tokens are of an answer: behind the first newline, and no padding."""
    ahead_BT = jnp.roll(tokens_BT, -1, 1)
    logp_BT = jnp.roll(bundle.lm.logprobs(bundle.params, tokens_BT, ahead_BT), 1, 1)
    logp_BT = jnp.maximum(logp_BT, LEAST)
    ends_BT = tokens_BT == NEWLINE
    line_BT = jnp.cumsum(ends_BT, 1) - ends_BT
    so_far_BTT = jnp.tril(line_BT[:, :, None] == line_BT[:, None])
    lowest_BT = jnp.min(jnp.where(so_far_BTT, logp_BT[:, None], 0.0), -1)
    return jnp.stack([logp_BT, lowest_BT], -1), (line_BT > 0) & (tokens_BT > 0)


def corrupted(rng: np.random.Generator, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The batch with digits of the later half's answers put at random, and no labels there."""
    tokens, labels = batch["tokens"].copy(), batch["labels"].copy()
    ends = tokens == NEWLINE
    hit = np.isin(tokens, DIGITS) & (np.cumsum(ends, 1) - ends > 0)
    hit &= (rng.random(tokens.shape) < CORRUPTED) & (np.arange(len(tokens)) >= len(tokens) // 2)[
        :, None]
    labels[len(tokens) // 2:] = -1
    return {"tokens": np.where(hit, rng.choice(DIGITS, tokens.shape), tokens).astype(np.int32),
            "labels": labels}


def mean(x_BT: jax.Array, where_BT: jax.Array) -> jax.Array:
    """The mean where it is asked for; 0 where it is asked for nowhere."""
    return jnp.sum(x_BT * where_BT) / jnp.maximum(jnp.sum(where_BT), 1)


def start(bundle: Bundle, layers: int, key: jax.Array) -> tuple[LM, Params]:
    """The bundle with `layers` more, and what of it learns: those, which add nothing yet, the last
    norm, two labels, and the reading of the doubt, all of them zero."""
    c = bundle.lm.config
    lm = LM(replace(c, num_layers=c.num_layers + layers), labels=2, per_token=True)
    fresh = init(lm, key)
    new = {name: tree for name, tree in fresh.items()
           if name.startswith("layers_") and name not in bundle.params}
    norm = jax.tree.map(jnp.copy, bundle.params["final_norm"])
    doubt = {"w": jnp.zeros((c.dim, 2)), "b": jnp.zeros(2)}
    score = jax.tree.map(jnp.zeros_like, fresh["score"])
    return lm, new | {"final_norm": norm, "score": score, "doubt": doubt}


def fit(
    bundle: Bundle, lm: LM, params: Params, some: list[Rollout], steps: int, rate: float,
    work: Path, seed: int, save_every: int = 50,
) -> tuple[Params, dict[str, list[float]]]:
    """Muon under a rate that falls at the end; goes on from the last checkpoint in `work`.

    Returns: parameters, and the means of both losses over up to twenty equal parts of the run.
    """
    recipe = Recipe(lambda step: Mix((ROWS, 1)), short_run(steps), lr=rate, seed=seed)
    optimizer, names = optimiser(recipe), ("loss", "doubt")
    step = jax.jit(partial(train_step, objective_of(bundle, lm), optimizer), donate_argnums=0)
    state, losses = init_state(params, optimizer), np.zeros((steps, 2), np.float32)
    with ocp.CheckpointManager(
        work.resolve(), options=ocp.CheckpointManagerOptions(max_to_keep=1)
    ) as manager:
        if manager.latest_step() is not None:
            kept = {"state": state, "losses": losses}
            kept = manager.restore(manager.latest_step(), args=ocp.args.StandardRestore(kept))
            state, losses = kept["state"], np.array(kept["losses"])
        for number in (bar := tqdm(range(int(state.step), steps), desc="training")):
            rows = corrupted(np.random.default_rng([seed, number]), batch_of(some, number, seed))
            state, metrics = step(state, rows, None)
            losses[number] = [float(metrics[name]) for name in names]
            bar.set_postfix(loss=losses[max(number - 19, 0): number + 1].mean(0).round(3))
            if (number + 1) % save_every == 0 or number + 1 == steps:
                kept = {"state": state, "losses": losses}
                manager.save(number + 1, args=ocp.args.StandardSave(kept))
                manager.wait_until_finished()
    parts = np.array_split(losses, min(20, steps))
    return state.params, {name: [float(part[:, i].mean()) for part in parts]
                          for i, name in enumerate(names)}


def batch_of(some: list[Rollout], number: int, seed: int) -> dict[str, np.ndarray]:
    """A batch of a step: all rollouts in turn, by width, in another order each time round."""
    at, round_, drawn = number, 0, []
    while True:
        rng = np.random.default_rng([seed, round_])
        drawn = [indices[first: first + ROWS]
                 for indices in (rng.permutation(i) for i in by_width(some).values())
                 for first in range(0, len(indices), ROWS)]
        if at < len(drawn):
            chosen = drawn[rng.permutation(len(drawn))[at]]
            return rows_of([some[i] for i in chosen], width_of(some[chosen[0]]), ROWS)
        at, round_ = at - len(drawn), round_ + 1


def step_scores(lm: LM, params: Params, some: list[Rollout]) -> list[np.ndarray]:
    """The probability of label 1 at every labelled newline of every rollout."""
    return at_newlines(some, lambda tokens_BT: jax.nn.softmax(
        lm.classify(params, tokens_BT))[..., 1])


def line_doubts(bundle: Bundle, some: list[Rollout]) -> list[np.ndarray]:
    """The lowest probability of a token of each line under the bundle: what there is to know
    without learning anything."""
    return at_newlines(some, lambda tokens_BT: jnp.exp(doubts(bundle, tokens_BT)[0][..., 1]))


def at_newlines(some: list[Rollout], score: Callable[[jax.Array], jax.Array]) -> list[np.ndarray]:
    """What a function of tokens says at every labelled newline of every rollout."""
    score, found = jax.jit(score), [np.zeros(0)] * len(some)
    for indices, batch in in_order(some, ROWS):
        scores_BT = np.asarray(score(batch["tokens"]))
        for row, i in enumerate(indices):
            found[i] = scores_BT[row][batch["labels"][row] >= 0]
    return found


def auc(scores: np.ndarray, labels: np.ndarray) -> float:
    """The chance that a right step scores above a wrong one, ties a half (Mann and Whitney).

    >>> auc(np.array([0.1, 0.9, 0.9]), np.array([False, True, False]))
    0.75
    """
    right, wrong = int(labels.sum()), int((~labels).sum())
    if not right or not wrong:
        return 0.5
    return float((rankdata(scores)[labels].sum() - right * (right + 1) / 2) / (right * wrong))


def judged(some: list[Rollout], scores: list[np.ndarray], bins: int = 10) -> dict[str, Any]:
    """How well scores tell right from wrong steps, and whether they mean what they say.

    `first`: among steps before which nothing is wrong, so that it is the step itself that is
    judged. `calibration`: (mean score, share right, steps) of bins of equal width, and their mean
    gap weighted by steps.
    """
    p = np.concatenate(scores)
    y = np.concatenate([np.array(rollout.labels, bool) for rollout in some])
    clean = np.concatenate([np.cumprod(np.r_[True, r.labels])[: len(r.labels)].astype(bool)
                            for r in some])
    which = np.minimum((p * bins).astype(int), bins - 1)
    parts = [(float(p[which == b].mean()), float(y[which == b].mean()), int((which == b).sum()))
             for b in range(bins) if (which == b).any()]
    gap = sum(abs(said - was) * count for said, was, count in parts) / len(p)
    return {"steps": len(p), "right": float(y.mean()), "auc": auc(p, y),
            "accuracy": float(((p > 0.5) == y).mean()), "first_auc": auc(p[clean], y[clean]),
            "first_accuracy": float(((p > 0.5) == y)[clean].mean()),
            "first_right": float(y[clean].mean()), "brier": float(((p - y) ** 2).mean()),
            "calibration_error": gap, "calibration": parts}


AGGREGATES = {"last": lambda s: s[-1] if len(s) else 0.0, "min": lambda s: s.min(initial=1.0),
              "prod": lambda s: s.prod()}


def chosen(groups: list[list[Rollout]], scores: list[np.ndarray], count: int) -> dict[str, Any]:
    """Answers right among the first `count` rollouts of each problem, by how one is chosen."""
    samples = len(groups[0])
    texts = [[r.answer for r in group[:count]] for group in groups]
    truth = [str(problem_of(group[0].prompt).answer) for group in groups]
    right_RP = np.array([[final_answer(t) == true for t in row]
                         for row, true in zip(texts, truth, strict=True)])
    votes = sum(majority([final_answer(t) for t in row]) == true
                for row, true in zip(texts, truth, strict=True))
    found = {"one": clustered(right_RP), "majority": share(votes, len(groups)),
             "any": any_of(right_RP, count)}
    for name, aggregate in AGGREGATES.items():
        totals_RP = np.array([[aggregate(s) for s in scores[i * samples: i * samples + count]]
                              for i in range(len(groups))])
        won = right_RP[np.arange(len(groups)), totals_RP.argmax(1)]
        found[f"best_{name}"] = share(int(won.sum()), len(groups))
    return {name: {"value": s.value, "error": s.error} for name, s in found.items()}


def write(bundle: Bundle, lm: LM, params: Params, folder: Path) -> None:
    """The reward model as a folder, without its reading of the doubt."""
    extra = bundle.extra | {"id2label": {"0": "wrong", "1": "right"},
                            "label2id": {"wrong": 0, "right": 1}}
    whole = {name: (bundle.params | params)[name] for name in lm.shapes()}
    jaxlm.save(bundle.replace(lm=lm, params=whole, extra=extra), folder, overwrite=True)


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Draw rollouts, train on them, write the folder, judge the rollouts of the test side."""
    if args.smoke:
        args.steps, args.rollouts, args.test, args.work = 2, 64, 4, Path(tempfile.mkdtemp())
        args.folder = args.work / "prm"
    bundle = jaxlm.load("tiny", dtype=jnp.float32)
    keep = _harness.Resumable(args.work / "answers.json", {"model": "tiny", "seed": args.seed})
    draw = partial(rollouts, bundle, seed=args.seed, keep=keep)
    groups = draw("hard", "train", problems=args.rollouts // SAMPLES, samples=SAMPLES)
    some = [rollout for group in groups for rollout in group]
    lm, params = start(bundle, args.layers, jax.random.key(args.seed))
    name = f"rollouts-{args.layers}-{args.rollouts}-{args.steps}-{args.rate}-{args.seed}"
    params, losses = fit(bundle, lm, params, some, args.steps, args.rate, args.work / name,
                         args.seed)
    write(bundle, lm, params, args.folder)
    metrics: dict[str, Any] = {"steps": args.steps, "layers": args.layers, "losses": losses,
                               "rollouts": len(some)}
    for level, problems, samples in (("hard", args.test, 16), ("medium", args.test // 2, 4)):
        groups = draw(level, "test", problems=problems, samples=samples)
        flat = [r for group in groups for r in group]
        found = {"prm": step_scores(lm, bundle.params | params, flat),
                 "doubt": line_doubts(bundle, flat)}
        metrics[level] = {"problems": problems, "samples": samples}
        counts = [count for count in (2, 4, 8, 16) if count <= samples]
        for by, scores in found.items():
            metrics[level][by] = judged(flat, scores) | {
                f"of{count}": chosen(groups, scores, count) for count in counts}
        print(level, metrics[level], flush=True)
    of16 = metrics["hard"]["prm"]["of16"]
    metrics["best_of_16_gain"] = of16["best_prod"]["value"] - of16["one"]["value"]
    return metrics


def default_home() -> Path:
    """Where the model and the run's state go: outside the checkout."""
    return Path(os.environ.get("XDG_DATA_HOME", "~/.local/share")).expanduser() / "jaxlm"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What to train on, for how long, and where the model goes."""
    parser.add_argument("--folder", type=Path, default=default_home() / "prm",
                        help="folder to write the reward model to")
    parser.add_argument("--work", type=Path, default=default_home() / "train_prm",
                        help="folder of checkpoints and of the answers")
    parser.add_argument("--steps", type=int, default=1200)
    parser.add_argument("--rollouts", type=int, default=19_200, help="of the train side")
    parser.add_argument("--layers", type=int, default=2, help="new ones, over the bundled model's")
    parser.add_argument("--rate", type=float, default=0.01, help="peak learning rate of Muon")
    parser.add_argument("--test", type=int, default=64, help="hard problems of the test side")


if __name__ == "__main__":
    _harness.run(__file__, __doc__, measure, add_arguments)
