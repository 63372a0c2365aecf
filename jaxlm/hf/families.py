"""Each family: its config.json to ModelConfig and back, and what its tensors are called."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from jaxlm.core.errors import ConfigError
from jaxlm.hf.common import (
    FULL,
    SLIDING,
    divided,
    read_common,
    read_layers,
    read_window,
    read_windows,
    rope_from,
    unless_null,
    write_common,
    write_rope,
    write_windows,
)
from jaxlm.hf.fields import Fields
from jaxlm.models.config import ModelConfig, Rope

LAYER_NAMES = {
    "attn_norm/scale": "input_layernorm.weight",
    "mlp_norm/scale": "post_attention_layernorm.weight",
    **{f"attn/{p}/kernel": f"self_attn.{p}_proj.weight" for p in "qkvo"},
    **{f"attn/{p}/bias": f"self_attn.{p}_proj.bias" for p in "qkv"},
    **{f"attn/{p}_norm/scale": f"self_attn.{p}_norm.weight" for p in "qk"},
    **{f"mlp/{p}/kernel": f"mlp.{p}_proj.weight" for p in ("gate", "up", "down")},
}
GEMMA_NAMES = {
    "attn_post_norm/scale": "post_attention_layernorm.weight",
    "mlp_norm/scale": "pre_feedforward_layernorm.weight",
    "mlp_post_norm/scale": "post_feedforward_layernorm.weight",
}
TOP_NAMES = {
    "embed/table": "model.embed_tokens.weight",
    "head/table": "lm_head.weight",
    "score/table": "score.weight",
    "score/bias": "score.bias",
    **{f"score/{part}/{ours}": f"score.{number}.{theirs}"
       for part, number in (("inner", 0), ("outer", 2))  # 1 is the activation
       for ours, theirs in (("table", "weight"), ("bias", "bias"))},
    "final_norm/scale": "model.norm.weight",
}


@dataclass(frozen=True)
class Family:
    """One `model_type`: config both ways, transformers' class names, and renamed layer tensors.

    `sequence` and `token`: the classes with a label head; None where transformers has none.
    """

    architecture: str
    read: Callable[[Fields], ModelConfig]
    write: Callable[[ModelConfig], dict[str, Any]]
    layer_names: dict[str, str] = field(default_factory=dict)
    sequence: str | None = None
    token: str | None = None


def read_llama(fields: Fields) -> ModelConfig:
    """Llama 1 to 3.2, and SmolLM2, which is published as one; 3.1 and 3.2 scale slow rotations."""
    return read_common(fields, max_len=2048)


def write_llama(config: ModelConfig) -> dict[str, Any]:
    """The inverse of `read_llama`."""
    return write_common(divided(config)) | {"attention_bias": False, "mlp_bias": False}


def read_mistral(fields: Fields) -> ModelConfig:
    """Mistral 7B: Llama with a window on every layer; 0.2 and later have none (null)."""
    fields.count("num_key_value_heads")
    window = read_window(fields)
    windows = (window,) * read_layers(fields)
    return read_common(fields, max_len=131072, windows=windows)


def write_mistral(config: ModelConfig) -> dict[str, Any]:
    """The inverse of `read_mistral`."""
    return write_common(config) | {"sliding_window": write_windows(config)["sliding_window"]}


def read_qwen2(fields: Fields) -> ModelConfig:
    """Qwen 2 and 2.5: biases on q, k and v; a window, if switched on, in the upper layers."""
    return read_common(fields, max_len=32768, qkv_bias=True, windows=_qwen_windows(fields))


def read_qwen3(fields: Fields) -> ModelConfig:
    """Qwen 3: no biases; every head's queries and keys are normalised before rotation."""
    fields.count("head_dim")  # need not be hidden_size / heads
    return read_common(fields, max_len=32768, qk_norm=True, windows=_qwen_windows(fields))


