"""Requests that cannot be served: an error before any compute, never a guess."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from jaxlm.core.errors import ConfigError, JaxlmError, ShapeError, TokenizerError
from jaxlm.decode import generate as module
from jaxlm.decode.generate import generate, prepare, stream, to_ids
from jaxlm.decode.score import score
from tests.tiny import VOCAB

KEY = jax.random.key(0)
IDS = st.one_of(st.integers(0, VOCAB - 1), st.integers(0, VOCAB - 1).map(np.int32))
JUNK = st.one_of(
    st.integers(-5, VOCAB + 5), st.booleans(), st.floats(), st.text(max_size=2), st.none(),
    st.binary(max_size=2), st.sampled_from([np.float32(1.0), np.True_, 2**70, [1], {}]),
)


@pytest.fixture(autouse=True)
def no_compute(monkeypatch):
    """Nothing may reach a device."""
    fail = lambda *_, **__: pytest.fail("computed before all was checked")
    monkeypatch.setattr(module, "prefill_jit", fail)
    monkeypatch.setattr(module, "decode_jit", fail)


@pytest.mark.parametrize("prompts, arguments, error, words", [
    ("", {}, ShapeError, ["prompt 0 is empty", "at least one token"]),
    (["a", ""], {}, ShapeError, ["prompt 1 is empty"]),
    ([], {}, ShapeError, ["got no prompts", "at least one"]),
    ([[]], {}, ShapeError, ["prompt 0 is empty"]),
    (np.zeros((0, 3), int), {}, ShapeError, ["got no prompts"]),
    ([5, VOCAB], {}, TokenizerError, ["token id 258", "0 to 257", "another model"]),
    ([5, -1], {}, TokenizerError, ["token id -1", "0 to 257"]),
    ([[5], [True]], {}, TokenizerError, ["prompt 1", "token id True"]),
    ([True, 5], {}, TokenizerError, ["token id True"]),
    ([[1.5, 2.0]], {}, TokenizerError, ["token id 1.5", "whole number"]),
    (np.array([1.7, 2.2]), {}, TokenizerError, ["token id 1.7"]),
    ([5, "a"], {}, TokenizerError, ["token id 'a'"]),
    (b"abc", {}, ShapeError, ["bytes", "expected a text"]),
    (None, {}, ShapeError, ["NoneType", "expected a text"]),
    (3, {}, ShapeError, ["int 3", "expected a text"]),
    ([None], {}, TokenizerError, ["token id None"]),
    (["a", None], {}, ShapeError, ["prompt 1 is None"]),
    ("a" * 120, {}, ShapeError, ["136 tokens", "made for 128", "max_len=136"]),
    ("a" * 120, {"max_len": 130}, ShapeError, ["120 tokens", "16 new", "130", "max_len>=136"]),
    ("a", {"max_len": 0}, ConfigError, ["max_len is 0", "at least 1"]),
    ("a", {"max_len": 64.0}, ConfigError, ["max_len is 64.0"]),
    *[("a", {"max_new_tokens": bad}, ConfigError, ["max_new_tokens is", "at least 1"])
      for bad in (0, -3, 2.5, True, "4", None)],
    (["a", "b"], {"key": jax.random.split(KEY, 3)}, ShapeError, ["3 keys", "2 prompts"]),
    (["a", "b"], {"key": jax.random.PRNGKey(0)}, ConfigError, ["typed key", "jax.random.key(0)"]),
    ("a", {"key": 0}, ConfigError, ["key is 0", "typed key"]),
    ("a", {"key": jax.random.split(KEY, (1, 1))}, ShapeError, ["(1, 1)", "one key"]),
    ("a", {"stop_ids": [VOCAB]}, TokenizerError, ["stop_ids", "258", "0 to 257"]),
    ("a", {"stop_ids": [True]}, TokenizerError, ["stop_ids", "True"]),
    ("a", {"stop_ids": 5}, ConfigError, ["stop_ids is 5", "a list"]),
    ("a", {"stop_ids": "xy"}, ConfigError, ["stop_ids is 'xy'", "a list"]),
    ("a", {"max_new_tokens": 2**40}, ConfigError, [str(2**40), f"from 1 to {2**31 - 1}"]),
    ("a", {"include_stop": "no"}, ConfigError, ["include_stop is 'no'", "True or False"]),
    ("Q:\ud800", {}, TokenizerError, [r"'\ud800' at character 2", "valid Unicode"]),
    ("a", {"stop": ["b", "\ud800"]}, ConfigError, ["a stop string", "valid Unicode"]),
])
def test_generate_and_stream_refuse(bundle, prompts, arguments, error, words):
    arguments = {"max_new_tokens": 16} | arguments
    for function in (generate, stream):  # stream at the call, not at the first piece
        with pytest.raises(error) as caught:
            function(bundle, prompts, **arguments)
        assert all(word in str(caught.value) for word in words), str(caught.value)


@pytest.mark.parametrize("chunk", [0, -1, 2.0, True])
def test_stream_refuses_a_chunk(bundle, chunk):
    with pytest.raises(ConfigError, match="chunk is .* at least 1"):
        stream(bundle, "a", chunk=chunk)


@pytest.mark.parametrize("texts, arguments, error, words", [
    ("a", {}, ShapeError, ["text 0 has 1 token", "at least 2"]),
    ([], {}, ShapeError, ["got no texts"]),
    (["ab", ""], {}, ShapeError, ["1 is empty"]),
    ([[1, 999]], {}, TokenizerError, ["999", "0 to 257"]),
    *[("ab", {"window": bad}, ConfigError, ["window is", "from 2 to 128"])
      for bad in (1, 0, 129, 8.0, True, "8")],
    *[("ab", {"window": 8, "stride": bad}, ConfigError, ["stride is", "from 1 to 7"])
      for bad in (0, 8, -1, 2.0, True)],
    ("ab\udcff", {}, TokenizerError, [r"'\udcff' at character 2", "valid Unicode"]),
    *[("ab", {"batch": bad}, ConfigError, ["batch is", "at least 1"]) for bad in (0, 1.5, None)],
])
def test_score_refuses(bundle, texts, arguments, error, words):
    with pytest.raises(error) as caught:
        score(bundle, texts, **arguments)
    assert all(word in str(caught.value) for word in words), str(caught.value)


def is_id(value) -> bool:
    """The rule, by itself: Python's and numpy's integers, but no booleans, in range."""
    if isinstance(value, bool | np.bool_) or not isinstance(value, int | np.integer):
        return False
    return 0 <= int(value) < VOCAB


@settings(max_examples=400, deadline=None,
          suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(st.lists(st.lists(st.one_of(IDS, IDS, IDS, JUNK), max_size=4), max_size=3))
def test_generated_prompts(bundle, prompts):
    fine = len(prompts) > 0 and all(p and all(map(is_id, p)) for p in prompts)
    if fine:
        ids, many = to_ids(bundle, prompts)
        assert many and ids == [[int(i) for i in p] for p in prompts]
        assert all(type(i) is int for p in ids for i in p)
    else:
        with pytest.raises(JaxlmError):
            to_ids(bundle, prompts)


@settings(max_examples=300, deadline=None,
          suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(st.lists(st.text(max_size=5), max_size=3))
def test_generated_texts(bundle, texts):
    if texts and all(texts):
        ids, _ = to_ids(bundle, texts)
        assert ids == [list_of_bytes(bundle, text) for text in texts]
    else:
        with pytest.raises(ShapeError, match="empty|no prompts"):
            to_ids(bundle, texts)


def list_of_bytes(bundle, text):
    """The ids of a text's UTF-8 bytes, by the published alphabet: what prints stands for itself."""
    shown = [b for b in range(256) if 33 <= b <= 126 or 161 <= b <= 172 or 174 <= b <= 255]
    hidden = [b for b in range(256) if b not in shown]
    alphabet = {b: chr(b) for b in shown} | {b: chr(256 + n) for n, b in enumerate(hidden)}
    vocab = bundle.tokenizer._backend.get_vocab()
    return [vocab[alphabet[byte]] for byte in text.encode()]


@settings(max_examples=300, deadline=None,
          suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(st.lists(st.integers(1, 140), min_size=1, max_size=3), st.integers(-1, 60),
       st.one_of(st.none(), st.integers(-1, 200)))
def test_generated_lengths(bundle, lengths, max_new, max_len):
    """What fits is padded right; what does not is refused."""
    needed = max(lengths) + max_new
    fine = max_new >= 1 and (needed <= 128 if max_len is None else 1 <= max_len >= needed)
    prompts = [[1 + i % 7 for i in range(length)] for length in lengths]
    if not fine:
        with pytest.raises(JaxlmError, match="max_new_tokens|max_len|made for 128"):
            prepare(bundle, prompts, max_new, None, None, max_len)
        return
    job = prepare(bundle, prompts, max_new, None, None, max_len)
    assert job.lengths_B.tolist() == lengths and job.slots >= needed
    for row, prompt in enumerate(prompts):
        assert job.tokens_BT[row].tolist() == prompt + [0] * (job.tokens_BT.shape[1] - len(prompt))
    assert job.tokens_BT.dtype == jnp.int32 and job.keys_B.shape == (len(lengths),)
