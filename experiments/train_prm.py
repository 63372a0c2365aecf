"""Trains a small process reward model for the bundled model, on its own labelled rollouts.

Command: python experiments/train_prm.py --stop 150 --test 64
    --out experiments/results/train_prm/cpu.json
Hardware: 2 CPU cores, 4 GB.
Minutes: 17 of processor time; a stopped run goes on where it was. Without --stop, 252 steps.
Expected: not yet a useful model. On rollouts of 64 held-out hard sums at temperature 0.8 a step's
  AUC is 0.81, but 0.75 among steps before which nothing is wrong, and the best of 16 by the last
  score is right on 39 % of the problems where one sample is on 64 %: after 150 steps the score
  knows how hard a problem is and how large its totals are, and not whether a line's arithmetic
  is right.

The bundled model answers hard and medium problems of the train side; the exact checker labels each
step by whether all is right up to its end. A model of the same shape, started from the bundled one,
learns these labels with a token-classification head, and is written as a Hugging Face folder that
jaxlm.load, jaxlm.rewards.process_reward and transformers read.
"""

import argparse
import os
import tempfile
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
from experiments.prm_data import Rollout, epoch, in_order, rollouts, rows_of
from jaxlm.core.tree import Params
from jaxlm.eval.arithmetic_reward import problem_of
from jaxlm.eval.skills import any_of, clustered, final_answer, majority, share
from jaxlm.models.lm import LM
from jaxlm.train.step import Objective, init_state, train_step

ROWS = 32


def objective_of(lm: LM) -> Objective:
    """Mean cross-entropy of the labels, where there are any."""

    def objective(params, batch, key):
        logits_BTL = lm.classify(params, batch["tokens"])
        seen_BT = batch["labels"] >= 0
        losses_BT = optax.softmax_cross_entropy_with_integer_labels(
            logits_BTL, jnp.maximum(batch["labels"], 0))
        loss = jnp.sum(losses_BT * seen_BT) / jnp.maximum(seen_BT.sum(), 1)
        return loss, {"loss": loss}

    return objective


def fit(
    lm: LM, params: Params, some: list[Rollout], epochs: int, rate: float, work: Path, seed: int,
    stop: int | None = None, save_every: int = 50,
) -> tuple[Params, list[float]]:
    """AdamW under a cosine schedule; goes on from the last checkpoint in `work`.

    `stop`: end after so many steps, under the schedule of the whole.
    Returns: parameters, and the mean losses of up to ten equal parts of the run.
    """
    plan = [part for number in range(epochs) for part in epoch(some, ROWS, seed + number)]
    steps, last = len(plan), min(stop or len(plan), len(plan))
    schedule = optax.warmup_cosine_decay_schedule(0.0, rate, min(20, steps), max(steps, 21))
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule, b2=0.98))
    step = jax.jit(partial(train_step, objective_of(lm), optimizer), donate_argnums=0)
    params = jax.tree.map(jnp.copy, params)  # the step takes its state's buffers
    state, losses = init_state(params, optimizer), np.zeros(steps, np.float32)
    with ocp.CheckpointManager(
        work.resolve(), options=ocp.CheckpointManagerOptions(max_to_keep=1)
    ) as manager:
        if manager.latest_step() is not None:
            kept = {"state": state, "losses": losses}
            kept = manager.restore(manager.latest_step(), args=ocp.args.StandardRestore(kept))
            state, losses = kept["state"], np.array(kept["losses"])
        for number in tqdm(range(int(state.step), last), desc="training"):
            width, indices = plan[number]
            batch = rows_of([some[i] for i in indices], width, ROWS)
            state, metrics = step(state, batch, None)
            losses[number] = float(metrics["loss"])
            if (number + 1) % save_every == 0 or number + 1 == last:
                kept = {"state": state, "losses": losses}
                manager.save(number + 1, args=ocp.args.StandardSave(kept))
                manager.wait_until_finished()
    parts = np.array_split(losses[:last], min(10, last))
    return state.params, [float(np.mean(part)) for part in parts]


