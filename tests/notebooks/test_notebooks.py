"""Every notebook runs from top to bottom, and is committed without outputs."""

import ast
import os
import re
import sys
from argparse import Namespace

import nbformat
import pytest
from nbclient import NotebookClient

import jaxlm
from jaxlm.eval.verify import stored_dtype
from tests.source_tree import ROOT

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
LONG = {"04_finetune_without_forgetting"}  # over a minute; in make test-all
YOURS = ROOT / "notebooks" / "01_your_checkpoint.ipynb"  # its own test runs it twice
TIMEOUT_S = 900


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


def execute(path, monkeypatch, cells=None):
    """The notebook after a run of its first cells, all by default, in this interpreter's kernel."""
    notebook = read(path)
    notebook.cells = notebook.cells[:cells]
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
    return notebook


@pytest.mark.parametrize("path", [
    pytest.param(p, id=p.stem, marks=[pytest.mark.slow] if p.stem in LONG else [])
    for p in NOTEBOOKS if p != YOURS])
def test_runs(path, monkeypatch):
    execute(path, monkeypatch)


def printed(notebook):
    """All that a run printed."""
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    return "".join(output.get("text", "") for output in outputs if output.get("name") == "stdout")


def test_a_second_run_goes_on_where_the_first_ended(tmp_path, monkeypatch):
    """Two runs with one folder to keep: the second saves nothing and finishes what is left."""
    monkeypatch.setenv("JAXLM_KEEP", str(tmp_path))
    first = printed(execute(YOURS, monkeypatch))
    assert "0 of 12 are there, 12 to go" in first and "saved: [" in first
    (records,) = tmp_path.glob("*.jsonl")
    whole, (saved,) = records.read_text(), tmp_path.glob("*/model.safetensors")
    lines, written = whole.splitlines(keepends=True), saved.stat().st_mtime_ns
    assert stored_dtype(saved.parent) == "bfloat16"  # as it was loaded and asked about
    marked = [line.replace('"text": "', '"text": "kept ') for line in lines[:5]]
    records.write_text("".join(marked) + lines[5][:9])  # a kill in the sixth
    cell = "records = job(bundle, texts, JOB)"
    notebook = read(YOURS)
    position = next(i for i, c in enumerate(notebook.cells) if cell in c.source)
    second = printed(execute(YOURS, monkeypatch, position + 1))
    assert "5 of 12 are there, 7 to go" in second and "was there: [" in second
    assert str(saved.parent) in second and saved.stat().st_mtime_ns == written
    after = records.read_text().splitlines(keepends=True)
    assert after[:5] == marked and sorted(after[5:]) == sorted(lines[5:])


def test_a_model_that_does_not_fit_stops_the_notebook_with_advice():
    cell = next(source for source in code_cells(read(YOURS)) if "def too_large" in source)
    defined = next(node for node in ast.parse(cell).body if isinstance(node, ast.FunctionDef))
    names = {"name": "org/big", "TARGET": "v5e:1x1", "BATCH": 8, "CONTEXT": 2048}
    exec(ast.unparse(defined), names)
    said = names["too_large"](Namespace(fits=False))
    assert "org/big does not fit one v5e:1x1" in said and "smaller one, such as" in said
    assert names["too_large"](Namespace(fits=True)) is None is names["too_large"](None)
    assert "raise SystemExit(too_large(fitted))" in cell


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_is_written_for_readers(path):
    notebook = read(path)
    sources = code_cells(notebook)
    assert not any(cell.get("outputs") for cell in notebook.cells), "clear the outputs"
    badge = r"colab-badge\.svg\)\]\((\S+)\)"  # no address holds the file: it opens what uploads it
    assert re.search(badge, notebook.cells[0].source)[1].endswith("/#upload=true")
    assert f'WHEEL = "jaxlm-{jaxlm.__version__}-py3-none-any.whl"' in sources[0]
    guarded = ast.parse(sources[0]).body[-1]
    assert isinstance(guarded, ast.If) and "find_spec" in ast.unparse(guarded.test)
    last = ast.parse(sources[-1]).body
    assert all(isinstance(node, ast.Assert) for node in last) and len(last) > 2
