"""The public names are frozen: a change is made in tests/data/public_api.txt too, on purpose."""

import ast
import importlib
import subprocess
import sys

import jaxlm
from tests.source_tree import PACKAGES, ROOT, module_name

FROZEN = ROOT / "tests" / "data" / "public_api.txt"


def re_exported():
    """`package.name` of every `X as X` in a package's __init__: what it offers by its own name."""
    found = []
    for path in (path for name in PACKAGES for path in (ROOT / name).rglob("__init__.py")):
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.ImportFrom):
                found += [f"{module_name(path)}.{alias.name}" for alias in node.names
                          if alias.asname == alias.name]
    return found


def test_public_names_are_frozen():
    names = FROZEN.read_text().split()
    assert names == sorted(set(names)), f"keep {FROZEN.name} sorted, each name once"
    assert sorted([*jaxlm.__all__, *re_exported()]) == names


def test_public_names_resolve_and_are_listed():
    for name in jaxlm.__all__:
        assert getattr(jaxlm, name) is not None
    assert set(jaxlm.__all__) <= set(dir(jaxlm))
    for package, name in (dotted.rsplit(".", 1) for dotted in re_exported()):
        assert hasattr(importlib.import_module(package), name)


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
