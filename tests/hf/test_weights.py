"""Checkpoints that are damaged, incomplete or not what config.json says: an error, no compute."""

import json
import shutil
import struct

import jax
import ml_dtypes
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from jaxlm.core.errors import CheckpointError, JaxlmError
from jaxlm.core.tree import flatten
from jaxlm.hf.bundle import load
from jaxlm.hf.config import from_hf
from jaxlm.hf.families import FAMILIES
from jaxlm.hf.weights import INDEX, SINGLE, load_params, locate, save_params
from jaxlm.models.lm import LM
from tests.tiny import HF_CONFIG, contents, tokenizer_json, weights, write_folder

GATE = "model.layers.1.mlp.gate_proj.weight"


def fails(folder, *words, error=CheckpointError):
    """Loading says all the words, and touches nothing."""
    before = contents(folder)
    with pytest.raises(error) as caught:
        load(folder)
    assert all(word in str(caught.value) for word in words), str(caught.value)
    assert contents(folder) == before


def changed(name, value):
    """The tiny weights with one tensor changed, or gone for None."""
    tensors = weights() | {name: value}
    return {name: array for name, array in tensors.items() if array is not None}


@pytest.mark.parametrize("tensors, words", [
    (changed(GATE, None), [GATE, "missing", "1 in all"]),
    (changed("model.layers.2.extra", np.zeros(3, np.float32)), ["layers.2.extra", "no place"]),
    (changed(GATE, np.zeros((16, 24), np.float32)), [GATE, "(16, 24)", "(24, 16)"]),
    (changed(GATE, np.zeros((24, 16), np.int64)), [GATE, "I64", "BF16"]),
    (changed(GATE, np.full((24, 16), np.nan, np.float32)), [GATE, "NaN or infinity"]),
    (changed(GATE, np.full((24, 16), -np.inf, np.float16)), [GATE, "infinity"]),
    (changed(GATE, np.full((24, 16), 1e300)), [GATE, "infinity"]),
])
def test_tensors_that_do_not_fit(tmp_path, tensors, words):
    fails(write_folder(tmp_path / "m", tensors=tensors), *words)


def test_checks_come_before_any_tensor_is_placed(tmp_path, monkeypatch):
    folder = write_folder(tmp_path / "m", tensors=changed("model.norm.weight", np.zeros(3)))
    monkeypatch.setattr(jax, "device_put", lambda *_: pytest.fail("placed before all was checked"))
    fails(folder, "model.norm.weight", "(3,)", "(16,)")


def test_missing_file_and_pickle(tmp_path):
    folder = write_folder(tmp_path / "m")
    (folder / SINGLE).unlink()
    fails(folder, SINGLE, "missing")
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04cposix\nsystem\n")
    fails(folder, "pytorch_model.bin", "pickle", "never loaded", "convert")


@pytest.mark.parametrize("cut", [0, 4, 8, 100, -1])
def test_truncated_file(tmp_path, cut):
    folder = write_folder(tmp_path / "m")
    data = (folder / SINGLE).read_bytes()
    (folder / SINGLE).write_bytes(data[:cut])
    fails(folder, SINGLE, "not a whole safetensors file", "fetch it again")


@pytest.fixture(scope="module")
def scratch(tmp_path_factory):
    """A folder whose weights each case overwrites."""
    return write_folder(tmp_path_factory.mktemp("scratch") / "m")


ENTRIES = st.fixed_dictionaries({
    "dtype": st.sampled_from(["F32", "F64", "I64", "BF16", "XX", "", 3]),
    "shape": st.one_of(st.lists(st.integers(-1, 70), max_size=3), st.just("x"), st.just([2**63])),
    "data_offsets": st.one_of(st.lists(st.integers(-1, 5000), max_size=3), st.none()),
})


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.one_of(
    st.binary(max_size=60),
    st.dictionaries(st.sampled_from([GATE, "model.norm.weight", "x"]), ENTRIES, max_size=3),
    st.tuples(st.integers(0, 2**64 - 1), st.binary(max_size=20)),
))
def test_generated_headers(scratch, made):
    """No header made up here describes the model; each is refused before a tensor is read."""
    if isinstance(made, dict):
        header = json.dumps(made).encode()
        made = struct.pack("<Q", len(header)) + header + bytes(64)
    elif isinstance(made, tuple):
        made = struct.pack("<Q", made[0]) + made[1]
    (scratch / SINGLE).write_bytes(made)
    config = from_hf(HF_CONFIG)
    with pytest.raises(CheckpointError):
        load_params(scratch, LM_SHAPES, FAMILIES[config.family])


