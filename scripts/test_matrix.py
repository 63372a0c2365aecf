#!/usr/bin/env python3
"""Run the quick tests on every supported set of versions: make test-matrix.

Each row has its own environment under .venv-matrix, made once; one without pins is upgraded
each time. Pythons are looked for on the PATH and under pyenv; a row whose Python is absent is
skipped, loudly. With --strict that is a failure; without, only when no row ran.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Row:
    """A Python, and the versions that it gets instead of the newest ones."""

    name: str
    python: str
    pins: tuple[str, ...] = ()


def minima(project: str) -> tuple[str, ...]:
    """The base dependencies of a pyproject.toml, each at the lowest version that it allows.

    >>> minima('dependencies = [\\n  "jax>=0.7.2",  # why\\n  "numpy>=2.0",  # why\\n]\\n')
    ('jax==0.7.2', 'numpy==2.0')
    """
    block = re.search(r"^dependencies = \[\n(.*?)^\]", project, re.S | re.M)
    lines = block[1].splitlines() if block else []
    found = [re.match(r'  "([\w.-]+)>=([\w.]+)",', line) for line in lines]
    if not found or not all(found):
        raise ValueError('pyproject.toml: expected a dependency a line, each `"name>=version",`')
    return tuple(f"{match[1]}=={match[2]}" for match in found if match)


ROWS = (
    # The oldest Python alone: the newer ones have no wheels of the oldest numpy.
    Row("py311-minimum", "3.11", minima((ROOT / "pyproject.toml").read_text())),
    Row("py311-jax0.10.2", "3.11", ("jax==0.10.2", "flax==0.12.8")),
    Row("py312-newest", "3.12"),
    Row("py313-newest", "3.13"),
    # What Colab shipped in 2026-08.
    Row("colab", "3.13", ("jax==0.7.2", "flax==0.11.2", "transformers==5.15.0")),
)


def find_python(version: str) -> str | None:
    """An interpreter of this version that starts: from the PATH, or from pyenv."""
    pyenv = Path(os.environ.get("PYENV_ROOT", "~/.pyenv")).expanduser() / "versions"
    candidates = [shutil.which(f"python{version}")]
    candidates += sorted(map(str, pyenv.glob(f"{version}.*/bin/python")), reverse=True)
    test = f"import sys, venv; sys.exit('%d.%d' % sys.version_info[:2] != '{version}')"
    for candidate in filter(None, candidates):
        if subprocess.run([candidate, "-c", test], capture_output=True).returncode == 0:
            return candidate
    return None


def prepare(row: Row, python: str) -> Path:
    """The row's environment: made anew when pyproject.toml is newer, upgraded where not pinned."""
    folder = ROOT / ".venv-matrix" / row.name
    stamp, project = folder / ".installed", ROOT / "pyproject.toml"
    inside = folder / "bin" / "python"
    current = stamp.exists() and stamp.stat().st_mtime > project.stat().st_mtime
    if current and row.pins:
        return inside
    if not current:
        environment = {**os.environ, "PYTHON": python}
        subprocess.run([ROOT / "scripts/make_env.sh", folder], env=environment, check=True)
    eager = ["--upgrade", "--upgrade-strategy", "eager"]  # or pip keeps the jax that it finds
    install = [inside, "-m", "pip", "install", "--quiet", *eager, "-e", f"{ROOT}[dev]"]
    subprocess.run([*install, *row.pins], check=True)
    stamp.touch()
    return inside


def versions(python: Path) -> str:
    """What was installed, as a line."""
    code = (
        "import sys, importlib.metadata as m; print(sys.version.split()[0], *("
        "f'{n} {m.version(n)}' for n in ('jax', 'jaxlib', 'flax', 'numpy', 'transformers')))"
    )
    return subprocess.run([python, "-c", code], capture_output=True, text=True).stdout.strip()


def run(row: Row, pytest_arguments: list[str]) -> str:
    """One row, in a line."""
    python = find_python(row.python)
    if python is None:
        return f"SKIPPED: no Python {row.python} on the PATH or under pyenv"
    start = time.monotonic()
    try:
        inside = prepare(row, python)
    except subprocess.CalledProcessError as error:
        return f"FAILED: the installation: {error}"
    print(f"== {row.name}: {versions(inside)}", flush=True)
    command = [inside, "-m", "pytest", "-q", "-n", "2", "--dist", "loadfile",
               "--max-worker-restart", "0", *pytest_arguments]
    code = subprocess.run(command, cwd=ROOT).returncode
    result = "passed" if code == 0 else f"FAILED: pytest exit code {code}"
    return f"{result} in {time.monotonic() - start:.0f} s ({versions(inside)})"


def main() -> int:
    """The command line; 1 if a row fails, or none ran."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="*", choices=[row.name for row in ROWS])
    parser.add_argument("--strict", action="store_true", help="a skipped row is a failure")
    args, pytest_arguments = parser.parse_known_args()
    rows = [row for row in ROWS if not args.only or row.name in args.only]
    results = {row.name: run(row, pytest_arguments) for row in rows}
    print("\n" + "\n".join(f"{name:18} {result}" for name, result in results.items()))
    bad = ("FAILED", "SKIPPED") if args.strict else ("FAILED",)
    if none := all(result.startswith("SKIPPED") for result in results.values()):
        print("no row ran: nothing was tested; install one of the Pythons named above")
    return int(none or any(result.startswith(bad) for result in results.values()))


if __name__ == "__main__":
    sys.exit(main())
