"""The batches of a run, in order: which samples, in which rows, and where a stopped run goes on.

Batch `s` is a function of the data, the settings and `s` alone, so the position in the data is one
number, whatever the number of processes or devices.
"""

import itertools
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Protocol

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from jaxlm.core.mesh import partition
from jaxlm.train.data import Examples
from jaxlm.train.packing import fill, pack

AHEAD = 4  # batches that are made before they are asked for


@dataclass(frozen=True)
class Order:
    """Which samples come when: lists of sample numbers, a list for each pass over some data.

    Stacked: every epoch is all files, shuffled together. Phased: the files in turn, each for all
    its epochs (2403.01081: knowledge before skills). Replayed samples are `share` of
    each pass, drawn anew.

    Args:
      samples: numbers of the samples of each file.
      epochs: passes; None repeats for ever.
      replay: numbers of samples of earlier tasks.
      share: of the samples of a pass that are replayed, in [0, 1).
    """

    samples: tuple[np.ndarray, ...]
    epochs: int | None
    seed: int
    phased: bool = False
    replay: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    share: float = 0.0

    def passes(self) -> Iterator[np.ndarray]:
        """The samples of each pass."""
        groups = self.samples if self.phased else (np.concatenate(self.samples),)
        for phase, group in enumerate(groups):
            epochs = itertools.count() if self.epochs is None else range(self.epochs)
            for epoch in epochs:
                rng = np.random.default_rng([self.seed, phase, epoch])
                count = round(len(group) * self.share / (1 - self.share)) * bool(len(self.replay))
                again = np.resize(rng.permutation(self.replay), count)
                yield rng.permutation(np.concatenate([group, again]).astype(np.int64))


@dataclass
class Batches:
    """Batches as a sequence: `batches[s]` is a dict of numpy arrays that lead with rows.

    Args:
      size: rows of a batch, in all processes together.
      packed: several samples a row; else one.
      mine: the rows of a batch that this process reads; default all.
      noise: `(tokens (T,), weights (T,), generator) -> tokens (T,)`: the inputs that a row shows
        the model instead of its tokens.
      steps: how many; 0 where the passes decide.
    """

    examples: Examples
    order: Order
    size: int
    packed: bool = True
    mine: np.ndarray | None = None
    noise: Callable[..., np.ndarray] | None = None
    steps: int = 0
    rows: list[tuple[int, ...]] = field(default_factory=list)

    def __post_init__(self):
        self._passes = self.order.passes()
        if not self.steps:
            self._plan(None)
            self.steps = -(-len(self.rows) // self.size)

    def __len__(self) -> int:
        return self.steps

    def _plan(self, rows: int | None) -> None:
        """Plan passes until there are so many rows, or all."""
        while rows is None or len(self.rows) < rows:
            if (order := next(self._passes, None)) is None:
                return
            width = self.examples.limit
            self.rows += (pack(self.examples.lengths.tolist(), order.tolist(), width) if self.packed
                          else [(int(i),) for i in order])

    def samples(self, step: int) -> list[tuple[int, ...]]:
        """The samples of each row of a batch; rows beyond the last pass have none."""
        self._plan((step + 1) * self.size)
        found = self.rows[step * self.size:(step + 1) * self.size]
        return found + [()] * (self.size - len(found))

    def __getitem__(self, step: int) -> dict[str, np.ndarray]:
        if not 0 <= step < self.steps:  # or a loop over them would have no end
            raise IndexError(f"batch {step} of {self.steps}")
        rows = self.samples(step)
        mine = range(self.size) if self.mine is None else self.mine
        return stack_rows([self._row(step, int(r), rows[r]) for r in mine])

    def _row(self, step: int, row: int, samples: tuple[int, ...]) -> dict[str, np.ndarray]:
        found = fill([self.examples[i] for i in samples], self.examples.limit)
        if self.noise is not None:
            rng = np.random.default_rng([self.order.seed, step, row])
            weights = np.append(0, found["weights"][:-1])  # of an input as an earlier target
            found["inputs"] = self.noise(found["tokens"][:-1], weights, rng)
        return found


def stack_rows(rows: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """Rows to one batch."""
    return {name: np.stack([row[name] for row in rows]) for name in rows[0]}


def mask_thoughts(share: float, mask_id: int) -> Callable[..., np.ndarray]:
    """Masked thought: an input token of the answer is `mask_id` with probability `share`.

    The targets stay as they are. Source: 2403.02178, section 3.
    """
    def noise(tokens_T, weights_T, rng):
        hidden = (weights_T > 0) & (rng.random(len(tokens_T)) < share)
        return np.where(hidden, mask_id, tokens_T).astype(np.int32)

    return noise


class Stream(Protocol):
    """An iterator of batches whose position can be kept."""

    def __next__(self) -> dict[str, np.ndarray]: ...
    def get_state(self) -> dict[str, Any]: ...
    def set_state(self, state: dict[str, Any]) -> None: ...


def stream(batches: Batches, start: dict[str, Any] | None = None) -> Stream:
    """Batches made ahead in threads, from a kept position; grain's where it is installed."""
    try:
        import grain

        found = iter(grain.MapDataset.source(batches).to_iter_dataset(
            grain.ReadOptions(num_threads=1, prefetch_buffer_size=AHEAD)))
    except ImportError:  # it has no wheel for some systems
        found = Ahead(batches)
    if start is not None:
        found.set_state(start)
    return found


class Ahead:
    """What `stream` gives without grain, with the same state."""

    def __init__(self, batches: Batches):
        self.batches, self.pool = batches, ThreadPoolExecutor(1)
        self.set_state({"next_index": 0})

    def __iter__(self) -> "Ahead":
        return self

    def __next__(self) -> dict[str, np.ndarray]:
        while len(self.made) < AHEAD and self.asked < len(self.batches):
            self.made.append(self.pool.submit(self.batches.__getitem__, self.asked))
            self.asked += 1
        if not self.made:
            raise StopIteration
        self.next += 1
        return self.made.popleft().result()

    def get_state(self) -> dict[str, int]:
        """The number of the next batch."""
        return {"next_index": self.next}

    def set_state(self, state: dict[str, int]) -> None:
        """Go on from there."""
        self.next = self.asked = state["next_index"]
        self.made: deque = deque()


def my_rows(size: int, mesh: Mesh | None) -> np.ndarray | None:
    """The rows of a batch that this process's devices hold; None for all."""
    if mesh is None or not mesh.is_multi_process:
        return None
    where = _rows_sharding(size, mesh)
    places = where.addressable_devices_indices_map((size,))
    return np.unique(np.concatenate([np.arange(size)[index] for index in places.values()]))


def place(batch: dict[str, np.ndarray], size: int, mesh: Mesh | None) -> dict[str, jax.Array]:
    """This process's rows (all of them on one process) as arrays of the whole batch."""
    if mesh is None:
        return jax.device_put(batch)
    where = _rows_sharding(size, mesh)
    if (mine := my_rows(size, mesh)) is None:
        return jax.device_put(batch, where)

    def whole(rows: np.ndarray) -> jax.Array:
        def part(index: Any) -> np.ndarray:
            return rows[np.searchsorted(mine, np.arange(size)[index[0]])]

        return jax.make_array_from_callback((size, *rows.shape[1:]), where, part)

    return {name: whole(rows) for name, rows in batch.items()}


def _rows_sharding(size: int, mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, partition(("batch",), (size,), mesh, path="batch"))
