"""The version matrix fails where it tests nothing, and its newest rows are the newest."""

import os
import subprocess
import sys
import tomllib

import pytest

from scripts import test_matrix as matrix
from tests.source_tree import ROOT

PINNED, NEWEST = matrix.Row("old", "3.11", ("jax==0.10.2",)), matrix.Row("new", "3.12")


@pytest.mark.parametrize(("there", "strict", "code"), [
    ((), False, 1), ((), True, 1), (("3.12",), False, 0), (("3.12",), True, 1),
    (("3.11", "3.12"), True, 0)])
def test_a_matrix_without_a_python_fails(monkeypatch, capsys, there, strict, code):
    monkeypatch.setattr(matrix, "ROWS", (PINNED, NEWEST))
    monkeypatch.setattr(matrix, "find_python", lambda version: "x" if version in there else None)
    monkeypatch.setattr(matrix, "prepare", lambda row, python: python)
    monkeypatch.setattr(matrix, "versions", lambda python: "")
    done = subprocess.CompletedProcess([], 0)
    monkeypatch.setattr(matrix.subprocess, "run", lambda *_, **__: done)
    monkeypatch.setattr(sys, "argv", ["test_matrix.py", *["--strict"] * strict])
    assert matrix.main() == code
    assert ("no row ran" in capsys.readouterr().out) is (not there)


def test_rows_without_pins_are_upgraded_each_time(monkeypatch, tmp_path):
    (tmp_path / "pyproject.toml").touch()
    os.utime(tmp_path / "pyproject.toml", (0, 0))
    monkeypatch.setattr(matrix, "ROOT", tmp_path)
    calls = []

    def run(command, **_):
        calls.append([str(word) for word in command])
        for name in ("old", "new"):
            (tmp_path / ".venv-matrix" / name).mkdir(parents=True, exist_ok=True)

    monkeypatch.setattr(matrix.subprocess, "run", run)
    for row in (PINNED, NEWEST):
        calls.clear()
        matrix.prepare(row, "python")
        assert len(calls) == 2 and "make_env.sh" in calls[0][0] and "eager" in calls[1]
        assert calls[1][-len(row.pins):] == list(row.pins) or not row.pins
        calls.clear()
        matrix.prepare(row, "python")
        assert len(calls) == (0 if row.pins else 1) and all("eager" in call for call in calls)


def test_a_row_pins_every_base_dependency_to_its_minimum():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    (row,) = [row for row in matrix.ROWS if row.name.endswith("minimum")]
    assert row.pins == tuple(d.replace(">=", "==") for d in project["dependencies"])
    assert project["requires-python"] == f">={row.python}"


@pytest.mark.parametrize("line", ['  "jax",', '  "jax>=0.7,<1",', "  'jax>=0.7',", None])
def test_a_dependency_without_a_plain_minimum_is_refused(line):
    text = "" if line is None else f"dependencies = [\n{line}\n]\n"
    with pytest.raises(ValueError, match="a dependency a line"):
        matrix.minima(text)
