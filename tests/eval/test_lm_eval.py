"""The harness's three requests against what the model itself says; requests are stubs with `args`.

The slow test runs the harness where it is installed.
"""

import json
import subprocess
import sys
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxlm
from jaxlm.core.errors import ConfigError, NumericsError, ShapeError
from jaxlm.eval.lm_eval import Evaluator, generation_settings, lm_eval_model, rolling_windows
from jaxlm.hf.bundle import BUNDLED
from tests.source_tree import ROOT
from tests.tiny import BOS

APPLY = jax.jit(lambda lm, params, ids: lm.apply(params, ids).logits[0], static_argnums=0)
BODY = "the river rises in the hills north of the town"


class Request(NamedTuple):
    """What the harness gives, as far as a model sees it."""

    args: tuple


def asked(*args):
    return [Request(arg if isinstance(arg, tuple) else (arg,)) for arg in args]


@pytest.fixture(scope="module")
def evaluator(bundle):
    return Evaluator(bundle, batch_size=3)


@pytest.fixture(scope="module")
def tiny():
    if not (BUNDLED["tiny"] / "model.safetensors").exists():
        pytest.skip(f"the bundled model is not here: no weights in {BUNDLED['tiny']}")
    return jaxlm.load("tiny")


def likelihood(bundle, before, after):
    """By the definition, from all logits, in numpy."""
    ids = before + after
    padded = jnp.asarray([ids + [0] * (bundle.lm.config.max_len - len(ids))])
    logits = np.asarray(APPLY(bundle.lm, bundle.params, padded), np.float64)[: len(ids)]
    logprobs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    rows = np.arange(len(before) - 1, len(ids) - 1)
    return logprobs[rows, after].sum(), bool((logits[rows].argmax(-1) == after).all())


PAIRS = [("ab", "c"), ("a longer context of this text", " and more"), ("", "xyz"), ("ab ", "cd"),
         (" ", "q"), ("naïve", " ✓é"), ("z", BODY[:40])]


def test_loglikelihood_is_the_sum_over_the_continuation(bundle, evaluator):
    encode = bundle.tokenizer.encode
    found = evaluator.loglikelihood(asked(*PAIRS), disable_tqdm=True)
    for (context, continuation), (logprob, greedy) in zip(PAIRS, found, strict=True):
        bare = context.rstrip()
        before = encode(bare) if bare else [BOS]
        after = encode(context[len(bare):] + continuation)
        expected, likeliest = likelihood(bundle, before, after)
        assert logprob == pytest.approx(expected, abs=1e-4) and greedy == likeliest


@pytest.mark.parametrize("batch_size", [1, 2, 7, 16])
def test_the_batch_changes_nothing(bundle, evaluator, batch_size):
    other = Evaluator(bundle, batch_size=batch_size)
    for kind, requests in {
        "loglikelihood": asked(*PAIRS), "loglikelihood_rolling": asked("ab", BODY, "é✓"),
    }.items():
        found, expected = (getattr(e, kind)(requests, True) for e in (other, evaluator))
        np.testing.assert_allclose(np.array(found, float), np.array(expected, float), atol=1e-4)
    settings = {"until": ["e"], "max_gen_toks": 6, "temperature": 1.0, "do_sample": True}
    requests = asked(*[(text, settings) for text in (BODY, "x", "two", "three")])
    assert other.generate_until(requests, True) == evaluator.generate_until(requests, True)


def test_is_greedy_is_what_greedy_decoding_draws(bundle, evaluator):
    requests, expected = [], []
    for prompt in ("ab", BODY, "q"):
        answer = jaxlm.generate(bundle, prompt, max_new_tokens=4, stop_ids=[])
        ids = list(answer.tokens)
        for change in (0, 1):
            pair = bundle.tokenizer.encode(prompt), ids[:-1] + [(ids[-1] + change) % 256]
            requests.append(pair)
            expected.append(not change)
    encode = Evaluator.encode_pair
    try:  # ids as they are: a random model's text need not be text
        Evaluator.encode_pair = lambda self, before, after: (before, after)
        found = evaluator.loglikelihood(asked(*requests), disable_tqdm=True)
    finally:
        Evaluator.encode_pair = encode
    assert [greedy for _, greedy in found] == expected


def test_equal_logits_count_as_decoding_takes_them(bundle):
    flat = jax.tree.map(jnp.zeros_like, bundle.params)
    found = Evaluator(bundle.replace(params=flat)).loglikelihood(
        asked(("x", bundle.tokenizer.decode([0])), ("x", bundle.tokenizer.decode([1]))), True
    )
    assert [greedy for _, greedy in found] == [True, False]
    assert found[0][0] == pytest.approx(-np.log(bundle.lm.config.vocab_size))


