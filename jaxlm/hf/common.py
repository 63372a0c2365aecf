"""What the families' config.json files share: sizes, rotary settings, windows."""

from collections.abc import Callable
from typing import Any

from jaxlm.core.errors import ConfigError
from jaxlm.hf.fields import Fields
from jaxlm.models.config import ModelConfig, Rope

ACTIVATIONS = {"silu": "silu", "gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu"}
FULL, SLIDING = "full_attention", "sliding_attention"
MAX_LAYERS = 10_000  # a damaged file must not make us build a million layers


def read_rope(fields: Fields) -> Rope:
    """Rotary settings from `rope_parameters` (transformers 5), or from the older pair of fields."""
    bare = fields.number("rope_theta", None)
    given = {name: fields.take(name, None, dict) for name in ("rope_parameters", "rope_scaling")}
    ropes = []
    for name, setting in ({k: v for k, v in given.items() if v} or {"rope_theta": {}}).items():
        source = dict(setting)
        theta = source.setdefault("rope_theta", 10000.0 if bare is None else bare)
        if bare is not None and theta != bare:
            raise ConfigError(
                f"{fields.where}: rope_theta is {bare} but {name} says {theta}; remove the wrong "
                "one"
            )
        ropes.append(rope_from(Fields(source, f"{fields.where} {name}")))
    if ropes[0] != ropes[-1]:
        raise ConfigError(
            f"{fields.where}: rope_parameters and rope_scaling disagree: {given}; remove the wrong "
            "one"
        )
    return ropes[0]


def rope_from(source: Fields) -> Rope:
    """One rotary setting, every entry of which must be known."""
    old_name = source.take("type", "default")
    kind = source.take("rope_type", old_name)
    theta = float(source.number("rope_theta"))
    fraction = source.number("partial_rotary_factor", 1.0)
    if fraction != 1.0:
        raise ConfigError(f"{source.where}: partial_rotary_factor is {fraction}; only 1 is known")
    if kind == "default":
        rope = Rope(theta)
    elif kind == "linear":
        rope = Rope(theta, "linear", float(source.number("factor")))
    elif kind == "llama3":
        rope = Rope(
            theta, "llama3", float(source.number("factor")),
            float(source.number("low_freq_factor")), float(source.number("high_freq_factor")),
            source.count("original_max_position_embeddings"),
        )
    else:
        raise ConfigError(
            f"{source.where}: rope_type is {kind!r}; supported: 'default', 'linear', 'llama3'"
        )
    source.finish()
    return rope


def write_rope(rope: Rope) -> dict[str, Any]:
    """The `rope_parameters` of one setting."""
    out: dict[str, Any] = {"rope_type": rope.kind, "rope_theta": float(rope.theta)}
    if rope.kind != "default":
        out["factor"] = float(rope.factor)
    if rope.kind == "llama3":
        out |= {"low_freq_factor": float(rope.low_freq_factor),
                "high_freq_factor": float(rope.high_freq_factor),
                "original_max_position_embeddings": rope.original_max_len}
    return out


def read_common(
    fields: Fields, *, max_len: int, act: str = "hidden_act", **switches: Any
) -> ModelConfig:
    """The fields that every decoder family shares; `switches` are the family's own settings.

    A field that transformers would fill with a family's own default is read from the file or
    given in `max_len` (where the file does not say how long a text may be) and `switches`; the
    defaults here are those that all families have in common.
    """
    heads, dim = fields.count("num_attention_heads"), fields.count("hidden_size")
    head_dim = fields.take("head_dim", None)
    if head_dim is None:
        if dim % heads:
            raise ConfigError(
                f"{fields.where}: hidden_size {dim} is not a multiple of num_attention_heads "
                f"{heads} and head_dim is not given"
            )
        head_dim = dim // heads
    activation = fields.take(act, switches.pop("activation", "silu"), str)
    if activation not in ACTIVATIONS:
        raise ConfigError(
            f"{fields.where}: {act} is {activation!r}; supported: {list(ACTIVATIONS)}"
        )
    for name in ("quantization_config", "is_encoder_decoder", "tie_encoder_decoder",
                 "use_bidirectional_attention"):
        fields.expect(name, False, None)
    fields.expect("is_causal", True)
    for name in ("attention_bias", "mlp_bias"):
        fields.expect(name, False)
    fields.expect("pretraining_tp", 1)
    tied = switches.pop("tie_embeddings", False)
    rope = switches.pop("rope") if "rope" in switches else read_rope(fields)
    return ModelConfig(
        vocab_size=fields.count("vocab_size"), dim=dim,
        num_layers=read_layers(fields), num_heads=heads,
        num_kv_heads=fields.count("num_key_value_heads", heads), head_dim=head_dim,
        ffn_dim=fields.count("intermediate_size"),
        max_len=fields.count("max_position_embeddings", max_len),
        family=fields.take("model_type"), norm_eps=float(fields.number("rms_norm_eps", 1e-6)),
        rope=rope, activation=ACTIVATIONS[activation],
        tie_embeddings=fields.take("tie_word_embeddings", tied, bool), **switches,
    )


