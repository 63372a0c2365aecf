"""Trains small Llamas on the two tasks: loss, optimiser, a loop that resumes, the folder written.

Shared by train_tiny.py, which makes the bundled model, and make_models.py, which makes the rest.
"""

import hashlib
import json
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from optax.contrib import MuonDimensionNumbers, muon

from experiments import _harness, tiny_tokenizer
from experiments.tiny_data import STEP, VALUE, Mix, batch
from jaxlm.core.tree import Params, map_with_path
from jaxlm.hf.bundle import Bundle, save
from jaxlm.hf.tokenizer import Tokenizer
from jaxlm.models.config import ModelConfig
from jaxlm.models.lm import LM, count_params
from jaxlm.train.setup import weights_hash


@dataclass(frozen=True)
class Recipe:
    """One run. `mix(step)` is the curriculum.

    lr is Muon's, for every matrix; adam_lr is Adam's, for the embedding and the norms. `rate` has
    points (step, share of both) to draw straight lines between; the last is the end of the run.
    """

    mix: Callable[[int], Mix]
    rate: tuple[tuple[int, float], ...]
    lr: float = 0.01
    adam_lr: float = 0.003
    seed: int = 0

    @property
    def steps(self) -> int:
        """How long the run is."""
        return self.rate[-1][0]


