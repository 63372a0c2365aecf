"""Fewer rows computed than are resident: the same texts, and nothing of the others is touched."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.cache.parse import parse_cache
from jaxlm.core.errors import ConfigError
from jaxlm.decode.samplers import Categorical, Mirostat2
from jaxlm.decode.state import decode
from jaxlm.decode.stop import Stop
from tests.decode.tiny import start, tiny_model

ROWS = 5
DECODE = jax.jit(decode, static_argnames=("lm", "width"))
LM, PARAMS = tiny_model()
PENALISED = Categorical(0.9, repetition_penalty=1.3)
STOP = Stop((3, 7, 20, 31, 44, 52))


def begin(cache="dense", sampler=PENALISED, slots=24, rows=ROWS):
    return start(LM, PARAMS, slots=slots, sampler=sampler, rows=rows, cache=parse_cache(cache))


def run(state, max_new, width=None, sampler=PENALISED, stop=STOP):
    return DECODE(LM, PARAMS, sampler, state, stop, max_new, width=width)


def written(state):
    """Each row's drawn tokens and their log-probabilities, as far as the row goes."""
    return [(np.asarray(state.tokens_BS[b, :n]), np.asarray(state.logprob_BS[b, :n]))
            for b, n in enumerate(np.asarray(state.length_B))]


def assert_same(found, wanted):
    for (tokens, logprob), (other, exact) in zip(written(found), written(wanted), strict=True):
        np.testing.assert_array_equal(tokens, other)
        np.testing.assert_allclose(logprob, exact, atol=1e-5)
    np.testing.assert_array_equal(found.done_B, wanted.done_B)
    np.testing.assert_allclose(found.logits_BV, wanted.logits_BV, atol=1e-4)


@pytest.mark.parametrize(("sampler", "width"), [(PENALISED, 3), (Mirostat2(3.0), 1)], ids=str)
def test_texts_are_the_same_at_any_width(sampler, width):
    """Rows that stop at different lengths; sampler states go along."""
    whole = run(begin(sampler=sampler), 60, sampler=sampler)
    lengths = np.asarray(whole.length_B)
    assert whole.done_B.all() and len(set(lengths)) > 2
    assert_same(run(begin(sampler=sampler), 600, width, sampler), whole)


@pytest.mark.parametrize("cache", [
    "dense", pytest.param("kivi2", marks=pytest.mark.slow),
    pytest.param("squat2", marks=pytest.mark.slow)])
def test_an_iteration_leaves_alone_the_rows_that_do_not_work(cache):
    """To the bit, all that a row holds; beyond its length a kind may write, as in held rows."""
    before = run(begin(cache), 3, width=4, stop=Stop())
    after = run(before, 1, width=2, stop=Stop())
    assert (after.length_B - before.length_B).tolist() == [1, 1, 0, 0, 0]
    small = lambda s: [s.logits_BV, s.match_B2, s.length_B, s.done_B, s.hold_B, s.sampler]
    for old, new in zip(jax.tree.leaves(small(before)), jax.tree.leaves(small(after)), strict=True):
        np.testing.assert_array_equal(new[2:], old[2:])
    assert (after.logits_BV[:2] != before.logits_BV[:2]).any(1).all()
    for old, new in zip(before.caches, after.caches, strict=True):
        for b in range(2, ROWS):
            held = int(before.length_B[b])
            for x, y in zip(jax.tree.leaves(row(old, b, held)), jax.tree.leaves(row(new, b, held)),
                            strict=True):
                np.testing.assert_array_equal(y, x)
        moved = [row(cache, 0, int(after.length_B[0])) for cache in (old, new)]
        assert any((x != y).any() for x, y in zip(*map(jax.tree.leaves, moved), strict=True))


def row(cache, b, length):
    """What a layer's cache holds of a row: the first `length` tokens, or codes and their tail."""
    one = {name: jax.tree.map(lambda x: np.asarray(x[b]), leaf) for name, leaf in cache.items()}
    if "packed_B" in one:
        tail = length - int(one["packed_B"])
        return one | {"k": one["k"][:, :tail], "v": one["v"][:, :tail]}
    return {"k": one["k"][..., :length], "v": one["v"][:, :length]}


@pytest.mark.slow
@pytest.mark.parametrize("cache", ["kivi2", "squat2"])
def test_groups_are_coded_alike_where_flushes_come_at_the_same_lengths(cache):
    """Two rows work to their end, 88 tokens, 11 flushes; then the other two: as all four at once.

    At other times a flush finds a row with another number of tokens, and its group is coded some
    tokens sooner or later, as after a wait: `test_a_flush_that_comes_later_is_seen` below.
    """
    whole, lent = turns(cache, 88)
    assert all((layer["packed_B"] >= 32).all() for layer in whole.caches)
    assert_same(lent, whole)


@pytest.mark.slow
def test_a_flush_that_comes_later_is_seen():
    whole, lent = turns("kivi2", 85)
    with pytest.raises(AssertionError):
        assert_same(lent, whole)


def turns(cache, count):
    """Four rows of `count` tokens each, at once and two by two."""
    def fresh():
        state = start(LM, PARAMS, slots=count + 6, rows=4, cache=parse_cache(cache),
                      sampler=PENALISED)
        return state.replace(limit_B=state.length_B + count)

    return run(fresh(), count, stop=Stop()), run(fresh(), 4 * count, 2, stop=Stop())


def test_as_many_rows_or_more_are_the_program_without():
    state = begin()
    program = lambda width: str(jax.make_jaxpr(
        lambda state: decode(LM, PARAMS, PENALISED, state, STOP, 5, width=width))(state))
    assert program(ROWS) == program(10 * ROWS) == program(None) != program(ROWS - 1)


@pytest.mark.parametrize("width", [0, -1, 1.5, True, "2"])
def test_a_width_that_is_none_is_named(width):
    with pytest.raises(ConfigError, match="width is"):
        decode(LM, PARAMS, PENALISED, begin(), STOP, 5, width=width)


def test_numbers_for_each_row_are_refused_where_fewer_are_computed():
    sampler = Categorical(jnp.linspace(0.5, 1.0, ROWS))
    shapes = lambda width: jax.eval_shape(
        lambda state: decode(LM, PARAMS, sampler, state, STOP, 2, width=width), begin())
    assert shapes(ROWS).length_B.shape == (ROWS,)
    with pytest.raises(ConfigError, match="Categorical holds numbers for each of 5 rows"):
        shapes(2)
