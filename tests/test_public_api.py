"""The public names are frozen: a change is made in tests/data/public_api.txt too, on purpose."""

import subprocess
import sys

import jaxlm
from tests.source_tree import ROOT

FROZEN = ROOT / "tests" / "data" / "public_api.txt"


def test_public_names_are_frozen():
    names = FROZEN.read_text().split()
    assert names == sorted(set(names)), f"keep {FROZEN.name} sorted, each name once"
    assert sorted(jaxlm.__all__) == names


def test_public_names_resolve_and_are_listed():
    for name in jaxlm.__all__:
        assert getattr(jaxlm, name) is not None
    assert set(jaxlm.__all__) <= set(dir(jaxlm))


def test_a_public_name_stays_what_it_is():
    """A package of the same name would take its place once something imports it."""
    code = (
        "import types, jaxlm\n"
        "before = {name: getattr(jaxlm, name) for name in jaxlm.__all__}\n"
        "assert not any(isinstance(value, types.ModuleType) for value in before.values())\n"
        "assert all(getattr(jaxlm, name) is value for name, value in before.items())\n"
        "assert jaxlm.decode.decode and jaxlm.decode.fork is jaxlm.decode.rows.fork\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
