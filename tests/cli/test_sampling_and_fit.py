"""The sampling options of `generate`, and what `fit` takes for a model and says on stderr."""

import importlib.util
import json
import math
import os
import subprocess
import sys
from functools import partial

import jax
import pytest

import jaxlm
from experiments import twins
from experiments.loopback_hub import Hub
from jaxlm.cache.policy import write_policy
from jaxlm.cli import fit, main
from jaxlm.cli.generate import make_sampler, read_bias
from jaxlm.core.errors import CheckpointError, ConfigError
from jaxlm.core.targets import CARDS, target_like
from jaxlm.decode.samplers import Categorical, Greedy, Mirostat2, bias_array
from jaxlm.models.presets import preset
from tests.source_tree import ROOT

PROMPT, HEAT = "Q:", 4.0
OPEN = """
import sys
from jaxlm.cli.fit import open_config
print(open_config(sys.argv[1]).family)
"""


def process(code, *argv, **variables):
    """Python code in a process of its own."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **variables}
    return subprocess.run([sys.executable, "-c", code, *argv], env=environment, text=True,
                          capture_output=True, timeout=300)


@pytest.mark.parametrize("flags, values", [
    (("--top-k", "3", "--top-p", "0.9"), {"top_k": 3, "top_p": 0.9}),
    (("--min-p", "0.2", "--repetition-penalty", "1.5"), {"min_p": 0.2, "repetition_penalty": 1.5}),
])
def test_sampling_options_are_the_library_s(capsys, flags, values):
    tiny = jaxlm.load("tiny")
    ask = lambda sampler: jaxlm.generate(
        tiny, PROMPT, max_new_tokens=24, sampler=sampler, key=jax.random.key(5)).text
    expected = ask(Categorical(HEAT, **values))
    assert expected != ask(Categorical(HEAT))
    argv = ["generate", "tiny", PROMPT, "--max-new-tokens", "24", "--seed", "5",
            "--temperature", str(HEAT), *flags]
    assert main(argv) == 0 and capsys.readouterr().out == expected + "\n"


def test_a_penalty_acts_without_a_temperature_and_cuts_do_not():
    assert make_sampler(0.0, None, None, None, None) == Greedy()
    cold = make_sampler(0.0, None, None, None, 1.3)
    assert cold.repetition_penalty == 1.3 and cold.temperature == 0.0
    with pytest.raises(ConfigError, match="--top-k, --min-p does nothing at temperature 0"):
        make_sampler(0.0, 3, None, 0.1, None)


@pytest.mark.parametrize("flags, sampler", [
    (("--mirostat", "0.5"), Mirostat2(0.5, temperature=HEAT)),
    (("--logit-bias", "5=-inf", "7=2.5"),
     Categorical(HEAT, logit_bias=bias_array({5: -math.inf, 7: 2.5}, 100))),
], ids=["mirostat", "bias"])
def test_mirostat_and_biases_are_the_library_s(capsys, flags, sampler):
    tiny = jaxlm.load("tiny")
    assert tiny.lm.config.vocab_size == 100
    ask = lambda sampler: jaxlm.generate(
        tiny, PROMPT, max_new_tokens=24, sampler=sampler, key=jax.random.key(5)).text
    assert ask(sampler) != ask(Categorical(HEAT))
    argv = ["generate", "tiny", PROMPT, "--max-new-tokens", "24", "--seed", "5",
            "--temperature", str(HEAT), *flags]
    assert main(argv) == 0 and capsys.readouterr().out == ask(sampler) + "\n"


def test_what_mirostat_and_biases_cannot_be_is_said():
    sampler = partial(make_sampler, top_k=None, top_p=None, min_p=None, repetition_penalty=None)
    with pytest.raises(ConfigError, match="--mirostat does nothing at temperature 0"):
        sampler(0.0, mirostat=3.0)
    with pytest.raises(ConfigError, match="--mirostat makes its own cut and takes no --top-k"):
        sampler(1.0, mirostat=3.0, top_k=4)
    bias = read_bias(["3=-inf"], 5)
    with pytest.raises(ConfigError, match="takes no --logit-bias"):
        sampler(1.0, mirostat=3.0, logit_bias=bias)
    assert isinstance(sampler(0.0, logit_bias=bias), Categorical) and read_bias([], 5) is None
    for pair in ("3", "a=1", "3=", "3=x"):
        with pytest.raises(ConfigError, match="--logit-bias is .* expected ID=VALUE"):
            read_bias([pair], 5)
    with pytest.raises(ConfigError, match="token id of logit_bias is 5"):
        read_bias(["5=1"], 5)


@pytest.mark.parametrize("flag, value", [("--top-k", "0"), ("--top-p", "1.5"), ("--min-p", "-1"),
                                         ("--repetition-penalty", "0")])
def test_values_out_of_range_are_one_line(capsys, flag, value):
    code = main(["generate", "tiny", "x", "--temperature", "1", flag, value])
    error = capsys.readouterr().err
    assert code == 2 and error.count("\n") == 1
    assert flag[2:].replace("-", "_") in error and "expected" in error


def test_a_model_is_a_preset_a_folder_or_the_bundled_one(tmp_path):
    assert fit.open_config("qwen3-0.6b") == preset("qwen3-0.6b")
    folder = twins.write(twins.config_of("gemma2"), tmp_path / "twin")
    assert fit.open_config(str(folder)).family == "gemma2"
    assert fit.open_config("tiny").family == "llama"
    with pytest.raises(ConfigError, match="no preset 'tinny'"):
        fit.open_config("tinny")
    with pytest.raises(CheckpointError, match="neither a folder"):
        fit.open_config("./absent")


def test_of_a_hub_id_the_config_alone_is_fetched(tmp_path):
    folder = twins.write(twins.config_of("qwen2"), tmp_path / "twin")
    with Hub({"org/name": {"main": folder}}) as hub:
        variables = hub.environment(tmp_path / "home")
        done = process(OPEN, "org/name", **variables)
        assert done.stdout == "qwen2\n" and hub.downloads() == ["config.json"], done.stderr
    refused = process("from jaxlm.cli import main; raise SystemExit(main())", "fit", "--model",
                      "org/other", "--target", "v5e:1x1", HF_HUB_OFFLINE="1")
    assert refused.returncode == 2 and refused.stderr.startswith("jaxlm: cannot fetch 'org/other'")
    assert "Without a network" in refused.stderr and "Traceback" not in refused.stderr


def test_of_a_policy_every_layer_s_kind_is_asked_about(tmp_path, monkeypatch, capsys):
    config, asked = fit.open_config("tiny"), {}
    kinds = (jaxlm.Kivi(4, 4), *[jaxlm.Dense()] * (config.num_layers - 1))
    write_policy(tmp_path / "policy.json", config, kinds)

    def ask(*_, **settings):
        asked.update(settings)
        raise ConfigError("asked")

    monkeypatch.setattr(fit, "fit", ask)
    argv = ["fit", "--model", "tiny", "--target", "v5e:1x1", "--cache"]
    assert main([*argv, str(tmp_path / "policy.json")]) == 2 and asked["cache"] == kinds
    assert capsys.readouterr().err.endswith("jaxlm: asked\n")


@pytest.mark.parametrize("argv, expected", [
    (("--job", "train", "--cache", "squat2"), "job 'train' keeps none"),
    (("--form", "factored"), "job 'decode' makes no use"),
    (("--job", "train", "--unfreeze-ratio", "0.25"), "unfreeze_ratio=0.25"),
    (("--context", "65536"), "context is 65536; the model reads at most"),
])
def test_options_that_would_do_nothing_are_refused(capsys, argv, expected):
    assert main(["fit", "--model", "tiny", "--target", "v5e:1x1", *argv]) == 2
    assert expected in capsys.readouterr().err


def test_a_train_cell_of_the_table_names_the_cache_that_it_lacks(monkeypatch):
    """`--cache dense` and `--dtype`, as experiments/fit_table.py says them, ask for nothing."""
    asked = {}

    def ask(config, job, target, **settings):
        asked.update(settings)
        raise ConfigError("asked")

    monkeypatch.setattr(fit, "fit", ask)
    argv = ["fit", "--model", "tiny", "--target", "t4", "--job", "train", "--cache", "dense"]
    assert main([*argv, "--dtype", "float16"]) == 2
    assert asked["cache"] == jaxlm.Dense() and asked["dtype"] == "float16"
    assert asked["tuning"] is None and asked["context"] is None


@pytest.mark.parametrize("kind, name", [
    ("TPU v5 lite", "v5e:1x1"), ("TPU v5e", "v5e:1x1"), ("TPU v5", "v5p:1x1"),
    ("TPU v5p", "v5p:1x1"), ("TPU v6 lite", "v6e:1x1"), ("TPU v4", "v4:1x1"), ("Tesla T4", "t4"),
    ("NVIDIA H200", "h200"), ("NVIDIA RTX 4090", None), ("cpu", None),
    *((card.title, name) for name, card in CARDS.items()),
])
def test_the_chip_at_hand_has_a_target(kind, name):
    assert target_like(kind) == name


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="no libtpu")
def test_the_compiler_says_nothing_of_its_own(tmp_path):
    folder = twins.write(twins.config_of("llama"), tmp_path / "twin")
    argv = ("--model", str(folder), "--target", "v5e:1x1", "--context", "128", "--json")
    kept = {name: os.environ[name] for name in os.environ if not name.startswith("TPU_")}
    done = subprocess.run(
        [sys.executable, "-m", "jaxlm", "fit", *argv], text=True, capture_output=True,
        timeout=300, env=kept | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"},
    )
    assert json.loads(done.stdout)["fits"]
    assert done.stderr == "compiling decode for v5e:1x1 ...\n"
