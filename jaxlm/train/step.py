"""One training step as a pure function: an objective and an optax transformation, composed."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct

from jaxlm.core.tree import Params
from jaxlm.models.lm import LM

Objective = Callable[[Params, Any, jax.Array], tuple[jax.Array, dict[str, jax.Array]]]


@struct.dataclass
class TrainState:
    """What training carries: parameters (plain or stacked), optimiser state, steps taken."""

    params: Params
    opt_state: optax.OptState
    step: jax.Array


def init_state(params: Params, optimizer: optax.GradientTransformation) -> TrainState:
    """The state before the first step."""
    return TrainState(params, optimizer.init(params), jnp.zeros((), jnp.int32))


def lm_objective(lm: LM, chunk: int = 8192) -> Objective:
    """Next-token cross-entropy: `-sum_t w_t log p(x_t | x_<t) / sum_t w_t`.

    The batch is a dict: `tokens` int32 (B, T + 1); optional `weights` float32 (B, T), of the
    targets, at least 0; optional `segments` and `positions` int32 (B, T), of packed documents.
    Returns: the loss and metrics `loss`, `tokens` (the sum of weights). A batch without any
    weight gives 0.
    """

    def objective(params, batch, key):
        tokens = batch["tokens"]
        logprobs_BT = lm.logprobs(
            params, tokens[:, :-1], tokens[:, 1:], chunk=chunk,
            segments_BT=batch.get("segments"), positions_BT=batch.get("positions"),
        )
        weights_BT = batch.get("weights", jnp.ones_like(logprobs_BT))
        total = weights_BT.sum()
        loss = -(weights_BT * logprobs_BT).sum() / jnp.maximum(total, 1e-9)
        return loss, {"loss": loss, "tokens": total}

    return objective


def train_step(
    objective: Objective, optimizer: optax.GradientTransformation, state: TrainState, batch: Any,
    key: jax.Array | None,
) -> tuple[TrainState, dict[str, jax.Array]]:
    """Gradient, update, and metrics with the gradient's global norm.

    Examples:
      >>> import optax
      >>> objective = lambda p, batch, key: ((p["x"] ** 2).sum(), {})
      >>> sgd = optax.sgd(0.25)
      >>> state, _ = train_step(objective, sgd, init_state({"x": jnp.ones(1)}, sgd), None, None)
      >>> float(state.params["x"][0])
      0.5
    """
    (_, metrics), grads = jax.value_and_grad(objective, has_aux=True)(state.params, batch, key)
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    metrics = metrics | {"grad_norm": optax.tree.norm(grads)}
    return TrainState(params, opt_state, state.step + 1), metrics
