"""Samplers against references written a second time, in numpy, by sorting."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxlm.core.errors import ConfigError, ShapeError
from jaxlm.decode.contrastive import Against, Contrast
from jaxlm.decode.samplers import Categorical, Greedy, Mirostat2, Temperature, bias_array
from jaxlm.decode.stop import NEVER
from jaxlm.decode.transforms import keep_top_k, keep_top_p
from tests.decode.sampler_contract import (
    CHECKS,
    DRAWS,
    ROWS,
    STEP,
    VOCAB,
    Case,
    chi_square,
    example,
    keys,
)
from tests.decode.tiny import APPLY, DECODE, EXTEND, prompts, start, tiny_model

BIAS = np.where(np.arange(VOCAB) % 7 == 3, -np.inf, np.linspace(-1, 1, VOCAB)).astype(np.float32)


def softmax(l):
    weights = np.exp(l - l.max())
    return weights / weights.sum()


def reference(
    temperature=1.0, top_k=None, top_p=None, min_p=None, repetition_penalty=None, logit_bias=None
):
    """A chain by sorting and counting, in float64."""

    def probabilities(l, seen):
        l = l if logit_bias is None else l + logit_bias
        if repetition_penalty is not None:
            l = np.where(seen, l * repetition_penalty ** -np.sign(l), l)
        l = l / temperature
        order = np.argsort(-l)
        if top_k is not None:
            l[order[int(top_k):]] = -np.inf
        if top_p is not None:
            before = np.cumsum(softmax(l)[order]) - softmax(l)[order]
            l[order[before >= top_p]] = -np.inf
        if min_p is not None:
            p = softmax(l)
            l[p < min_p * p.max()] = -np.inf
        return softmax(l)

    return probabilities


def mirostat_reference(tau, temperature=1.0):
    """At the start, when mu = 2 tau."""

    def probabilities(l, seen):
        p = softmax(l / temperature)
        with np.errstate(divide="ignore"):
            keep = (-np.log2(p) <= 2 * tau) | (p == p.max())
        return p * keep / (p * keep).sum()

    return probabilities


NUMBERS = {"temperature": 2}, {"temperature": np.float64(0.3)}


def chain(name, sweep=NUMBERS, **values):
    """A case of Categorical; the sweep changes some of its values."""
    changed = lambda changes: Categorical(**{**values, **changes})
    return Case(
        name, changed({}), reference(**values), changed({"temperature": 0}),
        tuple(changed(changes) for changes in sweep),
    )


def against(temperature, amateur, alpha=0.05, beta=0.5):
    """Contrastive scores as a sampler over the expert's logits."""
    return Against(Categorical(temperature), Contrast(alpha, beta), amateur)


AMATEUR = np.asarray(2.0 * jax.random.normal(jax.random.key(11), (VOCAB,)), np.float32)


def contrast_reference(l, seen):
    p, q = softmax(l), softmax(AMATEUR.astype(np.float64))
    weights = np.where(p >= 0.05 * p.max(), p / q**0.5, 0.0)
    return weights / weights.sum()


CASES = (
    Case("greedy-model", Categorical(), reference(), Greedy(), ()),
    chain("temperature", temperature=0.7),
    chain("top_k", temperature=1.3, top_k=5, sweep=({"top_k": 1}, {"top_k": 100})),
    chain("top_p", top_p=0.8, sweep=({"top_p": 0.1}, {"top_p": 1})),
    chain("min_p", min_p=0.05, sweep=({"min_p": 0}, {"min_p": 1.0})),
    chain("penalty", repetition_penalty=1.5, sweep=({"repetition_penalty": 1},)),
    chain("bias", logit_bias=BIAS),
    chain("all", temperature=0.9, top_k=12, top_p=0.9, min_p=0.02, repetition_penalty=1.3,
          logit_bias=BIAS, sweep=({"top_k": 3, "top_p": 0.5}, {"temperature": 0})),
    Case("mirostat", Mirostat2(1.5), mirostat_reference(1.5), Mirostat2(1.5, temperature=0),
         (Mirostat2(3, 0.2), Mirostat2(0.5, temperature=2))),
)


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_contract(case, check):
    check(case)


