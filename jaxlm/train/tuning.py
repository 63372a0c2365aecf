"""How what is trained relates to a model's parameters: all of them, adapters, coordinates."""

from dataclasses import dataclass
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import optax

from jaxlm.core.tree import Params, map_with_path
from jaxlm.models.axes import axes_of
from jaxlm.models.lm import LM

Trained = Any  # a pytree of float32 arrays, what the optimiser moves
Frozen = Any  # a pytree that is stored once a task and never moved; {} where there is nothing


class Tuning(Protocol):
    """A frozen dataclass with pure functions; one step of the trainer is

        params  = materialise(trained, frozen)
        grads   = d [loss(params) + penalty(trained, frozen)] / d trained
        updates = wrap(optimizer).update(grads, state, decayed(trained, frozen), frozen=frozen)
        trained = settle(trained + updates, frozen)

    so `wrap` may place a transformation last in the chain, and weight decay acts on `decayed`.
    `materialise` and its transpose run once a step, however many parts a batch has.
    """

    def start(self, lm: LM, params: Params, key: jax.Array, **calibration: Any) -> tuple[
        Trained, Frozen]:
        """Split parameters at the beginning of a task; a key for what starts at random."""

    def materialise(self, trained: Trained, frozen: Frozen) -> Params:
        """The parameters that the model is run with."""

    def wrap(
        self, optimizer: optax.GradientTransformation
    ) -> optax.GradientTransformationExtraArgs:
        """The optimiser, with what this way of tuning adds to its chain."""

    def decayed(self, trained: Trained, frozen: Frozen) -> Trained:
        """What the optimiser sees as parameters: same structure and shapes as `trained`."""

    def settle(self, trained: Trained, frozen: Frozen) -> Trained:
        """After an update: put back what rounding or the optimiser moved away."""

    def penalty(self, trained: Trained, frozen: Frozen) -> jax.Array:
        """Added to the loss, float32 scalar."""

    def metrics(self, trained: Trained, frozen: Frozen) -> dict[str, jax.Array]:
        """What this way of tuning promises, measured: float32 scalars for the log."""

    def axes(self, trained: Trained, frozen: Frozen) -> tuple[Params, Params]:
        """Axis names of every leaf of the two, for `core.mesh.shardings`; shapes will do."""


@dataclass(frozen=True)
class Full:
    """Every parameter is trained.

    >>> Full().materialise({"w": 1.0}, {})
    {'w': 1.0}
    """

    def start(self, lm, params, key, **calibration):
        """All of them, in float32; nothing is frozen."""
        return jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), params), {}

    def materialise(self, trained, frozen):
        """As they are."""
        return trained

    def wrap(self, optimizer):
        """As it is."""
        return optax.with_extra_args_support(optimizer)

    def decayed(self, trained, frozen):
        """As they are."""
        return trained

    def settle(self, trained, frozen):
        """As they are."""
        return trained

    def penalty(self, trained, frozen):
        """None."""
        return jnp.zeros((), jnp.float32)

    def metrics(self, trained, frozen):
        """None."""
        return {}

    def axes(self, trained, frozen):
        """Those of the parameters."""
        return map_with_path(lambda path, _: axes_of(path), trained), {}
