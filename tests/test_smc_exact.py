"""The enumerated kernels of `experiments/smc_exact.py` against what they must satisfy exactly."""

import numpy as np
import pytest

from experiments import smc_exact, smc_kernels
from experiments.smc_chains import CHAINS, lengths
from experiments.smc_kernels import kernel_row, padded


@pytest.mark.parametrize("name", CHAINS)
def test_probabilities_of_all_texts_sum_to_one(name):
    chain = CHAINS[name]
    assert np.isclose(sum(map(chain.probability, chain.texts())), 1.0)
    assert np.isclose(sum(chain.law().values()), 1.0)


@pytest.mark.parametrize("name", smc_kernels.CHAINS)
@pytest.mark.parametrize("ancestors", [False, True])
def test_the_exact_kernel_leaves_the_target_alone(name, ancestors):
    chain = smc_kernels.CHAINS[name]
    law = dict(zip(padded(chain), [chain.law()[text] for text in chain.texts()], strict=True))
    after = dict.fromkeys(law, 0.0)
    for reference, p in law.items():
        row = kernel_row(chain, reference, ancestors)
        assert np.isclose(sum(row.values()), 1.0)
        for path, q in row.items():
            after[path] += p * q
    np.testing.assert_allclose(list(after.values()), list(law.values()), atol=1e-12)


def test_the_published_rule_prefers_short_texts():
    chain = CHAINS["texts"]
    assert abs(lengths(chain.law(), 5)[1] - 0.25) < 0.01
    assert lengths(chain.law(reweigh_ended=True), 5)[1] > 0.95


def drawn(name, law, draws, rng):
    """The distance of exact draws from a law of texts, by way of the texts."""
    texts, cells = list(law), lambda found: smc_exact.cells(CHAINS[name], found)
    picked = rng.choice(len(texts), draws, p=np.array(list(law.values())))
    found = {texts[i]: n / draws for i, n in enumerate(np.bincount(picked, minlength=len(texts)))}
    return smc_exact.distance(cells(found), cells(law))


def test_the_largest_distance_of_exact_draws_is_below_its_bound():
    names, draws, rng = ["texts"] * 4 + ["letters"] * 4, 200, np.random.default_rng(0)
    floor = {name: smc_exact.distances(CHAINS[name], draws, 1, 4000).mean() for name in set(names)}
    laws = {name: CHAINS[name].law() for name in floor}
    ratios = np.array([[drawn(name, laws[name], draws, rng) / floor[name] for name in names]
                       for _ in range(300)])
    assert abs(ratios.mean() - 1) < 4 * ratios.std() / np.sqrt(ratios.size)
    bound = smc_exact.largest(names, draws, 2)
    assert (ratios.max(1) > bound).sum() <= 10  # 3 of 300 on average
    assert (ratios.max(1) > 0.7 * bound).sum() > 10


def test_the_bound_is_bonferroni_s():
    assert abs(smc_exact.bound(1) - 2.5758) < 1e-3 and smc_exact.bound(100) > smc_exact.bound(10)
