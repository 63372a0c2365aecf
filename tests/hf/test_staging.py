"""Putting a folder in place: by renames where no call swaps two, what is kept, what is swept."""

import json
import os
import signal
import subprocess
import sys

import jax
import numpy as np
import pytest

from jaxlm.core.errors import CheckpointError
from jaxlm.hf import staging
from jaxlm.hf.bundle import load, save
from tests.source_tree import ROOT
from tests.tiny import contents, write_folder

same = lambda a, b: jax.tree.map(np.testing.assert_array_equal, a, b)
DEAD = 2**22 + 5  # above the largest process id of Linux


@pytest.fixture
def no_swap(monkeypatch):
    """A system without the call that swaps two folders."""

    def absent(*_, **__):
        raise OSError("no such library")

    monkeypatch.setattr(staging.ctypes, "CDLL", absent)


def failing(monkeypatch, *which):
    """os.rename that fails at these calls, counted from 1."""
    rename, calls = os.rename, []

    def sometimes(old, new):
        calls.append((old, new))
        if len(calls) in which:
            raise OSError(116, f"Stale file handle {len(calls)}")
        rename(old, new)

    monkeypatch.setattr(staging.os, "rename", sometimes)
    return calls


def names(folder):
    return sorted(path.name for path in folder.parent.iterdir())


def test_without_the_swapping_call_two_renames_serve(bundle, tmp_path, no_swap):
    folder = write_folder(tmp_path / "m")
    same(load(save(bundle, folder, overwrite=True)).params, bundle.params)
    assert names(folder) == ["m"]


@pytest.mark.parametrize("which", [1, 2])
def test_a_rename_that_fails_leaves_the_old_folder(bundle, tmp_path, monkeypatch, no_swap, which):
    folder = write_folder(tmp_path / "m")
    before = contents(folder)
    failing(monkeypatch, which)
    with pytest.raises(CheckpointError, match=f"Stale file handle {which}.*untouched"):
        save(bundle, folder, overwrite=True)
    assert contents(folder) == before and names(folder) == ["m"]


def test_an_old_folder_that_cannot_be_put_back_is_named(bundle, tmp_path, monkeypatch, no_swap):
    folder = write_folder(tmp_path / "m")
    before = contents(folder)
    failing(monkeypatch, 2, 3)
    with pytest.raises(CheckpointError, match="handle 2.*could not be put back.*handle 3") as told:
        save(bundle, folder, overwrite=True)
    (left,) = tmp_path.iterdir()
    assert str(left) in str(told.value) and left.name.startswith("m.old-")
    assert contents(left) == before and "untouched" not in str(told.value)


def test_a_last_rename_that_fails_is_no_failure(bundle, tmp_path, monkeypatch, no_swap):
    folder = write_folder(tmp_path / "m")
    failing(monkeypatch, 3)
    same(load(save(bundle, folder, overwrite=True)).params, bundle.params)
    assert names(folder) == ["m"]


KILLED = """
import os, signal, sys
from jaxlm.hf import staging
staging._swap = lambda one, other: False
rename = os.rename
def between(old, new):
    rename(old, new)
    os.kill(os.getpid(), signal.SIGKILL)
staging.os.rename = between
with staging.staged(staging.pathlib.Path(sys.argv[1]), True) as stage:
    (stage / "config.json").write_text("{}")
"""


def test_a_kill_between_the_renames_leaves_the_old_folder_in_sight(bundle, tmp_path):
    folder = write_folder(tmp_path / "m")
    before = contents(folder)
    ended = subprocess.run([sys.executable, "-c", KILLED, str(folder)], cwd=ROOT, timeout=240)
    assert ended.returncode == -signal.SIGKILL
    hidden, old = sorted(tmp_path.iterdir())
    assert hidden.name.startswith(".m-") and old.name.startswith("m.old-")
    assert contents(old) == before
    save(bundle, folder)  # sweeps what was half written, never what was there
    assert sorted(tmp_path.iterdir()) == [folder, old] and contents(old) == before


def test_only_what_the_dead_left_is_swept(bundle, tmp_path):
    folder = tmp_path / "m"
    own, end = staging._prefix(folder), "-0123abcd"
    swept = f"{own}{DEAD}{end}"
    kept = {f"{own}{os.getpid()}{end}", f"{own}1{end}", f"{own}{DEAD}{end}0",
            f"{own}{DEAD}-0123ABCD",
            f"{own}x{end}", f".m-00000000-{DEAD}{end}", f"{own}{DEAD}{end}-old",
            staging._prefix(tmp_path / "n") + f"{DEAD}{end}", ".m-0123abcd"}
    for name in (swept, *kept):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text("x")
    save(bundle, folder)
    assert set(names(folder)) == kept | {"m"}
    assert all((tmp_path / name / "file").exists() for name in kept)


def test_links_stay_links(bundle, tmp_path):
    folder, elsewhere = write_folder(tmp_path / "m"), tmp_path / "data"
    elsewhere.mkdir()
    (elsewhere / "big").write_text("big")
    links = {"gone": "../nowhere", "data": "../data", "big": str(elsewhere / "big"),
             "notes/inner": "../../data/big", "notes/gone": "nowhere"}
    (folder / "notes").mkdir()
    for name, target in links.items():
        (folder / name).symlink_to(target)
    (folder / "generation_config.json").symlink_to("nowhere")  # a file of ours is written anew
    (folder / "log").write_text("a line\n")
    for _ in range(2):
        save(bundle, folder, overwrite=True)
        assert {name: os.readlink(folder / name) for name in links} == links
    assert (folder / "notes" / "inner").read_text() == "big"
    assert json.loads((folder / "generation_config.json").read_text())
    assert (folder / "log").read_text() == "a line\n"
    same(load(folder).params, bundle.params)


@pytest.mark.parametrize("linked", [True, False])
def test_kept_files_are_linked_where_that_is_possible(bundle, tmp_path, monkeypatch, linked):
    folder = write_folder(tmp_path / "m")
    (folder / "notes").mkdir()
    kept = [folder / "log", folder / "notes" / "more"]
    for path in kept:
        path.write_text("x" * 100)
    before = [path.stat().st_ino for path in kept]
    if not linked:
        monkeypatch.setattr(staging.os, "link", lambda *_: (_ for _ in ()).throw(OSError(1, "no")))
    save(bundle, folder, overwrite=True)
    assert ([path.stat().st_ino for path in kept] == before) is linked
    assert all(path.read_text() == "x" * 100 and path.stat().st_nlink == 1 for path in kept)


def test_an_entry_that_cannot_be_kept_is_named(bundle, tmp_path, monkeypatch):
    folder = write_folder(tmp_path / "m")
    (folder / "notes").mkdir()
    (folder / "notes" / "secret").write_text("x")
    before = contents(folder)

    def denied(old, new):
        raise PermissionError(13, "Permission denied", str(old))

    monkeypatch.setattr(staging, "_second_name", denied)
    with pytest.raises(CheckpointError) as told:
        save(bundle, folder, overwrite=True)
    text = str(told.value)
    assert str(folder / "notes") in text and "secret" in text and "untouched" in text
    assert "Make room" not in text
    assert contents(folder) == before and names(folder) == ["m"]


@pytest.mark.parametrize("folder", [None, 5, ""], ids=repr)
def test_a_target_that_is_no_path(bundle, folder):
    with pytest.raises(CheckpointError, match=f"folder is {folder!r}; expected the path"):
        save(bundle, folder)
