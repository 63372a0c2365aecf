"""Each family: its config.json to ModelConfig and back, and what its tensors are called."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from jaxlm.core.errors import ConfigError
from jaxlm.hf.fields import Fields
from jaxlm.models.config import ModelConfig, Rope

ACTIVATIONS = {"silu": "silu", "gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu"}

LAYER_NAMES = {
    "attn_norm/scale": "input_layernorm.weight",
    "mlp_norm/scale": "post_attention_layernorm.weight",
    **{f"attn/{p}/kernel": f"self_attn.{p}_proj.weight" for p in "qkvo"},
    **{f"attn/{p}/bias": f"self_attn.{p}_proj.bias" for p in "qkv"},
    **{f"attn/{p}_norm/scale": f"self_attn.{p}_norm.weight" for p in "qk"},
    **{f"mlp/{p}/kernel": f"mlp.{p}_proj.weight" for p in ("gate", "up", "down")},
}
TOP_NAMES = {
    "embed/table": "model.embed_tokens.weight",
    "head/table": "lm_head.weight",
    "final_norm/scale": "model.norm.weight",
}


@dataclass(frozen=True)
class Family:
    """One `model_type`: config both ways, the architecture's name, and renamed layer tensors."""

    architecture: str
    read: Callable[[Fields], ModelConfig]
    write: Callable[[ModelConfig], dict[str, Any]]
    layer_names: dict[str, str] = field(default_factory=dict)


def read_rope(fields: Fields, theta: float = 10000.0) -> Rope:
    """Rotary settings from `rope_parameters` (transformers 5), or from the older pair of fields."""
    new = fields.take("rope_parameters", None, dict)
    old = fields.take("rope_scaling", None, dict)
    bare = fields.number("rope_theta", None)
    if new is None:
        source, where = dict(old or {}), "rope_scaling"
        source["rope_theta"] = bare if bare is not None else theta
    else:
        if old is not None and _scaling(old) != _scaling(new):
            raise ConfigError(
                f"config.json: rope_scaling is {old} but rope_parameters is {new}; "
                "remove the wrong one"
            )
        source, where = dict(new), "rope_parameters"
        if bare is not None and source.get("rope_theta", bare) != bare:
            raise ConfigError(
                f"config.json: rope_theta is {bare} but rope_parameters says "
                f"{source['rope_theta']}; remove the wrong one"
            )
        source.setdefault("rope_theta", bare)
    return rope_from(Fields(source, f"config.json {where}"), fields)


def _scaling(raw: dict[str, Any]) -> dict[str, Any]:
    """A rope setting without its theta, under the newer name of its kind."""
    return {"rope_type" if name == "type" else name: value for name, value in raw.items()
            if name != "rope_theta"}


def rope_from(source: Fields, fields: Fields) -> Rope:
    """One rope setting; `fields` gives the model's own length where a scaling leaves it out."""
    kind = source.take("rope_type", source.take("type", "default"))
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
    out: dict[str, Any] = {"rope_type": rope.kind, "rope_theta": rope.theta}
    if rope.kind != "default":
        out["factor"] = rope.factor
    if rope.kind == "llama3":
        out |= {"low_freq_factor": rope.low_freq_factor,
                "high_freq_factor": rope.high_freq_factor,
                "original_max_position_embeddings": rope.original_max_len}
    return out


def read_common(fields: Fields, *, tied: bool = False, activation: str = "silu",
                theta: float = 10000.0, **switches: Any) -> ModelConfig:
    """The fields that every decoder family shares; `switches` are the family's own."""
    heads, dim = fields.count("num_attention_heads"), fields.count("hidden_size")
    head_dim = fields.take("head_dim", None)
    if head_dim is None:
        if dim % heads:
            raise ConfigError(
                f"config.json: hidden_size {dim} is not a multiple of num_attention_heads {heads} "
                "and head_dim is not given"
            )
        head_dim = dim // heads
    act = fields.take("hidden_act", activation)
    if not isinstance(act, str) or act not in ACTIVATIONS:
        raise ConfigError(f"config.json: hidden_act is {act!r}; supported: {list(ACTIVATIONS)}")
    for name in ("quantization_config", "is_encoder_decoder", "tie_encoder_decoder"):
        fields.expect(name, False, None)
    fields.expect("pretraining_tp", 1)
    fields.expect("mlp_bias", False)
    return ModelConfig(
        vocab_size=fields.count("vocab_size"), dim=dim,
        num_layers=fields.count("num_hidden_layers"), num_heads=heads,
        num_kv_heads=fields.count("num_key_value_heads", heads), head_dim=head_dim,
        ffn_dim=fields.count("intermediate_size"),
        max_len=fields.count("max_position_embeddings", 2048),
        family=fields.take("model_type"), norm_eps=float(fields.number("rms_norm_eps", 1e-6)),
        rope=read_rope(fields, theta), activation=ACTIVATIONS[act],
        tie_embeddings=fields.take("tie_word_embeddings", tied, bool), **switches,
    )


def write_common(config: ModelConfig) -> dict[str, Any]:
    """The inverse of `read_common`."""
    activations = {ours: theirs for theirs, ours in ACTIVATIONS.items()}
    return {
        "vocab_size": config.vocab_size, "hidden_size": config.dim,
        "num_hidden_layers": config.num_layers, "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads, "head_dim": config.head_dim,
        "intermediate_size": config.ffn_dim, "max_position_embeddings": config.max_len,
        "rms_norm_eps": config.norm_eps, "hidden_act": activations[config.activation],
        "tie_word_embeddings": config.tie_embeddings, "rope_parameters": write_rope(config.rope),
    }


def read_llama(fields: Fields) -> ModelConfig:
    """Llama 1 to 3.2, and SmolLM2, which is published as one."""
    fields.expect("attention_bias", False)
    return read_common(fields)


def write_llama(config: ModelConfig) -> dict[str, Any]:
    """The inverse of `read_llama`."""
    return write_common(config) | {"attention_bias": False, "mlp_bias": False}


FAMILIES: dict[str, Family] = {
    "llama": Family("LlamaForCausalLM", read_llama, write_llama),
}


def family_of(model_type: Any) -> Family:
    """The entry of one `model_type`; ConfigError names what is supported."""
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise ConfigError(
            f"config.json: field 'model_type' is {model_type!r}; supported: {sorted(FAMILIES)}"
        )
    return FAMILIES[model_type]


def tensor_name(path: str, family: Family) -> str:
    """The Hugging Face name of one of our parameters.

    >>> tensor_name("layers_3/attn/q/kernel", FAMILIES["llama"])
    'model.layers.3.self_attn.q_proj.weight'
    """
    if path in TOP_NAMES:
        return TOP_NAMES[path]
    layer, rest = path.split("/", 1)
    name = (LAYER_NAMES | family.layer_names)[rest]
    return f"model.layers.{layer.removeprefix('layers_')}.{name}"
