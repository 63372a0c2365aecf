"""The published configurations of well-known checkpoints, without their weights.

Read from each checkpoint's config.json; a test compares the parameter counts with the published
ones. Use them to size a run (`jaxlm fit`), to compile for a chip, or to train from scratch.
"""

from jaxlm.core.errors import ConfigError
from jaxlm.models.config import ModelConfig, Rope


def _llama(
    vocab: int, dim: int, layers: int, heads: int, kv_heads: int, ffn: int, max_len: int,
    rope: Rope, **changes,
) -> ModelConfig:
    """What Llama and its descendants share; `changes` are a family's own switches."""
    given = {"head_dim": dim // heads, "norm_eps": 1e-5, **changes}
    return ModelConfig(vocab, dim, layers, heads, kv_heads, ffn_dim=ffn, max_len=max_len,
                       rope=rope, **given)


def _llama3(dim: int, layers: int, heads: int, ffn: int, factor: float, tied: bool) -> ModelConfig:
    """Llama 3.1 and 3.2: slow rotations slowed further, for 128k tokens."""
    rope = Rope(500000.0, "llama3", factor, 1.0, 4.0, 8192)
    return _llama(128256, dim, layers, heads, 8, ffn, 131072, rope, tie_embeddings=tied)


def _qwen2(
    vocab: int, dim: int, layers: int, heads: int, kv_heads: int, ffn: int, max_len: int,
    tied: bool, norm_eps: float = 1e-6,
) -> ModelConfig:
    """Qwen 2 and 2.5, the base models."""
    return _llama(vocab, dim, layers, heads, kv_heads, ffn, max_len, Rope(1e6), family="qwen2",
                  norm_eps=norm_eps, qkv_bias=True, tie_embeddings=tied)


def _qwen3(dim: int, layers: int, heads: int, ffn: int, tied: bool) -> ModelConfig:
    """Qwen 3."""
    return _llama(151936, dim, layers, heads, 8, ffn, 40960, Rope(1e6), family="qwen3",
                  norm_eps=1e-6, head_dim=128, qk_norm=True, tie_embeddings=tied)


def _gemma(
    vocab: int, dim: int, layers: int, heads: int, kv_heads: int, ffn: int, max_len: int,
    rope: Rope, **changes,
) -> ModelConfig:
    """What Gemma 2 and 3 share."""
    given = {"head_dim": 256, **changes}
    return _llama(vocab, dim, layers, heads, kv_heads, ffn, max_len, rope, norm_eps=1e-6,
                  tie_embeddings=True, activation="gelu_tanh", post_norms=True,
                  norm_offset=1.0, embed_scale=dim**0.5, **given)


def _gemma2(
    dim: int, layers: int, heads: int, kv_heads: int, ffn: int, **changes
) -> ModelConfig:
    """Gemma 2: every other layer windowed, both caps."""
    return _gemma(256000, dim, layers, heads, kv_heads, ffn, 8192, Rope(), family="gemma2",
                  windows=(4096, None) * (layers // 2), attention_softcap=50.0, logit_softcap=30.0,
                  **changes)


def _gemma3(
    vocab: int, dim: int, layers: int, heads: int, kv_heads: int, ffn: int, max_len: int,
    rope: Rope, window: int,
) -> ModelConfig:
    """Gemma 3, the language model alone: every sixth layer full."""
    return _gemma(vocab, dim, layers, heads, kv_heads, ffn, max_len, rope, family="gemma3_text",
                  qk_norm=True, local_rope=Rope(10000.0),
                  windows=tuple(None if i % 6 == 5 else window for i in range(layers)))


def _granite(
    dim: int, ffn: int, theta: float, attention_scale: float, logit_divisor: float
) -> ModelConfig:
    """Granite 3.1."""
    return _llama(49155, dim, 40, 32, 8, ffn, 131072, Rope(theta), family="granite",
                  tie_embeddings=True, embed_scale=12.0, residual_scale=0.22,
                  attention_scale=attention_scale, logit_divisor=logit_divisor)


PRESETS: dict[str, ModelConfig] = {
    "llama-2-7b": _llama(32000, 4096, 32, 32, 32, 11008, 4096, Rope()),
    "llama-3-8b": _llama(128256, 4096, 32, 32, 8, 14336, 8192, Rope(500000.0)),
    "llama-3.1-8b": _llama3(4096, 32, 32, 14336, 8.0, tied=False),
    "llama-3.1-70b": _llama3(8192, 80, 64, 28672, 8.0, tied=False),
    "llama-3.2-1b": _llama3(2048, 16, 32, 8192, 32.0, tied=True),
    "llama-3.2-3b": _llama3(3072, 28, 24, 8192, 32.0, tied=True),
    "smollm2-135m": _llama(49152, 576, 30, 9, 3, 1536, 8192, Rope(1e5), tie_embeddings=True),
    "smollm2-360m": _llama(49152, 960, 32, 15, 5, 2560, 8192, Rope(1e5), tie_embeddings=True),
    "smollm2-1.7b": _llama(49152, 2048, 24, 32, 32, 8192, 8192, Rope(130000.0),
                           tie_embeddings=True),
    "mistral-7b-v0.1": _llama(32000, 4096, 32, 32, 8, 14336, 32768, Rope(), family="mistral",
                              windows=(4096,) * 32),
    "mistral-7b-v0.3": _llama(32768, 4096, 32, 32, 8, 14336, 32768, Rope(1e6), family="mistral"),
    "qwen2-7b": _qwen2(152064, 3584, 28, 28, 4, 18944, 131072, tied=False),
    "qwen2.5-0.5b": _qwen2(151936, 896, 24, 14, 2, 4864, 32768, tied=True),
    "qwen2.5-1.5b": _qwen2(151936, 1536, 28, 12, 2, 8960, 131072, tied=True),
    "qwen2.5-3b": _qwen2(151936, 2048, 36, 16, 2, 11008, 32768, tied=True),
    "qwen2.5-7b": _qwen2(152064, 3584, 28, 28, 4, 18944, 131072, tied=False),
    "qwen2.5-14b": _qwen2(152064, 5120, 48, 40, 8, 13824, 131072, False, 1e-5),
    "qwen2.5-32b": _qwen2(152064, 5120, 64, 40, 8, 27648, 131072, False, 1e-5),
    "qwen3-0.6b": _qwen3(1024, 28, 16, 3072, tied=True),
    "qwen3-1.7b": _qwen3(2048, 28, 16, 6144, tied=True),
    "qwen3-4b": _qwen3(2560, 36, 32, 9728, tied=True),
    "qwen3-8b": _qwen3(4096, 36, 32, 12288, tied=False),
    "qwen3-14b": _qwen3(5120, 40, 40, 17408, tied=False),
    "qwen3-32b": _qwen3(5120, 64, 64, 25600, tied=False),
    "gemma-2-2b": _gemma2(2304, 26, 8, 4, 9216),
    "gemma-2-9b": _gemma2(3584, 42, 16, 8, 14336),
    "gemma-2-27b": _gemma2(4608, 46, 32, 16, 36864, head_dim=128, attention_scale=144**-0.5),
    "gemma-3-1b": _gemma3(262144, 1152, 26, 4, 1, 6912, 32768, Rope(1e6), 512),
    "gemma-3-4b": _gemma3(262208, 2560, 34, 8, 4, 10240, 131072, Rope(1e6, "linear", 8.0), 1024),
    "granite-3.1-2b": _granite(2048, 8192, 5e6, 0.015625, 8.0),
    "granite-3.1-8b": _granite(4096, 12800, 1e7, 0.0078125, 16.0),
}


def preset(name: str) -> ModelConfig:
    """A published configuration by name.

    Raises: ConfigError that lists the names.

    Example:
      >>> preset("llama-3.1-8b").num_kv_heads
      8
    """
    if name not in PRESETS:
        raise ConfigError(f"no preset {name!r}; expected one of {', '.join(PRESETS)}")
    return PRESETS[name]
