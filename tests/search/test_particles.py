"""The particle filter over text against enumeration, and a wrong rule refused."""

from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import struct

from jaxlm.rewards.base import Stateless
from jaxlm.search.base import Steps
from jaxlm.search.particles import Filter, filter_of, particle_filter
from jaxlm.search.run import make_task, search
from jaxlm.smc.entropic import temperature
from jaxlm.smc.weights import effective_size, normalise
from tests.search.toy import (
    END,
    NEWLINE,
    PROMPT,
    REWARD,
    SAMPLER,
    STEPS,
    bundle,
    ends,
    exact,
    model_law,
    z_score,
)

SEEDS, PARTICLES = 256, 8


def run(reward=REWARD, seeds=SEEDS, key=0, **options):
    """Many independent filters of one prompt, as prompts of one batch."""
    options = {"particles": PARTICLES, "steps": STEPS, "sampler": SAMPLER, **options}
    return particle_filter(bundle(), [PROMPT] * seeds, reward, key=jax.random.key(key), **options)


def law_of(results, by_weight=True):
    """The texts of all filters, weighted within by their weights, among them by their evidence."""
    found = Counter()
    share = np.asarray(normalise(np.array([r.log_evidence for r in results])).probs_P)
    for part, result in zip(share, results, strict=True):
        weights = np.asarray(normalise(np.array([a.log_weight for a in result.answers])).probs_P)
        for weight, answer in zip(weights, result.answers, strict=True):
            found[answer.tokens] += float(part * weight)
    return found


def distance(found, law):
    """Total variation."""
    return 0.5 * sum(abs(found[text] - law.get(text, 0.0)) for text in {*law, *found})


def test_the_toy_s_probabilities_sum_to_one():
    assert abs(sum(model_law(bundle()).values()) - 1) < 1e-5


@pytest.mark.parametrize("options", [
    {"threshold": 2.0}, {"threshold": 0.0},
    *(pytest.param(more, marks=pytest.mark.slow) for more in [
        {"threshold": 0.6, "scheme": "multinomial", "quorum": SEEDS},
        {"temper": "size", "threshold": 2.0, "temper_below": 2.0, "early": 0.9}])], ids=str)
def test_the_evidence_is_unbiased_and_the_law_right(options):
    results = run(**options)
    total, law = exact(bundle())
    assert abs(z_score([r.log_evidence for r in results], total)) < 3.5
    floor = np.random.default_rng(0).multinomial(SEEDS * PARTICLES, list(law.values()))
    floor = 0.5 * np.abs(floor / floor.sum() - list(law.values())).sum()
    assert distance(law_of(results), law) < 3 * floor


@struct.dataclass
class Counted(Filter):
    """A rule that gives the mean of its weights for evidence, whatever they are weights of."""

    def final(self, held):
        state = held[0]
        return state.log_weights_P, state.log_evidence, state.broken


def test_its_hub_s_rule_is_refused_by_the_same_test():
    rule = Counted(1.0, 2.0, scheme="multinomial", again=True)
    results = search(make_task(
        bundle(), [PROMPT] * SEEDS, REWARD, rule, particles=PARTICLES, steps=STEPS, sampler=SAMPLER,
        cache="dense", key=jax.random.key(0), choose="resampled"))
    assert abs(z_score([r.log_evidence for r in results], exact(bundle())[0])) > 10


@pytest.mark.parametrize("options", [
    {"compat": "its_hub"}, {"temper": "size", "threshold": 2.0, "forget": True}], ids=str)
def test_a_rule_with_another_target_gives_no_evidence(options):
    assert all(np.isnan(result.log_evidence) for result in run(seeds=2, **options))
    kept = {name: value for name, value in options.items() if name == "threshold"}
    assert all(np.isfinite(result.log_evidence) for result in run(seeds=2, forget=True, **kept))


@struct.dataclass
class Coin:
    """A letter b or a newline, each by half, whatever the model says."""

    def init(self, batch, vocab):
        return ()

    def step(self, keys_B, logits_BV, state):
        heads_B = jax.vmap(jax.random.bernoulli)(keys_B)
        return jnp.where(heads_B, 1, NEWLINE), jnp.full(len(heads_B), np.log(0.5)), state


