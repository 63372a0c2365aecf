"""Shared prompts against rows that each hold a copy, and resampling of both."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.cache import Dense
from jaxlm.cache.dense import SPARE
from jaxlm.cache.shared import Shared
from jaxlm.core.errors import ConfigError, ShapeError
from jaxlm.core.tree import nbytes
from jaxlm.decode.generate import decode_jit
from jaxlm.decode.rows import fork, gather, repeat
from jaxlm.decode.samplers import Categorical, Greedy
from jaxlm.decode.state import compact, prefill
from jaxlm.decode.stop import NEVER
from tests.decode.tiny import APPLY, DECODE, EXTEND, prompts, start, tiny_model

PARTICLES, NEW, TIME = 4, 12, 6
MODELS = {
    "plain": {},
    "window": {"windows": (4, None)},
    "capped": {"attention_softcap": 5.0, "num_heads": 6, "num_kv_heads": 3},
}
HOT = Categorical(0.9, top_p=0.95, repetition_penalty=1.2)


def both(model, sampler=HOT):
    """The same prompts, once shared and once copied."""
    lm, params = tiny_model(**MODELS[model])
    shared = fork(lm, params, start(lm, params, TIME, sampler), PARTICLES, NEW)
    copied = repeat(start(lm, params, TIME + NEW, sampler), PARTICLES)
    return lm, params, shared, copied


def assert_same(shared, copied):
    """Texts alike, logits and log-probabilities to 1e-5 of their size."""
    np.testing.assert_array_equal(shared.length_B, copied.length_B)
    for row, length in enumerate(np.asarray(shared.length_B)):
        np.testing.assert_array_equal(
            shared.tokens_BS[row, :length], copied.tokens_BS[row, :length]
        )
    np.testing.assert_allclose(shared.logits_BV, copied.logits_BV, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(shared.logprob_BS, copied.logprob_BS, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("model", MODELS)
def test_shared_equals_copied_through_decode_resampling_and_extend(model):
    lm, params, shared, copied = both(model)
    turn, _ = prompts(3 * PARTICLES, 3, seed=5)
    counts = jnp.arange(3 * PARTICLES) % 4
    ancestors = jnp.array([[0, 0, 2, 3], [3, 3, 3, 3], [1, 0, 3, 2]])
    move = jax.jit(gather)
    for step in range(3):
        shared, copied = (DECODE(lm, params, HOT, s, NEVER, 3) for s in (shared, copied))
        assert_same(shared, copied)
        if step == 0:
            shared, copied = move(shared, ancestors), move(copied, ancestors)
        if step == 1:
            shared, copied = (EXTEND(lm, params, s, turn, counts)[0] for s in (shared, copied))
            assert_same(shared, copied)
    assert len({tuple(row) for row in np.asarray(shared.tokens_BS).tolist()}) > 6


def test_attention_over_shared_and_copied_prompts_agrees_to_1e_6():
    lm, params, shared, copied = both("plain", Greedy())
    spec = lm.config.attention(0)
    rows = 3 * PARTICLES
    q, k, v = (jax.random.normal(jax.random.key(i), (rows, 2, heads, 8))
               for i, heads in enumerate((4, 2, 2)))
    start_B, count_B = shared.length_B, jnp.arange(rows) % 3
    pos_BT = start_B[:, None] + jnp.arange(2)
    outs = [
        state.kinds[0].extend(spec, state.caches[0], q, k, v, pos_BT, start_B, count_B)
        for state in (shared, copied)
    ]
    for a, b in zip(outs[0][:2], outs[1][:2], strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)


def test_greedy_text_is_the_models_own():
    """Every particle of a shared prompt, against full passes without any cache."""
    lm, params, shared, _ = both("plain", Greedy())
    state = DECODE(lm, params, Greedy(), shared, NEVER, NEW)
    logits = APPLY(lm, params, state.tokens_BS).logits
    for row in range(3 * PARTICLES):
        length = int(state.length_B[row])
        at = np.arange(length - NEW, length)
        np.testing.assert_array_equal(
            state.tokens_BS[row, at], np.argmax(logits[row, at - 1], -1)
        )
        assert state.done_B[row] and length == int(shared.length_B[row]) + NEW


def test_the_prompt_is_stored_once():
    lm, _, shared, copied = both("plain")
    token = lm.config.num_layers * 2 * 2 * 8 * 4  # layers, keys and values, heads, width, bytes
    lengths = lm.config.num_layers * 3 * 4
    spare = token * 3 * SPARE * (1 + PARTICLES)  # of the prompts and of their rows
    assert nbytes(shared.caches) == token * (3 * TIME + 3 * PARTICLES * NEW) + lengths + spare
    assert nbytes(copied.caches) == token * 3 * PARTICLES * (TIME + NEW + SPARE)
    text = lambda compiled: compiled.as_text()
    params = tiny_model()[1]
    step = jax.jit(lambda p, s: s.kinds[0].step(
        lm.config.attention(0), s.caches[0], *(jnp.ones((12, 1, n, 8)) for n in (4, 2, 2)),
        s.length_B, s.length_B,
    ))
    hlo = text(step.lower(params, shared).compile())
    assert f"f32[12,2,{TIME},8]" not in hlo  # no copy of the prompt for each row


def test_a_full_row_is_done_and_never_writes_past_its_room():
    lm, params, shared, _ = both("plain", Greedy())
    state = DECODE(lm, params, Greedy(), shared, NEVER, 100)
    np.testing.assert_array_equal(state.length_B, shared.length_B + NEW)
    assert state.done_B.all()
    more, _ = EXTEND(lm, params, state, jnp.ones((12, 1), jnp.int32), jnp.ones(12, jnp.int32))
    assert np.isnan(more.logits_BV).all() and (more.length_B == state.length_B).all()


def test_a_fork_may_be_forked_again():
    """Two levels against plain rows: the text of a parent is read by all of its children."""
    lm, params = tiny_model()
    shared = fork(lm, params, start(lm, params, TIME, Greedy()), 2, 5)
    copied = repeat(start(lm, params, 24, Greedy()), 2)
    shared, copied = (DECODE(lm, params, Categorical(1.0), s, NEVER, 3) for s in (shared, copied))
    shared, copied = fork(lm, params, shared, 3, 6), repeat(copied, 3)
    assert isinstance(shared.kinds[0].prompt, Shared)
    shared, copied = (DECODE(lm, params, Categorical(1.0), s, NEVER, 6) for s in (shared, copied))
    for row, length in enumerate(np.asarray(shared.length_B)):
        np.testing.assert_array_equal(
            shared.tokens_BS[row, :length], copied.tokens_BS[row, :length]
        )
    np.testing.assert_allclose(shared.logits_BV, copied.logits_BV, rtol=1e-5, atol=1e-5)


def test_left_padded_prompts_fork_alike():
    lm, params = tiny_model()
    tokens, lengths = prompts()
    valid = jnp.arange(TIME) >= TIME - lengths[:, None]
    left = jnp.stack([jnp.roll(row, TIME - n) for row, n in zip(tokens, lengths, strict=True)])
    moved, counts = compact(left, valid)
    keys = jax.random.split(jax.random.key(8), 3)
    one, other = (
        DECODE(lm, params, HOT, fork(lm, params, prefill(
            lm, params, HOT, t, n, Dense(), TIME, keys), 2, 4), NEVER, 4)
        for t, n in ((tokens, lengths), (moved, counts))
    )
    np.testing.assert_array_equal(one.logprob_BS, other.logprob_BS)


def test_clones_go_on_differently_and_prompts_stay():
    lm, params, shared, _ = both("plain")
    same = gather(shared, jnp.zeros((3, PARTICLES), jnp.int32))
    np.testing.assert_array_equal(
        jax.random.key_data(same.keys_B), jax.random.key_data(shared.keys_B)
    )
    assert same.caches[0].prompt is shared.caches[0].prompt
    drawn = DECODE(lm, params, Categorical(2.0), same, NEVER, 8)
    texts = np.asarray(drawn.tokens_BS)[:PARTICLES].tolist()
    assert len({tuple(text) for text in texts}) == PARTICLES


@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit], ids=["eager", "jit"])
def test_a_forked_state_may_be_donated(wrap):
    lm, params = tiny_model()
    state = wrap(lambda s: fork(lm, params, s, 2, 4))(start(lm, params, TIME))
    pointers = [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(state.caches)]
    assert len(set(pointers)) == len(pointers)
    done = decode_jit(lm, params, Greedy(), state, NEVER, 4)
    assert done.done_B.all()


def test_bad_calls_are_named():
    lm, params, shared, _ = both("plain")
    with pytest.raises(ConfigError, match="particles is 0"):
        fork(lm, params, start(lm, params, TIME), 0, 4)
    with pytest.raises(ConfigError, match="slots is 0"):
        fork(lm, params, start(lm, params, TIME), 2, 0)
    for bad in (2.5, True, "3", None):
        with pytest.raises(ConfigError, match=r"slots is .*whole number"):
            fork(lm, params, start(lm, params, TIME), 2, bad)
        for call in (lambda bad=bad: fork(lm, params, start(lm, params, TIME), bad, 4),
                     lambda bad=bad: repeat(start(lm, params, TIME), bad)):
            with pytest.raises(ConfigError, match=r"particles is .*whole number"):
                call()
    with pytest.raises(ConfigError, match="fork them"):
        repeat(shared, 2)
    with pytest.raises(ShapeError, match="12 rows"):
        gather(shared, jnp.zeros((3, 3), jnp.int32))
    with pytest.raises(ConfigError, match="then fork"):
        start(lm, params, TIME, cache=Shared(Dense(), Dense()))


@pytest.mark.parametrize("ancestors, words", [
    ([[0, 1, 2, 7], [0, 1, 2, 3], [0, 1, 2, 3]], "7.*indices from 0 to 3"),
    ([[0, 1, 2, 3], [0, -1, 2, 3], [0, 1, 2, 3]], "-1.*indices from 0 to 3"),
    ([[0, 1, 2, 2**32]] * 3, f"{2**32}.*indices from 0 to 3"),
    ([list(range(12))], r"\(1, 12\).*share 3 prompts.*\(3, 4\)"),
    ([[0, 1]] * 6, r"\(6, 2\).*share 3 prompts.*\(3, 4\)"),
    ([[0.0, 1.0, 2.0, 3.0]] * 3, "float64.*whole numbers"),
    ([[True, True, True, False]] * 3, "bool.*whole numbers"),
], ids=str)
def test_ancestors_that_are_none_of_the_prompt_s_rows_are_refused(ancestors, words):
    *_, shared, copied = both("plain")
    with pytest.raises(ShapeError, match=words):
        gather(shared, np.array(ancestors))
    if "share" not in words:
        with pytest.raises(ShapeError, match=words):
            gather(copied, np.array(ancestors))


def test_traced_ancestors_outside_the_prompt_give_nan():
    *_, shared, _ = both("plain")
    right = jnp.array([[0, 0, 2, 3], [3, 3, 3, 3], [1, 0, 3, 2]])
    moved, wrong = (jax.jit(gather)(shared, index) for index in (
        right, right.at[0, 1].set(7).at[2, 3].set(-1)))
    lost_B = np.isin(np.arange(12), [1, 11])
    assert np.isnan(wrong.logits_BV[lost_B]).all()
    np.testing.assert_array_equal(wrong.logits_BV[~lost_B], moved.logits_BV[~lost_B])
    assert np.isfinite(moved.logits_BV).all()
