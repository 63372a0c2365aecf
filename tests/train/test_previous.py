"""The run before, read from its folder."""

import shutil
from dataclasses import replace

import chex
import jax
import pytest

from jaxlm.core.errors import CheckpointError, ConfigError
from jaxlm.hf.bundle import load
from jaxlm.train import Ewc, Full, OLora, fit
from jaxlm.train.config import settings as compared
from jaxlm.train.previous import read_previous
from jaxlm.train.runs import export
from tests.tiny import model
from tests.train.small import settings


@pytest.fixture(scope="module")
def before(bundle, tmp_path_factory):
    """Two steps of O-LoRA: its folder and what it gave."""
    folder = tmp_path_factory.mktemp("before")
    config = settings(folder, steps=2, tuning=OLora(rank=2), optimizer={"rate": 0.1})
    return folder, fit(bundle, config)


def test_a_folder_gives_what_the_run_gave(bundle, before, tmp_path):
    folder, first = before
    files = sorted(str(p) for p in (folder / "out").rglob("*"))
    second = settings(tmp_path, steps=1, tuning=OLora(rank=3), previous=str(folder / "out"))
    chex.assert_trees_all_equal(read_previous(first.bundle, second, None), first.tuned)
    found = fit(first.bundle, second)
    assert found.history[0]["penalty"] > 0 and "earlier" in found.tuned[1]
    assert files == sorted(str(p) for p in (folder / "out").rglob("*"))
    with pytest.raises(CheckpointError, match="previous was .* and is None"):
        fit(first.bundle, second.replace(previous=None, steps=2))


def test_the_run_begins_from_the_weights_that_the_one_before_it_ended_with(
        bundle, before, tmp_path):
    """In memory, or as it was exported and in whatever dtype it was loaded."""
    folder, first = before
    config = settings(tmp_path, tuning=OLora(rank=2), previous=str(folder / "out"))
    with pytest.raises(CheckpointError, match="did not end with the weights .*out/model"):
        read_previous(bundle, config, None)
    with pytest.raises(CheckpointError, match="did not end with the weights"):
        fit(bundle, config)
    for dtype in ("float32", "bfloat16"):
        out = export(first.bundle, tmp_path / dtype, dtype)
        read_previous(load(out), config, None)
        read_previous(load(out, dtype="own"), config, None)
    low = jax.tree.map(lambda x: x.astype("float16"), first.bundle.params)
    read_previous(bundle.replace(params=low), config, None)
    shutil.copytree(folder / "out", tmp_path / "old")
    (tmp_path / "old" / "end.json").unlink()  # as an earlier version left it
    read_previous(bundle, config.replace(previous=str(tmp_path / "old")), None)


def test_a_folder_that_does_not_fit_is_refused(bundle, before, tmp_path):
    folder, _ = before
    config = settings(tmp_path, tuning=OLora(rank=2), previous=str(folder / "out"))
    lm, params = model(ffn_dim=32)
    for other, changes, said in (
            (bundle, {"previous": str(tmp_path / "none")}, "none, which holds no checkpoint"),
            (bundle, {"tuning": Ewc()}, "tuning.kind 'olora'; this run has 'ewc'"),
            (bundle, {"tuning": OLora(rank=2, targets=("q",))}, "tuning.targets .*this run has"),
            (bundle, {"stack": True}, "stack False; this run has True"),
            (bundle.replace(lm=lm, params=params), {}, "is of another model")):
        with pytest.raises(CheckpointError, match=said):
            read_previous(other, config.replace(**changes), None)
    with pytest.raises(ConfigError, match="only olora and ewc"):
        config.replace(tuning=Full())


def test_a_run_that_was_stopped_is_refused(bundle, before, tmp_path, monkeypatch):
    from jaxlm.train.checkpoint import Checkpoints

    folder, _ = before
    config = settings(tmp_path, tuning=OLora(rank=2), previous=str(folder / "out"))
    meta = Checkpoints.meta
    monkeypatch.setattr(Checkpoints, "meta", lambda self, step: meta(self, step) | {"steps": 9})
    with pytest.raises(CheckpointError, match="was stopped at step 2 of 9"):
        read_previous(bundle, config, None)


def test_a_field_that_is_not_used_changes_no_settings(tmp_path):
    config = settings(tmp_path, tuning=OLora())
    assert compared(config) == compared(replace(config, previous="a"))
