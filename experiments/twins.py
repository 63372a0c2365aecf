"""Tiny random twins of the published families, the same on every machine, and transformers' view.

Every switch of a family is exercised: windows shorter than the text, caps that the scores reach,
rotary bands of all three kinds, head sizes other than D / N.
"""

import json
import pathlib
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from jaxlm.core.tree import flatten
from jaxlm.hf.config import from_hf, labels_from_hf
from jaxlm.hf.families import family_of, tensor_name
from jaxlm.hf.weights import hf_shape
from jaxlm.models.lm import LM

TOKENS, VOCAB, WINDOW, PAD = 16, 48, 5, 0
BASE = {
    "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "rms_norm_eps": 1e-5,
    "max_position_embeddings": 1024, "tie_word_embeddings": False, "bos_token_id": 1,
    "eos_token_id": 2, "pad_token_id": PAD,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
}
LLAMA3 = {"rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0,
          "high_freq_factor": 4.0, "original_max_position_embeddings": 128}
GEMMA = {"tie_word_embeddings": True, "sliding_window": WINDOW, "query_pre_attn_scalar": 24}
CONFIGS: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama"},
    "llama3": {"model_type": "llama", "head_dim": 16, "tie_word_embeddings": True,
               "rope_parameters": LLAMA3},
    "mistral": {"model_type": "mistral", "sliding_window": WINDOW},
    "qwen2": {"model_type": "qwen2"},
    "qwen2_window": {"model_type": "qwen2", "use_sliding_window": True, "sliding_window": WINDOW,
                     "max_window_layers": 1},
    "qwen3": {"model_type": "qwen3", "head_dim": 16, "tie_word_embeddings": True},
    "gemma2": {"model_type": "gemma2", **GEMMA, "attn_logit_softcapping": 2.0,
               "final_logit_softcapping": 3.0},
    "gemma3_text": {
        "model_type": "gemma3_text", **GEMMA, "sliding_window_pattern": 2, "head_dim": 16,
        "rope_parameters": {
            "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
        },
    },
    "granite": {"model_type": "granite", "tie_word_embeddings": True, "embedding_multiplier": 3.0,
                "residual_multiplier": 0.22, "attention_multiplier": 0.7, "logits_scaling": 6.0},
}


def config_of(name: str, head: str = "CausalLM") -> dict[str, Any]:
    """A twin's config.json; `head` may be SequenceClassification or TokenClassification."""
    raw = {**BASE, **CONFIGS[name]}
    family = family_of(raw["model_type"])
    names = {"CausalLM": family.architecture, "SequenceClassification": family.sequence,
             "TokenClassification": family.token}
    raw["architectures"] = [names[head]]
    if head != "CausalLM":
        raw["id2label"] = {str(i): f"LABEL_{i}" for i in range(3)}
    return raw


def model_of(raw: dict[str, Any]) -> LM:
    """The model of a config.json."""
    labels, per_token = labels_from_hf(raw)
    return LM(from_hf(raw), labels=labels, per_token=per_token)


def uniform(count: int, stream: int) -> np.ndarray:
    """`count` numbers in [-1, 1) by splitmix64: integer arithmetic, so the same everywhere."""
    mask, step = np.uint64(2**64 - 1), np.uint64(0x9E3779B97F4A7C15)
    with np.errstate(over="ignore"):
        z = (np.arange(count, dtype=np.uint64) + np.uint64(stream * 2**32 + 1)) * step & mask
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    z ^= z >> np.uint64(31)
    return (z >> np.uint64(11)).astype(np.float64) / 2.0**52 - 1.0


def weights_of(raw: dict[str, Any]) -> dict[str, np.ndarray]:
    """Random float32 tensors under their Hugging Face names."""
    family, lm = family_of(raw["model_type"]), model_of(raw)
    tensors = {}
    for stream, (path, leaf) in enumerate(sorted(flatten(lm.shapes()).items())):
        name = tensor_name(path, family)
        shape = hf_shape(name, leaf.shape)
        value = uniform(int(np.prod(shape)), stream).reshape(shape)
        if path.endswith("/scale"):
            value = 0.3 * value + (1.0 - lm.config.norm_offset)
        elif len(shape) == 2:
            value = value * 2.5 * shape[1] ** -0.5
        tensors[name] = value.astype(np.float32)
    return tensors


def tokens_of(rows: int = 2, time: int = TOKENS) -> np.ndarray:
    """Token ids (rows, time), none of them special."""
    drawn = np.stack([uniform(time, 1000 + row) for row in range(rows)])
    return (3 + (drawn + 1) / 2 * (VOCAB - 3)).astype(np.int32)


def write(raw: dict[str, Any], folder: pathlib.Path) -> pathlib.Path:
    """A complete model folder, tokenizer included."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(raw))
    save_file(weights_of(raw), folder / "model.safetensors", metadata={"format": "pt"})
    words = {"<pad>": PAD, "<bos>": 1, "<eos>": 2, **{f"w{i}": i for i in range(3, VOCAB)}}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w3"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<eos>"})
    )
    return folder


def torch_model(raw: dict[str, Any]) -> Any:
    """transformers' model of a twin, with the same weights; float32, plain attention."""
    import torch
    import transformers

    cls = getattr(transformers, raw["architectures"][0])
    config = cls.config_class(**{k: v for k, v in raw.items() if k != "architectures"})
    if raw["model_type"] == "gemma3_text":
        config = transformers.Gemma3TextConfig(**raw)
    config._attn_implementation = "eager"
    model = cls(config).eval().float()
    state = {name: torch.from_numpy(value) for name, value in weights_of(raw).items()}
    missing, surplus = model.load_state_dict(state, strict=False)
    assert not surplus and set(missing) <= {"lm_head.weight"}, (missing, surplus)
    model.tie_weights()
    return model


def torch_forward(
    model: Any, tokens_BT: np.ndarray, mask_BT: np.ndarray | None = None
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Logits, and the output of every norm, attention and feed-forward of the blocks."""
    import torch

    seen: dict[str, np.ndarray] = {}

    def keep(name):
        def hook(module, inputs, output):
            seen[name] = (output[0] if isinstance(output, tuple) else output).numpy().copy()
        return hook

    names = ("self_attn", "mlp", "input_layernorm", "post_attention_layernorm",
             "pre_feedforward_layernorm", "post_feedforward_layernorm")
    hooks = [
        getattr(layer, part).register_forward_hook(keep(f"layers_{i}/{part}"))
        for i, layer in enumerate(model.model.layers) for part in names if hasattr(layer, part)
    ]
    ids = torch.from_numpy(tokens_BT.astype(np.int64))
    mask = None if mask_BT is None else torch.from_numpy(mask_BT.astype(np.int64))
    positions = None if mask is None else (mask.cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
        logits = model(ids, attention_mask=mask, position_ids=positions, use_cache=False).logits
    for hook in hooks:
        hook.remove()
    return logits.numpy(), seen
