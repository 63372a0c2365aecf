"""Generated config.json files: an error that names the field, or what an independent rule says."""

import json
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxlm.core.errors import CheckpointError, ConfigError, JaxlmError
from jaxlm.hf.config import from_hf, read_json, to_hf
from tests.tiny import HF_CONFIG

COUNTS = {"vocab_size": "vocab_size", "hidden_size": "dim", "intermediate_size": "ffn_dim",
          "num_hidden_layers": "num_layers", "num_attention_heads": "num_heads",
          "num_key_value_heads": "num_kv_heads", "head_dim": "head_dim",
          "max_position_embeddings": "max_len"}
JUNK = st.one_of(
    st.none(), st.booleans(), st.integers(), st.integers(-(10**400), 10**400), st.floats(),
    st.text(max_size=4), st.lists(st.integers(), max_size=2), st.just({}), st.just({"a": 1}),
)
MATHS = {"attention_bias": False, "mlp_bias": False, "pretraining_tp": 1,
         "is_encoder_decoder": False, "is_causal": True, "hidden_act": "silu",
         "tie_word_embeddings": False}


def is_count(value) -> bool:
    return type(value) is int and 1 <= value < 2**31


def is_positive(value) -> bool:
    return type(value) in (int, float) and 0 < value < 1e308


@settings(max_examples=400, deadline=None)
@given(st.dictionaries(st.sampled_from(sorted(COUNTS)), st.one_of(st.integers(1, 64), JUNK),
                       min_size=1, max_size=3))
def test_sizes(changes):
    raw = HF_CONFIG | changes
    heads, dim = raw["num_attention_heads"], raw["hidden_size"]
    for name, absent in (("num_key_value_heads", heads), ("max_position_embeddings", 2048)):
        raw[name] = absent if raw[name] is None else raw[name]
    fine = all(is_count(raw[name]) for name in COUNTS if name != "head_dim")
    if fine and raw["head_dim"] is None:
        fine, raw["head_dim"] = dim % heads == 0, dim // heads
    fine = fine and is_count(raw["head_dim"]) and raw["head_dim"] % 2 == 0
    fine = fine and heads % raw["num_key_value_heads"] == 0 and raw["num_hidden_layers"] <= 1024
    if not fine:
        with pytest.raises(ConfigError) as error:
            from_hf(HF_CONFIG | changes)
        names = [*changes, *(COUNTS[name] for name in changes)]
        assert any(name in str(error.value) for name in names), str(error.value)
        return
    config = from_hf(HF_CONFIG | changes)
    assert {ours: getattr(config, ours) for ours in COUNTS.values()} == {
        ours: raw[theirs] for theirs, ours in COUNTS.items()
    }
    if dim % heads:  # read all the same, for some have been published
        with pytest.raises(ConfigError, match=f"dim {dim} is not a multiple of num_heads {heads}"):
            to_hf(config)
        return
    assert from_hf(to_hf(config)) == config


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(sorted(MATHS)), JUNK)
def test_fields_that_change_the_maths(name, value):
    harmless = value is None or (type(value) is type(MATHS[name]) and value == MATHS[name])
    if name == "tie_word_embeddings" and isinstance(value, bool):
        assert from_hf(HF_CONFIG | {name: value}).tie_embeddings is value
    elif harmless:
        assert from_hf(HF_CONFIG | {name: value}) == from_hf(HF_CONFIG)
    else:
        with pytest.raises(ConfigError, match=name):
            from_hf(HF_CONFIG | {name: value})


@settings(max_examples=300, deadline=None)
@given(st.text("abcdefghij_", min_size=4, max_size=12), JUNK)
def test_unknown_fields(name, value):
    name = f"zz_{name}"
    if value is None or value is False or value in ([], {}):  # off; is_causal is read by name
        assert from_hf(HF_CONFIG | {name: value}) == from_hf(HF_CONFIG)
    else:
        with pytest.raises(ConfigError) as error:
            from_hf(HF_CONFIG | {name: value})
        assert repr(name) in str(error.value) and "may change the maths" in str(error.value)
        assert from_hf(HF_CONFIG | {name: value}, [name]) == from_hf(HF_CONFIG)


