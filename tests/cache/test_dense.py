"""The dense cache keeps the contract, alone and with one row (which has its own write)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.cache.dense import Dense, append
from tests.cache.contract import SPEC, Contract, draw, reference


class TestDense(Contract):
    kind = Dense()


class TestDenseInBfloat16(Contract):
    kind = Dense("bfloat16")
    exact = False
    tolerance = 0.1


def test_storage_is_as_asked():
    assert Dense().init(SPEC, 2, 5, jnp.float32)["k"].dtype == jnp.float32
    assert Dense("bfloat16").init(SPEC, 2, 5, jnp.float32)["v"].dtype == jnp.bfloat16
    assert Dense() == Dense(None) and hash(Dense()) == hash(Dense(None))


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("time", [1, 4])
def test_append_equals_a_loop(batch, time):
    rng = np.random.default_rng(0)
    values = rng.standard_normal((batch, 2, 6, 4)).astype(np.float32)
    keys = values.swapaxes(2, 3) + 1
    new = rng.standard_normal((batch, time, 2, 4)).astype(np.float32)
    write = jax.jit(append)
    for start in (0, 3, 5, 6):
        for count in range(time + 1):
            starts, counts = np.arange(batch) * -1 % 2 + start, np.full(batch, count)
            expected = values.copy()
            for row in range(batch):
                for t in range(count):
                    if starts[row] + t < 6:
                        expected[row, :, starts[row] + t] = new[row, t]
            found = write({"k": keys, "v": values}, new + 1, new, starts, counts)
            np.testing.assert_array_equal(found["v"], expected)
            np.testing.assert_array_equal(found["k"], expected.swapaxes(2, 3) + 1)


@pytest.mark.parametrize(("kind", "slots"), [(Dense(), 300), (Dense(steady=True), 400)])
def test_a_step_reads_all_it_must_whatever_size_it_cuts_to(kind, slots):
    """Over the lengths where a step on a CPU begins to read a longer piece of the cache."""
    batch = 2
    q, k, v = draw(slots, batch=batch)
    expected = reference(SPEC, q, k, v)
    state = kind.init(SPEC, batch, slots, jnp.float32)
    at = jnp.array([slots - 1, 60])
    pos = jnp.broadcast_to(jnp.arange(slots), (batch, slots))
    *_, state = kind.prefill(SPEC, state, q, k, v, pos, at + 1)
    step = jax.jit(kind.step, static_argnums=0)
    short = []
    for length in (3, 62, 63, 64, 65, 127, 128, 130, 255, 256, slots - 1):
        at = jnp.array([length, 60])  # rewrites what is there: the state stays good
        rows = jnp.arange(batch)
        now = tuple(x[rows, at][:, None] for x in (q, k, v))
        out, lse, state = step(SPEC, state, *now, at, at)
        np.testing.assert_allclose(out[:, 0], expected[0][rows, at], atol=1e-5)
        np.testing.assert_allclose(lse[:, 0], expected[1][rows, at], atol=1e-5)
        short.append((np.asarray(out[1]), np.asarray(lse[1])))
    if kind.steady:  # 61 tokens: without it, their sums differ in the last bit on an x86-64
        same = [(one[0] == short[0][0]).all() and (one[1] == short[0][1]).all() for one in short]
        assert all(same)
