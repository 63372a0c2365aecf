"""Per-layer cache policies: found, written, read back, and refused for another model."""

import json

import jax
import numpy as np
import pytest

from jaxlm.cache import Dense, Kivi, Squat
from jaxlm.cache.policy import open_cache, read_policy, write_policy
from jaxlm.core.errors import ConfigError, ShapeError
from jaxlm.eval.tune_cache import front, tune
from tests.decode.tiny import VOCAB, tiny_model

SMALL = dict(group=8, window=8)


def test_the_front_falls_from_cheap_to_exact():
    lm, params = tiny_model()
    tokens = jax.random.randint(jax.random.key(3), (2, 64), 0, VOCAB)
    kinds = [Kivi(2, 2, **SMALL), Kivi(8, 8, **SMALL), Dense("float32")]
    found = tune(lm, params, tokens, kinds, 4096, points=3)
    assert found[0].kinds == (kinds[0],) * 2 and found[-1].kinds == (kinds[2],) * 2
    for less, more in zip(found, found[1:], strict=False):
        assert less.bytes < more.bytes and less.error > more.error
        assert less.divergence > more.divergence
    assert found[0].divergence > 1e-4 and abs(found[-1].divergence) < 1e-6


def test_the_front_upgrades_what_gains_most_per_byte():
    """By hand: layer 1 first, then layer 0; a candidate that costs more and errs more is unused."""
    errors = np.array([[1.0, 8.0], [0.5, 1.0], [2.0, 9.0]])
    sizes = np.array([[10, 10], [20, 20], [30, 30]])
    assert front(errors, sizes) == [(0, 0), (0, 1), (1, 1)]


def test_a_policy_is_read_back_for_its_model_only(tmp_path):
    lm, _ = tiny_model()
    kinds, path = (Squat(2, 4, lam=1.0), Dense()), tmp_path / "new" / "policy.json"
    write_policy(path, lm.config, kinds, {"divergence": 0.1})
    assert read_policy(path, lm.config) == kinds == open_cache(str(path), lm.config)
    with pytest.raises(ConfigError, match=r"another model.*'dim': \(16, 32\)"):
        read_policy(path, lm.config.replace(dim=32))
    policy = json.loads(path.read_text())
    for broken in ("{", "[]", json.dumps(policy | {"layers": ["dense"]}),
                   json.dumps(policy | {"layers": ["dense", "kivi3"]}),
                   json.dumps(policy | {"model": None}), json.dumps(policy | {"layers": [1, 2]})):
        path.write_text(broken)
        with pytest.raises(ConfigError):
            read_policy(path, lm.config)


def test_bad_requests():
    lm, params = tiny_model()
    tokens = jax.numpy.zeros((1, 8), int)
    with pytest.raises(ConfigError, match="candidates"):
        tune(lm, params, tokens, [Dense()], 64)
    with pytest.raises(ShapeError, match="at least 4"):
        tune(lm, params, tokens[:, :3], [Dense(), Kivi()], 64)
