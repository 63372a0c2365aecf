"""Every notebook runs from top to bottom, and is committed without outputs."""

import ast
import os
import sys

import nbformat
import pytest
from nbclient import NotebookClient

from tests.source_tree import ROOT

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
TIMEOUT_S = 300


def read(path):
    """A notebook that follows the format."""
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    return notebook


def code_cells(notebook):
    """The sources of its code."""
    return [cell.source for cell in notebook.cells if cell.cell_type == "code"]


def test_there_are_notebooks():
    assert ROOT / "notebooks" / "00_quickstart.ipynb" in NOTEBOOKS


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_runs(path, monkeypatch):
    notebook = read(path)
    search = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    monkeypatch.setenv("PYTHONPATH", search)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")  # nothing is downloaded in a test
    client = NotebookClient(
        notebook, timeout=TIMEOUT_S, kernel_name="python3",
        resources={"metadata": {"path": str(path.parent)}},
    )
    # this interpreter, whatever a kernel of that name elsewhere on the machine would start
    client.create_kernel_manager().kernel_spec.argv[0] = sys.executable
    client.execute()
    assert all(cell.execution_count for cell in notebook.cells
               if cell.cell_type == "code" and cell.source.strip())


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_is_written_for_readers(path):
    notebook = read(path)
    sources = code_cells(notebook)
    assert not any(cell.get("outputs") for cell in notebook.cells), "clear the outputs"
    assert "colab-badge" in notebook.cells[0].source
    guarded = ast.parse(sources[0]).body[-1]
    assert isinstance(guarded, ast.If) and "find_spec" in ast.unparse(guarded.test)
    last = ast.parse(sources[-1]).body
    assert all(isinstance(node, ast.Assert) for node in last) and len(last) > 2
