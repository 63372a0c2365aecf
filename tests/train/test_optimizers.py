"""What an optimiser takes for a matrix, whatever its axes and whether layers are stacked."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxlm.core.tree import unflatten
from jaxlm.models.stack import stack, unstack
from jaxlm.train import Optimizer, Osft
from jaxlm.train.optimizers import make_optimizer
from jaxlm.train.step import TrainState, lm_objective, tuned_step
from tests.train.osft_cases import CONFIG, MODEL

TOKENS = jax.random.randint(jax.random.key(3), (4, 13), 0, CONFIG.vocab_size)


def learnt(kind, stacked):
    """A model after four steps of the factored form, with much decay."""
    params = MODEL.init(jax.random.key(0))
    tuning = Osft("factored")
    optimizer = make_optimizer(Optimizer(kind, 1e-2, weight_decay=5.0, clip=0.0), 10)
    trained, frozen = tuning.start(
        MODEL, stack(params, CONFIG) if stacked else params, jax.random.key(1))
    state = TrainState(trained, tuning.wrap(optimizer).init(trained), jnp.zeros((), jnp.int32))
    step = jax.jit(lambda state: tuned_step(
        lm_objective(MODEL), tuning, optimizer, state, frozen, {"tokens": TOKENS})[0])
    for _ in range(4):
        state = step(state)
    found = tuning.materialise(state.params, frozen)
    return unstack(found) if stacked else found


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_factors_of_stacked_layers_train_as_those_of_layers_do(kind):
    chex.assert_trees_all_close(learnt(kind, False), learnt(kind, True), atol=2e-4)


@pytest.mark.parametrize("at", ["layers_0", "stack/layers_0"])
def test_singular_values_do_not_decay_and_factors_do(at):
    lead = (2,) if at.startswith("stack") else ()
    tree = unflatten({f"{at}/mlp/up/kernel/{name}": jnp.ones((*lead, *shape)) for name, shape in (
        ("u", (6, 3)), ("s", (3,)), ("v", (5, 3)))})
    decay = make_optimizer(Optimizer("sgd", 1.0, weight_decay=0.25, clip=0.0), 10)
    zeros = jax.tree.map(jnp.zeros_like, tree)
    update, _ = decay.update(zeros, decay.init(tree), tree)
    parts = update[at.split("/")[0]]
    parts = (parts["layers_0"] if lead else parts)["mlp"]["up"]["kernel"]
    assert bool((parts["s"] == 0).all())
    assert bool((parts["u"] == -0.25).all()) and bool((parts["v"] == -0.25).all())


def orthogonalised(path, gradient):
    """Muon's first update of one leaf."""
    tree, muon = unflatten({path: gradient}), make_optimizer(Optimizer("muon", 1.0, clip=0.0), 10)
    update, _ = muon.update(tree, muon.init(tree), jax.tree.map(jnp.zeros_like, tree))
    return jax.tree.leaves(update)[0]


@pytest.mark.parametrize(("path", "shape", "matrix"), [
    ("layers_0/attn/o/kernel/u", (2, 8, 4), (16, 4)),
    ("stack/layers_0/attn/o/kernel/u", (3, 2, 8, 4), (16, 4)),
    ("layers_0/attn/q/kernel/v", (2, 8, 4), (16, 4)),
    ("layers_0/attn/q/kernel", (16, 2, 8), (16, 16)),
    ("stack/layers_0/attn/o/kernel", (3, 2, 8, 16), (16, 16)),
    ("stack/layers_0/mlp/up/kernel/free", (3, 6, 5), (6, 5)),
    ("layers_0/mlp/up/kernel/a", (6, 2), (6, 2)),
])
def test_muon_takes_each_part_for_its_one_matrix(path, shape, matrix):
    gradient = jax.random.normal(jax.random.key(0), shape)
    found = orthogonalised(path, gradient).reshape(-1, *matrix)
    wanted = [orthogonalised("layers_0/mlp/up/kernel", one)
              for one in gradient.reshape(-1, *matrix)]
    np.testing.assert_allclose(found, jnp.stack(wanted), atol=1e-5)


@pytest.mark.parametrize("path", ["stack/layers_0/mlp/up/kernel/s", "embed/table"])
def test_muon_leaves_what_is_no_matrix_to_adam(path):
    gradient = jax.random.normal(jax.random.key(0), (3, 4))
    found = orthogonalised(path, gradient)
    first = 1 + 0.9 * 0.1 / (1 - 0.9**2)  # of Adam with Nesterov's momentum: every entry's size
    np.testing.assert_allclose(found, -first * jnp.sign(gradient), rtol=1e-4)
    alone = orthogonalised("layers_0/mlp/up/kernel", gradient)
    assert optax.tree.norm(alone) < 0.6 * optax.tree.norm(found)