def unless_null(fields: Fields, name: str, default: Any, kind: str = "number") -> Any:
    """A number or count (`kind`) where null means None and absent means the default."""
    if not fields.has(name):
        return default
    return getattr(fields, kind)(name, None) if fields.take(name, None) is not None else None


def read_window(fields: Fields) -> int | None:
    """`sliding_window`, which some Gemma 2 files say twice; the two must agree."""
    window = unless_null(fields, "sliding_window", 4096, "count")
    again = fields.take("sliding_window_size", window)
    if again != window:
        raise ConfigError(
            f"{fields.where}: sliding_window_size is {again!r} but sliding_window {window}; remove "
            "the wrong one"
        )
    return window


def read_layers(fields: Fields) -> int:
    """`num_hidden_layers`, within reason."""
    return fields.count("num_hidden_layers", most=MAX_LAYERS)


def read_windows(
    fields: Fields, window: int | None, is_sliding: Callable[[int], bool]
) -> tuple[int | None, ...]:
    """One window a layer: from `layer_types`, or by the family's rule where the file has none."""
    layers = read_layers(fields)
    kinds = fields.take("layer_types", None, list)
    if kinds is None:
        kinds = [SLIDING if is_sliding(i) else FULL for i in range(layers)]
    if len(kinds) != layers:
        raise ConfigError(
            f"{fields.where}: layer_types has {len(kinds)} entries for {layers} layers"
        )
    for kind in kinds:
        if kind not in (FULL, SLIDING):
            raise ConfigError(
                f"{fields.where}: layer_types holds {kind!r}; supported: {FULL!r}, {SLIDING!r}"
            )
    if SLIDING in kinds and window is None:
        raise ConfigError(
            f"{fields.where}: layer_types asks for {SLIDING!r} but sliding_window is not in use"
        )
    return tuple(window if kind == SLIDING else None for kind in kinds)


def write_windows(config: ModelConfig) -> dict[str, Any]:
    """`sliding_window` and `layer_types`; a model with two widths does not survive the re-reading
    that `to_hf` does."""
    windows = config.windows or (None,) * config.num_layers
    width = next((window for window in windows if window), None)
    kinds = [SLIDING if window else FULL for window in windows]
    return {"sliding_window": width, "layer_types": kinds}


def divided(config: ModelConfig) -> ModelConfig:
    """The config of a family whose width transformers holds to a multiple of its heads.

    Raises: ConfigError for another width, `head_dim` given or not.
    """
    if config.dim % config.num_heads:
        raise ConfigError(
            f"dim {config.dim} is not a multiple of num_heads {config.num_heads}, which "
            f"transformers asks of family {config.family!r}; choose another dim, or a family such "
            "as 'qwen3'"
        )
    return config


def write_common(config: ModelConfig, act: str = "hidden_act") -> dict[str, Any]:
    """The inverse of `read_common`."""
    activations = {ours: theirs for theirs, ours in ACTIVATIONS.items()}
    return {
        "vocab_size": config.vocab_size, "hidden_size": config.dim,
        "num_hidden_layers": config.num_layers, "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads, "head_dim": config.head_dim,
        "intermediate_size": config.ffn_dim, "max_position_embeddings": config.max_len,
        "rms_norm_eps": float(config.norm_eps), act: activations[config.activation],
        "tie_word_embeddings": config.tie_embeddings, "rope_parameters": write_rope(config.rope),
    }
