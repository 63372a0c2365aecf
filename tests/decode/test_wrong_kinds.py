"""Arguments of the wrong kind: an error that says what, got, expected and what to do."""

import jax
import jax.numpy as jnp
import pytest

import jaxlm
from jaxlm.cache import Dense, Kivi
from jaxlm.cache.policy import write_policy
from jaxlm.core.errors import ConfigError
from jaxlm.decode.generate import generate, stream
from jaxlm.decode.samplers import Categorical, Greedy
from jaxlm.decode.score import score
from jaxlm.decode.state import layer_kinds, prefill
from tests.tiny import model

BUNDLE = ["bundle is 'tiny'", "expected a Bundle", "jaxlm.load('tiny')"]


@pytest.mark.parametrize("arguments, words", [
    ({"sampler": "greedy"}, ["sampler is 'greedy'", "jaxlm.Greedy()"]),
    ({"sampler": Greedy}, ["sampler is the class Greedy", "an instance", "jaxlm.Greedy()"]),
    ({"sampler": None}, ["sampler is None"]),
    ({"sampler": Categorical(object())}, ["sampler holds <object", "expected numbers"]),
    ({"cache": Dense}, ["cache is the class Dense", "jaxlm.Dense()", "'kivi2'"]),
    ({"cache": 2}, ["cache is 2", "expected a kind"]),
    ({"cache": None}, ["cache is None", "expected a kind"]),
    ({"cache": "kivi3"}, ["cache 'kivi3' is unknown", "kivi2"]),
    ({"cache": "none.json"}, ["none.json is no cache policy"]),
    ({"cache": (Dense(), Dense)}, ["the class Dense"]),
    ({"cache": (Dense(), None)}, ["no kind for layers [1]", "one a layer"]),
    ({"cache": ["dense"]}, ["1 kinds for 2 layers", "one a layer"]),
])
def test_samplers_and_caches(bundle, arguments, words):
    tokens, lengths, keys = jnp.ones((1, 4), int), jnp.array([4]), jax.random.split(
        jax.random.key(0), 1)
    given = {"sampler": Greedy(), "cache": Dense()} | arguments
    calls = [lambda: generate(bundle, "a", **arguments), lambda: stream(bundle, "a", **arguments),
             lambda: prefill(bundle.lm, bundle.params, given["sampler"], tokens, lengths,
                             given["cache"], 8, keys)]
    for call in calls:
        with pytest.raises(ConfigError) as caught:
            call()
        assert all(word in str(caught.value) for word in words), str(caught.value)


def test_a_cache_by_name_is_the_kind_of_that_name(bundle, tmp_path):
    kind = Kivi(group=8, window=8)
    lm = bundle.lm
    named = "kivi2:group=8,window=8"
    write_policy(tmp_path / "p.json", lm.config, (kind, Dense()))
    assert layer_kinds(lm, named) == (kind, kind)
    assert layer_kinds(lm, [named, "dense"]) == (kind, Dense())
    assert layer_kinds(lm, str(tmp_path / "p.json")) == (kind, Dense())
    wanted = generate(bundle, "a" * 30, max_new_tokens=6, cache=kind)
    found = generate(bundle, "a" * 30, max_new_tokens=6, cache=named)
    assert found.tokens == wanted.tokens
    assert found.logprobs.tolist() == wanted.logprobs.tolist()
    dense = generate(bundle, "a" * 30, max_new_tokens=6)
    assert dense.logprobs.tolist() != found.logprobs.tolist()


def test_the_name_of_a_model_is_no_bundle(tmp_path):
    for call in (lambda: generate("tiny", "a"), lambda: stream("tiny", "a"),
                 lambda: score("tiny", "ab"), lambda: jaxlm.save("tiny", tmp_path / "m")):
        with pytest.raises(ConfigError) as caught:
            call()
        assert all(word in str(caught.value) for word in BUNDLE), str(caught.value)


@pytest.mark.parametrize("arguments, words", [
    ({"mask": "causal"}, ["mask is 'causal'", "expected a Mask", "jaxlm.Mask(causal=True)"]),
    ({"mask": jaxlm.Mask}, ["mask is <class", "expected a Mask"]),
    ({"want": "taps"}, ["want is 'taps'", "a tuple", "'hidden'"]),
    ({"want": ("tap",)}, ["want is ('tap',)", "'taps'"]),
    ({"want": None}, ["want is None", "or ()"]),
])
def test_apply(arguments, words):
    lm, params = model()
    with pytest.raises(ConfigError) as caught:
        lm.apply(params, jnp.ones((1, 2), int), **arguments)
    assert all(word in str(caught.value) for word in words), str(caught.value)


@pytest.mark.parametrize("plan", [(1, 1), [jaxlm.LayerPlan()] * 2, (jaxlm.LayerPlan(), None), "ab"])
def test_a_plan_is_made_of_layer_plans(plan):
    lm, _ = model()
    with pytest.raises(ConfigError, match="plan is .*expected a tuple of LayerPlan"):
        jaxlm.LM(lm.config, plan)
