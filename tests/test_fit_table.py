"""The page of what fits holds the committed table, and a table says what is missing."""

import argparse
import json

import pytest

from experiments import _harness, fit_table

CELL = {"total_bytes": 2**30, "parameter_bytes_all": 2**29, "device_bytes": 2**34, "fits": True,
        "refused": None, "flops": 2e9, "flops_source": "compiler", "bytes_accessed": 2**31,
        "compile_seconds": 3.2, "cpu_seconds": 5.0, "load": 1.0}


def test_the_page_is_up_to_date():
    page = fit_table.DOCS.read_text()
    result = _harness.RESULTS / "fit_table" / "cpu.json"
    fresh = fit_table.rewritten(page, result)
    assert fresh == page, "run python experiments/fit_table.py --docs"


def test_a_line_for_every_cell(tmp_path):
    cells = {"m decode dense v5e:1x1": CELL,
             "m decode dense v6e:1x1": CELL | {"fits": False, "refused": "too large",
                                                 "flops_source": "before optimisation"},
             "m decode dense t4": {"not_compiled": "no CUDA compiler here: x"},
             "m decode dense a100": {"not_compiled": "it broke"}}
    metrics = fit_table.summary(cells)
    counts = [metrics[name] for name in ("compiled", "fit", "without_compiler", "failed")]
    assert counts == [2, 1, 1, 1]
    path = tmp_path / "cpu.json"
    path.write_text(json.dumps({"metrics": metrics}))
    page = f"a\n{fit_table.BEGIN}\nstale\n{fit_table.END}\nb\n"
    fresh = fit_table.rewritten(page, path)
    assert "stale" not in fresh and fit_table.rewritten(fresh, path) == fresh
    start = "| m | decode | dense | v5e:1x1 | "
    assert start + "1.0 of 16.0 GiB | yes | 2 | 2.0 GiB | 3 s | 5 s | 1 |" in fresh
    assert "| 1.0 of 16.0 GiB | **no** | 2* | 2.0* GiB | 3 s | 5 s | 1 |" in fresh
    assert "no CUDA compiler here" in fresh and "it broke" in fresh
    for part in fit_table.overview(metrics), fit_table.table(metrics):
        widths = {line.count("|") for line in part.splitlines() if line.startswith("|")}
        assert len(widths) == 1
    with pytest.raises(ValueError, match="once each"):
        fit_table.rewritten("no marks", path)


def test_the_overview_says_what_fits_and_which_chips_fit_nothing():
    no = CELL | {"total_bytes": 2**35, "fits": False}
    made = fit_table.overview({"cells": {
        "m decode dense v5e:1x1": no, "m decode squat2 v5e:1x1": no, "m decode dense t4": CELL,
        "m decode squat2 t4": {"not_compiled": "it broke"}, "small decode dense v5e:1x1": CELL}})
    assert "| model | job | cache | v5e:1x1 (16.0) | t4 (16.0) |" in made
    assert "| m | decode | dense | **no**: 32.0 (200%) | 1.0 (6%) |" in made
    assert "| m | decode | squat2 | **no**: 32.0 (200%) |  |" in made
    assert "- m: weights of 16 bits alone are 0.5 GiB. No job here fits **v5e:1x1** (16.0" in made
    assert "- small: weights of 16 bits alone are 0.5 GiB. Every chip here fits some job." in made


def test_a_stopped_run_goes_on_and_what_failed_is_tried_again(tmp_path, monkeypatch):
    tried = []

    def compile_cell(cell, gpu_python):
        tried.append(cell[3])
        if cell[3] == "t4":
            raise fit_table.NotCompiled("no CUDA compiler here")
        return CELL

    monkeypatch.setattr(fit_table, "compile_cell", compile_cell)
    args = argparse.Namespace(models=["m"], targets=["v5e:1x1", "t4"], jobs=["train"], caches=None,
                              gpu_python=tmp_path)
    for _ in range(2):
        parts = _harness.Resumable(tmp_path / "x.cells", {"jax": "1"})
        found = fit_table.all_cells(args, parts)
        assert found["m train dense v5e:1x1"] == CELL
        assert found["m train dense t4"] == {"not_compiled": "no CUDA compiler here"}
    assert tried == ["v5e:1x1", "t4", "t4"]
