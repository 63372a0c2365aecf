"""What `load` takes: a folder, a bundled name, a hub id; and what it says when it is none."""

import json

import jax
import pytest

import jaxlm.hf.bundle
from jaxlm.core.errors import CheckpointError, ConfigError, DeviceError, JaxlmError, TokenizerError
from jaxlm.core.mesh import make_mesh
from jaxlm.hf.bundle import load, resolve
from tests.tiny import weights, write_folder


@pytest.mark.parametrize("source, words", [
    ("no-such-model", ["'no-such-model'", "neither a folder", "org/name", "tiny"]),
    ("./a/b", ["'./a/b'", "neither a folder"]),
    ("/nowhere/at/all", ["/nowhere/at/all", "neither a folder"]),
    ("a/b/c", ["'a/b/c'", "org/name"]),
])
def test_a_source_that_is_nothing(source, words):
    with pytest.raises(CheckpointError) as error:
        load(source)
    assert all(word in str(error.value) for word in words), str(error.value)


@pytest.mark.parametrize("source", ["", None, 3, b"", ["tiny"]])
def test_a_source_of_the_wrong_kind(source, monkeypatch, tiny_folder):
    monkeypatch.chdir(tiny_folder)  # "" must not mean the folder one happens to stand in
    with pytest.raises(CheckpointError, match="source is .* expected a folder"):
        load(source)


def test_a_file_is_not_a_folder(tmp_path):
    (tmp_path / "model.bin").write_text("x")
    with pytest.raises(CheckpointError, match="is a file; expected a model folder or a hub id"):
        load(tmp_path / "model.bin")


def test_a_hub_id_without_a_network(monkeypatch, tmp_path):
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(CheckpointError) as error:
        load("some-org/some-model")
    words = ("some-org/some-model", "Without a network", "local folder", "'tiny'", "HF_TOKEN")
    assert all(word in str(error.value) for word in words), str(error.value)


def test_a_hub_id_is_fetched_once_it_is_no_folder(monkeypatch, tiny_folder):
    asked = []
    monkeypatch.setattr(jaxlm.hf.bundle, "fetch",
                        lambda name, revision: asked.append((name, revision)) or tiny_folder)
    assert resolve("org/name", "main") == tiny_folder and asked == [("org/name", "main")]


@pytest.mark.parametrize("device", ["gpu", "tpu"])
def test_an_accelerator_that_is_absent(tiny_folder, device):
    if jax.default_backend() == device:
        pytest.skip(f"this machine has a {device}")
    with pytest.raises(DeviceError, match=f"asked for '{device}'.*'cpu'"):
        load(tiny_folder, device=device)


def test_a_bundle_is_shown_in_one_line(tiny_folder, bundle):
    """The size is that of the arrays on disk."""
    count = sum(array.size for array in weights().values())
    on = str(jax.devices()[0])
    assert repr(bundle) == f"Bundle(llama, {count:,} parameters, float32, {on})"
    half = load(tiny_folder, dtype="bfloat16", mesh=make_mesh(data=8))
    assert repr(half) == (f"Bundle(llama, {count:,} parameters, bfloat16, "
                          "mesh {'data': 8, 'fsdp': 1, 'tensor': 1})")


def test_device_and_mesh_exclude_each_other(tiny_folder):
    assert load(tiny_folder, device="cpu").params
    with pytest.raises(ConfigError, match="either a device or a mesh"):
        load(tiny_folder, device="cpu", mesh=make_mesh(data=8))


@pytest.mark.parametrize("named", [None, "LlamaTokenizer", "Qwen2Tokenizer", "GemmaTokenizer"])
def test_no_tokenizer(named, tmp_path):
    """Of a class by its name alone, or of none, transformers may make a tokenizer of no words."""
    folder = write_folder(tmp_path / "m")
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer_config.json").unlink()
    if named:
        (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": named}))
    for check in (True, False):
        with pytest.raises(TokenizerError, match="no tokenizer.json"):
            load(folder, check_tokenizer=check)


def test_no_chat_template(bundle):
    with pytest.raises(JaxlmError, match="no usable chat template"):
        bundle.tokenizer.chat([{"role": "user", "content": "hi"}])


def test_a_device_is_taken_as_it_is(tiny_folder):
    device = jax.devices()[-1]
    assert load(tiny_folder, device=device).params["embed"]["table"].devices() == {device}
    with pytest.raises(ConfigError, match="device is 5; expected 'cpu', 'gpu', 'tpu' or a jax"):
        load(tiny_folder, device=5)


def test_a_setting_that_changes_greedy_text_elsewhere_is_named(tmp_path, recwarn):
    folder = write_folder(tmp_path / "m")
    settings = {"temperature": 0.7, "repetition_penalty": 1.0, "no_repeat_ngram_size": 0}
    (folder / "generation_config.json").write_text(json.dumps(settings))
    load(folder)
    assert not recwarn.list
    settings |= {"repetition_penalty": 1.1}
    (folder / "generation_config.json").write_text(json.dumps(settings))
    named = r"\{'repetition_penalty': 1.1\}, which transformers"
    with pytest.warns(UserWarning, match=named):
        load(folder)
    (folder / "generation_config.json").unlink()  # as older checkpoints have it
    raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(raw | settings))
    with pytest.warns(UserWarning, match=named):
        load(folder)


def test_an_end_that_is_no_token_is_refused_though_another_file_has_one(tmp_path):
    folder = write_folder(tmp_path / "m")
    (folder / "generation_config.json").write_text('{"eos_token_id": 2}')
    raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(raw | {"eos_token_id": "x"}))
    with pytest.raises(ConfigError, match="eos_token_id is 'x'; expected ids from 0"):
        load(folder)


def test_weights_that_are_a_folder(tmp_path):
    folder = write_folder(tmp_path / "m")
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").mkdir()
    with pytest.raises(CheckpointError, match="model.safetensors is a folder"):
        load(folder)


@pytest.mark.parametrize("ids", [[-1], [5, 2**31]])
def test_what_is_no_id_is_not_decoded(bundle, ids):
    with pytest.raises(TokenizerError, match=f"got the id {ids[-1]}; expected ids"):
        bundle.tokenizer.decode(ids)