# Against carries a row's amateur logits, so what stacks samplers or repeats rows is not for it
ONE_AMATEUR = jnp.broadcast_to(jnp.asarray(AMATEUR), (ROWS, VOCAB))
CONTRAST = Case("contrast", against(1.0, ONE_AMATEUR), contrast_reference,
                against(0.0, ONE_AMATEUR), (against(1.0, ONE_AMATEUR, 0.2, 1.0),
                                            against(0.5, ONE_AMATEUR, 0.05, 0.0)))


@pytest.mark.parametrize("check", [
    check for check in CHECKS if check.__name__ in (
        "check_jit_equals_eager", "check_logprob_is_the_references", "check_cold_is_argmax",
        "check_sweep_compiles_once", "check_nan_is_not_hidden",
    )], ids=lambda check: check.__name__)
def test_contrast_keeps_the_contract(check):
    check(CONTRAST)


def test_contrast_as_a_sampler_has_the_references_distribution():
    sampler = against(1.0, jnp.broadcast_to(jnp.asarray(AMATEUR), (DRAWS, VOCAB)))
    logits = jnp.repeat(example(1), DRAWS, 0)
    tokens, logprobs, _ = STEP(sampler, keys(DRAWS, 5), logits, ())
    wanted = contrast_reference(np.asarray(example(1)[0], np.float64), None)
    counts = np.bincount(tokens, minlength=VOCAB)
    assert chi_square(counts, wanted) > 1e-3
    assert chi_square(counts, softmax(np.asarray(example(1)[0], np.float64))) < 1e-6
    np.testing.assert_allclose(np.exp(logprobs), wanted[np.asarray(tokens)], atol=1e-5)


TOP_K, TOP_P = jax.jit(keep_top_k), jax.jit(keep_top_p)


def in_row(values, width=40):
    """Logits (1, width), padded with what no threshold reaches."""
    row = np.full((1, width), -np.inf, np.float32)
    row[0, : len(values)] = values
    return row


@settings(max_examples=200, deadline=None)
@given(st.lists(st.floats(-1e6, 1e6, width=32, allow_subnormal=False), min_size=1, max_size=40),
       st.integers(1, 50))
def test_top_k_is_the_kth_largest_and_ties(values, k):
    l = in_row(values)
    kept = np.asarray(TOP_K(l, k))[0, : len(values)] > -1e38
    least = np.sort(values)[::-1][min(k, len(values)) - 1]
    np.testing.assert_array_equal(kept, np.array(values) >= least)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=30), st.integers(1, 99))
def test_top_p_is_the_smallest_set_that_reaches_p(weights, percent):
    """Whole weights: the mass at every threshold is exact, and ties abound."""
    total, p = sum(weights), percent / 100
    kept = np.asarray(TOP_P(in_row(np.log(weights)), p))[0, : len(weights)] > -1e38
    tops = {least: sum(w for w in weights if w >= least) for least in weights}
    near = [mass for mass in tops.values() if abs(mass / total - p) < 1e-5]
    least = max(least for least, mass in tops.items() if mass / total >= p)
    if not near:  # at an exact tie of mass and p, rounding may decide either way
        np.testing.assert_array_equal(kept, np.array(weights) >= least)


def test_mirostat_follows_its_rule_and_reaches_tau():
    """mu against a float64 loop; then the mean surprise of a long run."""
    tau, eta, steps = 2.0, 0.1, 600
    logits = jnp.broadcast_to(jnp.log(1.0 / jnp.arange(1, 401.0) ** 1.1), (8, 400))
    sampler = Mirostat2(tau, eta)

    def step(mu, key):
        _, logprob, after = sampler.step(jax.random.split(key, 8), logits, mu)
        return after, (mu, logprob)

    _, (mus, logprobs) = jax.lax.scan(step, sampler.init(8, 400), keys(steps))
    mu = np.full(8, 2 * tau)
    for now, logprob in zip(np.asarray(mus), np.asarray(logprobs), strict=True):
        np.testing.assert_allclose(now, mu, atol=2e-3)
        mu = mu - eta * (-logprob / np.log(2) - tau)
    surprise = -np.asarray(logprobs)[100:] / np.log(2)
    assert abs(surprise.mean() - tau) < 0.1
    plain = -np.asarray(jax.nn.log_softmax(logits[0])) / np.log(2)
    assert abs((plain * 2**-plain).sum() - tau) > 1.0  # untruncated text would not pass