LM_SHAPES = LM(from_hf(HF_CONFIG)).shapes()


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.data())
def test_a_flipped_byte_is_an_error_or_leaves_the_header_s_meaning(scratch, data):
    """Names and shapes cannot change in silence; numbers can, since the format has no checksum."""
    write_folder(scratch)
    whole = bytearray((scratch / SINGLE).read_bytes())
    header = struct.unpack("<Q", whole[:8])[0]
    at = data.draw(st.integers(0, 8 + header - 1))
    whole[at] ^= data.draw(st.integers(1, 255))
    (scratch / SINGLE).write_bytes(whole)
    try:
        found = load_params(scratch, LM_SHAPES, FAMILIES["llama"])
    except CheckpointError:
        return
    shape = lambda tree: {path: leaf.shape for path, leaf in flatten(tree).items()}
    assert shape(found) == shape(LM_SHAPES)


def sharded(folder):
    """The tiny folder in shards, with its index."""
    write_folder(folder)
    bundle = load(folder)
    (folder / SINGLE).unlink()
    save_params(folder, bundle.params, FAMILIES["llama"], shard_bytes=20_000)
    return json.loads((folder / INDEX).read_text()), bundle


def test_shards_load_as_one(tmp_path):
    index, bundle = sharded(tmp_path / "m")
    assert len(set(index["weight_map"].values())) > 2
    jax.tree.map(np.testing.assert_array_equal, load(tmp_path / "m").params, bundle.params)


@pytest.mark.parametrize("change, words", [
    (lambda m: {**m, GATE: "absent.safetensors"}, ["absent.safetensors", "missing"]),
    (lambda m: {**m, GATE: "../m/" + m[GATE]}, ["../m/", "plain file name"]),
    (lambda m: {**m, GATE: "/etc/passwd"}, ["/etc/passwd", "plain file name"]),
    (lambda m: {**m, "model.extra": m[GATE]}, ["model.extra", m_word := "does not"]),
    (lambda m: {**m, GATE: next(f for f in m.values() if f != m[GATE])}, [GATE, m_word]),
    (lambda m: {}, ["no weight_map"]),
    (lambda m: [1], ["no weight_map"]),
], ids=["absent", "escape", "absolute", "surplus", "elsewhere", "empty", "list"])
def test_an_index_that_is_wrong(tmp_path, change, words):
    index, _ = sharded(tmp_path / "m")
    index["weight_map"] = change(index["weight_map"])
    (tmp_path / "m" / INDEX).write_text(json.dumps(index))
    fails(tmp_path / "m", *words)


def test_a_tensor_in_two_shards_is_refused(tmp_path):
    index, _ = sharded(tmp_path / "m")
    other = tmp_path / "m" / next(f for f in index["weight_map"].values()
                                  if f != index["weight_map"][GATE])
    save_file(load_file(other) | {GATE: np.ones((24, 16), np.float32)}, other)
    fails(tmp_path / "m", GATE, "in both", other.name)


def test_a_whole_file_comes_before_an_index(tmp_path):
    """As in transformers: an index left over from another save is not followed."""
    folder = write_folder(tmp_path / "m")
    (folder / INDEX).write_text(json.dumps({"weight_map": {GATE: "gone.safetensors"}}))
    assert set(locate(folder).values()) == {folder / SINGLE}