def step_scores(lm: LM, params: Params, some: list[Rollout]) -> list[np.ndarray]:
    """The probability of label 1 at every labelled newline of every rollout."""
    @jax.jit
    def probability(tokens_BT):
        return jax.nn.softmax(lm.classify(params, tokens_BT))[..., 1]

    found: list[np.ndarray] = [np.zeros(0)] * len(some)
    for indices, batch in in_order(some, ROWS):
        scores_BT = np.asarray(probability(batch["tokens"]))
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
    clean = np.concatenate([np.r_[True, rollout.labels[:-1]][: len(rollout.labels)].astype(bool)
                            for rollout in some])
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


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Draw rollouts, train, write the folder, judge it on the test side."""
    if args.smoke:
        args.problems, args.epochs, args.test = 8, 1, 4
        args.work = Path(tempfile.mkdtemp())
        args.folder = args.work / "prm"
    bundle = jaxlm.load(args.model, dtype=jnp.float32)
    settings = {"model": str(args.model), "samples": args.samples, "seed": args.seed}
    args.work.mkdir(parents=True, exist_ok=True)
    keep = _harness.Resumable(args.work / "rollouts.json", settings)
    draw = partial(rollouts, bundle, seed=args.seed, keep=keep)
    some = [r for level, problems in (("hard", args.problems), ("medium", args.problems // 4))
            for group in draw(level, "train", problems, args.samples) for r in group]
    lm = LM(bundle.lm.config, labels=2, per_token=True)
    start = lm.init(jax.random.key(args.seed)) | {
        k: v for k, v in bundle.params.items() if k not in ("score", "head")}
    params, losses = fit(lm, start, some, args.epochs, args.rate, args.work / "checkpoints",
                         args.seed, args.stop)
    extra = bundle.extra | {"id2label": {"0": "wrong", "1": "right"},
                            "label2id": {"wrong": 0, "right": 1}}
    jaxlm.save(bundle.replace(lm=lm, params=params, extra=extra), args.folder, overwrite=True)
    metrics: dict[str, Any] = {"rollouts": len(some), "epochs": args.epochs, "stop": args.stop,
                               "losses": losses}
    for level, problems, samples in (("hard", args.test, 16), ("medium", args.test // 2, 4)):
        groups = draw(level, "test", problems, samples)
        flat = [r for group in groups for r in group]
        scores = step_scores(lm, params, flat)
        metrics[level] = judged(flat, scores) | {"problems": problems, "samples": samples}
        counts = [count for count in (2, 4, 8, 16) if count <= samples]
        metrics[level] |= {f"of{count}": chosen(groups, scores, count) for count in counts}
        print(level, metrics[level], flush=True)
    metrics["best_of_16_gain"] = (metrics["hard"]["of16"]["best_last"]["value"]
                                  - metrics["hard"]["of16"]["one"]["value"])
    return metrics


def default_home() -> Path:
    """Where the model and the run's state go: outside the checkout."""
    return Path(os.environ.get("XDG_DATA_HOME", "~/.local/share")).expanduser() / "jaxlm"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What to train on, for how long, and where the model goes."""
    parser.add_argument("--model", default="tiny", help="whose rollouts: 'tiny' or a folder")
    parser.add_argument("--folder", type=Path, default=default_home() / "prm",
                        help="folder to write the reward model to")
    parser.add_argument("--work", type=Path, default=default_home() / "train_prm",
                        help="folder of rollouts and checkpoints")
    parser.add_argument("--problems", type=int, default=800, help="hard ones; a quarter medium")
    parser.add_argument("--samples", type=int, default=4, help="rollouts a problem")
    parser.add_argument("--test", type=int, default=200, help="hard problems of the test side")
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--stop", type=int, help="end after so many steps of the epochs' own")
    parser.add_argument("--rate", type=float, default=6e-4, help="peak learning rate")


if __name__ == "__main__":
    _harness.run(__file__, __doc__, measure, add_arguments)
