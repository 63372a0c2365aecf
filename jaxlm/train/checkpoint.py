"""Checkpoints of a run, by orbax: written aside and renamed, so that a kill leaves the last one.

    out/checkpoints/STEP/   what is trained, the optimiser's state, and `meta` in JSON
    out/frozen/             what a task never moves, written once

Every array has a checksum in `meta`: orbax reads some damaged files without an error.
"""

import pathlib
import shutil
import time
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.experimental import multihost_utils

from jaxlm.core.device import versions
from jaxlm.core.errors import CheckpointError
from jaxlm.train.step import TrainState

Place = Callable[[Any, Any], tuple[Any, Any]]  # (trained, frozen) as shapes, to shardings
DROPPED = "dropped"  # where old ones are moved, so that a kill leaves no half of one by its name


class Restored(NamedTuple):
    """What a checkpoint holds."""

    state: TrainState
    frozen: Any
    meta: dict[str, Any]


class Checkpoints:
    """The checkpoints below a run's folder. Saving returns once the arrays are copied; a write
    that fails is an error at the next call.

    Args: keep: how many are kept. read_only: another run's, of which nothing is changed.
    """

    def __init__(self, out: pathlib.Path, keep: int = 2, read_only: bool = False):
        import orbax.checkpoint as ocp

        self.ocp, self.out, self.read_only = ocp, out.expanduser().resolve(), read_only
        self.frozen_digest: dict[str, int] = {}
        try:
            self.manager = ocp.CheckpointManager(
                self.out / "checkpoints", item_handlers={
                    "trained": ocp.StandardCheckpointHandler(),
                    "optimizer": ocp.StandardCheckpointHandler(),
                    "meta": ocp.JsonCheckpointHandler()},
                options=ocp.CheckpointManagerOptions(
                    max_to_keep=keep, read_only=read_only, create=not read_only,
                    todelete_subdir=None if read_only else DROPPED))
        except OSError as error:
            raise CheckpointError(f"{out} cannot hold checkpoints: {error}") from error

    def latest(self) -> int | None:
        """The last whole checkpoint's step."""
        return self.manager.latest_step()

    def save_frozen(self, frozen: Any) -> None:
        """Once a task, before its first checkpoint."""
        self.frozen_digest = digest(frozen)
        if not jax.tree.leaves(frozen):
            return
        with self._written("what is frozen"), self.ocp.StandardCheckpointer() as writer:
            writer.save(self.out / "frozen", frozen, force=True)
            writer.wait_until_finished()

    def save(self, step: int, state: TrainState, meta: dict[str, Any]) -> None:
        """Write one, unless it is there."""
        if self.latest() == step:
            return
        self._sweep()
        a = self.ocp.args
        sums = {"trained": digest(state.params), "optimizer": digest(state.opt_state),
                "frozen": self.frozen_digest}
        meta = meta | {"step": step, "digest": sums, "versions": versions()}
        with self._written(f"a checkpoint up to step {step}"):
            self.manager.save(step, args=a.Composite(
                trained=a.StandardSave(state.params), optimizer=a.StandardSave(state.opt_state),
                meta=a.JsonSave(meta)))

    def wait(self) -> None:
        """Until all is on disk."""
        with self._written("the last checkpoint"):
            self.manager.wait_until_finished()

    def close(self) -> None:
        """Wait, and let go of the threads."""
        with self._written("the last checkpoint"):
            self.manager.close()
        self._sweep()

    def _sweep(self) -> None:
        """Delete what is no longer kept; the folder stays, for the next may be on its way there."""
        if jax.process_index() == 0 and not self.read_only:
            for path in (self.out / "checkpoints" / DROPPED).glob("*"):
                shutil.rmtree(path, ignore_errors=True)

    def meta(self, step: int) -> dict[str, Any]:
        """What a checkpoint says of itself."""
        with self._read(step):
            return self.manager.restore(
                step, args=self.ocp.args.Composite(meta=self.ocp.args.JsonRestore())).meta

    def restore(
        self, step: int, optimizer: optax.GradientTransformation, place: Place
    ) -> Restored:
        """A checkpoint onto the devices at hand.

        Args:
          optimizer: wrapped by the tuning; its state's structure is read off it.
          place: where what is trained and what is frozen go.
        Raises: CheckpointError that names the folder, where it is damaged.
        """
        restore, (trained, where), frozen, meta = self._begin(step, place)
        with self._read(step):
            moments = jax.eval_shape(optimizer.init, trained)
            places = place_state(moments, trained, where)
            found = self.manager.restore(step, args=self.ocp.args.Composite(
                trained=restore(_with(trained, where)), optimizer=restore(_with(moments, places))))
        for name, tree in (("trained", found.trained), ("optimizer", found.optimizer)):
            self._check(step, name, tree, meta)
        count = jax.device_put(jnp.asarray(step, jnp.int32), everywhere(where))
        return Restored(TrainState(found.trained, found.optimizer, count), frozen, meta)

    def tuned(self, step: int, place: Place) -> tuple[Any, Any]:
        """(trained, frozen) of a checkpoint, without the optimiser's state."""
        restore, (trained, where), frozen, meta = self._begin(step, place)
        with self._read(step):
            found = self.manager.restore(step, args=self.ocp.args.Composite(
                trained=restore(_with(trained, where)))).trained
        self._check(step, "trained", found, meta)
        return found, frozen

    def _begin(self, step: int, place: Place) -> tuple[Any, tuple[Any, Any], Any, dict[str, Any]]:
        """How to read a tree, shapes and places of what is trained, what is frozen, and `meta`."""
        meta = self.meta(step)
        self.frozen_digest = meta["digest"]["frozen"]
        with self._read(step):
            trained = _shapes(self.manager.item_metadata(step).trained)
        with self._read(step, "frozen"), self.ocp.StandardCheckpointer() as reader:
            held = self.out / "frozen"
            frozen = _shapes(reader.metadata(held)) if self.frozen_digest else {}
            where, where_frozen = place(trained, frozen)
            if frozen:
                frozen = reader.restore(held, _with(frozen, where_frozen))
        self._check(step, "frozen", frozen, meta)
        return self.ocp.args.StandardRestore, (trained, where), frozen, meta

    def _check(self, step: int, name: str, tree: Any, meta: dict[str, Any]) -> None:
        found, wanted = digest(tree), meta["digest"][name]
        if wrong := [path for path in wanted if found.get(path) != wanted[path]]:
            raise CheckpointError(
                f"{self._folder(step, name)} is damaged: {wrong[0]!r} is not what was written; "
                f"{self._advice(step)}")

    def _folder(self, step: int, name: str = "") -> pathlib.Path:
        return self.out / "frozen" if name == "frozen" else self.out / "checkpoints" / str(step)

    def _advice(self, step: int) -> str:
        older = [s for s in self.manager.all_steps() if s < step]
        return (f"delete {self._folder(step)} to go on from step {max(older)}" if older else
                "no older one is left; start again in another `out`")

    def _read(self, step: int, name: str = "") -> Any:
        return _Turned(lambda error: (
            f"{self._folder(step, name)} is damaged or cut short ({_said(error)}); "
            f"{self._advice(step)}"))

    def _written(self, what: str) -> Any:
        def words(error: Exception) -> str:
            there = sorted(int(p.name) for p in (self.out / "checkpoints").iterdir()
                           if p.name.isdigit())
            left = f"that of step {there[-1]} is intact" if there else "there is no earlier one"
            return (f"{what} was not written below {self.out} ({_said(error)}); {left}. Make "
                    "room, and run the same command again")

        return _Turned(words)


