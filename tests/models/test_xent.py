"""Chunked cross-entropy: value, gradient, memory, and targets that are no tokens."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.core.errors import ConfigError
from jaxlm.models.xent import token_logprobs

B, T, D, V = 2, 3, 8, 37
CAP = lambda logits: 3 * jnp.tanh(1.5 * logits / 3)


@pytest.fixture
def arrays():
    rng = np.random.default_rng(0)
    hidden = rng.standard_normal((B, T, D)).astype(np.float32)
    table = rng.standard_normal((V, D)).astype(np.float32)
    return jnp.asarray(hidden), jnp.asarray(table), jnp.asarray(rng.integers(0, V, (B, T)))


def whole(hidden, table, targets, shape=lambda logits: logits):
    log_p = jax.nn.log_softmax(shape(hidden @ table.T))
    return jnp.take_along_axis(log_p, targets[..., None], -1)[..., 0]


@pytest.mark.parametrize("chunk", [1, 8, 36, 37, 1000])
@pytest.mark.parametrize("shape", [None, CAP], ids=["plain", "capped"])
def test_value_and_gradient_equal_those_of_the_whole_matrix(arrays, chunk, shape):
    extra = () if shape is None else (shape,)
    hidden, table, targets = arrays
    found = token_logprobs(*arrays, *extra, chunk=chunk)
    np.testing.assert_allclose(found, whole(*arrays, *extra), atol=1e-5)
    weight = jnp.arange(B * T, dtype=jnp.float32).reshape(B, T) - 2
    gradients = [
        jax.grad(lambda h, w, f=f: (weight * f(h, w)).sum(), (0, 1))(hidden, table)
        for f in (lambda h, w: token_logprobs(h, w, targets, *extra, chunk=chunk),
                  lambda h, w: whole(h, w, targets, *extra))
    ]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), *gradients)


def test_never_holds_the_whole_matrix():
    args = (jnp.zeros((4, 64, 8)), jnp.zeros((4096, 8)), jnp.zeros((4, 64), jnp.int32))

    def bytes_held(chunk):
        loss = lambda h, w, y: token_logprobs(h, w, y, chunk=chunk).sum()
        compiled = jax.jit(jax.grad(loss, (0, 1))).lower(*args).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    matrix = 4 * 64 * 4096 * 4
    assert bytes_held(256) < matrix / 2 < bytes_held(4096)


@pytest.mark.parametrize("bad", [-100, -1, V])
def test_a_target_outside_the_vocabulary_is_nan_and_harms_no_other(arrays, bad):
    hidden, table, targets = arrays
    broken = targets.at[1, 1].set(bad)
    found = token_logprobs(hidden, table, broken, chunk=8)
    assert jnp.isnan(found[1, 1]) and int(jnp.isnan(found).sum()) == 1
    masked = lambda h: jnp.where(broken == bad, 0, token_logprobs(h, table, broken)).sum()
    assert bool(jnp.isfinite(jax.grad(masked)(hidden)).all())


@pytest.mark.parametrize("chunk", [0, -1, 2.5])
def test_chunk_must_be_a_count(arrays, chunk):
    with pytest.raises(ConfigError, match="chunk is .* expected a whole number of at least 1"):
        token_logprobs(*arrays, chunk=chunk)
