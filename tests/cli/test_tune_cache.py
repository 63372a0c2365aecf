"""tune-cache: the policy it writes keeps to the budget; what cannot be tuned is refused at once."""

import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxlm
from jaxlm.cache.parse import parse_cache
from jaxlm.cache.policy import read_policy
from jaxlm.cli import main
from jaxlm.core.errors import ConfigError
from jaxlm.decode.state import layer_kinds
from jaxlm.eval import recall
from jaxlm.hf.bundle import BUNDLED

TEXT = recall.sample(np.random.default_rng(0), 100, 2).text
QUICK = ("--candidates", "kivi2", "dense", "--slots", "2048", "--points", "2")


@pytest.fixture
def text(tmp_path):
    if not (BUNDLED["tiny"] / "model.safetensors").exists():
        pytest.skip(f"the bundled model is not here: no weights in {BUNDLED['tiny']}")
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return path


def test_the_policy_keeps_to_the_budget_and_is_read_back(capsys, monkeypatch, text, tmp_path):
    """With the measuring itself in numbers of the test's own: tests/eval holds the real one."""
    dense = lambda kinds: sum(isinstance(kind, jaxlm.Dense) for kind in kinds)
    monkeypatch.setattr("jaxlm.eval.tune_cache.sensitivity", lambda lm, params, tokens, kind: (
        np.linspace(1, 2, lm.config.num_layers) * (1 - dense([kind]))))
    monkeypatch.setattr("jaxlm.eval.tune_cache.logprobs", lambda lm, params, tokens, kinds: (
        jax.nn.log_softmax(jnp.array([[[0.0, dense(kinds)]]]))))
    out = tmp_path / "policy.json"
    argv = ("tune-cache", "tiny", str(text), "--out", str(out), *QUICK, "--budget", "0.7")
    assert main(argv) == 0
    table, said = capsys.readouterr()
    found = json.loads(out.read_text())["found"]
    assert f"wrote {out}: {found['bytes_share']:.3f}" in said
    kinds = read_policy(out, jaxlm.load("tiny").lm.config)
    assert {type(kind).__name__ for kind in kinds} == {"Kivi", "Dense"}  # a mix, not an end
    head, *rows = (re.split(r"\s{2,}", line.strip()) for line in table.splitlines())
    assert head == ["share of bytes", "divergence", "error", "layers"] and len(rows) == 2
    shares = [float(row[0]) for row in rows]
    step = 1 / len(kinds)  # one layer more in full precision would not fit
    assert shares[0] < shares[1] <= 0.7 < shares[1] + step
    assert found["divergence"] == pytest.approx(min(float(row[1]) for row in rows), abs=1e-4)
    assert found["bytes_share"] == pytest.approx(shares[1], abs=1e-4)


def test_the_command_as_it_is_on_a_tiny_random_model(capsys, bundle, tiny_folder, tmp_path):
    """Nothing replaced: measured, written, and read back by the model it was measured on."""
    kinds = ("kivi2:group=8,window=8", "dense")
    text, out = tmp_path / "text.txt", tmp_path / "policy.json"
    text.write_text("The quick brown fox jumps over it. " * 2)
    assert main(["tune-cache", str(tiny_folder), str(text), "--out", str(out), "--tokens", "48",
                 "--slots", "256", "--points", "2", "--budget", "1",
                 "--candidates", *kinds]) == 0
    table, _ = capsys.readouterr()
    rows = [re.split(r"\s{2,}", line.strip()) for line in table.splitlines()[1:]]
    assert [row[3] for row in rows] == [f"{kind} x 2" for kind in kinds]
    numbers = np.array([row[:3] for row in rows], float)
    assert (numbers[0, 1:] > numbers[1, 1:] + 1e-3).all() and numbers[1, 0] == 1
    policy = json.loads(out.read_text())
    assert policy["name"] == str(tiny_folder) and len(policy["weights"]) == 2
    assert layer_kinds(bundle.lm, str(out), bundle.params) == (parse_cache(kinds[1]),) * 2
    other = jax.tree.map(lambda x: x + 0.1, bundle.params)
    with pytest.raises(ConfigError, match="other weights"):
        layer_kinds(bundle.lm, str(out), other)


@pytest.mark.parametrize("flags, tokens, message", [
    (("--budget", "0.05"), 100, "the cheapest mix takes 0.*budget is 0.05; raise it"),
    (("--budget", "nan"), 100, "budget is nan"),
    ((), 79, "the text has 79 tokens; kivi2 codes none of its first half: expected at least 80")])
def test_what_cannot_be_tuned_is_refused_before_measuring(capsys, monkeypatch, text, flags, tokens,
                                                          message):
    monkeypatch.setattr("jaxlm.eval.tune_cache.sensitivity", None)
    argv = ("tune-cache", "tiny", str(text), *QUICK, *flags, "--tokens", str(tokens),
            "--out", str(text.parent / "policy.json"))
    assert main(argv) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("jaxlm: ") and re.search(message, err)
    assert not (text.parent / "policy.json").exists()
