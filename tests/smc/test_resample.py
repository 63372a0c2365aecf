"""Resampling: unbiased offspring, what each scheme promises, and float32's pitfalls."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.core.errors import ConfigError
from jaxlm.smc.resample import SCHEMES, ancestors, resampler
from jaxlm.smc.weights import effective_size, normalise, standard_error

PROBS = np.array([0.05, 0.0, 0.31, 0.04, 0.25, 0.1, 0.2, 0.05], np.float32)


@pytest.mark.parametrize("scheme", sorted(SCHEMES))
def test_offspring_are_unbiased(scheme):
    runs, n = 20000, 8
    drawn = np.asarray(ancestors(jax.random.key(0), jnp.tile(PROBS, (runs, 1)), scheme))
    counts = np.stack([(drawn == i).sum(1) for i in range(len(PROBS))], 1)
    error = np.maximum(counts.std(0, ddof=1) / np.sqrt(runs), 1e-9)
    assert (counts[:, 1] == 0).all()
    live = PROBS > 0
    off = np.abs(counts.mean(0) - n * PROBS)[live]
    assert (off / error[live] < 4).all() or (off < 1e-6).all()
    if scheme in ("systematic", "residual"):
        assert (counts >= np.floor(n * PROBS - 1e-5)).all()
    if scheme == "systematic":
        assert (counts <= np.ceil(n * PROBS + 1e-5)).all()


def test_systematic_varies_less_than_multinomial():
    spread = {name: np.asarray(ancestors(jax.random.key(1), jnp.tile(PROBS, (4000, 1)), name))
              for name in ("systematic", "multinomial")}
    variance = {name: np.var((x == 2).sum(1)) for name, x in spread.items()}
    assert variance["systematic"] < 0.5 * variance["multinomial"]


@pytest.mark.parametrize("scheme", sorted(SCHEMES))
@pytest.mark.parametrize("count", [1, 3, 100_000])
def test_many_particles_in_float32(scheme, count):
    """Probabilities that do not sum to 1, zeros at both ends, whole expectations."""
    probs = jnp.zeros(count + 2).at[1:-1].set(1.0 / count)
    index = resampler(scheme)(jax.random.key(2), probs, count)
    assert int(index.min()) >= 1 and int(index.max()) <= count
    if scheme == "residual" and count < 100:
        assert sorted(index.tolist()) == list(range(1, count + 1))


def test_one_particle_that_holds_everything():
    for scheme in SCHEMES:
        index = resampler(scheme)(jax.random.key(3), jnp.zeros(9).at[4].set(1.0), 9)
        assert index.tolist() == [4] * 9


def test_unknown_schemes_are_named():
    with pytest.raises(ConfigError, match="'stratifed'.*multinomial"):
        resampler("stratifed")


def test_weights_of_any_size():
    logw = jnp.array([[1e4, 1e4 - 1.0], [-1e4, -1e4], [-jnp.inf, -jnp.inf], [jnp.nan, 0.0]])
    found = normalise(logw)
    np.testing.assert_allclose(found.probs_P[0, 0], 1 / (1 + np.exp(-1)), rtol=1e-6)
    np.testing.assert_allclose(found.probs_P[1:], [[0.5, 0.5], [0.5, 0.5], [0.0, 1.0]])
    assert found.broken.tolist() == [False, False, True, True]
    np.testing.assert_allclose(effective_size(logw)[1:], [2, 2, 1])


def test_the_standard_error_is_that_of_the_mean():
    """Against many repetitions of the experiment."""
    z = np.random.default_rng(0).lognormal(0.0, 0.5, (3000, 20))
    mean, error = standard_error(jnp.log(z.T))
    spread = np.log(z.mean(1)).std()
    np.testing.assert_allclose(float(error.mean()), spread, rtol=0.1)
    np.testing.assert_allclose(np.exp(mean), z.mean(1), rtol=1e-5)
    assert bool(jnp.isnan(standard_error(jnp.zeros((1, 2)))[1]).all())


def test_no_estimate_is_made_of_what_is_none():
    none, lost, over = jnp.nan, -jnp.inf, jnp.inf
    logz = jnp.array([[lost, none, 0.0, 0.0, over], [lost, none, none, lost, 0.0]])
    mean, error = standard_error(logz)
    np.testing.assert_allclose(mean, [lost, none, none, np.log(0.5), none])
    np.testing.assert_allclose(error, [none, none, none, 1.0, none])
