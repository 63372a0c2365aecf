"""A folder written beside its place under a temporary name, then put there in one move."""

import ctypes
import hashlib
import os
import pathlib
import re
import secrets
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from safetensors import SafetensorError

from jaxlm.core.errors import CheckpointError
from jaxlm.hf.tokenizer import FILES


@contextmanager
def staged(folder: pathlib.Path, overwrite: bool) -> Iterator[pathlib.Path]:
    """A temporary folder beside `folder` that takes its place when the block ends well.

    Raises: CheckpointError where `folder` may not be replaced, or could not be.
    """
    folder = folder.expanduser().resolve()  # a link's target is replaced, not the link
    if folder.exists() and not overwrite:
        raise CheckpointError(f"{folder} exists; pass overwrite=True or choose another folder")
    if folder.exists() and not folder.is_dir():
        raise CheckpointError(f"{folder} is a file; expected a folder, or a name not yet taken")
    if _holds_working_directory(folder):
        raise CheckpointError(f"{folder} is or holds the working directory, which would be gone "
                              "when another takes its place; change directory first")
    stage = None
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with suppress(OSError):  # a parent that cannot be listed can be written
            _sweep(folder)
        stage = folder.with_name(f"{_prefix(folder)}{os.getpid()}-{secrets.token_hex(4)}")
        # nobody else reads what replaces a folder before it has that folder's permissions
        stage.mkdir(0o700 if folder.exists() else 0o777)
        yield stage
        if folder.exists():
            _keep(folder, stage)
            _exchange(stage, folder)
        else:
            os.rename(stage, folder)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"{folder} was not written ({error}); what was there is untouched. Make room or choose "
            "another place"
        ) from error
    finally:
        if stage is not None:
            shutil.rmtree(stage, ignore_errors=True)


def _holds_working_directory(folder: pathlib.Path) -> bool:
    """Whether this process stands in `folder`, at any depth."""
    try:
        return pathlib.Path.cwd().is_relative_to(folder)
    except FileNotFoundError:  # it is gone already
        return False


def _prefix(folder: pathlib.Path) -> str:
    """How the temporary names of this machine begin; a process id and random digits follow.

    Process ids count within a machine, and within a container that has its own.
    """
    try:
        space = os.readlink("/proc/self/ns/pid")
    except OSError:  # not Linux
        space = ""
    host = hashlib.sha256(f"{socket.gethostname()} {space}".encode()).hexdigest()[:8]
    return f".{folder.name}-{host}-"


def _sweep(folder: pathlib.Path) -> None:
    """Remove what saves to `folder` left behind whose processes, of this machine, are dead."""
    ours = re.compile(re.escape(_prefix(folder)) + r"(\d{1,9})-[0-9a-f]{8}")
    for path in folder.parent.iterdir():
        found = ours.fullmatch(path.name)
        if found and not path.is_symlink() and _is_dead(int(found[1])):
            shutil.rmtree(path, ignore_errors=True)


def _is_dead(process: int) -> bool:
    """Whether there is surely no such process; one of another user's is there."""
    if os.name != "posix":  # elsewhere os.kill ends what it asks after
        return False
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return True
    except OSError:
        return False
    return False


def _keep(folder: pathlib.Path, stage: pathlib.Path) -> None:
    """Carry over what stays of an overwritten folder: files not of a model, and permissions."""
    for old in folder.iterdir():
        new = stage / old.name
        try:
            if new.exists():
                if old.exists():  # not so a link that leads nowhere
                    shutil.copymode(old, new)
            elif not _is_ours(old.name):
                _carry(old, new)
        except OSError as error:
            raise CheckpointError(
                f"{folder} was not written: {old}, which is no file of a model and would be kept, "
                f"could not be carried over ({error}); what was there is untouched. Move it "
                "elsewhere, or choose another folder"
            ) from error
    shutil.copymode(folder, stage)


def _carry(old: pathlib.Path, new: pathlib.Path) -> None:
    """The same file, link or tree under a second name; copied where files cannot have two."""
    if old.is_dir() and not old.is_symlink():
        shutil.copytree(old, new, symlinks=True, copy_function=_second_name)
    else:
        _second_name(old, new)


def _second_name(old: str | pathlib.Path, new: str | pathlib.Path) -> None:
    """A hard link to a file, or a copy; a symbolic link stays one."""
    if os.path.islink(old):
        os.symlink(os.readlink(str(old)), new)
        return
    try:
        os.link(old, new)
    except OSError:
        shutil.copy2(old, new)


def _is_ours(name: str) -> bool:
    """Files that belong to one model, and must not be left over from another."""
    return name in FILES or name.endswith((".safetensors", ".safetensors.index.json"))


def _exchange(stage: pathlib.Path, folder: pathlib.Path) -> None:
    """Swap two folders: in one system call where Linux has it, else by renames.

    Then there is a moment without `folder`: what was there stands beside it, in sight.
    """
    if _swap(stage, folder):
        return
    aside = folder.with_name(f"{folder.name}.old-{secrets.token_hex(4)}")
    try:
        os.rename(folder, aside)
        os.rename(stage, folder)
    except BaseException as error:
        if folder.exists() or not aside.exists():
            raise
        try:
            os.rename(aside, folder)
        except OSError as second:
            raise CheckpointError(
                f"{folder} was not written ({error}), and what was there could not be put back "
                f"({second}): it is whole in {aside}. Rename that to {folder}"
            ) from error
        raise
    try:
        os.rename(aside, stage)  # which the caller removes
    except OSError:
        shutil.rmtree(aside, ignore_errors=True)


def _swap(one: pathlib.Path, other: pathlib.Path) -> bool:
    """Whether the system could swap two folders in one call."""
    at_cwd, exchange = -100, 2
    try:
        libc = ctypes.CDLL(None, use_errno=True)
        return libc.renameat2(at_cwd, os.fsencode(one), at_cwd, os.fsencode(other),
                              ctypes.c_uint(exchange)) == 0
    except (OSError, AttributeError):
        return False