def test_penalty_counts_prompt_chat_turns_and_drawn_tokens():
    """What the state has seen is the row's text, and the log-probabilities follow from it."""
    lm, params = tiny_model()
    sampler = Categorical(0.8, repetition_penalty=2.0)
    state = start(lm, params, 24, sampler)
    state = DECODE(lm, params, sampler, state, NEVER, 4)
    turn, _ = prompts(3, 4, seed=9)
    state, _ = EXTEND(lm, params, state, turn, jnp.array([4, 0, 2]))
    before = np.asarray(state.length_B)
    state = DECODE(lm, params, sampler, state, NEVER, 3)
    all_logits = np.asarray(APPLY(lm, params, state.tokens_BS).logits, np.float64)
    for row in range(3):
        length = int(state.length_B[row])
        text = np.asarray(state.tokens_BS[row, :length])
        assert set(np.flatnonzero(state.sampler.seen_BV[row])) == set(text)
        logits = all_logits[row]
        for at in range(before[row], length):
            seen = np.isin(np.arange(lm.config.vocab_size), text[:at])
            p = reference(0.8, repetition_penalty=2.0)(logits[at - 1], seen)
            np.testing.assert_allclose(state.logprob_BS[row, at], np.log(p[text[at]]), atol=1e-4)


BAD = [
    (Categorical, "temperature", -0.1), (Categorical, "temperature", float("nan")),
    (Categorical, "top_k", 0), (Categorical, "top_k", 2.5), (Categorical, "top_k", True),
    (Categorical, "top_p", 0.0), (Categorical, "top_p", 1.01), (Categorical, "min_p", -1e-3),
    (Categorical, "min_p", 2), (Categorical, "repetition_penalty", 0),
    (Categorical, "logit_bias", np.array([0.0, np.nan])), (Categorical, "temperature", "hot"),
    (Categorical, "logit_bias", np.array([np.inf])), (Categorical, "temperature", [0.5, 0.7]),
    (Categorical, "top_p", np.array([0.5, 1.5])), (Categorical, "top_k", jnp.array([3, -1])),
    (Mirostat2, "tau", 0.0), (Mirostat2, "eta", -0.1), (Mirostat2, "temperature", -1),
    (Contrast, "alpha", 0.0), (Contrast, "alpha", 1.5), (Contrast, "beta", -1.0),
    (Contrast, "temperature", 0.0), (Contrast, "temperature", 1e-38), (Contrast, "beta", 1e38),
    (Categorical, "temperature", 1j), (Categorical, "top_k", np.complex64(1)),
    (Categorical, "top_p", np.bool_(True)), (Categorical, "temperature", None),
    *((kind, name, None) for kind, names in ((Mirostat2, ("tau", "eta", "temperature")),
                                             (Contrast, ("alpha", "beta", "temperature")))
      for name in names),
]


@pytest.mark.parametrize("kind, name, value", BAD, ids=str)
def test_values_outside_their_range_are_named(kind, name, value):
    with pytest.raises(ConfigError, match=rf"{name} .*expected"):
        kind(**{name: value})


@settings(max_examples=300, deadline=None)
@given(
    st.sampled_from(["temperature", "top_k", "top_p", "min_p", "repetition_penalty"]),
    st.one_of(st.floats(), st.integers(), st.booleans(), st.text(max_size=3)),
)
def test_any_value_is_refused_or_works(name, value):
    """Either a ConfigError, or a token of the vocabulary with a log-probability up to 0."""
    try:
        sampler = Categorical(**{name: value})
    except ConfigError as error:
        assert name in str(error) and "expected" in str(error)
        return
    token, logprob, _ = STEP(sampler, keys(ROWS), example(), sampler.init(ROWS, VOCAB))
    token, logprob = np.asarray(token), np.asarray(logprob)
    assert ((token >= 0) & (token < VOCAB)).all()
    assert ((logprob <= 1e-5) & np.isfinite(logprob)).all()


