"""`jaxlm train`: its file, its overrides, its refusals; whole runs are in tests/train."""

import dataclasses
import json

import pytest

from jaxlm.cli import main
from jaxlm.cli import train as command
from jaxlm.train import Config, Data, Ewc, Lora, MeshSizes, Optimizer, Osft
from jaxlm.train.config import TUNINGS
from jaxlm.train.stopping import Stopped
from tests.source_tree import ROOT
from tests.train.small import sums


def test_a_run_by_its_file_with_settings_overridden(tiny_folder, tmp_path, capsys):
    train = sums(tmp_path / "train.jsonl", 16)
    (tmp_path / "c.yaml").write_text(
        f"model: {tiny_folder}\nout: {tmp_path}/out\nsteps: 50\nbatch: 4\n"
        f"data: {{train: [{train}], eval: [{train}], window: 24}}\ntuning: {{kind: lora}}\n")
    assert main(["train", f"{tmp_path}/c.yaml", "--steps", "2", "--optimizer.rate", "1e-3",
                 "--tuning.rank", "2", "--data.window", "25"]) == 0
    out, said = capsys.readouterr()
    assert "step 2 of 2, done: 16 samples (" in said and "0 cut" in said and "perplexity" in out
    assert "{" not in said
    rows = [json.loads(line) for line in (tmp_path / "out" / "log.jsonl").open()]
    assert [row["step"] for row in rows] == [1, 2, 2]
    assert (tmp_path / "out" / "model" / "model.safetensors").exists()


@pytest.mark.parametrize(("text", "said"), [
    (None, "cannot read"), ("modle: tiny", "did you mean 'model'"),
    ("steps: 3", "data.train names no file"),
])
def test_a_refusal_is_one_line_and_code_2(tmp_path, capsys, text, said):
    if text is not None:
        (tmp_path / "c.yaml").write_text(text)
    assert main(["train", f"{tmp_path}/c.yaml", "--out", f"{tmp_path}/out"]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and said in err


@pytest.mark.parametrize("kind", sorted(TUNINGS))
def test_every_option_has_a_word(kind):
    """Help is read from the docstrings, a field's own or that of the class it comes from."""
    from docstring_parser import parse

    for config in (Config, Data, Optimizer, MeshSizes, TUNINGS[kind]):
        said = {p.arg_name for base in config.__mro__ if base is not object
                for p in parse(base.__doc__ or "").params if p.description}
        assert not [f.name for f in dataclasses.fields(config) if f.name not in said], config


def test_a_way_of_tuning_is_an_option_and_so_are_its_fields(tmp_path, capsys, monkeypatch):
    seen = []
    monkeypatch.setattr(command, "train", lambda config: seen.append(config) or stop())
    (tmp_path / "c.yaml").write_text("tuning: {kind: lora, rank: 4}\nsteps: 3\n")
    asked = lambda *options: main(["train", f"{tmp_path}/c.yaml", *options])
    for options in ((), ("--tuning.kind", "lora", "--tuning.alpha", "3"),
                    ("--tuning.kind=osft", "--tuning.unfreeze-ratio", "0.25", "--steps", "5"),
                    ("--tuning.kind", "ewc", "--tuning.decay", "0.5")):
        assert asked(*options) == 75
    assert [config.tuning for config in seen] == [
        Lora(rank=4), Lora(rank=4, alpha=3.0), Osft(unfreeze_ratio=0.25), Ewc(decay=0.5)]
    assert seen[2].steps == 5 and "the same command goes on" in capsys.readouterr().err
    assert asked("--tuning.kind", "osfd") == 2
    assert "did you mean 'osft'" in capsys.readouterr().err
    with pytest.raises(SystemExit) as left:
        main(["train", "--tuning.kind", "osft", "--help"])
    said = capsys.readouterr().out
    assert left.value.code == 0 and "--tuning.unfreeze-ratio" in said and "--tuning.kind" in said


def stop():
    raise Stopped("the same command goes on")


@pytest.mark.parametrize(("words", "wanted"), [
    ((), ()), (("host:1", "2", "1"), ("host:1", 2, 1))], ids=["found", "named"])
def test_processes_meet_before_the_run(tmp_path, monkeypatch, words, wanted):
    calls = []
    monkeypatch.setattr(command.jax.distributed, "initialize", lambda *where: calls.append(where))
    monkeypatch.setattr(command, "train", lambda config: calls.append(config.steps) or stop())
    (tmp_path / "c.yaml").write_text("steps: 3\n")
    assert main(["train", f"{tmp_path}/c.yaml", "--distributed", *words, "--steps", "5"]) == 75
    assert calls == [wanted, 5]


@pytest.mark.parametrize(("words", "said"), [
    (("host:1",), "expected nothing behind it, or HOST:PORT PROCESSES PROCESS"),
    (("host:1", "two", "0"), "is 'host:1 two 0'"), ((), "no coordinator; on a TPU pod")])
def test_processes_that_cannot_meet_are_code_2(tmp_path, monkeypatch, capsys, words, said):
    def alone(*where):
        raise ValueError("no coordinator")

    monkeypatch.setattr(command.jax.distributed, "initialize", alone)
    monkeypatch.setattr(command, "train", lambda config: pytest.fail("ran alone"))
    (tmp_path / "c.yaml").write_text("steps: 3\n")
    assert main(["train", f"{tmp_path}/c.yaml", "--distributed", *words]) == 2
    assert said in capsys.readouterr().err


def test_without_a_config_it_says_what_it_wants(capsys):
    assert main(["train"]) == 2
    assert "jaxlm train CONFIG.yaml" in capsys.readouterr().err


@pytest.mark.slow
def test_a_run_that_diverges_is_code_3(tiny_folder, tmp_path, capsys):
    train = sums(tmp_path / "train.jsonl", 16)
    (tmp_path / "c.yaml").write_text(
        f"model: {tiny_folder}\nout: {tmp_path}/out\nsteps: 50\nbatch: 4\n"
        f"data: {{train: [{train}], window: 24}}\n"
        "optimizer: {kind: sgd, rate: 1e30, clip: 0}\n")
    assert main(["train", f"{tmp_path}/c.yaml"]) == 3
    assert "loss" in capsys.readouterr().err


@pytest.mark.slow
def test_the_documented_config_runs_for_two_steps(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    assert main(["train", "docs/configs/reverse.yaml", "--steps", "2", "--out", f"{tmp_path}/out",
                 "--checkpoint-every", "0"]) == 0
    assert "step 2 of 2, done" in capsys.readouterr().err
