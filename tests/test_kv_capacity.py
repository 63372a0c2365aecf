"""How kv_capacity reckons and whom it asks; the compiling is the script's own."""

import argparse
import json
import sys
from pathlib import Path

import pytest

from experiments import kv_capacity
from jaxlm.models.lm import LM, count_params
from jaxlm.models.presets import preset


def test_arguments_are_bilinear_and_temporaries_go_on_from_the_largest_program():
    held = lambda layers, rows: 100 + 20 * layers + 3 * rows + 5 * layers * rows
    loose = {(2, 8): 50, (4, 8): 50, (2, 16): 70, (4, 16): 82}
    corners = {at: {"total": held(*at) + extra, "temporaries": extra}
               for at, extra in loose.items()}
    for layers, rows in ((2, 8), (4, 16), (32, 16), (32, 100)):
        more = (82 - 50) / 8 * (rows - 16) + (82 - 70) / 2 * (layers - 4)
        assert kv_capacity.predicted(corners, layers, rows) == pytest.approx(
            held(layers, rows) + max(82 + more, 0))


def test_weights_and_a_row_are_the_least_and_too_much_is_not_compiled():
    model = "llama-3.1-8b"
    least = kv_capacity.least(model, "h100", 4096, "dense")
    weights = 2 * count_params(LM(preset(model)))
    assert least == pytest.approx(weights + 32 * 2 * 4096 * 8 * 128 * 2, rel=1e-3)
    assert weights < kv_capacity.least(model, "t4", 4096, "squat2") < least


def test_a_cell_that_cannot_fit_is_none(monkeypatch):
    small = argparse.Namespace(bytes_per_device=16 * 2**30, devices=(0,))
    monkeypatch.setattr(kv_capacity, "open_target", lambda name: small)
    cell = kv_capacity.largest("llama-3.1-8b", "v5e:1x1", 16384, "squat2", True, None)
    assert cell["batch"] == cell["compiled"] == 0 and cell["bytes"] > cell["usable"]


def test_cards_are_asked_of_their_own_python(monkeypatch, tmp_path):
    asked = []

    def answer(command, env, check):
        asked.append(command)
        made = {"metrics": {"rows": [1], "paper_setting": [2], "fraction": 3}}
        Path(command[-1]).write_text(json.dumps(made))

    monkeypatch.setattr(kv_capacity.subprocess, "run", answer)
    other = tmp_path / "bin" / "python"
    assert not kv_capacity.another_python(other)
    other.parent.mkdir()
    other.touch()
    assert kv_capacity.another_python(other)
    assert not kv_capacity.another_python(Path(sys.prefix, "bin", "python"))
    args = argparse.Namespace(
        targets=["v5e:1x1", "t4", "h100:2"], models=["m"], contexts=[1024], kinds=["bf16"],
        whole=[], parts=tmp_path / "a.cells", gpu_python=other, stored=False)
    assert kv_capacity.of_cards(args)["paper_setting"] == [2]
    (command,) = asked
    text = " ".join(map(str, command))
    assert text.startswith(f"{other} {kv_capacity.__file__} --targets t4 h100:2 --models m ")
    assert f"--whole --parts {tmp_path}/a.cards.cells --out" in text


def test_of_stored_compilations_alone_a_cell_that_lacks_one_is_left_out(monkeypatch, tmp_path):
    chip = argparse.Namespace(bytes_per_device=80 * 2**30, devices=(0,))
    monkeypatch.setattr(kv_capacity, "open_target", lambda name: chip)
    kept = kv_capacity.Stored(tmp_path / "x.cells", {})
    args = argparse.Namespace(models=["llama-3.1-8b"], contexts=[4096], kinds=["bf16"], whole=[])
    (cell,) = kv_capacity.table(args, kept, ["h100"])
    assert "not compiled" in cell["left_out"] and "batch" not in cell
