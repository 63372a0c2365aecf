"""Elastic weight consolidation: every parameter is tied to its old value as its Fisher says."""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from jaxlm.core.errors import ConfigError, number
from jaxlm.core.tree import Params
from jaxlm.models.lm import LM
from jaxlm.train.step import Objective, lm_objective
from jaxlm.train.tuning import Full


@dataclass(frozen=True)
class Ewc(Full):
    """`loss + weight / 2 * sum_i F_i (theta_i - theta*_i)^2`, all parameters trained.

    `theta*` are the parameters when the task begins; `F` is the diagonal of the empirical Fisher
    information over data of the task before, added to `decay` times that of the tasks before it.
    Source: 1612.00796, equation 3; one anchor for all tasks: 1805.06370, section 2.2.

    Args:
      weight: lambda, at least 0.
      decay: of earlier tasks' information, in [0, 1].
    """

    weight: float = 400.0
    decay: float = 1.0

    def __post_init__(self):
        number("tuning.weight", self.weight)
        number("tuning.decay", self.decay, high=1.0)

    def start(self, lm: LM, params: Params, key, *, batches=None, previous=None, **calibration):
        """`batches`: of earlier data, empty where there is none; `previous`: (trained, frozen)."""
        if batches is None:
            raise ConfigError("EWC needs samples of the earlier task, to know what mattered for "
                              "it; name their files in data.calibration")
        trained, _ = super().start(lm, params, key)
        found = fisher(lm_objective(lm), trained, batches)
        if previous is not None:
            old = previous[1]["fisher"]
            found = jax.tree.map(lambda new, old: new + self.decay * old, found, old)
        return trained, {"anchor": jax.tree.map(jnp.copy, trained), "fisher": found}

    def penalty(self, trained, frozen):
        """`weight / 2 * sum F (theta - theta*)^2`."""
        return 0.5 * self.weight * _distance(trained, frozen)

    def metrics(self, trained, frozen):
        """The weighted squared distance, without the weight."""
        return {"ewc_distance": _distance(trained, frozen)}

    def axes(self, trained, frozen):
        """Those of the parameters, three times."""
        names, _ = super().axes(trained, frozen)
        return names, {"anchor": names, "fisher": names}


def _distance(trained: Params, frozen: dict[str, Any]) -> jax.Array:
    parts = jax.tree.map(lambda f, now, then: (f * (now - then) ** 2).sum(),
                         frozen["fisher"], trained, frozen["anchor"])
    return sum(jax.tree.leaves(parts), jnp.zeros((), jnp.float32))


def fisher(objective: Objective, params: Params, batches: Iterable[dict[str, Any]]) -> Params:
    """The diagonal of the empirical Fisher information: the mean over rows of
    `(d log p(answer | prompt) / d theta)^2`, a row being a sample.

    Averaging gradients over a batch before squaring, as some code does, gives something else.
    """
    total, count = jax.tree.map(jnp.zeros_like, params), 0.0
    for batch in batches:
        total, seen = _add_squares(objective, params, total, batch)
        count += float(seen)
    return jax.tree.map(lambda x: x / max(count, 1.0), total)


@partial(jax.jit, static_argnums=0, donate_argnums=2)
def _add_squares(objective, params, total, batch):
    """Adds each row's squared gradient; rows of padding count for nothing."""
    def one(total, row):
        def log_likelihood(params):
            loss, metrics = objective(params, jax.tree.map(lambda x: x[None], row), None)
            return -loss * metrics["tokens"], metrics["tokens"]

        grads, tokens = jax.grad(log_likelihood, has_aux=True)(params)
        return jax.tree.map(lambda a, g: a + g**2, total, grads), tokens > 0

    total, real = jax.lax.scan(one, total, batch)
    return total, real.sum()
