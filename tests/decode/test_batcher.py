"""Continuous batching: an answer is the same whatever else is asked, and nothing is compiled anew.

"The same" is to the bit, log-probabilities included: a row's numbers come from the same program
over the same values, wherever it stands and whenever it joined.
"""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.core.errors import ConfigError, ShapeError, TokenizerError
from jaxlm.core.tree import nbytes
from jaxlm.decode import pool, prompts
from jaxlm.decode.batcher import Batcher
from jaxlm.decode.generate import generate
from jaxlm.decode.samplers import Categorical
from jaxlm.hf.bundle import load
from tests.tiny import write_folder

PROGRAMS = (pool.empty_pool_jit, pool.join_jit, pool.leave_jit, pool.take_jit, pool.advance_jit,
            prompts.prefill_jit, prompts.extend_jit)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    found = load(write_folder(tmp_path_factory.mktemp("serve") / "model"))
    params = dict(found.params)  # sharper than at random, so that greedy rows differ
    params["embed"] = {"table": params["embed"]["table"] * 4}
    return found.replace(params=params)


@pytest.fixture(scope="module")
def batcher(bundle):
    return Batcher(bundle, rows=4, max_len=96, chunk=4, piece=8, readers=2)


def some_requests(batcher, count=14):
    """Requests that differ in everything that they may differ in."""
    rng = np.random.default_rng(3)
    shared = rng.integers(0, 256, 40).tolist()
    made = []
    for i in range(count):
        own = rng.integers(0, 256, rng.integers(1, 30)).tolist()
        prompt = shared[: rng.integers(8, 40)] + own if i % 3 else shared[:17]
        made.append(dict(
            prompt=prompt, max_new_tokens=int(rng.integers(1, 25)), seed=i, choice=i % 2,
            temperature=[0.0, 0.7, 1.3][i % 3], top_p=[1.0, 0.8][i % 2],
            top_k=[None, 5, 40][i // 2 % 3], min_p=[0.0, 0.05][i // 3 % 2],
            tops=[0, 3][i // 4 % 2], stop=[[], list("etaoinsh0123<"), ["q"]][i % 3],
            stream=bool(i % 2)))
    return made


def answer(batcher, asked, **changes):
    """Run requests together, two joining a step; what became of each."""
    requests = [batcher.request(**{**one, **changes}) for one in asked]
    left, texts, ends = list(requests), {}, {}
    while left or batcher.busy:
        for request in left[:2]:
            batcher.add(request)
        left = left[2:]
        for progress in batcher.step():
            name = id(progress.request)
            texts[name] = texts.get(name, "") + progress.text
            if progress.finish:
                assert name not in ends
                ends[name] = progress.finish
                assert progress.settled == len(progress.request.drawn)
    return [(r.drawn, r.logprobs, r.alternatives, texts[id(r)], ends[id(r)]) for r in requests]


@pytest.fixture(scope="module")
def mixed(batcher):
    asked = some_requests(batcher)
    return asked, answer(batcher, asked)


def test_every_answer_is_its_answer_alone(batcher, mixed):
    for one, together in zip(*mixed, strict=True):
        batcher.reader.forget()
        alone, = answer(batcher, [one])
        assert alone == together


def test_the_comparison_sees_another_seed(batcher, mixed):
    asked, together = mixed
    warm = [i for i, one in enumerate(asked) if one["temperature"] > 0]
    other = answer(batcher, [asked[i] | {"seed": asked[i]["seed"] + 100} for i in warm])
    assert sum(a[0] != together[i][0] for a, i in zip(other, warm, strict=True)) > len(warm) / 2


def test_answers_are_those_of_generate(bundle, mixed):
    for one, (drawn, _, _, text, end) in list(zip(*mixed, strict=True))[:8]:
        sampler = Categorical(one["temperature"], one["top_k"] or 258, one["top_p"], one["min_p"])
        keys = jax.random.split(jax.random.key(one["seed"]), 2)[one["choice"]][None]
        found = generate(bundle, one["prompt"], max_new_tokens=one["max_new_tokens"], key=keys,
                         sampler=sampler, stop=[*one["stop"], "\0never"], max_len=96)
        assert (list(found.tokens), found.text, found.finish) == (drawn, text, end)


def test_ends_of_all_kinds_were_seen(mixed):
    assert {end for *_, end in mixed[1]} >= {"string", "length"}


def test_kept_prompts_change_nothing(batcher, mixed):
    asked, together = mixed
    batcher.reader.forget()
    first = answer(batcher, asked)
    read = batcher.reader.tokens_read
    again = answer(batcher, asked)
    assert first == again == together
    assert batcher.reader.tokens_read == read  # every prompt was kept whole
    assert batcher.reader.tokens_reused > read > 0


def test_beginnings_are_shared(batcher):
    batcher.reader.forget()
    long = list(range(30))
    answer(batcher, [dict(prompt=long)], max_new_tokens=1)
    answer(batcher, [dict(prompt=long[:20] + [99])], max_new_tokens=1)
    assert batcher.reader.tokens_reused == 16  # whole pieces of 8
    answer(batcher, [dict(prompt=long[:16])], max_new_tokens=1)
    assert batcher.reader.tokens_reused == 16 + 8  # the last piece gives the logits


def test_nothing_is_compiled_after_the_start(bundle):
    batcher = Batcher(bundle, rows=4, max_len=96, chunk=4, piece=8, readers=2)
    batcher.warm()
    sizes = [program._cache_size() for program in PROGRAMS]
    answer(batcher, some_requests(batcher))
    assert [program._cache_size() for program in PROGRAMS] == sizes
    assert batcher.reader.tokens_reused > 0


def test_log_probabilities_are_the_models_own(bundle, mixed):
    tokens = np.zeros((len(mixed[0]), 96), np.int32)
    for row, (one, (drawn, *_)) in enumerate(zip(*mixed, strict=True)):
        tokens[row, : len(one["prompt"] + drawn)] = one["prompt"] + drawn
    logits = jax.jit(lambda params, x: bundle.lm.apply(params, x).logits)(bundle.params, tokens)
    for one, (drawn, logprobs, tops, _, _), line in zip(*mixed, np.asarray(logits), strict=True):
        table = np.asarray(jax.nn.log_softmax(line, -1))[len(one["prompt"]) - 1:]
        np.testing.assert_allclose(logprobs, table[np.arange(len(drawn)), drawn], atol=2e-5)
        for step, others in enumerate(tops):
            assert len(others) == one["tops"]
            best = np.sort(table[step])[::-1][: one["tops"]]
            np.testing.assert_allclose([value for _, value in others], best, atol=2e-5)
            np.testing.assert_allclose(table[step][[token for token, _ in others]], best, atol=2e-5)


def test_a_cancelled_row_is_free_and_harms_nobody(batcher, mixed):
    asked, together = mixed
    victims = [batcher.request(**{**one, "max_new_tokens": 40, "stop": []}) for one in asked[:3]]
    for victim in victims:
        batcher.add(victim)
    while not batcher.live:
        batcher.step()
    for victim in victims:
        victim.cancelled = True
    assert answer(batcher, asked) == together
    assert not batcher.live and sorted(batcher._free) == [0, 1, 2, 3]


def test_several_answers_read_their_prompt_once(batcher):
    batcher.reader.forget()
    asked = [dict(prompt=list(range(20)), choice=i, temperature=1.0, max_new_tokens=6)
             for i in range(4)]
    for one in asked:
        batcher.add(batcher.request(**one))
    ends = [p.request.drawn for p in batcher.run() if p.finish]
    assert batcher.reader.tokens_read == 20 and len({tuple(drawn) for drawn in ends}) > 1


@pytest.mark.slow
@pytest.mark.parametrize("cache", ["kivi2:group=8,window=8", "squat2:group=8,window=8"])
def test_quantised_rows_are_flushed_at_their_own_steps(bundle, cache):
    batcher = Batcher(bundle, rows=3, max_len=96, chunk=4, piece=8, readers=2, cache=cache)
    asked = some_requests(batcher, 7)
    together = answer(batcher, asked)
    assert batcher.reader.tokens_reused > 0
    for one, mixed in zip(asked, together, strict=True):
        batcher.reader.forget()
        alone, = answer(batcher, [one])
        assert alone == mixed


def test_kinds_that_learn_from_a_prompt_get_long_first_pieces(bundle, monkeypatch):
    """On a CPU too: what the queries of later pieces say, SQuat does not learn."""
    monkeypatch.setattr("jaxlm.decode.batcher.empty_pool_jit", lambda *_: None)
    monkeypatch.setattr("jaxlm.decode.batcher.backend", lambda: "cpu")
    piece = lambda cache, **more: Batcher(bundle, rows=1, max_len=96, cache=cache,
                                          **more).reader.piece
    small = "2:group=8,window=8"
    assert [piece(kind) for kind in ("dense", f"kivi{small}", f"rkivi{small}")] == [32] * 3
    assert [piece(kind) for kind in (f"squat{small}", f"rsquat{small}")] == [96] * 2  # all the room
    assert piece(("dense", f"squat{small}")) == 96 and piece(f"squat{small}", piece=8) == 8


def test_a_chunk_is_whole_flush_periods(bundle):
    with pytest.raises(ConfigError, match="multiple of 4"):
        Batcher(bundle, rows=2, max_len=32, chunk=6, cache="kivi2:group=8,window=8")


def test_a_joining_row_copies_no_cache(bundle):
    """The row is written in place: what a join holds besides its arguments is far below a pool."""
    sampler, kinds = pool.RowSampler(4), Batcher(bundle, rows=2, max_len=16).reader.kinds
    make = lambda rows: jax.eval_shape(
        lambda: pool.empty_pool(bundle.lm, bundle.params, sampler, kinds, rows, 1024))
    state, fresh = make(16), make(1)
    index = jax.ShapeDtypeStruct((1,), jnp.int32)
    joining = prompts.unasked(1, 1)
    program = pool.join_jit.lower(state, fresh, index, index, 1, joining).compile()
    assert program.memory_analysis().temp_size_in_bytes < nbytes(state.caches) / 16
    leaves = {",".join(map(str, x.shape)) for x in jax.tree.leaves(state.caches)}
    copies = re.findall(r"= f32\[([\d,]+)\]\S* copy\(", program.as_text())
    assert not leaves & set(copies)


def test_broken_weights_end_a_row_with_an_error(bundle):
    params = dict(bundle.params) | {"embed": {"table": bundle.params["embed"]["table"] * np.nan}}
    batcher = Batcher(bundle.replace(params=params), rows=4, max_len=96, chunk=4, piece=8,
                      readers=2)
    batcher.add(batcher.request([1, 2, 3], max_new_tokens=5))
    assert [p.finish for p in batcher.run()] == ["error"]
    assert len(batcher.reader.kept) == 0


@pytest.mark.parametrize(("changes", "error"), [
    ({"prompt": ""}, ShapeError), ({"prompt": []}, ShapeError),
    ({"prompt": [999]}, TokenizerError), ({"max_new_tokens": 95}, ShapeError),
    ({"prompt": [1] * 96}, ShapeError), ({"temperature": -1}, ConfigError),
    ({"top_p": 0}, ConfigError), ({"top_k": 0}, ConfigError), ({"tops": 21}, ConfigError),
    ({"seed": 2**64}, ConfigError), ({"stop": [""]}, ConfigError),
    ({"max_new_tokens": 0}, ConfigError),
])
def test_bad_requests_are_refused(batcher, changes, error):
    with pytest.raises(error):
        batcher.request(**{"prompt": [1, 2], "temperature": 1.0, **changes})


def kept(limit, cuttable=True):
    """A cache of prompts whose states weigh 8 bytes."""
    return prompts.PromptCache(limit, 2, cuttable)


def test_the_least_recently_used_prompt_goes_first():
    cache, state = kept(16), jnp.zeros(2)
    cache.keep([1, 2, 3], state)
    cache.keep([4, 5, 6], state)
    cache.find([1, 2, 9])
    cache.keep([7, 8, 9], state)
    assert cache.bytes == 16 and len(cache) == 2
    assert cache.find([4, 5, 6]) == (None, 0) and cache.find([1, 2, 3])[1] == 3
    assert cache.find([4, 5, 9]) == (None, 0) and cache.find([1, 2, 9])[1] == 2


def test_what_does_not_fit_is_not_kept():
    cache = kept(7)
    cache.keep([1, 2], jnp.zeros(2))
    assert len(cache) == cache.bytes == 0


def test_states_that_cannot_be_cut_serve_whole_only():
    cache = kept(99, cuttable=False)
    cache.keep([1, 2, 3], jnp.zeros(2))
    assert cache.find([1, 2, 9]) == (None, 0)
    cache.keep([1, 2], jnp.zeros(2))
    assert cache.find([1, 2, 9])[1] == 2