def _qwen_windows(fields: Fields) -> tuple[int | None, ...]:
    fields.count("num_key_value_heads")
    window = read_window(fields)
    first = fields.take("max_window_layers", 28, int)
    if not fields.take("use_sliding_window", False, bool):
        window = None
    return read_windows(fields, window, lambda layer: window is not None and layer >= first)


def write_qwen(config: ModelConfig) -> dict[str, Any]:
    """The inverse of `read_qwen2` and `read_qwen3`; `layer_types` says it all."""
    windows = write_windows(config)
    return write_common(config) | windows | {
        "use_sliding_window": windows["sliding_window"] is not None,
        "max_window_layers": config.num_layers,
    }


def read_gemma2(fields: Fields) -> ModelConfig:
    """Gemma 2: soft caps on scores and logits, norms after each branch too, every other layer
    windowed, norm scales stored minus 1, embeddings times sqrt(D). Source: 2408.00118."""
    window = read_window(fields)
    return read_common(
        fields, max_len=8192, **_gemma_switches(fields),
        windows=read_windows(fields, window, lambda layer: layer % 2 == 0),
        attention_softcap=unless_null(fields, "attn_logit_softcapping", 50.0),
        logit_softcap=unless_null(fields, "final_logit_softcapping", 30.0),
    )


def write_gemma2(config: ModelConfig) -> dict[str, Any]:
    """The inverse of `read_gemma2`."""
    return _write_gemma(config) | {"attn_logit_softcapping": _real(config.attention_softcap)}


def read_gemma3(fields: Fields) -> ModelConfig:
    """Gemma 3, text: Gemma 2 without the cap on scores, with normalised queries and keys, five
    windowed layers to a full one, and their own rotary base. Source: 2503.19786."""
    window = read_window(fields)
    period = fields.count("sliding_window_pattern", 6)
    fields.take("_sliding_window_pattern", None)  # transformers' note to itself
    # transformers 5 reads this cap and never applies it, so no value has one meaning
    fields.expect("attn_logit_softcapping", None)
    rope, local_rope = _gemma3_ropes(fields)
    return read_common(
        fields, max_len=131072, **_gemma_switches(fields), rope=rope, local_rope=local_rope,
        qk_norm=True,
        windows=read_windows(fields, window, lambda layer: (layer + 1) % period != 0),
        logit_softcap=unless_null(fields, "final_logit_softcapping", None),
    )


def write_gemma3(config: ModelConfig) -> dict[str, Any]:
    """The inverse of `read_gemma3`."""
    ropes = {FULL: write_rope(config.rope), SLIDING: write_rope(config.local_rope or config.rope)}
    return _write_gemma(config) | {"rope_parameters": ropes}


def _gemma_switches(fields: Fields) -> dict[str, Any]:
    for name in ("head_dim", "num_key_value_heads"):
        fields.count(name)
    activation = fields.take("hidden_activation", "gelu_pytorch_tanh")
    if fields.take("hidden_act", activation) != activation:
        raise ConfigError(
            f"{fields.where}: hidden_act is {fields.raw['hidden_act']!r} but hidden_activation, "
            f"which Gemma computes with, is {activation!r}; remove the wrong one"
        )
    return {
        "act": "hidden_activation", "activation": "gelu_pytorch_tanh", "tie_embeddings": True,
        "post_norms": True, "norm_offset": 1.0, "embed_scale": fields.count("hidden_size") ** 0.5,
        "attention_scale": fields.count("query_pre_attn_scalar", 256) ** -0.5,
    }


def _write_gemma(config: ModelConfig) -> dict[str, Any]:
    scale = max(config.attention_scale or config.head_dim**-0.5, 1e-9)
    return write_common(divided(config), act="hidden_activation") | write_windows(config) | {
        "query_pre_attn_scalar": max(round(scale**-2), 1),
        "final_logit_softcapping": _real(config.logit_softcap),
    }


def _real(value: float | None) -> float | None:
    """A number as a float: transformers' strict configs refuse an int in its place."""
    return None if value is None else float(value)


