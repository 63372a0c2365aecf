"""The tokenizer of another model: refused as far as sizes and the begin token tell."""

import json
import re
import shutil

import pytest

from jaxlm.core.errors import ConfigError, TokenizerError
from jaxlm.hf.bundle import BUNDLED, is_padding, load
from tests.tiny import BOS, EOS, VOCAB, tokenizer_json, write_folder


def fails(folder, *words):
    """Loading says all the words."""
    with pytest.raises(TokenizerError) as caught:
        load(folder)
    assert all(word in str(caught.value) for word in words), str(caught.value)


def sized_tokenizer(path, size):
    """A tokenizer.json of so many ids, in place of what was there."""
    made = tokenizer_json()
    made["model"]["vocab"] = {f"t{i}": i for i in range(size)}
    made["added_tokens"] = []
    path.write_text(json.dumps(made))


@pytest.mark.parametrize("vocab, size", [(512, 105), (512, 100), (105, 100), (200, 150), (64, 65)])
def test_a_tokenizer_of_another_size_is_another_model_s(tmp_path, vocab, size):
    folder = write_folder(tmp_path / "m", vocab_size=vocab, bos_token_id=None, eos_token_id=None)
    sized_tokenizer(folder / "tokenizer.json", size)
    fails(folder, f"ids up to {size - 1}", f"vocabulary is {vocab}", "another model",
          "check_tokenizer=False", "--no-check-tokenizer")
    assert load(folder, check_tokenizer=False).tokenizer.size == size


@pytest.mark.parametrize("vocab, size", [(128, 105), (104, 100), (320, 300), (320, 319), (7, 7)])
def test_a_padded_vocabulary_loads(tmp_path, vocab, size):
    folder = write_folder(tmp_path / "m", vocab_size=vocab, bos_token_id=None, eos_token_id=None)
    sized_tokenizer(folder / "tokenizer.json", size)
    assert load(folder).lm.config.vocab_size == vocab


def test_published_paddings_are_allowed():
    """Sizes of published tokenizers, added tokens included, and of their models."""
    for size, vocab in ((151_665, 151_936), (151_665, 152_064), (151_669, 151_936),
                        (128_256, 128_256), (32_000, 32_000), (32_000, 32_001),
                        (256_000, 256_000), (262_145, 262_144), (49_152, 49_152)):
        assert is_padding(size, vocab), (size, vocab)
    assert not is_padding(32_000, 128_256) and not is_padding(49_152, 151_936)


def test_another_begin_token_is_a_warning_where_config_json_names_a_special_one(tmp_path):
    """DeepSeek-R1-Distill-Qwen: Qwen's config.json, and a tokenizer that begins texts by itself."""
    folder = write_folder(tmp_path / "m", bos_token_id=EOS)
    with pytest.warns(UserWarning, match=f"bos_token is id {BOS} but config.json says {EOS}"):
        assert load(folder).tokenizer.id_of("bos_token") == BOS
    fails(write_folder(tmp_path / "n", bos_token_id=5), "says 5", "another model")


@pytest.mark.parametrize("name", ["bos_token_id", "pad_token_id"])
def test_a_token_id_that_is_none_of_the_vocabulary_is_named(tmp_path, name):
    folder = write_folder(tmp_path / "m")
    raw = json.loads((folder / "config.json").read_text())
    for value in ("x", VOCAB, -2, 1.0, True, [1]):
        (folder / "config.json").write_text(json.dumps(raw | {name: value}))
        with pytest.raises(ConfigError, match=re.escape(f"{name} is {value!r}; expected an id")):
            load(folder, check_tokenizer=False)
    for value in (None, -1, 0, VOCAB - 1):  # -1 stands in published files
        (folder / "config.json").write_text(json.dumps(raw | {name: value}))
        load(folder, check_tokenizer=False)


@pytest.mark.parametrize("name", ["bos_token", "eos_token"])
@pytest.mark.parametrize("value", [5, ["a"], False, {}, {"content": 5}, {"content": None}],
                         ids=repr)
def test_a_special_token_that_is_no_text_is_named(tmp_path, name, value):
    folder = write_folder(tmp_path / "m")
    path = folder / "tokenizer_config.json"
    settings = json.loads(path.read_text())
    path.write_text(json.dumps(settings | {name: value}))
    fails(folder, str(path), repr(name), repr(value), "expected a token's text")
    for fine in (settings[name], {"content": settings[name]}, None):
        path.write_text(json.dumps(settings | {name: fine}))
        assert load(folder).tokenizer.id_of(name) == (fine and {"bos_token": BOS}.get(name, EOS))


@pytest.mark.parametrize("model, other", [
    ("stories260K", "babyllama-1M-tok105"), ("stories260K", "tiny"),
    ("babyllama-1M-tok105", "tiny"), ("babyllama-1M-tok105", "stories260K"),
    ("tiny", "stories260K"), ("tiny", "babyllama-1M-tok105"),
])
def test_real_tokenizers_swapped(models_dir, tmp_path, model, other):
    home = lambda name: BUNDLED[name] if name in BUNDLED else models_dir / name
    assert load(home(model)).params
    folder = shutil.copytree(home(model), tmp_path / "m", copy_function=shutil.copyfile)
    shutil.copyfile(home(other) / "tokenizer.json", folder / "tokenizer.json")
    fails(folder, "another model")
