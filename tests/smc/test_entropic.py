"""The three published temperatures, against numpy written from the formulas."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.core.errors import ConfigError
from jaxlm.smc.entropic import RULES, temperature

WEIGHTS = np.array([0.85, 0.05, 0.04, 0.03, 0.02, 0.01])


def by_hand(rule, s):
    p, n = WEIGHTS, len(WEIGHTS)
    size, entropy = 1 / (p**2).sum(), -(p * np.log(p)).sum() / np.log(n)
    return max(1.0, {"size": n / size * (1 - s), "entropy": 1 / (entropy + (1 - entropy) * s),
                     "progress": 2 - s}[rule])


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("s", [0.0, 0.3, 0.49])
def test_the_formulas(rule, s):
    np.testing.assert_allclose(temperature(jnp.log(WEIGHTS), s, rule), by_hand(rule, s), rtol=1e-4)


@pytest.mark.parametrize("rule", RULES)
def test_late_steps_equal_weights_and_single_particles_are_left_alone(rule):
    assert float(temperature(jnp.log(WEIGHTS), 0.5, rule)) == 1.0
    assert float(temperature(jnp.zeros(6), 0.1, rule)) == 1.0
    assert float(temperature(jnp.zeros(1), 0.1, rule)) == 1.0
    many = temperature(jnp.stack([jnp.log(WEIGHTS), jnp.zeros(6)]), 0.1, rule)
    assert many.shape == (2,) and float(many[0]) > 1 and float(many[1]) == 1


def test_an_unknown_rule_is_named():
    with pytest.raises(ConfigError, match="'ess'.*size"):
        temperature(jnp.zeros(2), 0.1, "ess")
