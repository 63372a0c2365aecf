"""prefill, extend, decode_step and decode agree with the model without a cache."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.cache.dense import Dense
from jaxlm.core.errors import ConfigError, ShapeError
from jaxlm.core.tree import gather_rows, nbytes
from jaxlm.decode import state as functions
from jaxlm.decode.samplers import Greedy, Temperature
from jaxlm.decode.state import Stop, compact
from jaxlm.models.config import LayerPlan
from jaxlm.models.lm import LM
from tests.decode.steps import Script, decode, extend, prefill, step
from tests.tiny import CONFIG, VOCAB, model

B, SLOTS = 3, 32
LENGTHS = jnp.array([9, 4, 1])
KEYS = jax.random.split(jax.random.key(5), B)
TOKENS = jax.random.randint(jax.random.key(2), (B, 24), 0, VOCAB)
full = jax.jit(lambda lm, params, tokens: lm.apply(params, tokens).logits, static_argnums=0)
close = lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5)


def begin(lm=None, params=None, sampler=Greedy(), lengths=LENGTHS, slots=SLOTS, width=9):
    own, own_params = model()
    return prefill(lm or own, params or own_params, sampler, TOKENS[:, :width], lengths, Dense(),
                   slots, KEYS)


def greedy_by_hand(lm, params, prompt, count):
    """argmax of the whole text's last logits, again and again, in one fixed width."""
    text = list(map(int, prompt))
    for _ in range(count):
        padded = jnp.asarray([text + [0] * (SLOTS - len(text))])
        text.append(int(full(lm, params, padded)[0, len(text) - 1].argmax()))
    return text


def test_decode_equals_the_model_without_a_cache():
    lm, params = model()
    state = begin()
    for row in range(B):
        close(state.logits_BV[row], full(lm, params, TOKENS[:, :9])[row, LENGTHS[row] - 1])
    state = decode(lm, params, Greedy(), state, Stop(), 12)
    assert state.length_B.tolist() == [21, 16, 13]
    for row, length in enumerate(LENGTHS):
        expected = greedy_by_hand(lm, params, TOKENS[row, :length], 12)
        assert state.tokens_BS[row, : len(expected)].tolist() == expected
        log_p = jax.nn.log_softmax(full(lm, params, state.tokens_BS)[row])
        at = jnp.arange(length, length + 12)
        close(state.logprob_BS[row, at], log_p[at - 1, state.tokens_BS[row, at]])
        assert (state.logprob_BS[row, :length] == 0).all()


def test_steps_equal_one_loop_and_chunks_of_it():
    lm, params = model()
    sampler = Temperature(1.0)
    whole = decode(lm, params, sampler, begin(sampler=sampler), Stop(), 9)
    chunks = begin(sampler=sampler)
    for count in (2, 1, 6):
        chunks = decode(lm, params, sampler, chunks, Stop(), count)
    stepped = begin(sampler=sampler)
    for _ in range(9):
        stepped = step(lm, params, sampler, stepped)
    for other in (chunks, stepped):
        np.testing.assert_array_equal(other.length_B, whole.length_B)
        for row, length in enumerate(whole.length_B):
            np.testing.assert_array_equal(
                other.tokens_BS[row, :length], whole.tokens_BS[row, :length]
            )
        close(other.logprob_BS, whole.logprob_BS)


def test_a_ragged_extend_equals_reading_all_at_once():
    lm, params = model()
    counts = jnp.array([3, 0, 5])
    more = TOKENS[:, 9:14]
    state, asked = extend(lm, params, begin(), more, counts, "all")
    texts = [jnp.concatenate([TOKENS[row, : LENGTHS[row]], more[row, : counts[row]]])
             for row in range(B)]
    assert state.length_B.tolist() == [len(text) for text in texts]
    for row, text in enumerate(texts):
        logits = full(lm, params, jnp.pad(text, (0, SLOTS - len(text)))[None])[0]
        close(state.logits_BV[row], logits[len(text) - 1])
        close(asked[row, : counts[row]], logits[LENGTHS[row]: len(text)])
        assert state.tokens_BS[row, : len(text)].tolist() == text.tolist()


def test_stop_ids_end_a_row_and_an_extend_revives_it():
    lm, params = model()
    script = Script(jnp.array([7, 9, 8, 8, 8, 8]))
    state = begin(sampler=script)
    state = decode(lm, params, script, state, Stop((9,)), 5)
    assert state.done_B.all() and (state.length_B == LENGTHS + 2).all()
    frozen = decode(lm, params, script, state, Stop((9,)), 5)
    jax.tree.map(np.testing.assert_array_equal, (frozen.tokens_BS, frozen.logits_BV),
                 (state.tokens_BS, state.logits_BV))
    state, _ = extend(lm, params, state, TOKENS[:, :2], jnp.array([2, 0, 1]))
    assert state.done_B.tolist() == [False, True, False]


