"""Generated config.json files and safetensors of every family: an error or a right answer.

1,710 cases: 1,170 configurations, 270 changed files and 270 damaged ones.
"""

import json
import struct
from functools import lru_cache

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from experiments import twins
from jaxlm.core.errors import CheckpointError, ConfigError, JaxlmError
from jaxlm.hf.config import from_hf, labels_from_hf, to_hf
from jaxlm.hf.families import family_of
from jaxlm.hf.weights import load_params
from jaxlm.models.config import ModelConfig
from tests.source_tree import documented_cases

NAMES = sorted(twins.CONFIGS)
FIELDS = sorted({field for name in NAMES for field in twins.config_of(name)} | {
    "rope_theta", "rope_scaling", "rope_local_base_freq", "layer_types", "hidden_act",
    "hidden_activation", "attention_bias", "mlp_bias", "pretraining_tp", "quantization_config",
    "use_bidirectional_attention", "partial_rotary_factor", "num_local_experts", "num_labels",
    "query_pre_attn_scalar", "attn_logit_softcapping", "final_logit_softcapping",
    "use_sliding_window", "max_window_layers", "unheard_of", "dtype", "transformers_version",
})
NUMBERS = st.one_of(
    st.integers(-2, 70), st.integers(), st.floats(), st.sampled_from([0, 1e-8, 1e300, 10**400])
)
VALUES = st.one_of(
    NUMBERS, st.none(), st.booleans(), st.text(max_size=5), st.sampled_from(["silu", "gelu"]),
    st.lists(st.sampled_from(["full_attention", "sliding_attention", "x", 3]), max_size=4),
    st.dictionaries(
        st.sampled_from(["rope_type", "type", "rope_theta", "factor", "full_attention", "low",
                         "low_freq_factor", "high_freq_factor", "partial_rotary_factor"]),
        st.one_of(NUMBERS, st.sampled_from(["default", "linear", "llama3", "yarn"]), st.none()),
        max_size=4,
    ),
)
# What an accepted value must have become.
MEANING = {
    "vocab_size": lambda c: c.vocab_size, "hidden_size": lambda c: c.dim,
    "intermediate_size": lambda c: c.ffn_dim, "num_hidden_layers": lambda c: c.num_layers,
    "num_attention_heads": lambda c: c.num_heads, "num_key_value_heads": lambda c: c.num_kv_heads,
    "head_dim": lambda c: c.head_dim, "rms_norm_eps": lambda c: c.norm_eps,
    "tie_word_embeddings": lambda c: c.tie_embeddings, "rope_theta": lambda c: c.rope.theta,
    "logits_scaling": lambda c: c.logit_divisor, "embedding_multiplier": lambda c: c.embed_scale,
    "residual_multiplier": lambda c: c.residual_scale,
    "final_logit_softcapping": lambda c: c.logit_softcap,
    "attn_logit_softcapping": lambda c: c.attention_softcap,
    "attention_multiplier": lambda c: c.attention(0).scale,
    "max_position_embeddings": lambda c: c.max_len,
}
NEVER = {"unheard_of", "num_local_experts", "quantization_config", "partial_rotary_factor",
         "attention_bias", "mlp_bias", "use_bidirectional_attention"}
QUIET = (None, False, [], {})  # off, as 0 is; a field of another family may be there, and off


def check(raw: dict, changes: dict) -> None:
    """An error of ours, or a model that means what the file says and that survives writing."""
    try:
        config = from_hf(raw)
        labels_from_hf(raw)
    except JaxlmError as error:
        assert len(str(error)) > 20
        return
    assert isinstance(config, ModelConfig)
    for field, value in changes.items():
        off = any(value is q or value == q for q in QUIET)
        assert field not in NEVER or off, field
        untied = field == "tie_word_embeddings" and value is False
        if field in MEANING and (not off or untied):
            assert MEANING[field](config) == pytest.approx(value, rel=1e-12), field
    if config.dim % config.num_heads and config.family in ("llama", "gemma2", "gemma3_text"):
        with pytest.raises(ConfigError, match="is not a multiple of num_heads"):
            to_hf(config)
        return
    assert from_hf(to_hf(config)) == config


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=130, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.dictionaries(st.sampled_from(FIELDS), VALUES, min_size=1, max_size=3))
def test_generated_configs(name, changes):
    check(twins.config_of(name) | changes, changes)


@pytest.mark.parametrize("name", NAMES)
def test_every_single_field_missing(name):
    raw = twins.config_of(name)
    for field in raw:
        check({key: value for key, value in raw.items() if key != field}, {})


def test_the_check_notices_a_field_passed_over():
    raw = twins.config_of("llama")
    with pytest.raises(AssertionError):
        check(raw, {"hidden_size": 999})
    with pytest.raises(AssertionError):
        check(raw, {"unheard_of": 1})


@pytest.fixture(scope="module", params=NAMES)
def twin(request, tmp_path_factory):
    folder = twins.write(twins.config_of(request.param), tmp_path_factory.mktemp("twin"))
    return folder, load_file(folder / "model.safetensors")


@lru_cache
def expected(folder):
    """The shapes and the key table of a folder's config.json."""
    raw = json.loads((folder / "config.json").read_text())
    return twins.model_of(raw).shapes(), family_of(raw["model_type"])


def read(folder):
    return load_params(folder, *expected(folder))


@settings(max_examples=30, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_generated_tensors(twin, data):
    """One tensor lost, renamed, reshaped, made an integer or not finite; or nothing done."""
    folder, tensors = twin
    name = data.draw(st.sampled_from(sorted(tensors)))
    what = data.draw(st.sampled_from(["nothing", "lost", "renamed", "shape", "integer", "nan",
                                      "surplus"]))
    changed = dict(tensors)
    value = changed.pop(name)
    if what == "renamed":
        changed[name + "_"] = value
    elif what != "lost":
        bad = {"shape": value.reshape(-1, 1), "integer": value.astype(np.int32),
               "nan": np.where(value == value.max(), np.nan, value)}
        changed[name] = bad.get(what, value)
    if what == "surplus":
        changed["model.layers.9.mlp.up_proj.weight"] = value
    save_file(changed, folder / "model.safetensors")
    if what == "nothing":
        assert (read(folder)["final_norm"]["scale"] == tensors["model.norm.weight"]).all()
        return
    with pytest.raises(CheckpointError):
        read(folder)


@settings(max_examples=30, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_generated_damage(twin, data):
    """Bytes of the header overwritten, or the file cut: an error, or the very same tensors."""
    folder, tensors = twin
    path = folder / "model.safetensors"
    save_file(tensors, path)
    whole = path.read_bytes()
    (header,) = struct.unpack("<Q", whole[:8])
    if data.draw(st.booleans()):
        path.write_bytes(whole[: data.draw(st.integers(0, len(whole) - 1))])
    else:
        at = data.draw(st.integers(0, header + 7))
        path.write_bytes(whole[:at] + data.draw(st.binary(min_size=1, max_size=4)) + whole[at + 1:])
    try:
        found = read(folder)
    except CheckpointError:
        return
    assert (found["final_norm"]["scale"] == tensors["model.norm.weight"]).all()
    assert (found["embed"]["table"] == tensors["model.embed_tokens.weight"]).all()


def test_the_count_is_true():
    stated, count = documented_cases(globals())
    per_twin = 2 * 30  # of tensors and of damage, over the fixture's twins
    assert stated == count + per_twin * (len(NAMES) - 1)
