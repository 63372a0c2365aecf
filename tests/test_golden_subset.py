"""The committed reference numbers are small, and agree with an independent numpy model."""

import json

import numpy as np

from tests import numpy_llama


def test_at_most_two_megabytes(golden_subset):
    size = sum(path.stat().st_size for path in golden_subset.rglob("*") if path.is_file())
    assert size <= 2 * 2**20


def test_random_llama_agrees_with_the_equations(golden_subset):
    folder = golden_subset / "random_llama"
    config, weights = numpy_llama.load(folder)
    expected = np.load(folder / "expected.npz")
    for row in range(3):
        prompt, greedy = expected[f"prompt_{row}"], expected[f"greedy_{row}"]
        np.testing.assert_allclose(
            numpy_llama.logits(config, weights, prompt), expected[f"logits_{row}"], atol=1e-4
        )
        whole = np.concatenate([prompt, greedy])
        best = numpy_llama.logits(config, weights, whole).argmax(-1)
        assert (best[len(prompt) - 1 : -1] == greedy).all()


def test_the_oracle_notices_a_wrong_equation(golden_subset):
    folder = golden_subset / "random_llama"
    config, weights = numpy_llama.load(folder)
    expected = np.load(folder / "expected.npz")
    config["rope_parameters"] = {"rope_theta": 500.0}
    found = numpy_llama.logits(config, weights, expected["prompt_1"])
    assert np.abs(found - expected["logits_1"]).max() > 0.01


def test_real_models_agree_with_the_equations(golden_subset, models_dir):
    for name, golden in json.loads((golden_subset / "models.json").read_text()).items():
        config, weights = numpy_llama.load(models_dir / name)
        ids = np.array(golden["prompt_ids"] + golden["greedy_ids"])
        logits = numpy_llama.logits(config, weights, ids)
        first = len(golden["prompt_ids"]) - 1
        assert logits.argmax(-1)[first:-1].tolist() == golden["greedy_ids"]
        shifted = logits - logits.max(-1, keepdims=True)
        log_p = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
        loss = -log_p[np.arange(len(ids) - 1), ids[1:]].mean()
        assert abs(loss - golden["mean_loss_of_both"]) < 1e-4


def test_squat_subset_is_that_of_the_full_vectors(golden_subset, goldens_dir):
    for name in ("squat_keys.npz", "squat_attention.npz"):
        part, full = np.load(golden_subset / name), np.load(goldens_dir / name)
        assert part.files and all((part[key] == full[key]).all() for key in part.files)
