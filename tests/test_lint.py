"""ruff and mypy have nothing to say; the check of a change runs both (make lint)."""

import importlib.util
import subprocess
import sys

import pytest

from tests.source_tree import ROOT


def complaints(tool: str, *arguments: str) -> str:
    """What a tool prints when it fails; empty when it is content."""
    if importlib.util.find_spec(tool) is None:
        pytest.skip(f"no {tool}: make test installs it")
    done = subprocess.run(
        [sys.executable, "-m", tool, *arguments], cwd=ROOT, capture_output=True, text=True
    )
    return done.stdout + done.stderr if done.returncode else ""


def test_ruff():
    assert not complaints("ruff", "check", "--no-cache", "--quiet", ".")


def test_ruff_notices(tmp_path):
    (tmp_path / "x.py").write_text("import os\n")
    assert "F401" in complaints("ruff", "check", "--no-cache", str(tmp_path))


def test_the_check_of_a_change_type_checks():
    lint = (ROOT / "Makefile").read_text().split("\nlint:")[1].split("\n\n")[0]
    assert "mypy" in lint and "ruff check" in lint
    assert "make lint test" in (ROOT / ".ci" / "run").read_text()


@pytest.mark.slow
def test_mypy():
    assert not complaints("mypy")