def test_done_rows_are_untouched_while_others_go_on():
    lm, params = model()
    state = begin()
    held = state.replace(done_B=jnp.array([False, True, False]))
    after = decode(lm, params, Greedy(), held, Stop(), 6)
    alone = decode(lm, params, Greedy(), state, Stop(), 6)
    assert after.length_B.tolist() == [15, 4, 7]
    np.testing.assert_array_equal(after.logits_BV[1], state.logits_BV[1])
    np.testing.assert_array_equal(after.tokens_BS[0], alone.tokens_BS[0])
    awake = decode(lm, params, Greedy(), after.replace(done_B=jnp.array([True, False, True])),
                   Stop(), 6)
    np.testing.assert_array_equal(awake.tokens_BS[1, :10], alone.tokens_BS[1, :10])


def test_a_full_row_stops_and_an_overflow_is_poisoned():
    lm, params = model()
    state = decode(lm, params, Greedy(), begin(slots=10), Stop(), 50)
    assert state.length_B.tolist() == [10, 10, 10] and state.done_B.all()
    grown, _ = extend(lm, params, begin(slots=10), TOKENS[:, :4], jnp.array([2, 4, 4]))
    assert grown.length_B.tolist() == [9, 8, 5]
    assert jnp.isnan(grown.logits_BV[0]).all() and jnp.isfinite(grown.logits_BV[1:]).all()
    beyond, asked = extend(lm, params, begin(), TOKENS[:, :2], jnp.array([3, -1, 2]), "all")
    assert jnp.isnan(beyond.logits_BV[:2]).all() and jnp.isnan(asked[:2]).all()
    assert jnp.isfinite(beyond.logits_BV[2]).all()


@pytest.mark.parametrize("counts, row", [([2, 4, 4], 0), ([1, -1, 2], 1), ([1, 1, 5], 2)])
def test_outside_a_jit_an_overflow_is_an_error_before_any_compute(monkeypatch, counts, row):
    lm, params = model()
    state = begin(slots=10)
    monkeypatch.setattr(functions, "cached_run", None)
    with pytest.raises(ShapeError, match=f"row {row} holds .* of 10 tokens and cannot take "
                                         f"{counts[row]} of a piece of 4"):
        functions.extend(lm, params, state, TOKENS[:, :4], jnp.array(counts))


def test_logits_of_what_a_row_did_not_append_are_poisoned():
    lm, params = model()
    counts = jnp.array([2, 1, 0])
    everything = extend(lm, params, begin(), TOKENS[:, 9:11], counts, "all")[1]
    state, asked = jax.jit(functions.extend, static_argnums=0)(
        lm, params, begin(), TOKENS[:, 9:11], counts, jnp.array([[9, 1], [1, 0], [0, -1]]))
    assert jnp.isnan(asked).all(-1).tolist() == [[True, False], [True, False], [True, True]]
    close(asked[0, 1], everything[0, 1])
    close(asked[1, 1], everything[1, 0])
    assert jnp.isfinite(state.logits_BV).all()  # the next token's, of the row of none too
    np.testing.assert_array_equal(state.logits_BV[2], begin().logits_BV[2])


@pytest.mark.parametrize("bad", [0, 10, -1])
def test_a_length_that_cannot_be_is_poisoned(bad):
    state = begin(lengths=jnp.array([9, bad, 1]))
    assert jnp.isnan(state.logits_BV[1]).all() and jnp.isfinite(state.logits_BV[::2]).all()


def test_rows_are_copied_by_gathering_and_then_differ_by_their_own_keys():
    lm, params = model()
    sampler = Temperature(1.0)
    state = begin(sampler=sampler, lengths=jnp.full(B, 5))
    clones = jnp.array([[0, 0, 0]])
    moved = state.replace(
        tokens_BS=gather_rows(state.tokens_BS, clones), caches=gather_rows(state.caches, clones),
        logits_BV=gather_rows(state.logits_BV, clones),
    )
    after = decode(lm, params, sampler, moved, Stop(), 10)
    texts = {tuple(row) for row in after.tokens_BS[:, :15].tolist()}
    assert len({text[:5] for text in texts}) == 1 and len(texts) == B
    alone = decode(lm, params, sampler, state, Stop(), 10)
    np.testing.assert_array_equal(after.tokens_BS[0], alone.tokens_BS[0])


