"""A tiny random Llama with a byte-level tokenizer: what most tests run on."""

import json
from functools import lru_cache
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tokenizers
from safetensors.numpy import save_file

from jaxlm.models.config import ModelConfig
from jaxlm.models.lm import LM

BOS, EOS, VOCAB = 256, 257, 258
HF_CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": VOCAB,
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 128, "rms_norm_eps": 1e-5,
    "hidden_act": "silu", "tie_word_embeddings": False, "attention_bias": False, "mlp_bias": False,
    "bos_token_id": BOS, "eos_token_id": EOS,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}, "dtype": "float32",
}
CONFIG = ModelConfig(
    vocab_size=VOCAB, dim=16, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8, ffn_dim=24,
    max_len=128,
)


@lru_cache
def model(**changes: Any) -> tuple[LM, Any]:
    """A language model without a folder, and its random parameters."""
    lm = LM(CONFIG.replace(**changes))
    return lm, lm.init(jax.random.key(1))


def weights(config: dict[str, Any] = HF_CONFIG, seed: int = 0) -> dict[str, np.ndarray]:
    """Random weights under their Hugging Face names."""
    dim, ffn, head = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    q, kv = config["num_attention_heads"] * head, config["num_key_value_heads"] * head
    shapes = {"model.embed_tokens.weight": (config["vocab_size"], dim), "model.norm.weight": (dim,)}
    if not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (config["vocab_size"], dim)
    for layer in range(config["num_hidden_layers"]):
        for name, shape in {
            "input_layernorm": (dim,), "post_attention_layernorm": (dim,),
            "self_attn.q_proj": (q, dim), "self_attn.k_proj": (kv, dim),
            "self_attn.v_proj": (kv, dim), "self_attn.o_proj": (dim, q),
            "mlp.gate_proj": (ffn, dim), "mlp.up_proj": (ffn, dim), "mlp.down_proj": (dim, ffn),
        }.items():
            shapes[f"model.layers.{layer}.{name}.weight"] = shape
    rng = np.random.default_rng(seed)
    return {
        name: ((len(shape) == 1) + 0.3 * rng.standard_normal(shape)).astype(np.float32)
        for name, shape in shapes.items()
    }


def tokenizer_json() -> dict[str, Any]:
    """One id a byte, so that most characters beyond ASCII span several tokens."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocab = {char: i for i, char in enumerate(alphabet)}
    made = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, []))
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(False, use_regex=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    made.add_special_tokens(["<s>", "</s>"])
    return json.loads(made.to_str())


def write_folder(
    folder: Path, config: dict[str, Any] = HF_CONFIG,
    tensors: dict[str, np.ndarray] | None = None, **changes: Any,
) -> Path:
    """A whole Hugging Face folder; `changes` go into config.json."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({**config, **changes}))
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer_json()))
    (folder / "tokenizer_config.json").write_text(json.dumps(
        {"bos_token": "<s>", "eos_token": "</s>", "tokenizer_class": "PreTrainedTokenizerFast"}
    ))
    save_file(weights({**config, **changes}) if tensors is None else tensors,
              folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, to see that nothing changed."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*")) if path.is_file()
    }
