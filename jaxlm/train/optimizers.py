"""Optimisers by optax, whose rate and length are arrays: a sweep over them compiles once."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from optax.contrib import MuonDimensionNumbers, muon

from jaxlm.models.stack import STACK
from jaxlm.train.config import Optimizer
from jaxlm.train.matrices import input_axes

VECTORS = ("scale", "bias", "s")  # what is no matrix, stacked or not; s: singular values
TABLES = ("table",)  # rows looked up, not a map


class Rate(NamedTuple):
    """The state of a schedule: updates made, and what may be swept."""

    updates: jax.Array
    peak: jax.Array
    warmup: jax.Array
    total: jax.Array

    def value(self, schedule: str) -> jax.Array:
        """The rate of the next update: up from 0 over `warmup`, then down to 0 at `total`."""
        up = jnp.minimum((self.updates + 1) / jnp.maximum(self.warmup, 1), 1.0)
        span = jnp.maximum(self.total - self.warmup, 1)
        done = jnp.clip((self.updates - self.warmup) / span, 0.0, 1.0)
        down = {"constant": jnp.ones(()), "linear": 1 - done,
                "cosine": (1 + jnp.cos(jnp.pi * done)) / 2}
        return self.peak * up * down[schedule]


def scale_by_rate(settings: Optimizer, total: int) -> optax.GradientTransformation:
    """Updates times minus the rate, which lives in the state."""
    def init(params):
        f32 = lambda x: jnp.asarray(x, jnp.float32)
        return Rate(jnp.zeros((), jnp.int32), f32(settings.rate), f32(settings.warmup), f32(total))

    def update(updates, state, params=None):
        rate = -state.value(settings.schedule)
        return (jax.tree.map(lambda u: rate * u, updates),
                state._replace(updates=state.updates + 1))

    return optax.GradientTransformation(init, update)


def rate_of(opt_state: Any, schedule: str) -> jax.Array:
    """The rate of the next update, found in a whole optimiser's state."""
    is_rate = lambda node: isinstance(node, Rate)
    found = [x for x in jax.tree.leaves(opt_state, is_leaf=is_rate) if is_rate(x)]
    return found[0].value(schedule)


def make_optimizer(settings: Optimizer, total: int) -> optax.GradientTransformation:
    """Clipping, the optimiser at rate 1 with decoupled weight decay, the rate.

    Args: total: steps of the run, for the schedule.
    """
    decay = optax.add_decayed_weights(settings.weight_decay, mask=_decays)
    core = {
        "adamw": lambda: optax.chain(optax.scale_by_adam(settings.b1, settings.b2), decay),
        "lion": lambda: optax.chain(optax.scale_by_lion(settings.b1, settings.b2), decay),
        "sgd": lambda: optax.chain(optax.trace(settings.b1), decay),
        "muon": lambda: optax.chain(_muon(settings), optax.scale(-1.0), decay),
    }[settings.kind]()
    clip = [optax.clip_by_global_norm(settings.clip)] if settings.clip else []
    return optax.chain(*clip, core, scale_by_rate(settings, total))


def _muon(settings: Optimizer) -> optax.GradientTransformation:
    """Orthogonalised momentum for matrices, Adam for the rest, at rate 1."""
    return muon(1.0, beta=settings.b1, adam_b1=settings.b1, adam_b2=settings.b2,
                muon_weight_dimension_numbers=lambda tree: _named(_dimensions, tree))


def _dimensions(path: str, leaf: jax.Array) -> MuonDimensionNumbers | None:
    """Which axes are a matrix's rows and which its columns; None for what is no matrix.

    Stacked layers are matrices side by side. Of a kernel's parts (a factor, an adapter, a core)
    the last axis is the columns: `o/kernel/u` (heads, width, r) is one matrix.
    """
    name, lead = path.rsplit("/", 1)[-1], int(path.startswith(f"{STACK}/"))
    if not _is_matrix(path, leaf) or name in TABLES:
        return None
    split = lead + input_axes(path) if name == "kernel" else leaf.ndim - 1
    return MuonDimensionNumbers(tuple(range(lead, split)), tuple(range(split, leaf.ndim)))


def _is_matrix(path: str, leaf: jax.Array) -> bool:
    """By the leaf's name and its axes, those of stacked layers apart."""
    lead = int(path.startswith(f"{STACK}/"))
    return path.rsplit("/", 1)[-1] not in VECTORS and leaf.ndim > 1 + lead


def _decays(tree: Any) -> Any:
    """Weight decay is for matrices."""
    return _named(_is_matrix, tree)


def _named(function: Any, tree: Any) -> Any:
    """`function(path, leaf)` at every leaf of any tree."""
    def call(keys, leaf):
        return function("/".join(str(getattr(k, "key", getattr(k, "idx", k))) for k in keys), leaf)

    return jax.tree_util.tree_map_with_path(call, tree)
