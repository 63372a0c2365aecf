"""What every search keeps: a prompt's answers are its own, over every cache, on device and host."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.cache import Dense
from jaxlm.core.errors import ConfigError, DeviceError, NumericsError, ShapeError
from jaxlm.core.mesh import make_mesh, shardings
from jaxlm.decode.samplers import Categorical
from jaxlm.models.config import LayerPlan
from jaxlm.rewards.base import Stateless
from jaxlm.rewards.call import TextReward
from jaxlm.search.base import Steps, evidence
from jaxlm.search.beam import beam_search, dvts
from jaxlm.search.memory import check_memory
from jaxlm.search.particles import filter_of, particle_filter
from jaxlm.search.run import begin_jit, grow, loop_jit, make_task, search, start
from tests.search.toy import (
    END,
    HOST,
    REWARD,
    SAMPLER,
    STEPS,
    bundle,
    ends,
    logits_of,
    score_of,
)

PROMPTS = [[0, 1, 1], [1], [0, 0, 1, 2, 0], [2, 1]]
CODED = Steps("\n", tokens=5, max_steps=14, max_new_tokens=48, stop_ids=())
KEYS = jax.random.split(jax.random.key(3), len(PROMPTS))
OPTIONS = {"particles": 4, "steps": STEPS, "sampler": SAMPLER, "threshold": 2.0}


def run(prompts=PROMPTS, reward=REWARD, keys=KEYS, model=None, **options):
    return particle_filter(model or bundle(), prompts, reward, key=keys, **{**OPTIONS, **options})


def answers(results):
    return [[answer.tokens for answer in result.answers] for result in results]


@pytest.fixture(scope="module")
def together():
    return run()


def test_answers_are_scored_by_step_and_bounded(together):
    for result in together:
        assert result.ess.shape == result.resampled.shape == (result.steps,)
        assert result.ancestors.shape == (result.steps, 4) and result.flags == ()
        for answer in result.answers:
            assert list(answer.step_ends) == ends(answer.tokens)
            scores = [score_of(answer.tokens[:end]) for end in answer.step_ends]
            np.testing.assert_allclose(answer.step_scores, scores, atol=1e-6)
            assert answer.finish == ("stop" if answer.tokens[-1] == END else "length")
        assert result.text == max(result.answers, key=lambda answer: answer.score).text
        longest = max(len(answer.tokens) for answer in result.answers)
        assert longest <= result.tokens_drawn <= 4 * STEPS.max_new_tokens


def test_a_prompt_s_answers_are_its_own(together):
    """Alone, in another place, in step with the others, or in a queue: the same texts."""
    assert answers(run()) == answers(together)
    back = run(PROMPTS[::-1], keys=KEYS[::-1])[::-1]
    assert answers(back) == answers(together)
    assert answers(run(quorum=4)) == answers(together)
    queued = run(at_once=2)
    assert answers(queued) == answers(together)
    for one, other in zip(queued, together, strict=True):
        np.testing.assert_allclose(one.log_evidence, other.log_evidence, rtol=1e-5)
        np.testing.assert_array_equal(one.ancestors, other.ancestors)
        assert one.tokens_drawn == other.tokens_drawn


def test_a_sweep_compiles_nothing(together):
    programs = (begin_jit, loop_jit)
    before = [program._cache_size() for program in programs]
    found = [run(threshold=threshold, tau=tau, sampler=Categorical(warm))
             for threshold, tau, warm in [(0.3, 1.0, 1.0), (2.0, 0.25, 1.0), (2.0, 1.0, 0.6)]]
    assert [program._cache_size() for program in programs] == before and min(before) > 0
    assert not all(result.resampled[1:].all() for result in found[0])  # each did something
    weights = [[a.log_weight for r in results for a in r.answers] for results in (together, *found)]
    assert all(other != weights[0] for other in weights[1:])


@pytest.mark.slow
def test_prompts_over_eight_devices_equal_one():
    """Each device holds the rows of its own prompt, to the end of the search."""
    prompts, keys, mesh = PROMPTS * 2, jax.random.split(jax.random.key(8), 8), make_mesh(data=8)
    model = bundle()
    places = shardings(model.lm.axes(), model.lm.shapes(), mesh)
    spread = model.replace(params=jax.device_put(model.params, places), mesh=mesh)
    alone, found = (run(prompts, keys=keys, model=one) for one in (model, spread))
    assert answers(found) == answers(alone)
    for one, other in zip(found, alone, strict=True):
        np.testing.assert_allclose(one.log_evidence, other.log_evidence, rtol=1e-4, atol=1e-5)
        np.testing.assert_array_equal(one.ancestors, other.ancestors)
    task = make_task(spread, prompts, REWARD, filter_of("odds", 1.0, 2.0, "systematic"), key=keys,
                     particles=4, steps=STEPS, sampler=SAMPLER, cache="dense")
    pop = grow(task, *start(task, range(8)), range(8), 8)[0]
    for leaf in jax.tree.leaves([pop.rows.caches[0].own, pop.rows.tokens_BS, pop.score_B]):
        assert leaf.sharding.shard_shape(leaf.shape)[0] == leaf.shape[0] // 8


def test_a_reward_on_the_host_gives_the_same_answers_and_sees_texts(together):
    seen = []

    def score(rows):
        assert all(isinstance(leaf, np.ndarray) for leaf in rows[:4])
        seen.extend(rows.texts)
        return HOST.function(rows)

    found = run(reward=Stateless(score, on_device=False))
    assert answers(found) == answers(together)
    assert {answer.text for result in found for answer in result.answers} <= set(seen)


@pytest.mark.parametrize(("on_device", "at_once"), [
    (False, None), (True, None), pytest.param(True, 2, marks=pytest.mark.slow)])
def test_each_result_is_told_as_soon_as_it_is_over(together, on_device, at_once):
    calls, told = [], {}

    def score(rows):
        calls.append(None)
        return HOST.function(rows)

    def tell(number, result):
        assert number not in told
        told[number] = result, len(calls)

    reward = REWARD if on_device else Stateless(score, on_device=False)
    found = run(reward=reward, at_once=at_once, on_result=tell)
    assert answers(found) == answers(together)
    assert answers([told[i][0] for i in range(len(PROMPTS))]) == answers(found)
    assert all(0 < one.row_utilisation <= 1 for one, _ in told.values())
    assert on_device or len({at for _, at in told.values()}) > 1


SMALL = ":group=8,window=8"  # coded from 12 tokens on


@pytest.mark.parametrize(("cache", "error"), [
    ("dense", 1e-3), ("kivi8" + SMALL, 0.05),
    pytest.param("kivi4" + SMALL, 0.3, marks=pytest.mark.slow),
    pytest.param("squat4" + SMALL, 0.3, marks=pytest.mark.slow)])
def test_over_every_cache_and_a_skipped_layer(cache, error):
    """Log-probabilities of what was drawn, by full passes. Rows are resampled when part of what
    they drew is in codes; where caches do not follow, most answers are off by 0.8 or more."""
    plan = (LayerPlan(skip_attention=True), LayerPlan())
    model = bundle(2, plan, width=32)
    task = make_task(model, PROMPTS[:2], REWARD, filter_of("odds", 1.0, 2.0, "systematic"),
                     particles=4, steps=CODED, sampler=SAMPLER, cache=cache, key=KEYS[:2])
    found, moved = search(task), 0
    if cache != "dense":
        pop = grow(task, *start(task, range(2)), range(2), 2)[0]
        assert int(pop.rows.caches[1].own["packed_B"].min()) >= 8
    for prompt, result in zip(PROMPTS, found, strict=False):
        assert np.isfinite(result.log_evidence) and not result.flags
        for row, answer in enumerate(result.answers):
            scores = [score_of(answer.tokens[:end]) for end in answer.step_ends]
            np.testing.assert_allclose(answer.step_scores, scores, atol=1e-6)
            assert max(np.diff([0, *answer.step_ends])) <= 5
            moved += result.ancestors[-1][row] != row and answer.step_ends[-2] >= 16
            drawn = answer.tokens
            text = np.zeros((1, 64), np.int32)
            text[0, : len(prompt) + len(drawn)] = [*prompt, *drawn]
            logits = logits_of(model.lm, model.params, jnp.asarray(text))[0, len(prompt) - 1:]
            logp = logits - np.logaddexp.reduce(logits, -1, keepdims=True)
            exact = logp[np.arange(len(drawn)), drawn].sum()
            assert abs(answer.logprob - exact) < error
    assert moved > 0


BAD = {
    "zero": lambda s: 0.0 * s, "nan": lambda s: jnp.nan * s, "inf": lambda s: jnp.inf * s,
    "one nan": lambda s: jnp.where(jnp.arange(len(s)) % 4 == 1, jnp.nan, s),
}


@pytest.mark.parametrize("kind", BAD)
def test_rewards_without_a_number_are_flagged_and_give_answers(kind):
    on_host = Stateless(lambda rows: np.asarray(BAD[kind](HOST.function(rows))), on_device=False)
    found = run(reward=on_host, weight="prob")
    for result in found:
        assert result.flags == ("broken",) and result.text is not None
        for answer in result.answers:
            assert np.isfinite(answer.score) and np.isfinite(answer.step_scores).all()
        assert not np.isnan(result.log_evidence)
        if kind != "one nan":
            assert result.log_evidence == -np.inf
        assert not np.isnan([answer.log_weight for answer in result.answers]).any()


def test_one_particle_and_a_step_that_never_ends():
    endless = Steps("\n\n\n\n\n\n\n", max_steps=3, max_new_tokens=6, stop_ids=())
    found = run(PROMPTS[:1], keys=KEYS[:1], steps=endless, particles=1)[0]
    assert found.chosen == 0 and found.steps == 1
    assert [(len(answer.tokens), answer.finish) for answer in found.answers] == [(6, "length")]


@pytest.mark.slow
def test_a_host_s_rewards_keep_their_place_in_a_queue(together):
    assert answers(run(reward=HOST, at_once=3)) == answers(together)


def failing(which, at, calls):
    """Scores by text; prompt `which` fails once an answer has `at` letters."""
    def scores(prompts, texts):
        calls.extend(zip(prompts, texts, strict=True))
        if any(p == which and len(t) >= at for p, t in zip(prompts, texts, strict=True)):
            raise RuntimeError("out of order")
        return [0.2 + 0.1 * (sum(map(ord, text)) % 7) for text in texts]

    return TextReward(scores, retries=1, wait_s=0)


@pytest.mark.parametrize(("at", "at_once"), [
    (0, None), (3, None), pytest.param(3, 2, marks=pytest.mark.slow)])
def test_a_prompt_whose_reward_fails_ends_and_takes_no_other_with_it(at, at_once):
    """The others' answers are those of a search in which nothing failed; it is not asked again."""
    whole = run(reward=failing(None, 0, []), at_once=at_once)
    length = [max(len(answer.text) for answer in result.answers) for result in whole]
    which, calls = int(np.argmax(length)), []
    bad = bundle().tokenizer.decode(PROMPTS[which])
    assert length[which] >= at
    with pytest.warns(UserWarning, match="out of order"):
        found = run(reward=failing(bad, at, calls), at_once=at_once)
    lost, kept = found.pop(which), found
    del whole[which]
    assert answers(kept) == answers(whole)
    assert [r.log_evidence for r in kept] == [r.log_evidence for r in whole]
    assert all(result.failed is None and result.flags == () for result in kept)
    assert lost.flags == ("failed",) and lost.failed == "RuntimeError: out of order"
    for answer in lost.answers:
        assert len(answer.text) < max(at, 1) and np.isfinite(answer.score)
        assert answer.finish == ("stop" if END in answer.tokens else "failed")
    assert (lost.steps > 0) == (at > 0)  # of the steps before, scores and texts are kept
    wrong = [text for prompt, text in calls if prompt == bad and len(text) >= at]
    assert 0 < len(wrong) <= 3 * OPTIONS["particles"]  # two tries with the others, one alone