def test_a_skipped_block_keeps_no_cache():
    lm = LM(CONFIG, (LayerPlan(), LayerPlan(skip_attention=True)))
    params = model()[1]
    state = begin(lm, params)
    assert state.caches[1] == () and state.kinds[1] is None
    state = decode(lm, params, Greedy(), state, Stop(), 4)
    assert state.tokens_BS[0, :13].tolist() == greedy_by_hand(lm, params, TOKENS[0, :9], 4)


def test_vmap_over_problems_equals_a_loop():
    lm, params = model()
    tokens = jax.random.randint(jax.random.key(3), (4, 2, 6), 0, VOCAB)
    lengths = jnp.array([[6, 2], [3, 1], [5, 5], [1, 6]])
    keys = jax.random.split(jax.random.key(4), (4, 2))
    sampler = Temperature(1.0)

    def solve(tokens, lengths, keys):
        state = functions.prefill(lm, params, sampler, tokens, lengths, Dense(), 12, keys)
        for _ in range(2):
            state = functions.decode_step(lm, params, sampler, state)
        return state.tokens_BS, state.length_B, state.logits_BV

    together, one = jax.jit(jax.vmap(solve))(tokens, lengths, keys), jax.jit(solve)
    for problem in range(4):
        alone = one(tokens[problem], lengths[problem], keys[problem])
        np.testing.assert_array_equal(together[1][problem], alone[1])
        np.testing.assert_array_equal(together[0][problem], alone[0])
        close(together[2][problem], alone[2])
    apply = jax.jit(jax.vmap(lambda tokens: lm.apply(params, tokens).logits))
    close(apply(tokens), jnp.stack([full(lm, params, row) for row in tokens]))


def test_the_loop_holds_no_copy_of_the_cache():
    """Temporaries stay below one layer's cache (a step reads a cut); the loop writes in place."""
    lm, params = model()
    slots = 4096
    shapes = jax.eval_shape(
        lambda: prefill(lm, params, Greedy(), TOKENS[:, :9], LENGTHS, Dense(), slots, KEYS)
    )
    donating = jax.jit(decode.__wrapped__, static_argnames=("lm", "stop"), donate_argnames="state")
    memory = donating.lower(lm, params, Greedy(), shapes, Stop(), 64).compile().memory_analysis()
    cache = nbytes(shapes.caches)
    assert cache > 2 * 2**20
    assert memory.temp_size_in_bytes < cache / lm.config.num_layers
    assert memory.alias_size_in_bytes >= cache  # donated: the caller's cache is the loop's


def test_left_padding_is_compacted():
    tokens = jnp.array([[0, 0, 5, 6], [7, 8, 9, 4], [0, 3, 0, 2]])
    valid = jnp.array([[0, 0, 1, 1], [1, 1, 1, 1], [0, 1, 0, 1]], bool)
    moved, lengths = compact(tokens, valid)
    assert moved.tolist() == [[5, 6, 0, 0], [7, 8, 9, 4], [3, 2, 0, 0]]
    assert lengths.tolist() == [2, 4, 2]


@pytest.mark.parametrize("change, words", [
    ({"slots": 8}, ["9 tokens wide", "holds 8", "raise slots"]),
    ({"tokens": TOKENS[:0]}, ["(0, 24)", "at least one"]),
    ({"tokens": TOKENS[:, :0]}, ["(3, 0)", "at least one"]),
    ({"tokens": TOKENS[:, :9] * 1.0}, ["float32", "whole numbers"]),
    ({"lengths": LENGTHS[:2]}, ["lengths_B", "(2,)", "(3,)"]),
    ({"keys": KEYS[:2]}, ["keys_B", "(2,)", "(3,)"]),
    ({"cache": (Dense(),)}, ["1 kinds", "2 layers"]),
])
def test_prefill_refuses_what_does_not_fit(change, words):
    lm, params = model()
    given = {"tokens": TOKENS[:, :9], "lengths": LENGTHS, "slots": SLOTS, "keys": KEYS,
             "cache": Dense()} | change
    with pytest.raises((ShapeError, ConfigError)) as error:
        prefill(lm, params, Greedy(), given["tokens"], given["lengths"], given["cache"],
                given["slots"], given["keys"])
    assert all(word in str(error.value) for word in words), str(error.value)


def test_extend_refuses_rows_that_are_not_there():
    lm, params = model()
    with pytest.raises(ShapeError, match=r"tokens_BT is \(2, 4\); expected \(3, 4\)"):
        extend(lm, params, begin(), TOKENS[:2, :4], jnp.array([1, 1]))
    with pytest.raises(ShapeError, match=r"counts_B is \(3, 1\); expected \(3,\)"):
        extend(lm, params, begin(), TOKENS[:, :4], jnp.ones((3, 1), int))
