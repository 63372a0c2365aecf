"""Hub ids over a hub on loopback: what is sent, what is fetched, what is kept, what is said.

Each load is a process of its own, since huggingface_hub reads its variables when imported.
"""

import json
import os
import shutil
import subprocess
import sys

import pytest

import jaxlm
from experiments import twins
from experiments.loopback_hub import Hub, commit_of
from jaxlm.hf.hub import missing
from jaxlm.hf.weights import INDEX
from tests.source_tree import ROOT

OPEN, GATED = "some-org/open-model", "some-org/gated-model"
NEEDED = {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
FETCH = """
import json, sys
from jaxlm.core.errors import CheckpointError
from jaxlm.hf.hub import fetch
try:
    print(json.dumps({"folder": str(fetch(sys.argv[1], *sys.argv[2:]))}))
except CheckpointError as error:
    print(json.dumps({"error": str(error)}))
"""
LOAD = """
import json, sys
import jaxlm
from tests.hf.test_hub import summary
print(json.dumps([summary(jaxlm.load(sys.argv[1], revision=name)) for name in sys.argv[2:]]))
"""


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Two revisions of a model, with files that are of no use here."""
    base = tmp_path_factory.mktemp("hub")
    first = twins.write(twins.config_of("llama"), base / "first")
    (first / "original").mkdir()
    for extra in ("pytorch_model.bin", "consolidated.safetensors", "original/params.json",
                  "README.md"):
        (first / extra).write_text("{}")
    second = base / "second"
    shutil.copytree(first, second)
    raw = json.loads((second / "config.json").read_text())
    (second / "config.json").write_text(json.dumps(raw | {"rms_norm_eps": 0.25}))
    return first, second


@pytest.fixture
def hub(folders):
    revisions = {"main": folders[0], "v2": folders[1]}
    with Hub({OPEN: revisions, GATED: revisions}, {GATED: "hf_secret"}) as running:
        yield running


def run(code, variables, *arguments):
    """What a process printed, a line of JSON."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING"))}
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], text=True, capture_output=True, timeout=120,
        env=kept | {"PYTHONPATH": str(ROOT)} | variables,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


def summary(bundle):
    """What tells two models apart."""
    ids = jaxlm.generate(bundle, "w5 w9", max_new_tokens=6, stop_ids=[]).tokens
    return {"eps": bundle.lm.config.norm_eps, "ids": list(ids)}


def test_only_what_is_needed_is_fetched_and_only_once(hub, folders, tmp_path):
    variables = hub.environment(tmp_path)
    found = run(FETCH, variables, OPEN)["folder"]
    assert sorted(hub.downloads()) == sorted(NEEDED)
    assert found.endswith(commit_of(OPEN, "main"))
    for name in NEEDED:
        with open(os.path.join(found, name), "rb") as file:
            assert file.read() == (folders[0] / name).read_bytes()
    assert all(token is None for _, _, token in hub.log)
    before = len(hub.downloads())
    assert run(FETCH, variables, OPEN)["folder"] == found and len(hub.downloads()) == before


def test_the_token_is_sent_and_needed(hub, tmp_path):
    error = run(FETCH, hub.environment(tmp_path), GATED)["error"]
    assert GATED in error and "set HF_TOKEN" in error and not hub.downloads()
    wrong = hub.environment(tmp_path, HF_TOKEN="hf_other")
    assert "set HF_TOKEN" in run(FETCH, wrong, GATED)["error"] and not hub.downloads()
    hub.log.clear()
    right = hub.environment(tmp_path, HF_TOKEN="hf_secret")
    assert run(FETCH, right, GATED)["folder"]
    assert set(hub.downloads()) == NEEDED
    assert {token for _, _, token in hub.log} == {"Bearer hf_secret"}


