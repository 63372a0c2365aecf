"""Reading prompts in pieces of one fixed width, and keeping what was read for the next one.

A prompt's pieces do not depend on what was kept: token `i * piece` always begins a piece. So a
state found here holds, to the bit, what reading the whole prompt anew would have left.
"""

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import jax
import numpy as np

from jaxlm.core.tree import nbytes
from jaxlm.decode.pool import (
    NEUTRAL,
    Asked,
    Joining,
    RowSampler,
    empty_pool_jit,
    join_jit,
    take_jit,
)
from jaxlm.decode.state import DecodeState, Kinds, extend, prefill
from jaxlm.hf.bundle import Bundle

Ids = Sequence[int]


@dataclass(frozen=True)
class Kept:
    """A prompt that was read: its tokens, and a state of one row."""

    ids: np.ndarray
    state: DecodeState


class PromptCache:
    """Prompts that were read, the least recently used ones dropped first.

    Args:
      limit: bytes that the kept states may hold in all; 0 keeps none.
      piece: tokens of a piece; a shared beginning is found at multiples of it.
      cuttable: whether a kept state may be cut back to fewer tokens, as the cache kinds that
        never compress can; else only whole kept prompts are beginnings of others.
    """

    def __init__(self, limit: int, piece: int, cuttable: bool):
        self.limit, self.piece, self.cuttable = limit, piece, cuttable
        self.bytes = 0
        self._kept: OrderedDict[bytes, Kept] = OrderedDict()
        self._beginnings: dict[bytes, bytes] = {}  # of a beginning, the kept prompt that has it

    def __len__(self) -> int:
        return len(self._kept)

    def find(self, ids: Ids) -> tuple[Kept | None, int]:
        """What was kept of a prompt, and how many of its tokens: all, or whole pieces of it."""
        text = _bytes(ids)
        if text in self._kept:
            self._kept.move_to_end(text)
            return self._kept[text], len(ids)
        for length in range((len(ids) - 1) // self.piece * self.piece, 0, -self.piece):
            if (name := self._beginnings.get(text[: 4 * length])) is not None:
                self._kept.move_to_end(name)
                return self._kept[name], length
        return None, 0

    def keep(self, ids: Ids, state: DecodeState) -> None:
        """Keep a prompt's state, of one row, if it fits at all."""
        text, size = _bytes(ids), nbytes(state)
        if text in self._kept or size > self.limit:
            return
        self._kept[text] = Kept(np.asarray(ids, np.int32), state)
        self.bytes += size
        for beginning in self._cuts(text):
            self._beginnings.setdefault(beginning, text)
        while self.bytes > self.limit:
            self._drop(next(iter(self._kept)))

    def _drop(self, text: bytes) -> None:
        self.bytes -= nbytes(self._kept.pop(text).state)
        for beginning in self._cuts(text):
            if self._beginnings.get(beginning) == text:
                del self._beginnings[beginning]

    def _cuts(self, text: bytes) -> list[bytes]:
        """The beginnings that a kept prompt serves."""
        step = 4 * self.piece
        if self.cuttable:
            return [text[:end] for end in range(step, len(text) + 1, step)]
        return [text] if len(text) % step == 0 else []


class Reader:
    """Reads up to `rows` prompts together, a piece at a time, by two compiled programs.

    Args: piece: tokens a row reads at once. limit: bytes of states to keep.
    """

    def __init__(self, bundle: Bundle, sampler: RowSampler, kinds: Kinds, slots: int, rows: int,
                 piece: int, limit: int):
        self.bundle, self.sampler, self.kinds = bundle, sampler, kinds
        self.slots, self.rows, self.piece = slots, rows, piece
        cuttable = all(kind is None or kind.flush_every is None for kind in kinds)
        self._limits = limit, piece, cuttable
        self.forget()
        self._keys = jax.random.split(jax.random.key(0), rows)

    def forget(self) -> None:
        """Keep nothing, and count anew."""
        self.kept = PromptCache(*self._limits)
        self.tokens_read = self.tokens_reused = 0

    def read(self, prompts: Sequence[Ids]) -> Iterator[DecodeState | None]:
        """Read prompts, at most `rows`.

        Yields: None after each piece but the last, then the state; its first rows are the prompts.
        """
        found = [self.kept.find(ids) for ids in prompts]
        start = np.array([length for _, length in found] + [0] * (self.rows - len(prompts)))
        self.tokens_reused += int(start.sum())
        self.tokens_read += sum(map(len, prompts)) - int(start.sum())
        state = self._begin(prompts, found, start)
        while True:
            self._remember(prompts, state, start)
            counts = self._counts(prompts, start)
            if not counts.any():
                yield state
                return
            yield None
            tokens = self._piece(prompts, start, counts)
            state = extend_jit(self.bundle.lm, self.bundle.params, state, tokens, counts)
            start = start + counts

    def _begin(
        self, prompts: Sequence[Ids], found: list[tuple[Kept | None, int]], start: np.ndarray
    ) -> DecodeState:
        """New prompts read up to their first piece, kept ones put beside them; moves `start`."""
        counts = np.where(start == 0, self._counts(prompts, start), 0)
        if counts.any():
            state = prefill_jit(
                self.bundle.lm, self.bundle.params, self.sampler,
                self._piece(prompts, start, counts), np.maximum(counts, 1).astype(np.int32),
                self.kinds, self.slots, self._keys)
        else:
            state = empty_pool_jit(self.bundle.lm, self.bundle.params, self.sampler, self.kinds,
                                   self.rows, self.slots)
        for row, (kept, length) in enumerate(found):
            if kept is not None:
                state = join_jit(state, kept.state, np.zeros(1, np.int32),
                                 np.array([row], np.int32), 1, unasked(length, self.slots))
        start += counts
        return state

    def _counts(self, prompts: Sequence[Ids], start: np.ndarray) -> np.ndarray:
        """Tokens of each row's next piece."""
        left = [len(ids) - start[row] for row, ids in enumerate(prompts)]
        counts = np.zeros(self.rows, np.int32)
        counts[: len(prompts)] = np.minimum(left, self.piece)
        return counts

    def _piece(self, prompts: Sequence[Ids], start: np.ndarray, counts: np.ndarray) -> np.ndarray:
        """The next tokens of every row, right-padded."""
        tokens = np.zeros((self.rows, self.piece), np.int32)
        for row, ids in enumerate(prompts):
            tokens[row, : counts[row]] = ids[start[row]: start[row] + counts[row]]
        return tokens

    def _remember(self, prompts: Sequence[Ids], state: DecodeState, start: np.ndarray) -> None:
        """Keep the rows that are at their end, and where states cannot be cut, at a last piece."""
        if not self.kept.limit:
            return
        for row, ids in enumerate(prompts):
            ended = start[row] == len(ids)
            last = start[row] == (len(ids) - 1) // self.piece * self.piece > 0
            if ended or (last and not self.kept.cuttable):
                one, finite = take_jit(state, row)
                if finite:
                    self.kept.keep(ids[: start[row]], one)


def unasked(length: int, limit: int) -> Joining:
    """One row as it is, cut to `length` tokens."""
    asked = Asked(**{name: np.full(1, value, np.float32) for name, value in NEUTRAL.items()})
    return Joining(np.zeros((1, 2), np.uint32), np.zeros(1, np.int32), np.array([length], np.int32),
                   np.array([limit], np.int32), asked)


def _bytes(ids: Ids) -> bytes:
    return np.asarray(ids, np.int32).tobytes()


prefill_jit = jax.jit(prefill, static_argnames=("lm", "sampler", "cache", "slots"))
extend_jit = partial(jax.jit, static_argnames="lm", donate_argnames="state")(
    lambda lm, params, state, tokens_BT, counts_B: extend(lm, params, state, tokens_BT,
                                                          counts_B)[0])
