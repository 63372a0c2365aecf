"""Generated requests, configurations and label heads of every family: an error, or a right answer.

900 cases: 450 requests, 270 valid configurations there and back, 180 tables of labels.
test_bad_input.py has 1,710 more: configurations that need not be valid, changed and damaged files.
"""

import jax
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import jaxlm
from experiments import twins
from jaxlm.core.errors import ConfigError, JaxlmError
from jaxlm.core.tree import flatten
from jaxlm.decode import generate as module
from jaxlm.hf.config import from_hf, labels_from_hf, to_hf
from jaxlm.models.lm import LM, count_params
from tests.source_tree import documented_cases

NAMES = sorted(twins.CONFIGS)
VOCAB, LIMIT = twins.VOCAB, twins.BASE["max_position_embeddings"]
DIVIDED = ("llama", "gemma2", "gemma3_text")  # transformers holds their width to their heads
QUICK = {"deadline": None, "suppress_health_check": list(HealthCheck)}


@pytest.fixture(scope="module")
def bundles(tmp_path_factory):
    base = tmp_path_factory.mktemp("twins")
    return {name: jaxlm.load(twins.write(twins.config_of(name), base / name)) for name in NAMES}


TOKEN = st.one_of(*[st.integers(0, VOCAB - 1)] * 4, st.integers(-2, VOCAB + 2), st.none(),
                  st.booleans(), st.floats(0, 9), st.integers())
PROMPTS = st.lists(st.one_of(
    st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=6), st.lists(TOKEN, max_size=4),
    st.sampled_from(["w5 w9", "", "w3", None, 4]), st.integers(1, LIMIT + 9).map(lambda n: [7] * n),
), max_size=3)


def is_token(value):
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < VOCAB


def is_prompt(value):
    if isinstance(value, str):
        return value != ""
    return isinstance(value, list) and value != [] and all(map(is_token, value))


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=50, **QUICK)
@given(prompts=PROMPTS, room=st.integers(-1, 40), stop=st.lists(TOKEN, max_size=2))
def test_requests(bundles, name, prompts, room, stop):
    """Refused before any compute, or padded right: nothing is cut, nothing is guessed."""
    bundle = bundles[name]
    if is_prompt(prompts):  # a flat list of ids is one prompt
        prompts = [prompts]
    fine = all(map(is_prompt, prompts)) and prompts != []
    fine &= room >= 1 and all(map(is_token, stop))
    if fine:
        lengths = [len(p.split()) if isinstance(p, str) else len(p) for p in prompts]
        fine = max(lengths) + room <= LIMIT
    if not fine:
        with pytest.raises(JaxlmError):
            module.prepare(bundle, prompts, room, None, stop, None)
        return
    job = module.prepare(bundle, prompts, room, None, stop, None)
    assert job.lengths_B.tolist() == lengths and job.stop.ids == tuple(sorted(set(stop)))
    assert job.slots >= max(lengths) + room
    for row, prompt in enumerate(prompts):
        if not isinstance(prompt, str):
            assert job.tokens_BT[row, : len(prompt)].tolist() == prompt
        assert not job.tokens_BT[row, lengths[row]:].any()


SIZES = {"vocab_size": st.integers(8, 90), "hidden_size": st.integers(1, 40),
         "intermediate_size": st.integers(1, 50), "num_hidden_layers": st.integers(1, 2),
         "head_dim": st.integers(1, 20).map(lambda half: 2 * half),
         "num_key_value_heads": st.integers(1, 3), "groups": st.integers(1, 3),
         "rms_norm_eps": st.floats(1e-9, 1e-2), "tie_word_embeddings": st.booleans(),
         "max_position_embeddings": st.integers(2, 10**6)}


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=30, **QUICK)
@given(sizes=st.fixed_dictionaries(SIZES), window=st.integers(1, 9))
def test_valid_configurations(name, sizes, window):
    """Read as written, as many parameters as the shapes say by hand, and written back the same."""
    sizes = dict(sizes)
    sizes["num_attention_heads"] = sizes["num_key_value_heads"] * sizes.pop("groups")
    raw = twins.config_of(name) | sizes
    raw = {key: value for key, value in raw.items() if key != "layer_types"}
    if "sliding_window" in raw:
        raw["sliding_window"] = window
    config = from_hf(raw)
    assert (config.vocab_size, config.dim, config.ffn_dim, config.num_layers) == tuple(
        raw[field] for field in ("vocab_size", "hidden_size", "intermediate_size",
                                 "num_hidden_layers"))
    assert (config.num_heads, config.num_kv_heads, config.head_dim, config.max_len) == tuple(
        raw[field] for field in ("num_attention_heads", "num_key_value_heads", "head_dim",
                                 "max_position_embeddings"))
    assert set(filter(None, config.windows or ())) <= {window}
    assert count_params(LM(config)) == parameters(raw)
    if config.dim % config.num_heads and config.family in DIVIDED:
        with pytest.raises(ConfigError, match="is not a multiple of num_heads"):
            to_hf(config)
        return
    assert from_hf(to_hf(config)) == config


def parameters(raw):
    """By hand, from the published definitions of the families."""
    kind, dim, head = raw["model_type"], raw["hidden_size"], raw["head_dim"]
    q, kv = raw["num_attention_heads"] * head, raw["num_key_value_heads"] * head
    layer = dim * (2 * q + 2 * kv) + 3 * dim * raw["intermediate_size"]
    layer += (4 if kind.startswith("gemma") else 2) * dim
    layer += q + 2 * kv if kind == "qwen2" else 0
    layer += 2 * head if kind in ("qwen3", "gemma3_text") else 0
    tables = 1 if raw["tie_word_embeddings"] else 2
    return raw["num_hidden_layers"] * layer + tables * raw["vocab_size"] * dim + dim


LABEL = st.one_of(st.text(max_size=4), st.none(), st.integers(0, 3))


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=20, **QUICK)
@given(count=st.integers(1, 9), token=st.booleans(), names=st.lists(LABEL, max_size=4))
def test_label_heads(name, count, token, names):
    """A head of as many labels as the file says, or an error; never a head of another size."""
    head = "TokenClassification" if token else "SequenceClassification"
    raw = twins.config_of(name, head)
    if raw["architectures"][0] is None:
        raw["architectures"] = [f"Some{head}"]
    raw = {key: value for key, value in raw.items() if key != "id2label"}
    raw |= {"id2label": dict(enumerate(names))} if names else {"num_labels": count}
    try:
        labels, per_token = labels_from_hf(raw)
        lm = LM(from_hf(raw), labels=labels, per_token=per_token)
    except JaxlmError as error:
        assert len(str(error)) > 20
        return
    assert (labels, per_token) == (len(names) or count, token)
    shapes = flatten(jax.tree.map(lambda leaf: leaf.shape, lm.shapes(),
                                  is_leaf=lambda leaf: hasattr(leaf, "shape")))
    score = [shape for path, shape in shapes.items() if path.startswith("score")]
    assert score and all(labels in shape for shape in score if np.prod(shape) > 0)


def test_the_count_is_true():
    assert documented_cases(globals()) == (900, 900)
