"""Entropic tempering of the early steps: resample less sharply while rewards say little.

At progress `s = t / T`, when the effective size is below a threshold and s below `early`, ancestors
are drawn by `W^(1/tau)`. The published rule then forgets the weights, which changes the target;
`filter.step` carries `W^(1 - 1/tau)` on, which keeps it.

Source: arXiv 2510.05825, section 4, and its released code for the three temperatures. That code
resamples at every step, by that step's weights alone, and tempers below an effective size of P / 2.
"""

import jax
import jax.numpy as jnp

from jaxlm.core.errors import ConfigError
from jaxlm.smc.weights import normalise

CLIP = 1e-7
RULES = ("size", "entropy", "progress")


def temperature(
    log_weights_P: jax.Array, progress: jax.Array | float, rule: str = "size",
    threshold: jax.Array | float = 0.5, early: jax.Array | float = 0.5,
) -> jax.Array:
    """tau >= 1 of each problem, float32 (...).

    'size': `(P / ESS) (1 - s)`; 'entropy': `1 / (H + (1 - H) s)`, H the entropy over log P;
    'progress': `2 - s`; never below 1, and 1 when the effective size or the progress is not below
    its bound, or for one particle.

    Args:
      progress: s, from 0 to 1. threshold: of the effective size over P. early: of the progress.
    Raises: ConfigError for an unknown rule.

    >>> round(float(temperature(jnp.log(jnp.array([1.0, 0.0, 0.0, 0.0])), 0.25)), 3)
    3.0
    """
    if rule not in RULES:
        raise ConfigError(f"rule is {rule!r}; expected one of {RULES}")
    count = log_weights_P.shape[-1]
    if count == 1:
        return jnp.ones(log_weights_P.shape[:-1])
    probs = jnp.clip(normalise(log_weights_P).probs_P, CLIP, 1 - CLIP)
    size = 1.0 / jnp.sum(probs * probs, -1)
    entropy = -jnp.sum(probs * jnp.log(probs), -1) / jnp.log(jnp.float32(count))
    s = jnp.asarray(progress, jnp.float32)
    tau = {"size": count / size * (1 - s), "entropy": 1 / (entropy + (1 - entropy) * s),
           "progress": jnp.broadcast_to(2 - s, size.shape)}[rule]
    return jnp.where((size < threshold * count) & (s < early), jnp.maximum(tau, 1.0), 1.0)
