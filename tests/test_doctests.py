"""The examples in docstrings, the README and the docs run and print what they say."""

import doctest
import importlib
import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.source_tree import PACKAGES, ROOT, module_name, python_files

OPTIONS = doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS
MODULES = [
    module_name(path)
    for path in python_files(*PACKAGES, "experiments")
    if ">>> " in path.read_text()
]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def python_blocks(markdown: str) -> list[str]:
    """The fenced Python examples; a fence of `{.python .no-run}` is left out."""
    return re.findall(r"^```python[ \t]*\n(.*?)^```", markdown, re.S | re.M)


@pytest.mark.parametrize("module", MODULES)
def test_docstring_examples(module):
    needs_model = 'load("tiny")' in importlib.util.find_spec(module).loader.get_source(module)
    if needs_model and not (ROOT / "jaxlm/bundled/tiny/config.json").exists():
        pytest.skip("the bundled model is not in this checkout")
    result = doctest.testmod(importlib.import_module(module), optionflags=OPTIONS)
    assert result.attempted > 0 and result.failed == 0


@pytest.mark.parametrize(
    "page", [p for p in PAGES if python_blocks(p.read_text())], ids=lambda p: p.name
)
def test_page_examples(page: Path, tmp_path):
    """The blocks of one page share their names, as a reader would paste them one after another."""
    code = "\n".join(python_blocks(page.read_text()))
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=900
    )
    assert result.returncode == 0, result.stderr[-2000:]


def test_blocks_are_found():
    page = "```python\nx = 1\n```\n```{.python .no-run}\ny\n```\n```\nz\n```\n"
    assert python_blocks(page) == ["x = 1\n"]
