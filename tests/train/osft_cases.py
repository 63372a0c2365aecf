"""One matrix as a whole model, and steps with given gradients: what the tests of OSFT run on."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import optax

from jaxlm.core.tree import flatten, unflatten
from jaxlm.models.config import ModelConfig
from jaxlm.models.lm import LM

CONFIG = ModelConfig(vocab_size=32, dim=16, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=8,
                     ffn_dim=24)
MODEL = LM(CONFIG)
PATH = "layers_0/mlp/up/kernel"


def params_of(W):
    """A tree with one kernel."""
    return unflatten({PATH: jnp.asarray(W)})


def kernel(tree):
    """That kernel."""
    return flatten(tree)[PATH]


def start(tuning, W, lm=MODEL):
    """A task on one matrix."""
    return only(tuning).start(lm, params_of(W), jax.random.key(0))


def only(tuning):
    """The tuning, with the one projection that is there as its target."""
    return replace(tuning, targets=("up",))


def run(tuning, W, gradients, optimizer, each=False):
    """W after steps whose dL/dW are given, as the trainer takes them.

    Returns: W, or W after every step; and (trained, frozen) at the end.
    """
    trained, frozen = start(tuning, W)
    wrapped = tuning.wrap(optimizer)

    @jax.jit
    def step(carry, G):
        trained, state = carry
        _, pull = jax.vjp(lambda x: kernel(tuning.materialise(x, frozen)), trained)
        updates, state = wrapped.update(
            pull(G)[0], state, tuning.decayed(trained, frozen), frozen=frozen)
        trained = tuning.settle(optax.apply_updates(trained, updates), frozen)
        return (trained, state), kernel(tuning.materialise(trained, frozen)) if each else None

    carry, all_W = jax.lax.scan(step, (trained, wrapped.init(trained)), jnp.asarray(gradients))
    W = all_W if each else kernel(tuning.materialise(carry[0], frozen))
    return W, (carry[0], frozen)
