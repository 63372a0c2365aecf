"""The page of checkpoints says what the code computes."""

import json

from experiments.checkpoints_table import CHIPS, FOLDERS, FREE, cache_bytes, row, table
from experiments.verify_hub import CHECKPOINTS
from jaxlm.models.lm import LM, count_params
from jaxlm.models.presets import PRESETS, preset
from tests.source_tree import ROOT


def test_every_preset_has_a_checkpoint():
    assert set(CHECKPOINTS) | set(FOLDERS) == set(PRESETS)


def test_the_page_holds_the_table():
    page = (ROOT / "docs" / "checkpoints.md").read_text()
    assert table() in page, 'python -c "import experiments.checkpoints_table as t; t.main()"'


def test_what_no_chip_holds_is_loaded_onto_a_mesh():
    line = row("llama-3.1-70b")
    assert "| several |" in line and ", mesh=jaxlm.make_mesh(tensor=8))`" in line
    assert "mesh=" not in row("llama-3.1-8b")
    config = preset("llama-3.1-70b")
    held = 2 * count_params(LM(config)) + cache_bytes(config)
    assert config.num_kv_heads % 8 == 0  # so that the cache is split too
    assert held / 8 < (1 - FREE) * CHIPS["v6e"]


def test_the_page_names_the_transformers_of_the_committed_result():
    result = json.loads((ROOT / "experiments/results/parity/cpu.json").read_text())
    version = result["versions"]["transformers"].rpartition(".")[0]
    page = (ROOT / "docs" / "checkpoints.md").read_text()
    assert f"against transformers {version} (`python\nexperiments/parity.py`" in page


def test_an_8b_model_does_not_fit_a_16_gb_chip():
    assert "| A100 40 GB |" in row("llama-3.1-8b") or "| v6e |" in row("llama-3.1-8b")
    assert "| v6e |" in row("gemma-3-4b") or "| v5e |" in row("gemma-3-4b")
    assert cache_bytes(preset("llama-3.1-8b")) == 2**30


def test_a_t4_is_given_no_bfloat16():
    """Nor Gemma in float16, which its activations outgrow."""
    lines = [line for line in table().splitlines() if "| T4 |" in line]
    assert lines and all(("float32" if "gemma" in line else "float16") in line for line in lines)
    assert 'jaxlm.load("Qwen/Qwen2.5-0.5B", dtype="float16")' in row("qwen2.5-0.5b")
    assert 'jaxlm.load("google/gemma-2-2b", dtype="float32")' in row("gemma-2-2b")
    assert "dtype" not in row("qwen3-8b")
