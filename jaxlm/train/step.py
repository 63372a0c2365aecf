"""One training step as a pure function: an objective and an optax transformation, composed."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct
from jax.extend.core import Literal

from jaxlm.core.tree import Params
from jaxlm.models.lm import LM
from jaxlm.train.tuning import Frozen, Tuning

Objective = Callable[[Params, Any, jax.Array | None], tuple[jax.Array, dict[str, jax.Array]]]


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
    targets, at least 0; optional `segments` and `positions` int32 (B, T), of packed documents;
    optional `inputs` int32 (B, T), which the model reads in place of the tokens.
    Returns: the loss and metrics `loss`, `tokens` (the sum of weights). A batch without any
    weight gives 0.
    """

    def objective(params, batch, key):
        tokens = batch["tokens"]
        logprobs_BT = lm.logprobs(
            params, batch.get("inputs", tokens[:, :-1]), tokens[:, 1:], chunk=chunk,
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

    Example:
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


def tuned_step(
    objective: Objective, tuning: Tuning, optimizer: optax.GradientTransformation,
    state: TrainState, frozen: Frozen, batch: Any, key: jax.Array | None = None,
    parts: int = 1, dtype: Any = jnp.float32,
) -> tuple[TrainState, dict[str, jax.Array]]:
    """`train_step` on what a tuning trains (`state.params`), in the order that `Tuning` gives.

    The parameters are made once a step, and the gradient with respect to them is carried back to
    what is trained once, however many parts the batch has. The price is memory: with several
    parts, the sum of gradients has the shapes of the parameters that training moves, in float32,
    though what is trained be smaller (adapters, coordinates).

    Args:
      optimizer: not yet wrapped by the tuning; `state.opt_state` is of the wrapped one.
      batch: arrays that lead with rows, a multiple of `parts`.
      parts: row r is in part `r % parts`; gradients are summed over the parts, each weighted by
        its tokens, which is the gradient of the whole batch.
      dtype: of the compute; `state.params` stay float32.
    Returns: the next state, and metrics: those of the objective, `penalty` and `grad_norm`.
    """
    trained = state.params
    moved, pull, merged = _opened(lambda x: tuning.materialise(x, frozen), trained, dtype)

    def loss(moved, part):
        value, metrics = objective(merged(moved), part, key)
        return value * metrics["tokens"], metrics

    grads, metrics = _summed(jax.grad(loss, has_aux=True), moved, batch, parts)
    grads = pull(grads)
    penalty, tied = jax.value_and_grad(tuning.penalty)(trained, frozen)
    total = jnp.maximum(metrics["tokens"], 1e-9)
    grads = jax.tree.map(lambda g, p: g / total + p, grads, tied)
    updates, opt_state = tuning.wrap(optimizer).update(
        grads, state.opt_state, tuning.decayed(trained, frozen), frozen=frozen)
    trained = tuning.settle(optax.apply_updates(trained, updates), frozen)
    metrics |= {"penalty": penalty, "grad_norm": optax.tree.norm(grads)}
    return TrainState(trained, opt_state, state.step + 1), metrics


def _opened(
    materialise: Callable[[Any], Params], trained: Any, dtype: Any
) -> tuple[list[jax.Array], Callable, Callable]:
    """The parameters that training moves, apart from those that it does not.

    A gradient with respect to all would be a product too many for every frozen matrix.
    Returns: the list of those that move, in `dtype`; their gradients to those of what is trained;
      the list, or another, to whole parameters.
    """
    moves = depends(materialise, trained)

    def some(trained):
        params = materialise(trained)
        return [x for x, m in zip(jax.tree.leaves(params), moves, strict=True) if m], params

    moved, transpose, params = jax.vjp(some, trained, has_aux=True)
    pull = lambda grads: transpose(jax.tree.map(lambda g, x: g.astype(x.dtype), grads, moved))[0]
    low = lambda tree: jax.tree.map(lambda x: x.astype(dtype), tree)
    leaves, tree = jax.tree.flatten(low(params))

    def merged(moved):
        new = iter(moved)
        chosen = [next(new) if m else x for x, m in zip(leaves, moves, strict=True)]
        return jax.tree.unflatten(tree, chosen)

    return low(moved), pull, merged


def depends(function: Callable[[Any], Any], x: Any) -> list[bool]:
    """Which leaves of `function(x)` depend on x, by the traced program.

    >>> depends(lambda x: {"a": 2 * x, "b": jnp.ones(3)}, 1.0)
    [True, False]
    """
    program = jax.make_jaxpr(function)(x).jaxpr
    known = set(program.invars)
    has = lambda var: not isinstance(var, Literal) and var in known
    for equation in program.eqns:
        if any(map(has, equation.invars)):
            known.update(equation.outvars)
    return [has(var) for var in program.outvars]


def _summed(grad: Callable, params: Any, batch: Any, parts: int) -> tuple[Any, dict]:
    """Gradients, at least float32, and metrics over a batch's parts, one part after another."""
    wide = lambda tree: jax.tree.map(
        lambda x: x.astype(jnp.promote_types(x.dtype, jnp.float32)), tree)
    if parts == 1:
        grads, metrics = grad(params, batch)
        return wide(grads), metrics
    split = jax.tree.map(
        lambda x: jnp.swapaxes(x.reshape(x.shape[0] // parts, parts, *x.shape[1:]), 0, 1), batch)

    def add(total, part):
        grads, metrics = grad(params, part)
        return jax.tree.map(jnp.add, total, wide(grads)), metrics

    zeros = wide(jax.tree.map(jnp.zeros_like, params))
    grads, each = jax.lax.scan(add, zeros, split)
    tokens = each["tokens"].sum()
    weigh = lambda x: (x * each["tokens"]).sum() / jnp.maximum(tokens, 1e-9)
    return grads, {name: weigh(x) for name, x in each.items()} | {"tokens": tokens}
