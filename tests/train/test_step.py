"""A training step: its loss, its packing, its weights."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxlm.core.mesh import make_mesh, shard_batch, shardings
from jaxlm.models.config import ModelConfig
from jaxlm.models.lm import LM
from jaxlm.models.stack import stack, stack_axes
from jaxlm.train.step import init_state, lm_objective, train_step

LM_ = LM(ModelConfig(vocab_size=13, dim=16, num_layers=2, num_heads=2, num_kv_heads=1,
                     head_dim=8, ffn_dim=24))
PARAMS = LM_.init(jax.random.key(0))
TOKENS = jax.random.randint(jax.random.key(1), (3, 9), 0, 13)


def plain_loss(tokens, weights):
    logits = np.asarray(LM_.apply(PARAMS, tokens[:, :-1]).logits, np.float64)
    logprobs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    picked = np.take_along_axis(logprobs, np.asarray(tokens)[:, 1:, None], -1)[..., 0]
    return -(picked * weights).sum() / weights.sum()


def test_the_loss_is_the_weighted_cross_entropy():
    weights = np.array(jax.random.uniform(jax.random.key(2), (3, 8)))
    batch = {"tokens": TOKENS, "weights": jnp.asarray(weights)}
    loss, metrics = lm_objective(LM_)(PARAMS, batch, None)
    np.testing.assert_allclose(loss, plain_loss(TOKENS, weights), rtol=1e-5)
    np.testing.assert_allclose(metrics["tokens"], weights.sum(), rtol=1e-6)


def test_packed_documents_do_not_see_each_other():
    first, second = TOKENS[:1, :5], TOKENS[1:2, :5]
    packed = jnp.concatenate([first, second], 1)
    segments = jnp.array([[0] * 5 + [1] * 4])
    positions = jnp.array([[0, 1, 2, 3, 4, 0, 1, 2, 3]])
    weights = jnp.array([[1.0] * 4 + [0] + [1] * 4])  # the seam predicts nothing
    batch = {"tokens": packed, "segments": segments, "positions": positions, "weights": weights}
    loss, _ = lm_objective(LM_)(PARAMS, batch, None)
    apart = [plain_loss(doc, np.ones((1, 4))) for doc in (first, second)]
    np.testing.assert_allclose(loss, np.mean(apart), rtol=1e-5)


def test_steps_lower_the_loss():
    adam = optax.adam(1e-2)
    step = jax.jit(lambda s, b: train_step(lm_objective(LM_), adam, s, b, None))
    state, losses = init_state(PARAMS, adam), []
    for _ in range(20):
        state, metrics = step(state, {"tokens": TOKENS})
        losses.append(float(metrics["loss"]))
    assert losses[-1] < 0.5 * losses[0]
    assert int(state.step) == 20 and float(metrics["grad_norm"]) > 0


@pytest.mark.parametrize("stacked", [False, True])
@pytest.mark.parametrize("axes", [{"fsdp": 8}, {"data": 2, "fsdp": 2, "tensor": 2}], ids=str)
def test_eight_devices_train_as_one(axes, stacked):
    """Held rows change where the work is done, not what comes out."""
    config = LM_.config.replace(vocab_size=16, num_kv_heads=2)
    tokens = jax.random.randint(jax.random.key(2), (8, 9), 0, 16)
    sgd = optax.sgd(0.1)

    def trained(mesh):
        lm = LM(config, remat=True, mesh=mesh)
        params, names = lm.init(jax.random.key(0)), lm.axes()
        if stacked:
            params, names = stack(params, config), stack_axes(names, config)
        if mesh is not None:
            params = jax.device_put(params, shardings(names, params, mesh))
        step = jax.jit(lambda s, b: train_step(lm_objective(lm), sgd, s, b, None))
        state, metrics = step(init_state(params, sgd), shard_batch({"tokens": tokens}, mesh))
        return state.params, metrics["loss"]

    alone, together = trained(None), trained(make_mesh(**axes))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), alone, together)
