"""What every implementation shares: masks, the online softmax, the tail."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

EMPTY_LSE = -1e30  # log-sum-exp of no tokens; finite, so that merges of segments stay finite


class Softmax(NamedTuple):
    """Running maximum, sum and weighted values of an online softmax."""

    top: jax.Array  # [..., 1]
    total: jax.Array  # [..., 1]
    values: jax.Array  # [..., H]


def start_softmax(lead: tuple[int, ...], head_dim: int) -> Softmax:
    """No tokens yet."""
    column = (*lead, 1)
    return Softmax(jnp.full(column, EMPTY_LSE, jnp.float32), jnp.zeros(column, jnp.float32),
                   jnp.zeros((*lead, head_dim), jnp.float32))


def cap(logits: jax.Array, softcap: float | None) -> jax.Array:
    """Logits under a soft cap, where there is one."""
    return logits if softcap is None else softcap * jnp.tanh(logits / softcap)


def weigh(state: Softmax, logits: jax.Array, keep: jax.Array) -> tuple[Softmax, jax.Array]:
    """Weights of new logits [..., S] and the state rescaled to the new maximum.

    The caller adds `weights @ values` to `state.values`.
    """
    logits = jnp.where(keep, logits, EMPTY_LSE)
    top = jnp.maximum(state.top, jnp.max(logits, -1, keepdims=True))
    weights = jnp.where(keep, jnp.exp(logits - top), 0.0)
    shrink = jnp.exp(state.top - top)
    total = state.total * shrink + jnp.sum(weights, -1, keepdims=True)
    return Softmax(top, total, state.values * shrink), weights


def finish(state: Softmax) -> tuple[jax.Array, jax.Array]:
    """(out [..., H], lse [...]); zeros and EMPTY_LSE where nothing was kept."""
    some = state.total > 0
    total = jnp.where(some, state.total, 1.0)
    lse = jnp.where(some, state.top + jnp.log(total), EMPTY_LSE)
    return jnp.where(some, state.values / total, 0.0), lse[..., 0]
