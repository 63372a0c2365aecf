"""Saving: what is written loads again, and what was there survives a full disk and a kill."""

import json
import os
import signal
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.core.errors import CheckpointError, ConfigError
from jaxlm.hf.bundle import load, save
from jaxlm.hf.convert import convert
from jaxlm.hf.weights import INDEX, SINGLE, save_params
from jaxlm.models.config import LayerPlan
from jaxlm.models.lm import LM
from tests.source_tree import ROOT
from tests.tiny import BOS, CONFIG, EOS, HF_CONFIG, contents, write_folder

same = lambda a, b: jax.tree.map(np.testing.assert_array_equal, a, b)


def modes(folder):
    """The permissions of a folder and of all in it."""
    return {path.name: oct(path.stat().st_mode & 0o7777) for path in (folder, *folder.iterdir())}


@pytest.fixture
def umask():
    """Sets the umask; it is put back at the end."""
    before = os.umask(0o022)
    yield os.umask
    os.umask(before)


def leftovers(folder):
    """Temporary folders beside the target."""
    return [path.name for path in folder.parent.iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_saved_folder_loads_the_same(tiny_folder, tmp_path, dtype):
    bundle = load(tiny_folder, dtype=dtype)
    folder = save(bundle, tmp_path / "a" / "b")
    again = load(folder, dtype=dtype)
    assert again.lm == bundle.lm and again.stop_ids == bundle.stop_ids
    assert again.extra == bundle.extra
    same(again.params, bundle.params)
    assert again.tokenizer.encode("é!") == bundle.tokenizer.encode("é!")
    assert json.loads((folder / "config.json").read_text())["dtype"] == dtype
    assert not leftovers(folder)


def test_tied_and_untied_models_round_trip(tmp_path):
    for tied in (True, False):
        config = HF_CONFIG | {"tie_word_embeddings": tied}
        bundle = load(write_folder(tmp_path / f"in{tied}", config))
        assert ("head" in bundle.params) is not tied
        same(load(save(bundle, tmp_path / f"out{tied}")).params, bundle.params)


def test_an_existing_folder_is_kept_unless_asked(bundle, tmp_path):
    folder = write_folder(tmp_path / "m", seed_note=None)
    before = contents(folder)
    with pytest.raises(CheckpointError, match="exists; pass overwrite=True"):
        save(bundle, folder)
    (tmp_path / "file").write_text("x")
    with pytest.raises(CheckpointError, match="is a file; expected a folder"):
        save(bundle, tmp_path / "file", overwrite=True)
    assert contents(folder) == before and (tmp_path / "file").read_text() == "x"


@pytest.mark.parametrize("mask, mode, inner", [
    (0o022, "0o755", "0o644"), (0o077, "0o700", "0o600"), (0o002, "0o775", "0o664")])
def test_a_new_folder_has_the_permissions_of_the_umask(bundle, tmp_path, umask, mask, mode, inner):
    umask(mask)
    found = modes(save(bundle, tmp_path / "m"))
    assert found.pop("m") == mode and set(found.values()) == {inner}, found


def test_overwriting_keeps_the_permissions(bundle, tmp_path, umask, monkeypatch):
    folder = save(bundle, tmp_path / "m")
    folder.chmod(0o750)
    (folder / SINGLE).chmod(0o600)
    (folder / "config.json").chmod(0o640)
    before, during = modes(folder), []

    def look(stage, *arguments):
        during.append(oct(stage.stat().st_mode & 0o777))
        save_params(stage, *arguments)

    monkeypatch.setattr("jaxlm.hf.bundle.save_params", look)
    save(bundle, folder, overwrite=True)
    assert modes(folder) == before and during == ["0o700"]


def test_the_working_directory_is_not_replaced(bundle, tmp_path, monkeypatch):
    folder = save(bundle, tmp_path / "m")
    (folder / "notes").mkdir()
    before = contents(folder)
    for here, target in ((folder, "."), (folder / "notes", ".."), (folder, folder)):
        monkeypatch.chdir(here)
        with pytest.raises(CheckpointError, match="holds the working directory.*change directory"):
            save(bundle, target, overwrite=True)
        assert os.getcwd() == str(here)
    assert contents(folder) == before and not leftovers(folder)
    save(bundle, "beside")  # a new folder in it is no harm
    assert (folder / "beside" / SINGLE).exists()


def test_overwriting_leaves_nothing_of_another_model(bundle, tmp_path):
    folder = write_folder(tmp_path / "m")
    (folder / SINGLE).rename(folder / "model-00001-of-00001.safetensors")
    (folder / INDEX).write_text('{"weight_map": {"a": "model-00001-of-00001.safetensors"}}')
    (folder / "special_tokens_map.json").write_text('{"bos_token": "</s>"}')
    (folder / "notes").mkdir()
    (folder / "notes" / "README.md").write_text("kept")
    save(bundle, folder, overwrite=True)
    names = set(contents(folder))
    assert names == {"config.json", "generation_config.json", SINGLE, "tokenizer.json",
                     "tokenizer_config.json", "notes/README.md"}
    same(load(folder).params, bundle.params)
    assert not leftovers(folder)


def test_saving_over_its_own_source(tmp_path):
    bundle = load(write_folder(tmp_path / "m"))
    doubled = bundle.replace(params=jax.tree.map(lambda x: x * 2, bundle.params))
    same(load(save(doubled, tmp_path / "m", overwrite=True)).params, doubled.params)
    (tmp_path / "link").symlink_to(tmp_path / "m")
    same(load(save(bundle, tmp_path / "link", overwrite=True)).params, bundle.params)
    assert (tmp_path / "link").is_symlink()
    same(load(tmp_path / "m").params, bundle.params)


def test_generation_settings_are_kept(tmp_path):
    source = write_folder(tmp_path / "in")
    settings = {"do_sample": True, "temperature": 0.6, "top_p": 0.9, "pad_token_id": 3}
    read = lambda folder: json.loads((folder / "generation_config.json").read_text())
    (source / "generation_config.json").write_text(json.dumps(settings | {"eos_token_id": 7}))
    bundle = load(source)
    folder = save(bundle, tmp_path / "out")
    expected = settings | {"bos_token_id": BOS, "eos_token_id": [7, EOS]}
    assert read(folder) == expected and load(folder).stop_ids == bundle.stop_ids == (7, EOS)
    again = convert(folder, tmp_path / "again", "bfloat16")
    assert read(again) == expected
    save(bundle.replace(stop_ids=(5,)), source, overwrite=True)  # ids are the bundle's
    assert read(source) == expected | {"eos_token_id": [5]}


def test_what_a_folder_cannot_hold(bundle, tmp_path):
    planned = LM(CONFIG, (LayerPlan(), LayerPlan(skip_attention=True)))
    with pytest.raises(ConfigError, match="cannot hold a layer plan"):
        save(bundle.replace(lm=planned), tmp_path / "m")
    with pytest.raises(CheckpointError, match="score"):  # a label head that has no weights
        save(bundle.replace(lm=LM(CONFIG, labels=2)), tmp_path / "m")
    broken = bundle.replace(params={**bundle.params, "final_norm": {"scale": jnp.ones(3)}})
    with pytest.raises(CheckpointError, match=r"final_norm/scale.*\(3,\).*expected \(16,\)"):
        save(broken, tmp_path / "m")
    surplus = bundle.replace(params={**bundle.params, "extra": {"scale": jnp.ones(3)}})
    with pytest.raises(CheckpointError, match=r"extra/scale.*expected absent"):
        save(surplus, tmp_path / "m")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("change, words", [
    (lambda x: x.astype(jnp.int8), r"embed/table.* is int8; expected one of .*'float32'"),
    (lambda x: x.astype(jnp.float8_e4m3fn), "embed/table.* is float8_e4m3fn; expected one of"),
    (lambda x: x.at[3, 5].set(jnp.nan), "embed_tokens.weight.*holds NaN or infinity"),
    (lambda x: x.at[3, 5].set(-jnp.inf), "embed_tokens.weight.*holds NaN or infinity"),
    (lambda x: np.asarray(x, np.float64) * 1e300, "embed_tokens.weight.*holds NaN or infinity"),
], ids=["int8", "float8", "nan", "infinity", "beyond float32"])
def test_what_could_not_be_loaded_again_replaces_nothing(bundle, tmp_path, change, words):
    folder = save(bundle, tmp_path / "m")
    before = contents(folder)
    table = change(bundle.params["embed"]["table"])
    damaged = bundle.replace(params={**bundle.params, "embed": {"table": table}})
    for target in (folder, tmp_path / "new"):
        with pytest.raises(CheckpointError, match=words):
            save(damaged, target, overwrite=True)
    assert contents(folder) == before and not (tmp_path / "new").exists()
    assert not leftovers(folder)
    same(load(folder).params, bundle.params)


@pytest.mark.parametrize("overwrite", ["no", 1, None])
def test_only_true_overwrites(bundle, tmp_path, overwrite):
    folder = save(bundle, tmp_path / "m")
    before = contents(folder)
    with pytest.raises(ConfigError, match="overwrite is .* expected True or False"):
        save(bundle, folder, overwrite=overwrite)
    assert contents(folder) == before


def test_a_tokenizer_that_is_gone(tmp_path):
    folder = write_folder(tmp_path / "m")
    bundle = load(folder)
    (folder / "tokenizer.json").rename(tmp_path / "elsewhere.json")
    (folder / "tokenizer_config.json").unlink()
    with pytest.raises(CheckpointError, match="no longer holds the tokenizer's files"):
        save(bundle, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("where", ["write_text", "save_params", "copyfile", "_exchange"])
def test_an_error_at_any_moment_leaves_the_old_folder(bundle, tmp_path, monkeypatch, where):
    folder = write_folder(tmp_path / "m")
    before = contents(folder)

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    home = {"write_text": "jaxlm.hf.bundle.pathlib.Path", "copyfile": "jaxlm.hf.bundle.shutil",
            "_exchange": "jaxlm.hf.staging"}
    monkeypatch.setattr(f"{home.get(where, 'jaxlm.hf.bundle')}.{where}", full)
    for target in (folder, tmp_path / "new"):
        if where == "_exchange" and target != folder:
            continue
        with pytest.raises(CheckpointError, match="not written.*No space left.*untouched"):
            save(bundle, target, overwrite=True)
    monkeypatch.undo()
    assert contents(folder) == before and not (tmp_path / "new").exists()
    assert not leftovers(folder)
    save(bundle, folder, overwrite=True)


FULL_DISK = """
import resource, signal, sys
from jaxlm.core.errors import CheckpointError
from jaxlm.hf.bundle import load, save
bundle = load(sys.argv[1])
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
try:
    save(bundle, sys.argv[2], overwrite=True)
except CheckpointError as error:
    print("refused:", error)
"""

ENDLESS = """
import sys
from jaxlm.hf.bundle import load, save
bundle = load(sys.argv[1])
print("ready", flush=True)
while True:
    save(bundle, sys.argv[2], overwrite=True)
    print("saved", flush=True)
"""


def test_a_file_that_cannot_grow(tiny_folder, tmp_path):
    """The operating system itself refuses the bytes, as it does when a disk is full."""
    folder = write_folder(tmp_path / "m")
    before = contents(folder)
    done = subprocess.run([sys.executable, "-c", FULL_DISK, str(tiny_folder), str(folder)],
                          capture_output=True, text=True, cwd=ROOT, timeout=240)
    assert "refused:" in done.stdout and "not written" in done.stdout, done.stdout + done.stderr
    assert contents(folder) == before and not leftovers(folder)


def test_a_kill_at_any_moment_leaves_a_whole_folder(tiny_folder, tmp_path):
    """Killed while it saves over and over; what stands there loads, and can be saved over."""
    expected, folder = load(tiny_folder), tmp_path / "m"
    write_folder(folder)
    for delay in (0.0, 0.011, 0.023, 0.037):
        with subprocess.Popen([sys.executable, "-c", ENDLESS, str(tiny_folder), str(folder)],
                              stdout=subprocess.PIPE, text=True, cwd=ROOT) as running:
            assert running.stdout.readline() == "ready\n"
            time.sleep(delay)
            running.send_signal(signal.SIGKILL)
        same(load(folder).params, expected.params)
        save(expected, folder, overwrite=True)
        same(load(folder).params, expected.params)
