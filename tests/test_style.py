"""Limits that keep the code readable: short files, short functions, a docstring on public names."""

import ast
from pathlib import Path

import pytest

from tests.source_tree import PACKAGES, ROOT, python_files

FOLDERS = (*PACKAGES, "experiments", "scripts", "tests")
MAX_COLUMNS, MAX_FILE_LINES, MAX_FUNCTION_LINES = 100, 400, 70
KERNEL_FILES = {"tpu.py", "gpu.py"}  # a kernel body is one thought, however long
FUNCTION = (ast.FunctionDef, ast.AsyncFunctionDef)


def long_lines(text: str) -> list[int]:
    """The numbers of the lines that are too wide."""
    return [n for n, line in enumerate(text.splitlines(), 1) if len(line) > MAX_COLUMNS]


def long_functions(tree: ast.AST) -> list[str]:
    """The functions longer than a screen."""
    return [
        f"{node.name} ({node.end_lineno - node.lineno + 1} lines)"
        for node in ast.walk(tree)
        if isinstance(node, FUNCTION) and node.end_lineno - node.lineno >= MAX_FUNCTION_LINES
    ]


def without_docstring(tree: ast.Module) -> list[str]:
    """The module and its public functions and classes that say nothing about themselves."""
    public = [
        node
        for node in tree.body
        if isinstance(node, (*FUNCTION, ast.ClassDef)) and not node.name.startswith("_")
    ]
    return [getattr(node, "name", "module") for node in [tree, *public] if not has_docstring(node)]


def has_docstring(node: ast.AST) -> bool:
    """Whether there is one, overloads aside."""
    overload = any("overload" in ast.dump(d) for d in getattr(node, "decorator_list", []))
    return overload or bool(ast.get_docstring(node))


@pytest.fixture(scope="module")
def sources() -> dict[Path, str]:
    return {path.relative_to(ROOT): path.read_text() for path in python_files(*FOLDERS)}


def test_lines_fit(sources):
    wrong = [f"{path}:{n}" for path, text in sources.items() for n in long_lines(text)]
    assert not wrong, f"over {MAX_COLUMNS} columns: {wrong}"


def test_files_are_short(sources):
    sizes = {str(path): len(text.splitlines()) for path, text in sources.items()}
    wrong = {path: size for path, size in sizes.items() if size > MAX_FILE_LINES}
    assert not wrong, f"over {MAX_FILE_LINES} lines: is there a second concept inside? {wrong}"


def test_functions_are_short(sources):
    wrong = [
        f"{path}: {name}"
        for path, text in sources.items()
        if path.name not in KERNEL_FILES
        for name in long_functions(ast.parse(text))
    ]
    assert not wrong, f"over {MAX_FUNCTION_LINES} lines: {wrong}"


def test_public_names_have_docstrings(sources):
    wrong = [
        f"{path}: {name}"
        for path, text in sources.items()
        if path.parts[0] in PACKAGES and (text.strip() or path.name != "__init__.py")
        for name in without_docstring(ast.parse(text))
    ]
    assert not wrong, f"no docstring: {wrong}"


def test_the_checks_find_what_they_should():
    body = "\n".join("    x = 1" for _ in range(MAX_FUNCTION_LINES))
    tree = ast.parse(f"def long():\n{body}\nclass Public: pass\ndef _private(): pass")
    assert long_functions(tree) == [f"long ({MAX_FUNCTION_LINES + 1} lines)"]
    assert without_docstring(tree) == ["module", "long", "Public"]
    assert long_lines("ok\n" + "x" * (MAX_COLUMNS + 1)) == [2]
