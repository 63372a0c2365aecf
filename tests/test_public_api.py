"""The public names are frozen: a change is made in tests/data/public_api.txt too, on purpose."""

import ast
import importlib
import inspect
import subprocess
import sys
from typing import Any, get_args, get_overloads, get_type_hints

import jaxlm
from tests.source_tree import PACKAGES, ROOT, module_name

FROZEN = ROOT / "tests" / "data" / "public_api.txt"
ONE_OR_MANY = {"beam_search", "contrast", "dvts", "generate", "particle_filter", "particle_gibbs",
               "score", "stream"}


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


def test_type_checkers_are_told_of_every_lazy_name():
    """And of no other: a name that only `__getattr__` gives would be an error, or Any, to them."""
    inits = {module_name(path): ast.parse(path.read_text()) for name in PACKAGES
             for path in (ROOT / name).rglob("__init__.py")}
    lazy = [name for name, tree in inits.items()
            if any(getattr(node, "name", None) == "__getattr__" for node in ast.walk(tree))]
    assert lazy == ["jaxlm"]
    block = next(node for node in inits["jaxlm"].body if isinstance(node, ast.If))
    assert ast.unparse(block.test) == "TYPE_CHECKING"
    told = [(node.module, alias.name) for node in block.body for alias in node.names
            if alias.asname == alias.name]  # `X as X`, without which it stays private to the file
    names = [(home, name) for home, names in jaxlm._HOMES.items() for name in names]
    assert sorted(told) == sorted([*names, *(("jaxlm", name) for name in jaxlm._PACKAGES)])


def parameters(function):
    """The types of all parameters; of `**options: Unpack[Options]`, those of the options."""
    types = get_type_hints(function)
    found = {}
    for name, parameter in inspect.signature(function).parameters.items():
        if parameter.kind is parameter.VAR_KEYWORD:
            found |= get_type_hints(get_args(types[name])[0])
        else:
            found[name] = types[name]
    return found


def test_overloads_take_what_their_functions_take():
    """But for the prompts, which tell one result from a list of them."""
    functions = {name: getattr(jaxlm, name) for name in jaxlm.__all__
                 if inspect.isfunction(getattr(jaxlm, name))}
    assert not [name for name, f in functions.items() if get_type_hints(f)["return"] is Any]
    assert {name for name, f in functions.items() if get_overloads(f)} == ONE_OR_MANY
    for name in ONE_OR_MANY:
        whole = parameters(functions[name])
        split = [parameters(overload) for overload in get_overloads(functions[name])]
        prompts = "texts" if name == "score" else "prompts"
        assert split[0].pop(prompts) | split[1].pop(prompts) == whole.pop(prompts)
        assert split == [whole, whole], name