def test_a_context_too_long_loses_its_beginning(bundle):
    short = Evaluator(bundle, max_length=16)
    ids = bundle.tokenizer.encode(BODY)
    with pytest.warns(UserWarning, match="cut to its last 14"):
        (found,) = short.loglikelihood(asked((BODY, "abc")), True)
    after = bundle.tokenizer.encode("abc")
    assert found[0] == pytest.approx(likelihood(bundle, ids[-14:], after)[0], abs=1e-4)
    with pytest.raises(ShapeError, match="46 tokens.*loglikelihood_rolling"):
        short.loglikelihood(asked(("a", BODY)), True)
    with pytest.raises(ShapeError, match="adds no tokens"):
        short.loglikelihood(asked(("a", "")), True)


def test_rolling_agrees_with_score(bundle):
    ids = [BOS, *bundle.tokenizer.encode(BODY)]
    (whole,) = Evaluator(bundle).loglikelihood_rolling(asked(BODY), True)
    scored = jaxlm.score(bundle, ids)
    assert whole == pytest.approx(scored.logprobs.sum(), abs=1e-3)
    size = 12  # tokens read at once, so windows of 13 with the one that is scored last
    (found,) = Evaluator(bundle, max_length=size).loglikelihood_rolling(asked(BODY), True)
    n = len(ids) - 1
    tail = n % size
    most = jaxlm.score(bundle, ids[: len(ids) - tail], window=size + 1, stride=size)
    last = jaxlm.score(bundle, ids[-size - 1:])
    expected = most.logprobs.sum() + last.logprobs[-tail:].sum()
    assert 0 < tail < size and found == pytest.approx(expected, abs=1e-3)
    assert abs(found - whole) > 1e-3
    assert Evaluator(bundle).loglikelihood_rolling(asked(""), True) == [0.0]


@pytest.mark.parametrize("length, window", [(1, 4), (4, 4), (5, 4), (8, 4), (10, 4), (3, 100)])
def test_rolling_windows_score_each_token_once_with_all_the_context_there_is(length, window):
    seen = []
    for start, end, new in rolling_windows(length, window):
        assert 0 <= start < new < end <= length + 1 and end - start <= window + 1
        assert end - start == window + 1 or start == 0
        seen += range(new, end)
    assert seen == list(range(1, length + 1))
    assert rolling_windows(0, window) == []


def test_generate_until_is_generate(bundle, evaluator):
    settings = [{"until": ["e", "qq"], "max_gen_toks": 9}, {"until": "a", "max_new_tokens": 5},
                {"max_gen_toks": 9, "do_sample": False, "temperature": 0.7, "until": ["e", "qq"]}]
    requests = [(text, s) for s in settings for text in ("one", BODY, "", "x")]
    found = evaluator.generate_until(asked(*requests), True)
    for (text, wanted), answer in zip(requests, found, strict=True):
        prompt = text if text else [BOS]
        stop, room = wanted["until"], wanted.get("max_gen_toks", 5)
        assert answer == jaxlm.generate(bundle, prompt, stop=stop, max_new_tokens=room).text


def test_sampling_has_a_seed_and_repeats_differ(bundle):
    warm = {"until": [], "max_gen_toks": 8, "do_sample": True, "temperature": 1.5, "top_k": 0}
    requests = asked(*[("one", warm)] * 4)
    first, again, other = (Evaluator(bundle, seed=seed).generate_until(requests, True)
                           for seed in (0, 0, 1))
    assert first == again and first != other and len(set(first)) == 4


def test_settings():
    assert generation_settings({"until": None, "num_beams": 1}, 7) == ((), 7, {})
    assert generation_settings({"do_sample": True}, 7)[2] == {"temperature": 1.0}
    assert generation_settings({"temperature": 0.5, "top_p": 0.9, "max_tokens": 3, "until": ""},
                               7) == ((), 3, {"temperature": 0.5, "top_p": 0.9})
    for bad in ({"num_beams": 4}, {"untill": ["x"]}, {"until": [3]}, {"max_gen_toks": 0}):
        with pytest.raises(ConfigError):
            generation_settings(bad, 7)


@pytest.mark.parametrize("settings, expected", [
    ({"temperature": "0.5"}, "temperature is '0.5'; expected a number"),
    ({"until": 5}, "until is 5; expected a string or a list"), ({"until": [0]}, r"stop is \[0\]"),
    ({"top_k": -1}, "top_k is -1"), ({"do_sample": True, "top_k": -1}, "top_k is -1"),
    ({"do_sample": True, "top_p": 1.5}, "top_p is 1.5"), ({"do_sample": "no"}, "do_sample is 'no'"),
    ({"repetition_penalty": 0}, "repetition_penalty is 0"), ({"min_p": True}, "min_p is True"),
], ids=str)
def test_settings_that_cannot_be(settings, expected):
    with pytest.raises(ConfigError, match=expected):
        generation_settings(settings, 7)


