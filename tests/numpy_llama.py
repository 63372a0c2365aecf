"""A Llama in numpy and float64, from the equations alone: the oracle of tests without torch."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file


def load(folder: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """The config and the float64 weights, under their Hugging Face names."""
    weights = load_file(folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    return config, {name: value.astype(np.float64) for name, value in weights.items()}


def logits(config: dict[str, Any], weights: dict[str, np.ndarray], ids_T) -> np.ndarray:
    """Logits (T, V) of one unpadded sequence."""
    table_VD = weights["model.embed_tokens.weight"]
    x_TD, eps = table_VD[np.asarray(ids_T)], config["rms_norm_eps"]
    for layer in range(config["num_hidden_layers"]):
        w = {
            name.removeprefix(f"model.layers.{layer}."): value
            for name, value in weights.items()
            if name.startswith(f"model.layers.{layer}.")
        }
        x_TD = x_TD + attention(config, w, rms_norm(x_TD, w["input_layernorm.weight"], eps))
        x_TD = x_TD + mlp(w, rms_norm(x_TD, w["post_attention_layernorm.weight"], eps))
    x_TD = rms_norm(x_TD, weights["model.norm.weight"], eps)
    return x_TD @ weights.get("lm_head.weight", table_VD).T


def rms_norm(x_TD: np.ndarray, scale_D: np.ndarray, eps: float) -> np.ndarray:
    """x / sqrt(mean(x^2) + eps) * scale."""
    return x_TD / np.sqrt(np.mean(x_TD**2, -1, keepdims=True) + eps) * scale_D


def mlp(w: dict[str, np.ndarray], x_TD: np.ndarray) -> np.ndarray:
    """down(silu(gate x) * up x)."""
    gate_TF = x_TD @ w["mlp.gate_proj.weight"].T
    silu_TF = gate_TF / (1 + np.exp(-gate_TF))
    return (silu_TF * (x_TD @ w["mlp.up_proj.weight"].T)) @ w["mlp.down_proj.weight"].T


def attention(config: dict[str, Any], w: dict[str, np.ndarray], x_TD: np.ndarray) -> np.ndarray:
    """Causal attention; query head n reads kv head n // (N / K)."""
    T, N, K = len(x_TD), config["num_attention_heads"], config["num_key_value_heads"]
    rope = config.get("rope_parameters", config)
    q_TNH, k_TKH, v_TKH = (
        (x_TD @ w[f"self_attn.{name}_proj.weight"].T).reshape(T, heads, -1)
        for name, heads in (("q", N), ("k", K), ("v", K))
    )
    q_TNH, k_TKH = (rotate(x, rope["rope_theta"]) for x in (q_TNH, k_TKH))
    out_TNH = np.empty_like(q_TNH)
    for n in range(N):
        scores_TS = q_TNH[:, n] @ k_TKH[:, n // (N // K)].T / np.sqrt(q_TNH.shape[-1])
        scores_TS[np.triu_indices(T, 1)] = -1e30
        p_TS = np.exp(scores_TS - scores_TS.max(-1, keepdims=True))
        out_TNH[:, n] = p_TS / p_TS.sum(-1, keepdims=True) @ v_TKH[:, n // (N // K)]
    return out_TNH.reshape(T, -1) @ w["self_attn.o_proj.weight"].T


def rotate(x_TNH: np.ndarray, theta: float) -> np.ndarray:
    """Rotary embedding, the two halves of a head as the pairs."""
    half = x_TNH.shape[-1] // 2
    angle = np.arange(len(x_TNH))[:, None] * theta ** (-np.arange(half) / half)
    cos, sin = np.cos(angle)[:, None], np.sin(angle)[:, None]
    a, b = x_TNH[..., :half], x_TNH[..., half:]
    return np.concatenate([a * cos - b * sin, b * cos + a * sin], -1)