class Timer:
    """Whether a checkpoint is due by the clock, so that a kill costs no more than `minutes`.

    Of several processes the first one's clock decides. To hear it is a meeting, so each time it
    also says after how many steps, at the pace so far, the next one is due.
    """

    def __init__(self, minutes: float, step: int):
        self.seconds = 60 * minutes
        self.restart(step)

    def restart(self, step: int) -> None:
        """A checkpoint was just written."""
        self.began, self.since, self.look = time.monotonic(), step, step + 1

    def due(self, step: int) -> bool:
        """Whether to write one after this step; the same in all processes."""
        if not self.seconds or step < self.look:
            return False
        gone = time.monotonic() - self.began
        left = (self.seconds - gone) * (step - self.since) / max(gone, 1e-9)
        answer = np.asarray([gone >= self.seconds, min(max(left, 1), 1e6)], np.int32)
        if jax.process_count() > 1:
            answer = multihost_utils.broadcast_one_to_all(answer)
            self.look = step + int(answer[1])
        return bool(answer[0])


class _Turned:
    """Turns whatever orbax raises inside the block into a CheckpointError."""

    def __init__(self, words: Callable[[Exception], str]):
        self.words = words

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, Exception) and not isinstance(error, CheckpointError):
            raise CheckpointError(self.words(error)) from error