@pytest.mark.parametrize("arguments, expected", [
    ({}, "pretrained=None; expected a folder"), ({"pretrained": 3}, "pretrained=3"),
    ({"pretrained": "tiny", "trust_remote_code": True}, r"\['trust_remote_code'\] are not known"),
    ({"pretrained": "tiny", "cache": "nosuch"}, "cache 'nosuch' is unknown"),
    ({"pretrained": "tiny", "seed": "x"}, "seed is 'x'"),
    ({"pretrained": "tiny", "prefix_token_id": 1000000}, "prefix_token_id is 1000000.* 0 to 99"),
    ({"pretrained": "tiny", "max_length": "long"}, "max_length is 'long'"),
], ids=str)
def test_model_args_that_cannot_be(tiny, arguments, expected):
    with pytest.raises(ConfigError, match=expected):
        Evaluator.create_from_arg_obj(arguments)


def test_model_args(tiny):
    given = {"pretrained": "tiny", "dtype": "bfloat16", "cache": "squat2", "seed": 3}
    found = Evaluator.create_from_arg_obj(given, {"batch_size": "5", "device": "cuda:0"})
    assert (found.batch_size, found.seed) == (5, 3)
    assert found.kinds == (jaxlm.parse_cache("squat2"),) * tiny.lm.config.num_layers
    assert found.get_model_info()["model_dtype"] == "bfloat16"


def test_requests_that_cannot_be_served(bundle, evaluator):
    with pytest.raises(ConfigError, match="no room for a context"):
        evaluator.generate_until(asked(("x", {"max_gen_toks": 128})), True)
    with pytest.raises(ConfigError, match="batch_size is 'auto'"):
        Evaluator(bundle, batch_size="auto")
    with pytest.raises(ConfigError, match="max_length is 129"):
        Evaluator(bundle, max_length=129)
    broken = bundle.replace(params=jax.tree.map(lambda x: x * jnp.nan, bundle.params))
    for kind in ("loglikelihood", "loglikelihood_rolling"):
        args = ("a", "b") if kind == "loglikelihood" else ("ab",)
        with pytest.raises(NumericsError):
            getattr(Evaluator(broken), kind)(asked(args), True)


def test_stop_strings_that_no_tokens_spell_never_come(tiny):
    evaluator = Evaluator(tiny)
    settings = {"until": ["é", "A:"], "max_gen_toks": 32}
    (found,) = evaluator.generate_until(asked(("Q:12+34=\n", settings)), True)
    assert found == jaxlm.generate(tiny, "Q:12+34=\n", stop="A:", max_new_tokens=32).text


def test_answers_are_handed_to_the_harness_as_they_come(bundle):
    class Hook:
        def __init__(self):
            self.kept = []

        def add_partial(self, *what):
            self.kept.append(what)

    evaluator = Evaluator(bundle)
    evaluator.cache_hook = Hook()
    found = evaluator.loglikelihood(asked(("ab", "c")), True)
    assert evaluator.cache_hook.kept == [("loglikelihood", ("ab", "c"), found[0])]


def test_the_module_imports_no_harness_and_no_torch(bundle, monkeypatch):
    code = ("import sys, jaxlm.eval.lm_eval\n"
            "assert not {'lm_eval', 'torch', 'transformers', 'tqdm'} & set(sys.modules)")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    from jaxlm.eval.lm_eval import lm_eval_class

    lm_eval_class.cache_clear()
    monkeypatch.setitem(sys.modules, "lm_eval.api.model", None)
    with pytest.raises(ConfigError, match="pip install .lm_eval"):
        lm_eval_model(bundle)


@pytest.mark.slow
def test_the_harness_finds_what_the_library_finds(tiny, tmp_path):
    pytest.importorskip("lm_eval", reason='pip install ".[lm-eval]" to run the harness')
    from experiments import lm_eval_tasks as tasks

    found = tasks.evaluate(tmp_path, "tiny", problems=24, documents=12, pages=4, seed=3)
    own = tasks.by_the_library(tiny, problems=24, documents=12, pages=4, seed=3)
    assert found["jaxlm_arithmetic"]["exact_match"] == own["arithmetic"]
    assert found["jaxlm_recall"]["acc"] == own["recall"]
    assert found["jaxlm_pages"]["byte_perplexity"] == pytest.approx(own["byte_perplexity"])
    assert 0.2 < own["arithmetic"] <= 1 and 0.5 < own["recall"] <= 1


@pytest.mark.slow
def test_the_harness_s_command_knows_the_model(tmp_path):
    pytest.importorskip("lm_eval", reason='pip install ".[lm-eval]" to run the harness')
    from experiments import lm_eval_tasks as tasks

    tasks.write(tmp_path, problems=4, documents=2, pages=1, seed=0)
    command = [sys.executable, "-m", "jaxlm.eval.lm_eval", "run", "--model", "jaxlm",
               "--model_args", "pretrained=tiny", "--tasks", "jaxlm_arithmetic", "--include_path",
               str(tmp_path), "--batch_size", "4", "--output_path", str(tmp_path / "out")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    (path,) = (tmp_path / "out").rglob("results_*.json")
    assert "jaxlm_arithmetic" in json.loads(path.read_text())["results"]
