"""The particle filter over text against enumeration, and a wrong rule refused."""

from collections import Counter

import jax
import numpy as np
import pytest

from jaxlm.search.particles import particle_filter
from jaxlm.smc.weights import normalise
from tests.search.toy import PROMPT, REWARD, SAMPLER, STEPS, bundle, exact, model_law, z_score

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
        {"temper": "size", "threshold": 2.0, "early": 0.9}])], ids=str)
def test_the_evidence_is_unbiased_and_the_law_right(options):
    results = run(**options)
    total, law = exact(bundle())
    assert abs(z_score([r.log_evidence for r in results], total)) < 3.5
    floor = np.random.default_rng(0).multinomial(SEEDS * PARTICLES, list(law.values()))
    floor = 0.5 * np.abs(floor / floor.sum() - list(law.values())).sum()
    assert distance(law_of(results), law) < 3 * floor


def test_its_hub_s_rule_is_refused_by_the_same_test():
    results = run(compat="its_hub")
    assert abs(z_score([r.log_evidence for r in results], exact(bundle())[0])) > 10