def newline_last(rows):
    """1 for an answer that ends in a newline, else 0."""
    return jnp.take_along_axis(rows.tokens_BS, rows.length_B[:, None] - 1, 1)[:, 0] == NEWLINE


def test_a_row_never_draws_again_what_it_drew_for_a_text_that_it_lost():
    r"""A step is `\n`, `b\n` or `bb`, whose weight is 0: the evidence of T steps is (3/4)^T.

    A row that held `bb` and is given `\n` stands at a place where it drew b before. Would it draw
    by row and place alone, it would draw b again.
    """
    count = 6
    steps = Steps("\n", tokens=2, max_steps=count, max_new_tokens=2 * count, stop_ids=())
    results = run(Stateless(newline_last), 512, steps=steps, sampler=Coin(), weight="prob",
                  threshold=2.0)
    assert abs(z_score([r.log_evidence for r in results], 0.75**count)) < 3.5


def by_text(rows):
    """The score of a text by its letters, ends left out."""
    place = np.arange(rows.tokens_BS.shape[1])
    drawn = (place >= rows.start_B[:, None]) & (place < rows.length_B[:, None])
    return 0.3 + 0.1 * (np.where(drawn & (rows.tokens_BS != END), rows.tokens_BS + 1, 0).sum(1) % 5)


def once_ended(rows):
    """A half, and 0.9 once the answer has ended: what an outcome reward does."""
    return np.where(rows.ended_B, 0.9, 0.5)


@pytest.mark.parametrize("score", [by_text, once_ended])
def test_a_stop_id_alone_is_no_step(score):
    """The answers of the same letters have one weight, whether the end came in a step of its own or
    not; the score of the ended text is not lost."""
    odds = lambda r: np.log(r / (1 - r))
    results = run(Stateless(score, on_device=False), 32, threshold=0.0)
    alone = 0
    for answer in (answer for result in results for answer in result.answers):
        letters = [token for token in answer.tokens if token != END]
        if score is once_ended:
            weight = odds(0.9)
        else:
            scores = [0.3 + 0.1 * (sum(token + 1 for token in letters[:end]) % 5)
                      for end in ends(answer.tokens)]
            np.testing.assert_allclose(answer.step_scores, scores, atol=1e-6)
            weight = sum(map(odds, scores))
        np.testing.assert_allclose(answer.log_weight, weight, atol=1e-4)
        alone += answer.finish == "stop" and ends(letters)[-1:] == [len(letters)]
        assert answer.step_ends[-1] == len(answer.tokens)
    assert alone > 5


def test_the_published_schedule_of_tempering():
    """Resampled at every step, by that step's weights alone, less sharply where the effective size
    is below a half and progress too."""
    even, uneven = np.log([0.6, 0.2, 0.1, 0.1]), np.log([0.94, 0.03, 0.02, 0.01])
    logw = jnp.asarray(np.stack([even, uneven, uneven]), jnp.float32)
    assert (effective_size(logw) > 2).tolist() == [True, False, False]
    progress_R, open_R = jnp.array([0.25, 0.25, 0.5]), jnp.ones(3, bool)

    def chosen(method, logw=logw, seeds=64):
        keys = jax.random.split(jax.random.key(1), (seeds, 3))
        state, potential = method.init(3, 4)
        held = state._replace(log_weights_P=logw), potential
        choose = lambda keys_R: method.choose(keys_R, held, open_R, progress_R)
        return jax.jit(jax.vmap(choose))(keys)

    published = filter_of("odds", 1.0, 2.0, "systematic", "size", forget=True)
    (after, _), report = chosen(published)
    plain = chosen(filter_of("odds", 1.0, 2.0, "systematic"))[1]
    tau = temperature(logw[1], 0.25)
    tempered = chosen(filter_of("odds", 1.0, 2.0, "systematic"), logw / tau)[1]
    assert bool(report.resampled_R.all()) and bool((after.log_weights_P == 0).all())
    same = lambda one, r: bool((report.ancestors_RP[:, r] == one.ancestors_RP[:, r]).all())
    assert [same(plain, r) for r in range(3)] == [True, False, True]
    assert float(tau) > 1 and same(tempered, 1)
    always = filter_of("odds", 1.0, 2.0, "systematic", "size", forget=True, temper_below=2.0)
    assert not bool((chosen(always)[1].ancestors_RP[:, 0] == plain.ancestors_RP[:, 0]).all())
