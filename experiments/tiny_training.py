"""Trains small Llamas on the two tasks: loss, optimiser, a loop that resumes, the folder written.

Shared by train_tiny.py, which makes the bundled model, and make_models.py, which makes the rest.
"""

import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from optax.contrib import MuonDimensionNumbers, muon

from experiments import tiny_tokenizer
from experiments.tiny_data import STEP, VALUE, Mix, batch
from jaxlm.core.tree import Params, map_with_path
from jaxlm.hf.bundle import Bundle, save
from jaxlm.hf.tokenizer import Tokenizer
from jaxlm.models.config import ModelConfig
from jaxlm.models.lm import LM


@dataclass(frozen=True)
class Recipe:
    """One run. `mix(step)` is the curriculum; the rates rise, hold, and fall linearly to zero.

    lr is Muon's, for every matrix; adam_lr is Adam's, for the embedding and the norms.
    """

    mix: Callable[[int], Mix]
    steps: int
    decay: int
    warmup: int = 20
    lr: float = 0.01
    adam_lr: float = 0.003
    seed: int = 0


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
    def rate(peak: float) -> optax.Schedule:
        return optax.join_schedules(
            [optax.linear_schedule(0.0, peak, recipe.warmup), optax.constant_schedule(peak),
             optax.linear_schedule(peak, 0.0, recipe.decay)],
            [recipe.warmup, recipe.steps - recipe.decay])

    def as_matrix(path: str, leaf: jax.Array) -> MuonDimensionNumbers | None:
        if not path.endswith("kernel"):
            return None
        inputs = (0, 1) if path.endswith("/o/kernel") else (0,)
        return MuonDimensionNumbers(inputs, tuple(range(len(inputs), leaf.ndim)))

    return muon(rate(recipe.lr), adam_learning_rate=rate(recipe.adam_lr), weight_decay=0.01,
                adam_b2=0.98,
                muon_weight_dimension_numbers=lambda params: map_with_path(as_matrix, params))


def fit(lm: LM, recipe: Recipe, work: Path, params: Params | None = None,
        marks: dict[int, Callable[[Params], None]] | None = None, log_every: int = 20,
        save_every_s: float = 240.0) -> tuple[Params, dict[str, Any]]:
    """Trains, or goes on from the last checkpoint in `work`.

    Args:
      lm: the model.
      recipe: the run; data are a function of its seed and the step.
      work: folder of checkpoints, one kind of run each.
      params: to start from; default `init`.
      marks: step -> what to do with the parameters after it.
    Returns: float32 parameters, and {"steps", "tokens", "minutes", "history"}.
    """
    tx, marks = optimiser(recipe), marks or {}
    params = init(lm, jax.random.key(recipe.seed)) if params is None else params
    state = {"params": params, "opt": tx.init(params), "step": 0, "minutes": 0.0, "tokens": 0}
    options = ocp.CheckpointManagerOptions(max_to_keep=2)
    with ocp.CheckpointManager(work.resolve(), options=options) as manager:
        if manager.latest_step() is not None:
            state = manager.restore(manager.latest_step(), args=ocp.args.StandardRestore(state))
            print(f"resumed after step {state['step']}", flush=True)
        return _loop(lm, recipe, tx, state, manager, marks, log_every, save_every_s)


def _loop(lm, recipe, tx, state, manager, marks, log_every, save_every_s):
    @jax.jit
    def update(params, opt, data):
        grads, metrics = jax.grad(lambda p: loss_fn(lm, p, data), has_aux=True)(params)
        updates, opt = tx.update(grads, opt, params)
        return optax.apply_updates(params, updates), opt, metrics

    def store(step):
        manager.save(step, args=ocp.args.StandardSave({**state, "step": step}))
        manager.wait_until_finished()

    history, recent = [], []
    began = logged = saved = time.time()
    before = float(state["minutes"])
    data = batch(recipe.mix(int(state["step"])), recipe.seed, int(state["step"]))
    for step in range(int(state["step"]) + 1, recipe.steps + 1):
        state["params"], state["opt"], metrics = update(state["params"], state["opt"], data)
        state["tokens"] += data["inputs"].size
        if step < recipe.steps:  # made while the device works
            data = batch(recipe.mix(step), recipe.seed, step)
        recent.append(jax.device_get(metrics))
        now = time.time()
        state["minutes"] = before + (now - began) / 60
        if step % log_every == 0 or step == recipe.steps:
            row = {k: float(np.mean([m[k] for m in recent])) for k in recent[0]}
            history.append({"step": step, **row})
            pace = (now - logged) / len(recent)
            print(f"step {step}/{recipe.steps} loss {row['loss']:.4f} steps {row['steps']:.4f} "
                  f"values {row['values']:.4f} s/step {pace:.2f} min {state['minutes']:.1f} "
                  f"eta {pace * (recipe.steps - step) / 60:.0f} min", flush=True)
            recent, logged = [], now
        if step in marks:
            marks[step](state["params"])
        if now - saved > save_every_s or step == recipe.steps:
            store(step)
            saved = time.time()
    summary = {"steps": recipe.steps, "tokens": int(state["tokens"]),
               "minutes": float(state["minutes"]), "history": history}
    return state["params"], summary


def held_out_loss(lm: LM, params: Params, mix: Mix, seed: int, batches: int = 4) -> float:
    """The mean training loss on batches of the test side of the split."""
    loss = jax.jit(lambda data: loss_fn(lm, params, data)[0])
    return float(np.mean([loss(batch(mix, seed, i, "test")) for i in range(batches)]))


def write_folder(lm: LM, params: Params, folder: Path) -> None:
    """A complete Hugging Face folder in bf16, put in place in one move."""
    with tempfile.TemporaryDirectory() as scratch:
        tiny_tokenizer.write(Path(scratch), lm.config.max_len)
        ids = {"bos_token_id": tiny_tokenizer.BOS, "eos_token_id": tiny_tokenizer.EOS,
               "pad_token_id": tiny_tokenizer.PAD}
        half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
        bundle = Bundle(lm, half, Tokenizer(scratch), (tiny_tokenizer.EOS,), ids)
        save(bundle, folder, overwrite=True)
