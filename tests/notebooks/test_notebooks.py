"""Every notebook runs from top to bottom, and is committed without outputs."""

import ast
import os
import re
import sys
from argparse import Namespace

import jax.numpy as jnp
import nbformat
import numpy as np
import pytest
from nbclient import NotebookClient

import jaxlm
from jaxlm.eval.verify import stored_dtype
from jaxlm.models.lm import LM, count_params
from jaxlm.models.presets import preset
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


def run_part(text, kinds, names, assigned=()):
    """The cell that holds `text`, after its statements of some kinds were run among `names`."""
    cell = next(source for source in code_cells(read(YOURS)) if text in source)
    for node in ast.parse(cell).body:
        to = ast.unparse(node.targets[0]) if isinstance(node, ast.Assign) else None
        if isinstance(node, kinds) or to in assigned:
            exec(ast.unparse(node), names)
    return cell


IMPORTS = (ast.Import, ast.ImportFrom)


def test_the_weights_are_on_the_chip_once(tmp_path):
    """What was saved is compared with the bundle tensor by tensor, never loaded beside it."""
    assert "\n".join(code_cells(read(YOURS))).count("jaxlm.load(") == 1
    names = {"np": np}
    run_part("def holds", (*IMPORTS, ast.FunctionDef), names)
    bundle = jaxlm.load("tiny")
    folder = jaxlm.save(bundle, tmp_path / "saved")
    assert names["holds"](folder, bundle)
    assert names["holds"](folder, jaxlm.load(folder, dtype="bfloat16"))
    last = bundle.params["final_norm"]["scale"]
    other = {**bundle.params, "final_norm": {"scale": last.at[-1].add(1)}}
    assert not names["holds"](folder, bundle.replace(params=other))


@pytest.mark.parametrize("model, target, dtype", [
    ("gemma-2-2b", "t4", "float32"), ("gemma-3-1b", "t4", "float32"), ("qwen3-4b", "t4", "float16"),
    ("gemma-2-2b", "v5e:1x1", "bfloat16")])
def test_the_arithmetic_and_the_compiler_are_asked_in_the_dtype_of_the_chip(model, target, dtype):
    config = preset(model)
    names = {"config": config, "TARGET": target}
    asked = ("DTYPE", "(BATCH, CONTEXT)", "each", "weights", "cache")
    cell = run_part("DTYPE =", IMPORTS, names, asked)
    assert names["DTYPE"] == dtype and "dtype=DTYPE)" in cell
    assert names["weights"] == jnp.dtype(dtype).itemsize * count_params(LM(config))
    values = 8 * min(2048, config.max_len) * config.num_layers * config.num_kv_heads
    assert names["cache"] == jnp.dtype(dtype).itemsize * 2 * values * config.head_dim


def test_a_model_that_does_not_fit_stops_the_notebook_with_advice():
    names = {"name": "org/big", "TARGET": "v5e:1x1", "BATCH": 8, "CONTEXT": 2048}
    cell = run_part("def too_large", ast.FunctionDef, names)
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
