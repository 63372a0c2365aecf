"""Generated values for samplers and stop rules: an error that names them, or a right answer.

1,440 cases: 1,200 of the twelve numbers of three samplers, 60 of rows, 60 of biases, 120 of stops.
"""

import math

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxlm.core.errors import ConfigError
from jaxlm.decode.contrastive import Contrast
from jaxlm.decode.generate import check_strings
from jaxlm.decode.samplers import Categorical, Mirostat2, bias_array
from jaxlm.decode.stop import stop_rule
from tests.decode.sampler_contract import ROWS, STEP, VOCAB, example, keys
from tests.source_tree import documented_cases

# field: the range, by itself; every number must be finite as float32 too
RANGES = {
    (Categorical, "temperature"): lambda x: x >= 0,
    (Categorical, "top_k"): lambda x: x >= 1 and x == math.floor(x),
    (Categorical, "top_p"): lambda x: 0 < x <= 1,
    (Categorical, "min_p"): lambda x: 0 <= x <= 1,
    (Categorical, "repetition_penalty"): lambda x: x > 0,
    (Mirostat2, "tau"): lambda x: x > 0,
    (Mirostat2, "eta"): lambda x: x >= 0,
    (Mirostat2, "temperature"): lambda x: x >= 0,
    (Contrast, "alpha"): lambda x: 0 < x <= 1,
    (Contrast, "beta"): lambda x: 0 <= x <= 1000,
    (Contrast, "temperature"): lambda x: x >= 0.001,
    (Categorical, "logit_bias"): lambda x: True,
}
IDS = [f"{kind.__name__}.{name}" for kind, name in RANGES]
NUMBERS = st.one_of(
    st.sampled_from([0.0, -0.0, 1.0, 1e-45, 1e-40, 3.5e38, -1e-9, 1 + 1e-6, 1 + 2e-7, 2**31, -1]),
    st.floats(), st.floats(0, 1), st.integers(-3, 3), st.integers(),
)
TYPES = st.sampled_from([lambda x: x, np.float32, np.float64, np.asarray, jnp.float32])
JUNK = st.one_of(st.booleans(), st.text(max_size=3), st.lists(NUMBERS, max_size=2), st.just({}),
                 st.just(np.array(True)), st.just(np.array("1")), st.just(np.complex64(1)))


def in_range(kind, name, value):
    """Whether a value is a number of its range once it is float32."""
    if isinstance(value, bool | str | list | dict):
        return False
    array = np.asarray(value)
    if array.dtype.kind not in "iuf" and array.dtype != object:
        return False
    with np.errstate(over="ignore"):
        single = float(np.float32(value))
    if name == "logit_bias" and single == -math.inf:
        return True
    return math.isfinite(single) and bool(RANGES[kind, name](single))


@pytest.mark.parametrize(("kind", "name"), RANGES, ids=IDS)
@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_numbers(kind, name, data):
    value = data.draw(st.one_of(NUMBERS, NUMBERS, NUMBERS, JUNK))
    if isinstance(value, int | float) and not isinstance(value, bool):
        if isinstance(value, int) and abs(value) >= 2**53:
            value = 2**53 if value > 0 else -(2**53)
        with np.errstate(over="ignore"):
            value = data.draw(TYPES)(value)
    if in_range(kind, name, value):
        kept = getattr(kind(**{name: value}), name)
        with np.errstate(over="ignore"):
            assert kept.dtype == jnp.float32 and np.asarray(kept) == np.float32(value)
        return
    with pytest.raises(ConfigError) as error:
        kind(**{name: value})
    assert name in str(error.value) and "expected" in str(error.value)


PER_ROW = [key for key in RANGES if key[1] != "logit_bias"]


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(PER_ROW), st.lists(NUMBERS, min_size=ROWS, max_size=ROWS))
def test_rows(key, values):
    """One bad number among a row each is as bad as one for all."""
    kind, name = key
    with np.errstate(over="ignore"):
        array = np.asarray([float(value) for value in values]).astype(np.float32)
    if all(in_range(kind, name, value) for value in array):
        np.testing.assert_array_equal(getattr(kind(**{name: array}), name), array)
    else:
        with pytest.raises(ConfigError, match=name):
            kind(**{name: array})


BIAS = st.one_of(st.floats(-50, 50), st.just(-math.inf), st.just(-1e30), st.just(1e30))


@settings(max_examples=60, deadline=None)
@given(st.dictionaries(st.integers(-2, VOCAB + 1), BIAS, max_size=4))
def test_biases(biases):
    """Refused, or the likeliest token after adding them by hand."""
    if any(not 0 <= token < VOCAB for token in biases):
        with pytest.raises(ConfigError, match="token id of logit_bias"):
            bias_array(biases, VOCAB)
        return
    bias = bias_array(biases, VOCAB)
    sampler = Categorical(temperature=0.0, logit_bias=bias)
    token, logprob, _ = STEP(sampler, keys(ROWS), example(), sampler.init(ROWS, VOCAB))
    logits = np.asarray(example(), np.float64)
    for index, value in biases.items():
        logits[:, index] += value
    rows = np.arange(ROWS)
    np.testing.assert_allclose(logits[rows, np.asarray(token)], logits.max(-1), rtol=1e-5)
    assert np.isfinite(logprob).all() and (np.asarray(logprob) <= 1e-5).all()


LETTERS = [b"a", b"b", b"ab", b"\n", b"", b"ba\n", b"ab"]
STRING = st.one_of(st.text("ab\n", max_size=3), st.text("ab\n", min_size=1, max_size=3),
                   st.text(max_size=2), st.none(), st.integers(0, 2), st.binary(max_size=2))


@settings(max_examples=60, deadline=None)
@given(st.one_of(st.lists(STRING, max_size=3), STRING), st.lists(STRING, max_size=2))
def test_stop_rules(strings, delimiters):
    fine = isinstance(strings, list)
    for text in [*(strings if isinstance(strings, list) else []), *delimiters]:
        fine &= isinstance(text, str) and text != "" and set(text) <= set("ab\n")
    if not fine:
        with pytest.raises(ConfigError, match="stop (strings|delimiters)"):
            stop_rule(LETTERS, strings=strings, delimiters=delimiters)
        return
    rule = stop_rule(LETTERS, strings=strings, delimiters=delimiters)
    assert (rule.strings is None) == (not strings)
    assert (rule.delimiters is None) == (not delimiters)


@settings(max_examples=60, deadline=None)
@given(st.one_of(st.lists(STRING, max_size=4), STRING, st.dictionaries(st.text(), st.none())))
def test_stops_of_generate(stop):
    given_ = [stop] if isinstance(stop, str) else stop
    if isinstance(given_, list) and all(isinstance(text, str) and text for text in given_):
        assert check_strings(stop) == tuple(sorted(set(given_)))
    else:
        with pytest.raises(ConfigError, match="stop is"):
            check_strings(stop)


def test_the_count_is_true():
    assert documented_cases(globals()) == (1440, 1440)
