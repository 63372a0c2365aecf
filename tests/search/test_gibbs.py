"""Particle Gibbs and tempering over text: the law by enumeration; wrong kernels are refused."""

from collections import Counter

import jax
import numpy as np
import pytest

from jaxlm.core.errors import ConfigError
from jaxlm.decode.samplers import Mirostat2
from jaxlm.rewards.call import TextReward
from jaxlm.search import gibbs, methods
from jaxlm.search.gibbs import particle_gibbs
from jaxlm.search.methods import METHODS, Request
from jaxlm.search.particles import particle_filter
from tests.search.toy import PROMPT, REWARD, SAMPLER, STEPS, bundle, exact, log_potential

CHAINS, SWEEPS = 384, 6


def run(chains=CHAINS, **options):
    options = {"particles": 4, "sweeps": SWEEPS, "steps": STEPS, "sampler": SAMPLER, **options}
    return particle_gibbs(bundle(), [PROMPT] * chains, REWARD, key=jax.random.key(5), **options)


def worst(chains, law):
    """The largest |z| of the last reference's frequencies over independent chains.

    Texts that are too rare for a z score are counted together.
    """
    found = Counter(chain.references[-1].tokens for chain in chains)
    common = [text for text, p in law.items() if p * len(chains) > 5]
    rare = 1 - sum(law[text] for text in common)
    p = np.array([*(law[text] for text in common), rare])
    n = np.array([found[text] for text in common])
    n = np.append(n, len(chains) - n.sum()) / len(chains)
    return np.abs((n - p) / np.sqrt(p * (1 - p) / len(chains))).max()


def test_the_chain_s_law_is_the_target_s():
    chains = run()
    law = exact(bundle())[1]
    assert worst(chains, law) < 4
    for other in (2.0, 0.0):  # powers of the weights
        assert worst(chains, exact(bundle(), other)[1]) > 10
    moved = np.mean([a.tokens != b.tokens for c in chains
                     for a, b in zip(c.references[1:], c.references[2:], strict=False)])
    assert 0.2 < moved < 1.0
    for answer in chains[0].references:
        assert abs(sum(np.log(s / (1 - s)) for s in answer.step_scores)
                   - log_potential(answer.tokens)) < 1e-4


def test_the_first_sweep_is_the_plain_filter():
    """There is no reference yet: row 0 may be lost, with all that comes from it."""
    chains = run(8, sweeps=1)
    keys = jax.vmap(lambda key: jax.random.fold_in(jax.random.split(key, 1)[0], 0))(
        jax.random.split(jax.random.key(5), 8))
    plain = particle_filter(bundle(), [PROMPT] * 8, REWARD, particles=4, steps=STEPS, key=keys,
                            sampler=SAMPLER, scheme="multinomial", threshold=2.0)
    for chain, result in zip(chains, plain, strict=True):
        assert [a.tokens for a in chain.last.answers] == [a.tokens for a in result.answers]
        np.testing.assert_array_equal(chain.last.ancestors, result.ancestors)
        np.testing.assert_allclose(chain.last.log_evidence, result.log_evidence, rtol=1e-5)
    assert any((step != 0).all() for chain in chains for step in chain.last.ancestors[1:])
    second = run(8, sweeps=2)
    assert all((chain.last.ancestors[:, 0] == 0).all() for chain in second)


def test_a_chain_whose_reward_fails_ends_there_and_others_go_on():
    """Its references so far stay; the other's are those of a run in which nothing failed."""
    def reward(bad):
        calls = []

        def scores(prompts, texts):
            calls.append(texts)
            if bad in prompts and len(calls) > 3:  # in the second sweep
                raise RuntimeError("out of order")
            return [0.2 + 0.1 * (len(text) % 7) for text in texts]

        return TextReward(scores, retries=0, wait_s=0)

    prompts, names = [PROMPT, [1]], [bundle().tokenizer.decode([1]), None]
    with pytest.warns(UserWarning, match="out of order"):
        chains = [particle_gibbs(bundle(), prompts, reward(name), particles=4, sweeps=3,
                                 steps=STEPS, sampler=SAMPLER, key=jax.random.key(5))
                  for name in names]
    (good, lost), (same, whole) = chains
    assert [a.tokens for a in good.references] == [a.tokens for a in same.references]
    assert good.last.failed is None and len(good.references) == 3
    assert lost.last.failed == "RuntimeError: out of order" and lost.last.flags == ("failed",)
    kept = [a.tokens for a in lost.references]
    assert 1 <= len(kept) < 3 and kept == [a.tokens for a in whole.references][: len(kept)]


@pytest.mark.slow
def test_tempered_chains_swap_and_keep_the_first_one_s_law():
    chains = run(temperatures=(1.0, 3.0), sweeps=8)
    assert worst(chains, exact(bundle())[1]) < 4
    assert 0.1 < np.mean([chain.swapped for chain in chains]) < 1.0
    hot = run(temperatures=(3.0, 1.0), sweeps=8)
    assert worst(hot, exact(bundle(), 1 / 3)[1]) < 4
    assert worst(hot, exact(bundle())[1]) > 6  # of exact draws: 9.3 in the median, rarely below 6.4


def test_the_answer_is_the_best_of_all_sweeps_and_chains(monkeypatch):
    """A budget of 16 in 2 sweeps of 2 chains: all 16, and not 4, are chosen from."""
    kept = []
    monkeypatch.setattr(methods, "particle_gibbs", lambda *args, **options: kept.extend(
        particle_gibbs(*args, **options)) or kept)
    wanted = Request(bundle(), REWARD, 16, steps=STEPS, temperature=1.0, extract=lambda text: text)
    keys = jax.random.split(jax.random.key(0), 16)
    found = METHODS["parallel-tempering"].run(wanted, [PROMPT] * 16, keys)
    best = lambda results: max(a.score for one in results for a in one.answers)
    for one, chain in zip(found, kept, strict=True):
        assert [len(part.answers) for part in chain.sets] == [4] * 4
        assert chain.last.answers == chain.sets[2].answers and one.score == best(chain.sets)
    assert any(best([chain.last]) < best(chain.sets) for chain in kept)


def test_bad_calls_are_named():
    with pytest.raises(ConfigError, match="at least 2"):
        run(1, particles=1)
    with pytest.raises(ConfigError, match="Mirostat2 keeps a state"):
        run(1, sampler=Mirostat2())
    with pytest.raises(ConfigError, match="temperatures"):
        run(1, temperatures=(1.0, 0.0))


def test_every_token_of_every_sweep_of_every_chain_is_counted(monkeypatch):
    drawn, readable = [], gibbs.readable

    def noted(pop):
        drawn.append(np.asarray(pop.drawn_R).tolist())
        return readable(pop)

    monkeypatch.setattr(gibbs, "readable", noted)
    wanted = Request(bundle(), REWARD, 8, steps=STEPS, temperature=1.0)
    found = METHODS["parallel-tempering"].run(wanted, [PROMPT, [1]], jax.random.split(
        jax.random.key(3)))
    assert np.shape(drawn) == (2, 4)  # sweeps; two chains a prompt
    assert [one.tokens for one in found] == np.sum(drawn, 0).reshape(2, 2).sum(1).tolist()
    assert found[0].tokens != 4 * drawn[1][0]  # the first chain's last sweep is not all alike