def test_shapes_that_do_not_fit_are_named():
    with pytest.raises(ShapeError, match="temperature is"):
        Categorical(np.ones(ROWS + 1)).step(keys(ROWS), example(), ())
    with pytest.raises(ShapeError, match="logit_bias is"):
        Categorical(logit_bias=np.zeros(VOCAB + 1)).step(keys(ROWS), example(), ())
    with pytest.raises(ShapeError, match=r"alpha is \(2,\)"):
        Contrast(np.array([0.1, 0.2])).scores(example(), example())


@pytest.mark.parametrize("biases, words", [
    ({9: 1.0}, "id .* is 9; .*from 0 to 8"), ({-1: 1.0}, "id .* is -1"),
    ({True: 2.0}, "id .* is True"), ({1.0: 2.0}, "id .* is 1.0"), ({"1": 2.0}, "id .* is '1'"),
    ([1.0, 2.0], r"logit_bias is \[1.0, 2.0\]; expected biases by token id"),
    ({1: None}, "of token 1 is None"), ({1: "2"}, "of token 1 is '2'"),
    ({1: True}, "of token 1 is True"), ({1: float("nan")}, "of token 1 is nan"),
    ({1: float("inf")}, "of token 1 is inf"), ({1: 1e39}, "of token 1 is 1e\\+39"),
    ({1: -1e39}, "of token 1 is -1e\\+39"),
    ({1: 1j}, "of token 1 is 1j"), ({1: [2.0]}, "of token 1 is"),
    ({1: np.ones(2)}, "of token 1 is"),
], ids=str)
def test_biases_that_are_none_are_refused(biases, words):
    with pytest.raises(ConfigError, match=words):
        bias_array(biases, 9)


def test_biases_of_any_type_of_number():
    given = {np.int64(0): 1, 1: np.float32(2), 2: jnp.float32(3), 3: np.array(4), 4: -np.inf}
    assert bias_array(given, 6).tolist() == [1, 2, 3, 4, -np.inf, 0]


@pytest.mark.parametrize("bias", [
    np.full(5, -np.inf), jnp.full(5, -jnp.inf), np.full(5, -3.4e38),
    np.stack([np.zeros(5), np.full(5, -np.inf)]),
], ids=["numpy", "jax", "finite", "one row"])
def test_a_bias_that_bans_every_token_is_named(bias):
    with pytest.raises(ConfigError, match="logit_bias bans every token"):
        Categorical(logit_bias=bias)
    left = np.array(bias)
    left[..., 2] = 0.0
    assert Categorical(logit_bias=left).logit_bias.shape == bias.shape


def test_the_ends_of_the_contrast_s_range_give_numbers():
    """With tokens that the amateur bans too."""
    amateur = example(seed=4).at[:, 3].set(-jnp.inf)
    for rule in (Contrast(1e-30, 1e3, 1e-3), Contrast(1.0, 1e3, 1e-3), Contrast(1e-30, 0.0, 1e-3),
                 Contrast(1e-30, 1e3, 1e30)):
        for sampler in (Greedy(), Categorical(1e-3), Categorical(5.0)):
            both = Against(sampler, rule, amateur)
            token, logprob, _ = both.step(keys(ROWS), example(), ())
            assert np.isfinite(logprob).all() and (np.asarray(logprob) <= 1e-5).all(), rule
    best = Contrast(1e-30, 1e3, 1e-3).scores(example(), amateur).argmax(-1)
    np.testing.assert_array_equal(best, 3)  # it is the least likely to the amateur


def test_samplers_are_rebuilt_around_whatever_jax_puts_in_their_place():
    filled = Categorical(0.5, top_k=3, top_p=0.9, min_p=0.1, repetition_penalty=1.5,
                         logit_bias=BIAS)
    for sampler in (filled, Mirostat2(), Contrast()):
        leaves, tree = jax.tree.flatten(sampler)
        assert jax.tree.unflatten(tree, [object()] * len(leaves)) is not None
        mapped = jax.vmap(lambda s, x: jax.tree.map(lambda y: y + 0 * x, s), (None, 0))(
            sampler, jnp.arange(3.0))
        assert jax.tree.structure(mapped) == tree


def test_the_plain_name_is_the_chain():
    assert Temperature is Categorical
