"""What a decoder is: a frozen description, hashed by value; families differ by switches."""

import math
import numbers
from dataclasses import dataclass, replace

from jaxlm.core.errors import ConfigError, whole

ACTIVATIONS = ("silu", "gelu_tanh", "gelu")
ROPE_KINDS = ("default", "linear", "llama3")
MAX_LAYERS = 1024  # a decoder is unrolled: beyond this, a wrong config.json is likelier


def positive(name: str, value: object) -> None:
    """Raise ConfigError unless `value` is a finite number above 0."""
    real = isinstance(value, numbers.Real) and not isinstance(value, bool)
    if not (real and 0 < value < math.inf):  # type: ignore[operator]
        raise ConfigError(f"{name} is {value!r}; expected a finite number above 0")


@dataclass(frozen=True)
class Rope:
    """Rotary positions: `angle_i = pos * theta^(-2i/H)`, then one of the published scalings.

    kind `linear` divides positions by `factor`; `llama3` divides only the slow frequencies
    (wavelengths beyond `original_max_len / low_freq_factor`), with a smooth band between.
    Source: RoFormer (2104.09864) section 3.2; the Llama 3 report (2407.21783) section 3.4.
    """

    theta: float = 10000.0
    kind: str = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_len: int = 8192

    def __post_init__(self):
        if self.kind not in ROPE_KINDS:
            raise ConfigError(f"rope kind {self.kind!r} is unknown; expected one of {ROPE_KINDS}")
        for name in ("theta", "factor", "low_freq_factor", "high_freq_factor", "original_max_len"):
            positive(f"rope {name}", getattr(self, name))
        if self.kind == "llama3" and self.high_freq_factor <= self.low_freq_factor:
            raise ConfigError(
                f"rope high_freq_factor {self.high_freq_factor} must exceed "
                f"low_freq_factor {self.low_freq_factor}"
            )


@dataclass(frozen=True)
class AttentionSpec:
    """What one layer's attention needs to know; static, so a cache kind can specialise on it."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    scale: float
    rope: Rope
    softcap: float | None = None
    window: int | None = None


@dataclass(frozen=True)
class LayerPlan:
    """A static change to one layer: skip its attention block, scale its residual branches."""

    skip_attention: bool = False
    attention_scale: float = 1.0
    mlp_scale: float = 1.0

    def __post_init__(self):
        for name in ("attention_scale", "mlp_scale"):
            value = getattr(self, name)
            if not (isinstance(value, int | float) and math.isfinite(value)):
                raise ConfigError(f"plan {name} is {value!r}; expected a finite number")


@dataclass(frozen=True)
class ModelConfig:
    """A decoder. Every family is a setting of these fields; none has code of its own.

    `windows` holds one entry a layer (None: full attention), or is empty for full everywhere.
    `norm_offset` is added to every norm's stored scale; `local_rope` serves windowed layers.
    Values that say the default another way are stored as the default, so that models that compute
    the same compare and hash equal.
    """

    vocab_size: int
    dim: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    ffn_dim: int
    max_len: int = 2048
    family: str = "llama"
    norm_eps: float = 1e-5
    rope: Rope = Rope()
    tie_embeddings: bool = False
    activation: str = "silu"
    qkv_bias: bool = False
    qk_norm: bool = False
    post_norms: bool = False
    norm_offset: float = 0.0
    attention_scale: float | None = None
    attention_softcap: float | None = None
    logit_softcap: float | None = None
    embed_scale: float = 1.0
    residual_scale: float = 1.0
    logit_divisor: float = 1.0
    windows: tuple[int | None, ...] = ()
    local_rope: Rope | None = None

    def __post_init__(self):
        counts = ("vocab_size", "dim", "num_layers", "num_heads", "num_kv_heads", "head_dim",
                  "ffn_dim", "max_len")
        for name in counts:
            whole(name, getattr(self, name))
        whole("num_layers", self.num_layers, high=MAX_LAYERS)
        if self.num_heads % self.num_kv_heads:
            raise ConfigError(
                f"num_heads {self.num_heads} is not a multiple of num_kv_heads {self.num_kv_heads}"
            )
        if self.head_dim % 2:
            raise ConfigError(f"head_dim is {self.head_dim}; rotary positions need an even number")
        if self.activation not in ACTIVATIONS:
            raise ConfigError(f"activation {self.activation!r}; expected one of {ACTIVATIONS}")
        if not isinstance(self.windows, tuple):  # a list would not hash
            raise ConfigError(f"windows is {self.windows!r}; expected a tuple")
        if self.windows and len(self.windows) != self.num_layers:
            raise ConfigError(
                f"windows has {len(self.windows)} entries for {self.num_layers} layers; "
                "give one a layer, or none"
            )
        for layer, window in enumerate(self.windows):
            if window is not None:
                whole(f"windows[{layer}]", window)
        if not (isinstance(self.norm_offset, int | float) and math.isfinite(self.norm_offset)):
            raise ConfigError(f"norm_offset is {self.norm_offset!r}; expected a finite number")
        scales = ("norm_eps", "attention_scale", "attention_softcap", "logit_softcap",
                  "embed_scale", "residual_scale", "logit_divisor")
        optional = ("attention_scale", "attention_softcap", "logit_softcap")
        for name in scales:
            if getattr(self, name) is not None or name not in optional:
                positive(name, getattr(self, name))
        self._use_defaults()

    def _use_defaults(self) -> None:
        """Store a default that was spelled out as the default."""
        if not any(self.windows):
            object.__setattr__(self, "windows", ())
        if self.attention_scale == self.head_dim**-0.5:
            object.__setattr__(self, "attention_scale", None)
        if self.local_rope == self.rope:
            object.__setattr__(self, "local_rope", None)

    def attention(self, layer: int) -> AttentionSpec:
        """The attention of one layer."""
        window = self.windows[layer] if self.windows else None
        rope = self.local_rope if window is not None and self.local_rope else self.rope
        return AttentionSpec(
            self.num_heads, self.num_kv_heads, self.head_dim,
            self.attention_scale or self.head_dim**-0.5, rope, self.attention_softcap, window,
        )

    def replace(self, **changes) -> "ModelConfig":
        """A copy with some fields changed."""
        return replace(self, **changes)