def _gemma3_ropes(fields: Fields) -> tuple[Rope, Rope]:
    """The rotary settings of full and of windowed layers, in the new nested or the old flat form.

    An old `rope_scaling` is for the full layers alone.
    """
    new = fields.take("rope_parameters", None, dict)
    old = fields.take("rope_scaling", None, dict)
    if new is not None and old:
        raise ConfigError(
            f"{fields.where}: both rope_scaling and rope_parameters are given; remove the wrong one"
        )
    nested = Fields(new or {FULL: old}, f"{fields.where} rope_parameters")
    ropes = []
    for kind, flat, default in (
        (FULL, "rope_theta", 1e6), (SLIDING, "rope_local_base_freq", 1e4)
    ):
        bare = fields.number(flat, None)
        source = dict(nested.take(kind, {}, dict))
        theta = source.setdefault("rope_theta", default if bare is None else bare)
        if bare is not None and theta != bare:
            raise ConfigError(
                f"{fields.where}: {flat} is {bare} but rope_parameters says {theta} for {kind}; "
                "remove the wrong one"
            )
        ropes.append(rope_from(Fields(source, f"{nested.where} {kind}")))
    nested.finish()
    return ropes[0], ropes[1]


def read_granite(fields: Fields) -> ModelConfig:
    """Granite 3: Llama with four multipliers: embeddings, residual branches and scores are
    multiplied, logits divided. Absent ones are 1, the score's too, as transformers has it."""
    return read_common(
        fields, max_len=2048,
        embed_scale=float(fields.number("embedding_multiplier", 1.0)),
        residual_scale=float(fields.number("residual_multiplier", 1.0)),
        attention_scale=float(fields.number("attention_multiplier", 1.0)),
        logit_divisor=float(fields.number("logits_scaling", 1.0)),
    )


def write_granite(config: ModelConfig) -> dict[str, Any]:
    """The inverse of `read_granite`."""
    return write_common(config) | {
        "attention_bias": False, "mlp_bias": False,
        "embedding_multiplier": float(config.embed_scale),
        "residual_multiplier": float(config.residual_scale),
        "attention_multiplier": float(config.attention_scale or config.head_dim**-0.5),
        "logits_scaling": float(config.logit_divisor),
    }


def _family(
    name: str, read: Callable, write: Callable, layer_names: dict[str, str] | None = None
) -> Family:
    """A family whose label classes are named like its language model."""
    return Family(f"{name}ForCausalLM", read, write, layer_names or {},
                  f"{name}ForSequenceClassification", f"{name}ForTokenClassification")


FAMILIES: dict[str, Family] = {
    "llama": _family("Llama", read_llama, write_llama),
    "mistral": _family("Mistral", read_mistral, write_mistral),
    "qwen2": _family("Qwen2", read_qwen2, write_qwen),
    "qwen3": _family("Qwen3", read_qwen3, write_qwen),
    "gemma2": _family("Gemma2", read_gemma2, write_gemma2, GEMMA_NAMES),
    "gemma3_text": Family("Gemma3ForCausalLM", read_gemma3, write_gemma3, GEMMA_NAMES,
                          "Gemma3TextForSequenceClassification"),
    "granite": Family("GraniteForCausalLM", read_granite, write_granite),
}
HINTS = {
    "gemma3": "it is the model of text and images; save its language model alone (gemma3_text), "
              "by the lines in docs/checkpoints.md: text = Gemma3ForCausalLM(whole.config."
              "text_config); text.model, text.lm_head = whole.model.language_model, whole.lm_head",
}


def family_of(model_type: Any) -> Family:
    """The entry of one `model_type`; ConfigError names what is supported."""
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        hint = HINTS.get(model_type, "") if isinstance(model_type, str) else ""
        raise ConfigError(
            f"config.json: field 'model_type' is {model_type!r}; supported: {sorted(FAMILIES)}"
            + (f". {hint[0].upper()}{hint[1:]}" if hint else "")
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