def test_beams_and_trees_keep_the_best():
    beams = beam_search(bundle(), PROMPTS, REWARD, budget=8, width=2, steps=STEPS, sampler=SAMPLER,
                        key=KEYS)
    trees = dvts(bundle(), PROMPTS, REWARD, budget=8, width=2, steps=STEPS, sampler=SAMPLER,
                 key=KEYS)
    for beam, tree in zip(beams, trees, strict=True):
        for row in beam.ancestors[1:]:
            assert all(np.bincount(row)[np.unique(row)] == 2) and len(np.unique(row)) == 4
        for row in tree.ancestors[1:]:
            assert (row // 2 == np.arange(8) // 2).all() and (row[::2] == row[1::2]).all()
        assert np.isnan(beam.log_evidence) and np.isnan(tree.log_evidence)
    best = lambda results: np.mean([max(a.score for a in r.answers) for r in results])
    assert best(beams) > 0.6


def test_evidence_of_chains():
    chains = run([PROMPTS[0]] * 4)
    mean, error = evidence(chains)
    z = np.exp([chain.log_evidence for chain in chains])
    np.testing.assert_allclose([np.exp(mean), error],
                               [z.mean(), z.std(ddof=1) / 2 / z.mean()], rtol=1e-4)
    with pytest.raises(ShapeError, match="one prompt"):
        evidence(run())
    beams = beam_search(bundle(), [PROMPTS[0]] * 2, REWARD, budget=4, width=2, steps=STEPS,
                        sampler=SAMPLER, key=KEYS[:2])
    with pytest.raises(NumericsError, match="result 4 has no evidence"):
        evidence([*chains, *beams])
    with pytest.raises(NumericsError, match="result 1 has a failed reward .out of order"):
        evidence([chains[0], replace(chains[1], failed="out of order")])


def test_more_particles_than_memory_are_refused_before_any_compute():
    with pytest.raises(DeviceError, match=r"100000 particles.*; (\d+) particles fit") as error:
        run(particles=100_000, memory=2**22)
    fits = int(str(error.value).split("; ")[1].split(" ")[0])
    assert fits > 4
    kinds = (Dense(),)
    check_memory(bundle(), kinds, 4, 32, fits, 4, 2**22)
    with pytest.raises(DeviceError):
        check_memory(bundle(), kinds, 4, 32, fits + 1, 4, 2**22)


@pytest.mark.parametrize(("options", "message"), [
    ({"steps": "\n"}, "expected a Steps"), ({"weight": "logit"}, "weight is 'logit'"),
    ({"scheme": "best"}, "resampling is 'best'"), ({"tau": 0.0}, "tau is 0.0"),
    ({"temper": "ess"}, "temper is 'ess'"), ({"compat": "hub"}, "compat is 'hub'"),
    ({"choose": "first"}, "choose is 'first'"), ({"particles": 0}, "particles is 0"),
    ({"reward": len}, "expected a Reward"), ({"at_once": 0}, "at_once is 0"),
    ({"steps": Steps("#", max_new_tokens=8)}, "no token contains")], ids=str)
def test_bad_calls_are_named(options, message):
    with pytest.raises(ConfigError, match=message):
        run(**options)


def test_steps_that_are_none_are_named():
    for bad, message in [({}, "no end"), ({"tokens": 0}, "tokens is 0"),
                         ({"delimiters": ("",)}, "not empty"),
                         ({"tokens": 4, "max_steps": 1.5}, "max_steps is 1.5")]:
        with pytest.raises(ConfigError, match=message):
            Steps(**bad)