def short_run(steps: int) -> tuple[tuple[int, float], ...]:
    """The rate of a plain run: up over 20 steps, level, down over the last two fifths."""
    return (0, 0.0), (min(20, steps // 3), 1.0), (steps * 3 // 5, 1.0), (steps, 0.0)


def model_config(dim: int = 160, layers: int = 8, ffn: int = 448) -> ModelConfig:
    """A Llama with 4 query heads, 2 kv heads and the character vocabulary."""
    return ModelConfig(
        vocab_size=len(tiny_tokenizer.VOCAB), dim=dim, num_layers=layers, num_heads=4,
        num_kv_heads=2, head_dim=64, ffn_dim=ffn, max_len=2048, tie_embeddings=True)


def init(lm: LM, key: jax.Array) -> Params:
    """Parameters to train from: small embeddings, and nothing yet written to the residual."""
    def start(path: str, leaf: jax.Array) -> jax.Array:
        if path == "embed/table":
            return 0.02 * jax.random.normal(key, leaf.shape)
        return jnp.zeros_like(leaf) if path.endswith(("/o/kernel", "/down/kernel")) else leaf

    return map_with_path(start, lm.init(key))


def loss_fn(lm: LM, params: Params, data: dict[str, Any]) -> tuple[jax.Array, dict]:
    """Weighted cross-entropy of packed rows, and the accuracy on worked steps and on values.

    Positions run through the row; rope sees only their differences, within one document.
    """
    segments_BT = jnp.cumsum(data["inputs"] == tiny_tokenizer.BOS, 1, dtype=jnp.int32)
    logits_BTV = lm.apply(params, data["inputs"], segments_BT=segments_BT).logits
    losses_BT = optax.softmax_cross_entropy_with_integer_labels(logits_BTV, data["targets"])
    w, right = data["weights"], jnp.argmax(logits_BTV, -1) == data["targets"]
    share = lambda mask: jnp.sum(right * mask) / jnp.maximum(jnp.sum(mask), 1)
    loss = jnp.sum(losses_BT * w) / jnp.sum(w)
    return loss, {"loss": loss, "steps": share(w == STEP), "values": share(w == VALUE)}


def optimiser(recipe: Recipe) -> optax.GradientTransformation:
    """Muon (orthogonalised momentum) for matrices, Adam for the rest."""
    at, shares = (np.array(column, np.float32) for column in zip(*recipe.rate, strict=True))

    def rate(peak: float) -> optax.Schedule:
        return lambda count: peak * jnp.interp(jnp.asarray(count, jnp.float32), at, shares)

    def as_matrix(path: str, leaf: jax.Array) -> MuonDimensionNumbers | None:
        if not path.endswith("kernel"):
            return None
        inputs = (0, 1) if path.endswith("/o/kernel") else (0,)
        return MuonDimensionNumbers(inputs, tuple(range(len(inputs), leaf.ndim)))

    # muon's own Adam, beside it: optax 0.2.6 gives that one no rate of its own
    parts = {
        "muon": muon(rate(recipe.lr), weight_decay=0.01,
                     muon_weight_dimension_numbers=lambda tree: map_with_path(as_matrix, tree)),
        "adam": optax.nadamw(rate(recipe.adam_lr), b2=0.98, weight_decay=0.0)}
    part_of = lambda path, leaf: "muon" if as_matrix(path, leaf) else "adam"
    return optax.partition(parts, lambda params: map_with_path(part_of, params))


def fit(lm: LM, recipe: Recipe, work: Path, params: Params | None = None,
        marks: dict[int, Callable[[Params], None]] | None = None, log_every: int = 20,
        save_every_s: float = 240.0) -> tuple[Params, dict[str, Any]]:
    """Trains, or goes on from the last checkpoint in `work`.

    Args:
      lm: the model.
      recipe: the run; data are a function of its seed and the step.
      work: folder of checkpoints, one for each run.
      params: to start from; default `init`.
      marks: step -> what to do with the parameters after it.
      log_every: steps. save_every_s: seconds.
    Returns: float32 parameters, and {"steps", "tokens", "minutes", "history"}.
    Raises: ValueError where `work` holds another run: another seed, model, recipe or start.
    """
    _harness.Resumable(work / "run.json", described(lm, recipe, params))("begun", lambda: True)
    tx, marks = optimiser(recipe), marks or {}
    params = init(lm, jax.random.key(recipe.seed)) if params is None else params
    state = {"params": params, "opt": tx.init(params), "step": 0, "minutes": 0.0, "tokens": 0}
    options = ocp.CheckpointManagerOptions(max_to_keep=2)
    with ocp.CheckpointManager(work.resolve(), options=options) as manager:
        if manager.latest_step() is not None:
            state = manager.restore(manager.latest_step(), args=ocp.args.StandardRestore(state))
            print(f"resumed after step {state['step']}", flush=True)
        log = _Log(work / "history.json", recipe.steps, log_every, state)
        update = jax.jit(partial(_update, lm, tx))
        saved = time.time()
        for step in range(int(state["step"]), recipe.steps):
            data = batch(recipe.mix(step), recipe.seed, step)
            state["params"], state["opt"], metrics = update(state["params"], state["opt"], data)
            state["step"], state["tokens"] = step + 1, int(state["tokens"]) + data["inputs"].size
            state["minutes"] = log(step + 1, jax.device_get(metrics))
            if step + 1 in marks:
                marks[step + 1](state["params"])
            if time.time() - saved > save_every_s or step + 1 == recipe.steps:
                _harness.write_json(log.rows, log.path)
                manager.save(step + 1, args=ocp.args.StandardSave(state))
                manager.wait_until_finished()
                saved = time.time()
    return state["params"], {"steps": recipe.steps, "tokens": int(state["tokens"]),
                             "minutes": float(state["minutes"]), "history": log.rows}


def described(lm: LM, recipe: Recipe, params: Params | None) -> dict[str, Any]:
    """What tells a run from others: a checkpoint of another one is not gone on with."""
    every = max(1, recipe.steps // 64)
    mixes = repr([recipe.mix(step) for step in range(0, recipe.steps, every)])
    return {"model": repr(lm.config), "seed": recipe.seed, "rate": recipe.rate, "lr": recipe.lr,
            "adam_lr": recipe.adam_lr, "mixes": hashlib.sha256(mixes.encode()).hexdigest(),
            "start": None if params is None else weights_hash(params)}


def _update(lm, tx, params, opt, data):
    grads, metrics = jax.grad(lambda p: loss_fn(lm, p, data), has_aux=True)(params)
    updates, opt = tx.update(grads, opt, params)
    return optax.apply_updates(params, updates), opt, metrics


def pace(lm: LM, recipe: Recipe, repeats: int = 2) -> dict[str, Any]:
    """What a run costs, by a few steps of every shape of batch it has.

    Processor time, which other work on the machine changes little: on n cores it takes at least
    an n-th of it.
    Returns: {"parameters", "cpu_s_a_step": {shape: seconds}, "cpu_hours"}.
    """
    tx, params = optimiser(recipe), init(lm, jax.random.key(recipe.seed))
    at = {recipe.mix(step).shape: step for step in range(recipe.steps)}
    steps = Counter(recipe.mix(step).shape for step in range(recipe.steps))
    update, opt, seconds = jax.jit(partial(_update, lm, tx)), tx.init(params), {}
    for shape, step in at.items():
        data = batch(recipe.mix(step), recipe.seed, step)
        jax.block_until_ready(update(params, opt, data))
        began = time.process_time()
        for _ in range(repeats):
            jax.block_until_ready(update(params, opt, data))
        seconds[shape] = (time.process_time() - began) / repeats
    hours = sum(seconds[shape] * count for shape, count in steps.items()) / 3600
    return {"parameters": count_params(lm), "cpu_hours": hours,
            "cpu_s_a_step": {f"{B}x{T}": s for (B, T), s in seconds.items()}}


class _Log:
    """The line of progress and the rows of history; a call gives the minutes spent so far."""

    def __init__(self, path: Path, steps: int, every: int, state: dict[str, Any]):
        self.path, self.steps, self.every, self.recent = path, steps, every, []
        rows = json.loads(path.read_text()) if path.exists() else []
        self.rows = [row for row in rows if row["step"] <= int(state["step"])]
        self.began = self.logged = time.time()
        self.before = float(state["minutes"])

    def __call__(self, step: int, metrics: dict[str, Any]) -> float:
        now = time.time()
        minutes = self.before + (now - self.began) / 60
        self.recent.append(metrics)
        if step % self.every == 0 or step == self.steps:
            row = {k: float(np.mean([m[k] for m in self.recent])) for k in metrics}
            pace = (now - self.logged) / len(self.recent)
            print(f"step {step}/{self.steps} loss {row['loss']:.4f} steps {row['steps']:.4f} "
                  f"values {row['values']:.4f} s/step {pace:.2f} min {minutes:.1f} "
                  f"eta {pace * (self.steps - step) / 60:.0f} min", flush=True)
            self.rows.append({"step": step, **row})
            self.recent, self.logged = [], now
        return minutes


def held_out_loss(lm: LM, params: Params, mix: Mix, seed: int, batches: int = 4) -> float:
    """The mean training loss on batches of the test side of the split."""
    losses = [_loss(lm, params, batch(mix, seed, i, "test")) for i in range(batches)]
    return float(np.mean(losses))


@partial(jax.jit, static_argnums=0)
def _loss(lm: LM, params: Params, data: dict[str, Any]) -> jax.Array:
    return loss_fn(lm, params, data)[0]


def write_folder(lm: LM, params: Params, folder: Path) -> None:
    """A complete Hugging Face folder in bf16, put in place in one move."""
    with tempfile.TemporaryDirectory() as scratch:
        tiny_tokenizer.write(Path(scratch), lm.config.max_len)
        ids = {"bos_token_id": tiny_tokenizer.BOS, "eos_token_id": tiny_tokenizer.EOS,
               "pad_token_id": tiny_tokenizer.PAD}
        half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
        bundle = Bundle(lm, half, Tokenizer(scratch), (tiny_tokenizer.EOS,), ids)
        save(bundle, folder, overwrite=True)
