"""Per-layer cache policies: found, written, read back, and refused for another model."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.cache import Dense, Kivi, ReferenceKivi, Squat
from jaxlm.cache.policy import open_cache, read_policy, write_policy
from jaxlm.core.errors import ConfigError, NumericsError, ShapeError
from jaxlm.decode.state import layer_kinds
from jaxlm.eval.tune_cache import front, layer_bytes, tune
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


def test_a_budget_ends_the_front_at_the_best_mix_that_it_pays_for(monkeypatch):
    lm, params = tiny_model(num_layers=4)
    kinds = [Kivi(2, 2, **SMALL), Kivi(8, 8, **SMALL), Dense()]
    sizes = np.array([[layer_bytes(lm, i, kind, 4096) for i in range(4)] for kind in kinds])
    errors = np.array([[0.4, 0.3, 0.2, 0.1], [0.04, 0.03, 0.02, 0.01], [0.0] * 4])
    monkeypatch.setattr("jaxlm.eval.tune_cache.tables", lambda *_: (errors, sizes))
    monkeypatch.setattr("jaxlm.eval.tune_cache.logprobs", lambda *_: jnp.zeros((1, 1, 2)))
    tokens, path = jnp.zeros((1, 64), jnp.int32), front(errors, sizes)
    assert len(path) == 9  # points=2 of all of it are its ends, one poor, one too dear
    paid = sum(sizes[c, layer] for layer, c in enumerate(path[4])) + 1
    found = tune(lm, params, tokens, kinds, 4096, points=2, budget=paid / sizes[2].sum())
    assert [policy.kinds for policy in found] == [
        tuple(kinds[c] for c in mix) for mix in (path[0], path[4])]


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


def test_a_policy_of_another_checkpoint_of_equal_sizes_is_refused(tmp_path):
    lm, params = tiny_model()
    other, kinds, path = tiny_model(seed=1)[1], (Squat(2, 4), Dense()), tmp_path / "policy.json"
    write_policy(path, lm.config, kinds, name="org/one", params=params)
    assert json.loads(path.read_text())["name"] == "org/one"
    halved = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    for same in (params, halved, None):  # None: nothing to compare with
        assert open_cache(str(path), lm.config, same) == kinds
    assert layer_kinds(lm, str(path), params) == kinds
    jax.jit(lambda p: layer_kinds(lm, str(path), p) and p)(other)  # cannot be looked at: passes
    for read in (lambda: read_policy(path, lm.config, other),
                 lambda: layer_kinds(lm, [str(path)], other)):
        with pytest.raises(ConfigError, match="measured on org/one of the same sizes, but with "
                                              "other weights: layers_0/attn/k/kernel"):
            read()
    policy = json.loads(path.read_text())
    old = {name: policy[name] for name in ("model", "layers", "found")}  # as they once were
    for text, fine in ((old, True), (policy | {"weights": [1]}, False),
                       (policy | {"weights": {"layers_0/attn/k/kernel": "x"}}, False)):
        path.write_text(json.dumps(text))
        if fine:
            assert read_policy(path, lm.config, other) == kinds
        else:
            with pytest.raises(ConfigError, match="is no cache policy"):
                read_policy(path, lm.config, other)


@pytest.mark.parametrize("what", ["tables", "logprobs"])
def test_numbers_that_are_not_finite_make_no_policy(monkeypatch, what):
    lm, params = tiny_model()
    errors, sizes = np.array([[2.0, 2.0], [1.0, 1.0]]), np.array([[1, 1], [2, 2]])
    if what == "tables":
        errors[1, 1] = np.nan
    logits = jnp.full((1, 1, 2), np.nan if what == "logprobs" else 0.0)
    monkeypatch.setattr("jaxlm.eval.tune_cache.tables", lambda *_: (errors, sizes))
    monkeypatch.setattr("jaxlm.eval.tune_cache.logprobs", lambda *_: logits)
    with pytest.raises(NumericsError, match={"tables": "error of dense in layer 1 is nan",
                                             "logprobs": "divergence of .*kivi2.* is nan"}[what]):
        tune(lm, params, jnp.zeros((1, 64), jnp.int32), [Kivi(**SMALL), Dense()], 64)


@pytest.mark.parametrize("kind, least", [
    (Kivi(**SMALL), 24), (Squat(group=16), 80), (ReferenceKivi(), 66)])
def test_a_text_of_which_nothing_is_coded_is_refused(kind, least):
    lm, params = tiny_model()
    with pytest.raises(ShapeError, match=f"codes none.*at least {least}"):
        tune(lm, params, jnp.zeros((1, least - 1), jnp.int32), [Dense(), kind], 64)
    spec = lm.config.attention(0)

    def coded(half):
        q, k, v = (jnp.ones((1, half, heads, spec.head_dim)) for heads in (4, 2, 2))
        return kind.prefill(spec, kind.init(spec, 1, 64, jnp.float32), q, k, v,
                            jnp.arange(half)[None], jnp.array([half]))[-1]["packed_B"]

    count = jax.jit(coded, static_argnums=0)  # of which the compiler keeps only the counting
    assert int(count(least // 2)[0]) > 0 and int(count(least // 2 - 1)[0]) == 0


def test_bad_requests():
    lm, params = tiny_model()
    tokens = jax.numpy.zeros((1, 8), int)
    with pytest.raises(ConfigError, match="candidates"):
        tune(lm, params, tokens, [Dense()], 64)
    with pytest.raises(ShapeError, match="at least 4"):
        tune(lm, params, tokens[:, :3], [Dense(), Kivi()], 64)
    with pytest.raises(ConfigError, match="the budget is 0.01; raise it"):
        tune(lm, params, jax.numpy.zeros((1, 99), int), [Dense(), Kivi()], 64, budget=0.01)