def test_a_revision_is_honoured(hub, folders, tmp_path):
    variables = hub.environment(tmp_path)
    found = run(LOAD, variables, OPEN, "main", "v2")
    assert found == [summary(jaxlm.load(folder)) for folder in folders]
    assert found[0] != found[1]
    commit = commit_of(OPEN, "v2")
    assert run(FETCH, variables, OPEN, commit)["folder"].endswith(commit)
    error = run(FETCH, variables, OPEN, "v3")["error"]
    assert OPEN in error and "Revision" in error


def test_offline(hub, tmp_path):
    full, bare = tmp_path / "full", tmp_path / "bare"
    found = run(FETCH, hub.environment(full), OPEN)["folder"]
    hub.log.clear()
    assert run(FETCH, hub.environment(full, HF_HUB_OFFLINE="1"), OPEN)["folder"] == found
    error = run(FETCH, hub.environment(bare, HF_HUB_OFFLINE="1"), OPEN)["error"]
    assert all(word in error for word in (OPEN, "Without a network", "'tiny'"))
    assert "error" in run(FETCH, hub.environment(full, HF_HUB_OFFLINE="1"), OPEN, "v2")
    assert hub.log == []  # nobody was asked


def test_a_hub_that_is_gone(hub, tmp_path):
    variables = hub.environment(tmp_path) | {"HF_ENDPOINT": "http://127.0.0.1:9"}
    assert "Without a network" in run(FETCH, variables, OPEN)["error"]
    found = run(FETCH, hub.environment(tmp_path), OPEN)["folder"]
    assert run(FETCH, variables, OPEN)["folder"] == found  # what was fetched before still serves


def test_an_unknown_id(hub, tmp_path):
    error = run(FETCH, hub.environment(tmp_path), "some-org/none")["error"]
    assert "some-org/none" in error and "RepositoryNotFound" in error


FIT_THEN = """
import json, sys
from jaxlm.cli.fit import open_config
open_config(sys.argv[1])
print(json.dumps(True))
"""


def test_a_model_that_is_only_partly_in_the_cache(hub, tmp_path):
    """As `jaxlm fit ID` leaves it, which fetches the config alone."""
    assert run(FIT_THEN, hub.environment(tmp_path), OPEN)
    for variables in (hub.environment(tmp_path, HF_HUB_OFFLINE="1"),
                      hub.environment(tmp_path) | {"HF_ENDPOINT": "http://127.0.0.1:9"}):
        error = run(FETCH, variables, OPEN)["error"]
        for word in (OPEN, "only partly in the cache", "model.safetensors", "HF_HUB_OFFLINE",
                     "with a network", "'tiny'"):
            assert word in error, error
        assert "copy" not in error and error.count("\n") == 0
    assert run(FETCH, hub.environment(tmp_path), OPEN)["folder"]  # once with a network ...
    assert run(FETCH, hub.environment(tmp_path, HF_HUB_OFFLINE="1"), OPEN)["folder"]  # ... without


@pytest.mark.parametrize("gone, extra, words", [
    ("model.safetensors", "pytorch_model.bin", "as pytorch_model.bin, a pickle, which is never"),
    ("model.safetensors", "flax_model.msgpack", "no weights on the hub that jaxlm reads"),
    ("tokenizer.json", "README.md", "has no tokenizer on the hub; expected one of tokenizer.json"),
])
def test_what_a_repository_lacks_is_named(folders, tmp_path, gone, extra, words):
    folder = tmp_path / "repo"
    shutil.copytree(folders[0], folder)
    for path in (gone, "pytorch_model.bin"):
        (folder / path).unlink()
    (folder / extra).write_text("x")
    with Hub({OPEN: {"main": folder}}) as running:
        error = run(FETCH, running.environment(tmp_path / "home"), OPEN)["error"]
    assert words in error and OPEN in error, error


def test_a_shard_that_is_not_there_is_missing(folders, tmp_path):
    folder = tmp_path / "m"
    shutil.copytree(folders[0], folder)
    assert missing(folder) == []
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    names = [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    (folder / INDEX).write_text(json.dumps({"weight_map": {"a": names[0], "b": names[1]}}))
    (folder / "config.json").unlink()
    assert missing(folder) == ["config.json", names[1]]
