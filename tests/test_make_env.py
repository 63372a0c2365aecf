"""scripts/make_env.sh: where no environment can be made, it says why and what to install."""

import os
import subprocess

import pytest

from tests.source_tree import ROOT

# A Python as Debian ships it without python3-venv; {pip}: what `-m pip` does.
FAKE = """#!/bin/sh
case "$*" in
  -c*) exit 0 ;;
  --version) echo "Python 3.12.9" ;;
  "-m venv --clear --without-pip "*) mkdir -p "$5/bin" ;;
  "-m venv "*) echo "ensurepip is not available. apt install python3.12-venv"; exit 1 ;;
  "-m pip "*) {pip} ;;
esac
"""


@pytest.mark.parametrize("pip", ["echo 'No module named pip' >&2; exit 1", "exit 0"])
def test_a_python_without_ensurepip(tmp_path, pip):
    python = tmp_path / "python3.12"
    python.write_text(FAKE.format(pip=pip))
    python.chmod(0o755)
    done = subprocess.run([ROOT / "scripts/make_env.sh", tmp_path / "env"], text=True,
                          capture_output=True, env={**os.environ, "PYTHON": str(python)})
    if pip == "exit 0":
        assert done.returncode == 0 and "ensurepip" not in done.stderr
        return
    assert done.returncode == 1 and not (tmp_path / "env").exists()
    for words in ("ensurepip is not available", "No module named pip", "install python3-venv",
                  "make PYTHON="):
        assert words in done.stderr, done.stderr


def test_a_python_that_is_too_old(tmp_path):
    done = subprocess.run([ROOT / "scripts/make_env.sh", tmp_path / "env"], text=True,
                          capture_output=True, env={**os.environ, "PYTHON": "/bin/false"})
    assert done.returncode == 1 and "needs Python 3.11 or later; tried: /bin/false" in done.stderr
