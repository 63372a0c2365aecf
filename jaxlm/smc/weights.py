"""Log-weights of particles: normalised, their effective number, and what if none is left."""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Normalised(NamedTuple):
    """Probabilities of particles, along the last axis.

    probs_P: float32, sum to 1. log_mean: log of the mean weight, -inf only when all are zero.
    broken: every weight was zero, or one was NaN or +inf; the probabilities are then uniform.
    """

    probs_P: jax.Array
    log_mean: jax.Array
    broken: jax.Array


def normalise(log_weights_P: jax.Array) -> Normalised:
    """`W_i = w_i / sum_j w_j`, in float32 from log-weights.

    A weight of zero is -inf. A NaN or +inf counts as zero and is flagged, so that one broken reward
    never spoils the others; without any weight left the particles are alike.

    Args: log_weights_P: (..., P).

    Example:
      >>> normalise(jnp.log(jnp.array([1.0, 0.0]))).probs_P.tolist()
      [1.0, 0.0]
    """
    logw = log_weights_P.astype(jnp.float32)
    strange = jnp.isnan(logw) | (logw == jnp.inf)
    logw = jnp.where(strange, -jnp.inf, logw)
    peak = jnp.max(logw, -1, keepdims=True)
    none = peak == -jnp.inf
    weights = jnp.exp(logw - jnp.where(none, 0.0, peak))
    total = weights.sum(-1, keepdims=True)
    count = logw.shape[-1]
    probs = jnp.where(none, 1.0 / count, weights / jnp.where(none, 1.0, total))
    log_mean = jnp.where(none, -jnp.inf, peak + jnp.log(jnp.where(none, 1.0, total) / count))
    return Normalised(probs, log_mean[..., 0], none[..., 0] | strange.any(-1))


def effective_size(log_weights_P: jax.Array) -> jax.Array:
    """`(sum w)^2 / sum w^2`, from 1 (one particle holds all) to P (all alike); float32 (...).

    >>> float(effective_size(jnp.log(jnp.array([1.0, 1.0, 0.0, 0.0]))))
    2.0

    Source: Kong, Liu and Wong 1994, section 4.
    """
    probs = normalise(log_weights_P).probs_P
    return 1.0 / jnp.sum(probs * probs, -1)


def standard_error(log_evidence_C: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The log of the mean evidence over independent chains, and its standard error.

    `log Z = log mean_c exp(l_c)`; by the delta method its error is `sd(z) / (sqrt(C) mean(z))`,
    with `z_c = exp(l_c)`. The error is NaN for one chain, which tells nothing of its own, and where
    all estimates are zero; both are NaN where one of them is NaN or +inf.

    Args: log_evidence_C: (C, ...), one estimate a chain.
    Returns: both of shape (...).

    >>> mean, error = standard_error(jnp.log(jnp.array([1.0, 3.0])))
    >>> round(float(jnp.exp(mean)), 3), round(float(error), 3)
    (2.0, 0.5)
    """
    chains = log_evidence_C.shape[0]
    found = normalise(jnp.moveaxis(log_evidence_C, 0, -1))
    relative = chains * found.probs_P  # z_c over their mean
    spread = jnp.sqrt(jnp.sum((relative - 1) ** 2, -1) / max(chains - 1, 1) / chains)
    none = found.log_mean == -jnp.inf
    strange = found.broken & ~(log_evidence_C == -jnp.inf).all(0)
    return (jnp.where(strange, jnp.nan, found.log_mean),
            jnp.where(strange | none | (chains < 2), jnp.nan, spread))
