"""Presets hold as many parameters as the checkpoints that they are named after."""

import pytest

from jaxlm.core.errors import ConfigError
from jaxlm.hf.config import from_hf, to_hf
from jaxlm.models.lm import LM, count_params
from jaxlm.models.presets import PRESETS, preset

# As published with the checkpoints, a tied head counted once.
PUBLISHED = {
    "llama-2-7b": 6_738_415_616, "llama-3-8b": 8_030_261_248, "llama-3.1-8b": 8_030_261_248,
    "llama-3.2-1b": 1_235_814_400, "llama-3.2-3b": 3_212_749_824, "smollm2-135m": 134_515_008,
    "smollm2-360m": 361_821_120, "smollm2-1.7b": 1_711_376_384, "mistral-7b-v0.1": 7_241_732_096,
    "mistral-7b-v0.3": 7_248_023_552, "qwen2.5-0.5b": 494_032_768, "qwen2.5-1.5b": 1_543_714_304,
    "qwen2.5-7b": 7_615_616_512, "qwen3-0.6b": 596_049_920, "qwen3-1.7b": 1_720_574_976,
    "qwen3-8b": 8_190_735_360, "gemma-2-2b": 2_614_341_888, "gemma-2-9b": 9_241_705_984,
    "gemma-3-1b": 999_885_952, "granite-3.1-2b": 2_533_531_648, "granite-3.1-8b": 8_170_848_256,
    "llama-3.1-70b": 70_553_706_496, "qwen2.5-14b": 14_770_033_664,
    "qwen2.5-32b": 32_763_876_352, "qwen3-14b": 14_768_307_200, "qwen3-32b": 32_762_123_264,
    "gemma-2-27b": 27_227_128_320, "qwen3-4b": 4_022_468_096, "qwen2.5-3b": 3_085_938_688,
    "qwen2-7b": 7_615_616_512, "gemma-3-4b": 3_880_263_168,  # its text model
}


def count(config):
    """The count from models of one and two layers: all layers hold the same."""
    one, two = (count_params(LM(config.replace(num_layers=n, windows=()))) for n in (1, 2))
    return one + (config.num_layers - 1) * (two - one)


@pytest.mark.parametrize("name", PRESETS)
def test_parameter_count(name):
    assert count(preset(name)) == PUBLISHED[name]


def test_the_shortcut_counts_as_the_whole_does():
    assert count_params(LM(preset("llama-3.2-1b"))) == count(preset("llama-3.2-1b"))


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_survives_its_config_json(name):
    assert from_hf(to_hf(preset(name))) == preset(name)


def test_an_unknown_name_lists_the_known_ones():
    with pytest.raises(ConfigError, match="llama-3.1-8b"):
        preset("llama-9")


@pytest.mark.torch
@pytest.mark.parametrize("name", PRESETS)
def test_transformers_counts_the_same(name):
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    raw = to_hf(preset(name))
    config = AutoConfig.for_model(**raw)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    assert sum(x.numel() for x in model.parameters()) == PUBLISHED[name]