@settings(max_examples=400, deadline=None)
@given(
    st.sampled_from(["default", "linear", "llama3", "yarn", None, 3, ["default"]]),
    st.dictionaries(st.sampled_from(["rope_theta", "factor", "low_freq_factor", "high_freq_factor",
                                     "original_max_position_embeddings"]),
                    st.one_of(st.floats(1, 1e6), st.integers(1, 9000), JUNK)),
    st.booleans(),
)
def test_rotary_settings(kind, numbers, old_style):
    """Either spelling; what a kind needs must be there, and what it does not know must not."""
    numbers = {name: value for name, value in numbers.items() if value is not None}
    needs = {"default": set(), "linear": {"factor"},
             "llama3": {"factor", "low_freq_factor", "high_freq_factor",
                        "original_max_position_embeddings"}}
    theta = numbers.pop("rope_theta", None)
    if old_style:
        raw = {name: value for name, value in HF_CONFIG.items() if name != "rope_parameters"}
        raw |= {"rope_scaling": {"type": kind, **numbers}, "rope_theta": theta}
    else:
        raw = HF_CONFIG | {"rope_parameters": {"rope_type": kind, "rope_theta": theta, **numbers}}
    wanted = needs.get(kind if isinstance(kind, str) else "default" if kind is None else "?")
    off = {name for name, value in numbers.items() if value is False or value in ([], {})}
    fine = wanted is not None and wanted <= set(numbers) and set(numbers) - off <= wanted
    fine = fine and all(is_positive(numbers[name]) for name in wanted)
    fine = fine and (is_positive(theta) or (old_style and theta is None))
    if fine and kind == "llama3":
        fine = numbers["low_freq_factor"] < numbers["high_freq_factor"]
        fine = fine and is_count(numbers["original_max_position_embeddings"])
    if not fine:
        with pytest.raises(ConfigError, match="rope|factor|original_max"):
            from_hf(raw)
        return
    config = from_hf(raw)
    rope = config.rope
    assert rope.kind == (kind or "default") and rope.theta == float(theta or 10000.0)
    for name in wanted:
        ours = "original_max_len" if name.startswith("original") else name
        assert getattr(rope, ours) == numbers[name]
    assert from_hf(to_hf(config)) == config


@settings(max_examples=200, deadline=None)
@given(st.one_of(JUNK, st.text(max_size=12)))
def test_model_type(value):
    if isinstance(value, str) and value == "llama":
        return
    with pytest.raises(ConfigError, match="model_type.*supported.*llama"):
        from_hf(HF_CONFIG | {"model_type": value})


@pytest.mark.parametrize("changes, words", [
    ({"rope_theta": 500.0}, ["rope_theta", "500", "10000"]),
    ({"rope_scaling": {"rope_type": "linear", "factor": 2.0}}, ["rope_scaling", "rope_parameters"]),
    ({"quantization_config": {"bits": 4}}, ["quantization_config", "bits"]),
    ({"pruned_heads": {"0": [1]}}, ["pruned_heads"]),
    ({"residual_multiplier": 0}, ["residual_multiplier", "0"]),
    ({"sliding_window": 16}, ["sliding_window", "16"]),
    ({"rms_norm_eps": math.nan}, ["rms_norm_eps", "nan"]),
    ({"rms_norm_eps": 0}, ["norm_eps", "0"]),
])
def test_fields_that_contradict_or_cannot_be_expressed(changes, words):
    with pytest.raises(ConfigError) as error:
        from_hf(HF_CONFIG | changes)
    assert all(word in str(error.value) for word in words), str(error.value)


def test_a_family_that_cannot_say_it_is_refused():
    config = from_hf(HF_CONFIG).replace(qk_norm=True)
    with pytest.raises(ConfigError, match="llama.*cannot express qk_norm"):
        to_hf(config)


@settings(max_examples=300, deadline=None)
@given(st.one_of(
    st.binary(max_size=40),
    st.integers(0, len(json.dumps(HF_CONFIG)) - 1).map(
        lambda cut: json.dumps(HF_CONFIG).encode()[:cut]),
    st.sampled_from([b"[" * 10**5, b'{"a": ' + b"9" * 5000 + b"}", b"[]", b"null", b"\xff\xfe{}"]),
))
def test_damaged_json(tmp_path_factory, text):
    path = tmp_path_factory.getbasetemp() / "damaged.json"
    path.write_bytes(text)
    try:
        expected = json.loads(text.decode("utf-8"))
    except (ValueError, RecursionError):
        expected = None
    if isinstance(expected, dict):
        assert read_json(path) == expected
    else:
        with pytest.raises(CheckpointError, match="damaged.json"):
            read_json(path)


def test_a_missing_or_unreadable_json_names_its_path(tmp_path):
    with pytest.raises(JaxlmError, match="config.json is missing"):
        read_json(tmp_path / "config.json")
    (tmp_path / "config.json").mkdir()
    with pytest.raises(CheckpointError, match="config.json cannot be read"):
        read_json(tmp_path / "config.json")
