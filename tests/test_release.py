"""What a release needs beside the tests: the site builds strictly, and the wheel works elsewhere.

The same commands as `make docs` and `make check-wheel`.
"""

import importlib.metadata
import subprocess
import sys

import pytest

from tests.source_tree import ROOT

MAKEFILE = (ROOT / "Makefile").read_text()


def python(*arguments, **options):
    """A Python command of this environment in the checkout; its exit code and what it printed."""
    done = subprocess.run([sys.executable, *map(str, arguments)], cwd=ROOT, text=True,
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT, **options)
    return done.returncode, done.stdout


def needs(*tools):
    """Skip where a tool is not installed."""
    there = {found.name for found in importlib.metadata.distributions()}
    absent = [name for name in tools if name not in there]
    if absent:
        pytest.skip(f"not installed: {', '.join(absent)}; make test-all installs them")


@pytest.mark.slow
def test_the_site_builds_strictly(tmp_path):
    needs("mkdocs", "mkdocs-material", "mkdocstrings")
    assert "mkdocs build --strict" in MAKEFILE
    code, said = python("-m", "mkdocs", "build", "--strict", "--site-dir", tmp_path / "site")
    assert code == 0, said[-4000:]
    assert (tmp_path / "site" / "index.html").exists()


@pytest.mark.slow
def test_wheel_and_sdist_work_outside_the_checkout(tmp_path):
    needs("build", "pip")
    assert "scripts/check_wheel.py dist" in MAKEFILE and "-m build --outdir dist" in MAKEFILE
    code, said = python("-m", "pip", "install", "--dry-run", "--no-deps", "--ignore-installed",
                        "--target", tmp_path / "none", "hatchling", timeout=300)
    if code:
        pytest.skip(f"pip finds nothing to install from: {said.strip().splitlines()[-1]}")
    code, said = python("-m", "build", "--outdir", tmp_path / "dist")
    assert code == 0, said[-4000:]
    code, said = python("scripts/check_wheel.py", tmp_path / "dist")
    assert code == 0, said[-4000:]


def test_what_they_need_is_installed_by_make_test_all():
    stamp = MAKEFILE.split("\n$(VENV)/.all:")[1].split("\n\n")[0]
    assert "docs" in stamp and " build" in stamp
