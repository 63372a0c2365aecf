"""The language model inside a Gemma 3 of text and images, taken out by the lines of the docs."""

import re

import jax.numpy as jnp
import numpy as np
import pytest

import jaxlm
from experiments import twins
from jaxlm.core.errors import ConfigError
from jaxlm.hf.config import from_hf
from tests.source_tree import ROOT

HUB_ID, FOLDER = "google/gemma-3-4b-pt", "gemma-3-4b-text"


def test_the_error_says_how():
    with pytest.raises(ConfigError, match="docs/checkpoints.md.*text.model, text.lm_head"):
        from_hf({"model_type": "gemma3", "text_config": {}})


@pytest.mark.torch
def test_the_language_model_loads(tmp_path):
    import torch
    import transformers

    raw = twins.config_of("gemma3_text")
    folder = twins.write(raw, tmp_path / "whole")
    config = transformers.Gemma3Config(
        text_config={k: v for k, v in raw.items() if k != "architectures"},
        vision_config={"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1,
                       "num_attention_heads": 2, "image_size": 28, "patch_size": 14},
        mm_tokens_per_image=1, image_token_index=47, boi_token_index=46, eoi_token_index=45,
    )
    torch.manual_seed(0)
    whole = transformers.Gemma3ForConditionalGeneration(config).eval().float()
    (folder / "model.safetensors").unlink()
    whole.save_pretrained(folder)
    page = (ROOT / "docs" / "checkpoints.md").read_text()
    code = re.search(r"```\n(import torch\n.*?)```", page, re.S)[1]
    out = tmp_path / "text"
    exec(code.replace(HUB_ID, str(folder)).replace(FOLDER, str(out)), {})
    bundle = jaxlm.load(out)
    tokens = twins.tokens_of() % 40
    ours = bundle.lm.apply(bundle.params, jnp.asarray(tokens)).logits
    with torch.no_grad():
        theirs = whole(torch.from_numpy(tokens.astype(np.int64)), use_cache=False).logits.numpy()
    np.testing.assert_allclose(ours, theirs, atol=1e-4)
    assert theirs.std() > 1e-3
