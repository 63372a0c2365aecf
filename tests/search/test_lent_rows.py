"""Rows of other prompts fill the gap: the same answers, in fewer iterations."""

import jax
import numpy as np
import pytest

from jaxlm.core.errors import ConfigError
from jaxlm.core.mesh import make_mesh
from jaxlm.decode.samplers import Categorical
from jaxlm.search.base import Steps
from jaxlm.search.beam import beam_search, dvts
from jaxlm.search.gibbs import particle_gibbs
from jaxlm.search.methods import Request, method
from jaxlm.search.particles import particle_filter
from jaxlm.search.run import begin_jit, loop_jit
from tests.search.toy import HOST, REWARD, SAMPLER, bundle

PROMPTS = [[0, 1, 1], [1], [0, 0, 1, 2, 0], [2, 1], [0]]
KEYS = jax.random.split(jax.random.key(3), len(PROMPTS))
LONG = Steps("\n", tokens=7, max_steps=12, max_new_tokens=16, stop=("abab", "bbb", "aaaa"),
             stop_ids=())
SEARCHES = {
    "filter": lambda **options: particle_filter(particles=4, threshold=0.7, **options),
    "beam": lambda **options: beam_search(budget=4, width=2, **options),
    "dvts": lambda **options: dvts(budget=4, width=2, **options),
}


def run(name="filter", reward=REWARD, **options):
    options = {"key": KEYS, "steps": LONG, "sampler": SAMPLER, **options}
    return SEARCHES[name](bundle=bundle(), prompts=PROMPTS, reward=reward, **options)


def assert_same(found, wanted):
    for one, other in zip(found, wanted, strict=True):
        assert [a.tokens for a in one.answers] == [a.tokens for a in other.answers]
        assert [a.finish for a in one.answers] == [a.finish for a in other.answers]
        for name in ("logprob", "log_weight", "score"):
            get = lambda result, name=name: [getattr(a, name) for a in result.answers]
            np.testing.assert_allclose(get(one), get(other), rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(one.log_evidence, other.log_evidence, rtol=1e-5, atol=1e-5)
        np.testing.assert_array_equal(one.ancestors, other.ancestors)
        assert (one.chosen, one.tokens_drawn) == (other.chosen, other.tokens_drawn)


@pytest.fixture(scope="module")
def whole():
    return run()


@pytest.mark.parametrize(("name", "options"), [
    ("filter", {}), pytest.param("filter", {"at_once": 3}, marks=pytest.mark.slow),
    pytest.param("beam", {}, marks=pytest.mark.slow),
    pytest.param("dvts", {}, marks=pytest.mark.slow),
    pytest.param("filter", {"quorum": 2}, marks=pytest.mark.slow)], ids=str)
def test_answers_weights_and_evidence_are_those_of_all_rows_at_once(name, options, whole):
    wanted = whole if name == "filter" else run(name)
    found = run(name, rows=5, **options)
    assert_same(found, wanted)
    assert {"string", "length"} <= {a.finish for r in whole for a in r.answers}
    assert found[0].row_utilisation > wanted[0].row_utilisation + 0.1


def test_what_is_spent_is_counted_in_rows_that_are_computed(whole):
    drawn = sum(result.tokens_drawn for result in whole)
    iterations = drawn / run(rows=5)[0].row_utilisation / 5
    assert iterations == pytest.approx(round(iterations), abs=1e-3) and 5 * iterations >= drawn


@pytest.mark.slow
def test_one_row_at_a_time_never_idles(whole):
    found = run(rows=1)
    assert_same(found, whole)
    assert found[0].row_utilisation == 1.0


def test_a_sweep_compiles_once_and_all_rows_are_the_program_without(whole):
    run(rows=5)
    programs = (begin_jit, loop_jit)
    before = [program._cache_size() for program in programs]
    for threshold, warm in ((0.2, 1.0), (2.0, 0.5)):
        particle_filter(bundle(), PROMPTS, REWARD, particles=4, threshold=threshold, steps=LONG,
                        sampler=Categorical(warm), key=KEYS, rows=5)
    for rows in (20, 1000):
        assert_same(run(rows=rows), whole)
    assert [program._cache_size() for program in programs] == before


@pytest.mark.slow
def test_a_reward_on_the_host(whole):
    assert_same(run(reward=HOST, rows=5), whole)


@pytest.mark.slow
@pytest.mark.parametrize("cache", ["kivi2", "squat2"])
def test_over_quantised_caches(cache):
    """A shared prompt in codes, what the particles add in full precision as yet."""
    prompts = [[0, 1, 1, 2] * 20, [1, 0, 2] * 15, [2, 1] * 24]
    search = lambda **options: particle_filter(
        bundle(2, (), 32), prompts, REWARD, particles=4, steps=LONG, sampler=SAMPLER, cache=cache,
        key=KEYS[:3], **options)
    assert_same(search(rows=5), search())


@pytest.mark.parametrize("temperatures", [
    (1.0,), pytest.param((1.0, 2.0), marks=pytest.mark.slow)])
def test_chains_keep_their_references(temperatures):
    """Rows that are held to a given answer take it along."""
    chains = lambda **options: particle_gibbs(
        bundle(), PROMPTS[:3], REWARD, particles=4, sweeps=3, temperatures=temperatures, steps=LONG,
        sampler=SAMPLER, key=KEYS[:3], **options)
    whole, lent = chains(), chains(rows=5)
    for one, other in zip(lent, whole, strict=True):
        assert [a.tokens for a in one.references] == [a.tokens for a in other.references]
    assert_same([chain.last for chain in lent], [chain.last for chain in whole])
    assert lent[0].last.row_utilisation > whole[0].last.row_utilisation + 0.1


@pytest.mark.slow
def test_methods_by_name_pass_it_on():
    ask = lambda name, rows: method(name, REWARD).run(
        Request(bundle(), REWARD, 4, LONG, 1.0, rows=rows), [bundle().tokenizer.decode(p)
                                                             for p in PROMPTS], KEYS)
    for name in ("particle-filter", "best-of-n"):
        texts = [[one.text for one in ask(name, rows)] for rows in (None, 5)]
        assert texts[0] == texts[1]


@pytest.mark.parametrize(("options", "message"), [
    ({"rows": 0}, "rows is 0"), ({"rows": 2.5}, "rows is 2.5"),
    ({"rows": 5, "sampler": Categorical(np.linspace(0.5, 1.0, 20))}, "each of 20 rows")], ids=str)
def test_bad_calls_are_named(options, message):
    with pytest.raises(ConfigError, match=message):
        run(**options)


def test_rows_of_several_devices_are_not_lent():
    model = bundle().replace(mesh=make_mesh(data=8))
    with pytest.raises(ConfigError, match="over 8 devices"):
        particle_filter(model, PROMPTS, REWARD, particles=4, steps=LONG, key=KEYS, rows=5)
