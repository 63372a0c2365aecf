"""The page of checkpoints says what the code computes."""

from experiments.checkpoints_table import cache_bytes, row, table
from experiments.verify_hub import CHECKPOINTS
from jaxlm.models.presets import PRESETS, preset
from tests.source_tree import ROOT


def test_every_preset_has_a_checkpoint():
    assert set(CHECKPOINTS) == set(PRESETS)


def test_the_page_holds_the_table():
    page = (ROOT / "docs" / "checkpoints.md").read_text()
    assert table() in page, 'python -c "import experiments.checkpoints_table as t; t.main()"'


def test_an_8b_model_does_not_fit_a_16_gb_chip():
    assert "| A100 40 GB |" in row("llama-3.1-8b") or "| v6e |" in row("llama-3.1-8b")
    assert cache_bytes(preset("llama-3.1-8b")) == 2**30
