"""The dense cache keeps the contract, alone and with one row (which has its own write)."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.cache.dense import Dense, append
from tests.cache.contract import SPEC, Contract


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
    buffer = rng.standard_normal((batch, 2, 6, 4)).astype(np.float32)
    new = rng.standard_normal((batch, time, 2, 4)).astype(np.float32)
    for start in (0, 3, 5, 6):
        for count in range(time + 1):
            starts, counts = np.arange(batch) * -1 % 2 + start, np.full(batch, count)
            expected = buffer.copy()
            for row in range(batch):
                for t in range(count):
                    if starts[row] + t < 6:
                        expected[row, :, starts[row] + t] = new[row, t]
            found = append(jnp.asarray(buffer), jnp.asarray(new), jnp.asarray(starts),
                           jnp.asarray(counts))
            np.testing.assert_array_equal(found, expected)