def _said(error: Exception) -> str:
    """The first words of what is often a page."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:160]}"


def _shapes(metadata: Any) -> Any:
    """orbax's description of a tree of dicts as shapes."""
    metadata = getattr(metadata, "item_metadata", metadata)
    tree = getattr(metadata, "tree", metadata)
    is_dict = lambda x: isinstance(x, dict)
    if is_dict(tree):
        return {name: _shapes(value) for name, value in tree.items()}
    return jax.ShapeDtypeStruct(tree.shape, tree.dtype)


def _with(shapes: Any, places: Any) -> Any:
    """Shapes with where they go."""
    return jax.tree.map(
        lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where), shapes, places)


def everywhere(places: Any) -> jax.sharding.Sharding:
    """A whole copy on every device that a tree of shardings uses."""
    first = jax.tree.leaves(places)[0]
    if isinstance(first, jax.sharding.NamedSharding):
        return jax.sharding.NamedSharding(first.mesh, jax.sharding.PartitionSpec())
    return first


def place_state(state: Any, trained: Any, places: Any) -> Any:
    """Where an optimiser's state goes: what has the path and shape of a parameter, with it."""
    names = lambda path: tuple(str(getattr(k, "key", getattr(k, "idx", k))) for k in path)
    known = {names(path): (leaf.shape, where) for (path, leaf), where in zip(
        jax.tree_util.tree_leaves_with_path(trained), jax.tree.leaves(places), strict=True)}
    rest = everywhere(places)

    def where(path: Any, leaf: Any) -> Any:
        path = names(path)
        ends = (known[path[i:]] for i in range(len(path)) if path[i:] in known)
        shape, place = next(ends, (None, rest))
        return place if shape == leaf.shape else rest

    return jax.tree_util.tree_map_with_path(where, state)


@partial(jax.jit, static_argnames="dtype")
def _sums(leaves: list[jax.Array], dtype: Any = None) -> list[jax.Array]:
    """The bits of each array, added up as whole numbers modulo 2^32."""
    def one(x):
        x = x if dtype is None else x.astype(dtype)
        width = {1: jnp.uint8, 2: jnp.uint16}.get(x.dtype.itemsize, jnp.uint32)
        bits = x if x.dtype == jnp.bool_ else jax.lax.bitcast_convert_type(x, width)
        return bits.astype(jnp.uint32).sum(dtype=jnp.uint32)

    return [one(x) for x in leaves]


def digest(tree: Any, dtype: Any = None) -> dict[str, int]:
    """A checksum of every leaf, by its path: the same wherever the parts of an array lie.

    Args: dtype: of which the bits are added up; default each its own.
    """
    named = jax.tree_util.tree_leaves_with_path(tree)
    sums = jax.device_get(_sums([leaf for _, leaf in named], dtype))
    return {jax.tree_util.keystr(path): int(value)
            for (path, _), value in zip(named, sums, strict=True)}


def clear(out: pathlib.Path) -> None:
    """Remove a run's checkpoints, after which it begins anew."""
    for name in ("checkpoints", "frozen"):
        shutil.rmtree(out / name, ignore_errors=True)