def test_a_head_beside_a_tied_embedding_must_equal_it(tmp_path):
    config = HF_CONFIG | {"tie_word_embeddings": True}
    table = weights()["model.embed_tokens.weight"]
    tied = weights(config) | {"lm_head.weight": table}
    expected = write_folder(tmp_path / "a", config, tied | {"model.embed_tokens.weight": table})
    assert "head" not in load(expected).params
    tied["lm_head.weight"] = table + 1
    fails(write_folder(tmp_path / "b", config, tied), "lm_head.weight", "differ",
          "tie_word_embeddings")


def test_old_buffers_are_passed_over(tmp_path):
    extra = {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": np.ones(4, np.float32)
             for i in range(2)}
    assert load(write_folder(tmp_path / "m", tensors=weights() | extra)).params


@pytest.mark.parametrize("stored", [np.float64, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_float_dtype_is_read_and_cast(tmp_path, stored, dtype):
    tensors = {name: array.astype(stored) for name, array in weights().items()}
    bundle = load(write_folder(tmp_path / "m", tensors=tensors), dtype=dtype)
    table = bundle.params["embed"]["table"]
    assert table.dtype == dtype
    np.testing.assert_array_equal(
        np.asarray(table), tensors["model.embed_tokens.weight"].astype(dtype)
    )


def test_a_dtype_that_cannot_hold_the_numbers(tmp_path):
    folder = write_folder(tmp_path / "m", tensors=changed(GATE, np.full((24, 16), 1e5, np.float32)))
    with pytest.raises(CheckpointError, match="100000.0, beyond float16.*bfloat16"):
        load(folder, dtype="float16")
    for bad in ("int8", "float33", int, "float64"):
        with pytest.raises(JaxlmError, match="expected float32, bfloat16, float16 or 'own'"):
            load(folder, dtype=bad)


@pytest.mark.parametrize("what, words", [
    ("tokenizer.json", ["tokenizer.json", "damaged"]),
    ("config.json", ["config.json", "not valid JSON"]),
    ("generation_config.json", ["generation_config.json", "not valid JSON"]),
    ("tokenizer_config.json", ["tokenizer_config.json", "not valid JSON"]),
])
def test_damaged_companions(tmp_path, what, words):
    folder = write_folder(tmp_path / "m")
    (folder / what).write_text('{"a": ')
    fails(folder, *words, error=JaxlmError)


def test_an_unknown_field_may_be_ignored_by_name(tmp_path):
    folder = write_folder(tmp_path / "m", unheard_of=3)
    fails(folder, "unheard_of", "ignore_fields=['unheard_of']", error=JaxlmError)
    assert load(folder, ignore_fields=["unheard_of"]).params


def test_the_tokenizer_of_another_model(tmp_path):
    folder = write_folder(tmp_path / "m", bos_token_id=5)
    fails(folder, "bos_token is id 256", "says 5", "another model", error=JaxlmError)
    made = tokenizer_json()
    made["model"]["vocab"] = {name: i + 200 for name, i in made["model"]["vocab"].items()}
    shutil.copytree(write_folder(tmp_path / "n"), tmp_path / "o")
    (tmp_path / "o" / "tokenizer.json").write_text(json.dumps(made))
    fails(tmp_path / "o", "455", "vocabulary is 258", "another model", error=JaxlmError)


@pytest.mark.parametrize("eos", [True, "2", -1, 258, [1, 2.0]])
def test_end_ids_must_be_ids(tmp_path, eos):
    fails(write_folder(tmp_path / "m", eos_token_id=eos), "eos_token_id", "0 to 257",
          error=JaxlmError)


def test_a_tokenizer_file_that_cuts_or_pads_does_neither(tmp_path):
    folder = write_folder(tmp_path / "m")
    made = tokenizer_json()
    made["truncation"] = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst",
                          "stride": 0}
    made["padding"] = {"strategy": {"Fixed": 50}, "direction": "Right", "pad_to_multiple_of": None,
                       "pad_id": 0, "pad_type_id": 0, "pad_token": "<s>"}
    (folder / "tokenizer.json").write_text(json.dumps(made))
    assert len(load(folder).tokenizer.encode("a text of 22 bytes, ok")) == 22
