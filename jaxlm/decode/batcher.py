"""A pool at work: requests in, pieces of their answers out, one chunk of steps at a time."""

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxlm.cache.base import CacheKind
from jaxlm.cache.dense import Dense
from jaxlm.core.device import backend
from jaxlm.core.errors import ConfigError, ShapeError, whole
from jaxlm.core.tree import nbytes
from jaxlm.decode.generate import check_strings, continuation, placed, to_ids
from jaxlm.decode.pool import (
    NEUTRAL,
    TOPS,
    Asked,
    Chunk,
    Joining,
    RowSampler,
    advance_jit,
    empty_pool_jit,
    join_jit,
    leave_jit,
    seed_words,
)
from jaxlm.decode.prompts import Reader
from jaxlm.decode.samplers import Categorical
from jaxlm.decode.state import DecodeState, Kinds
from jaxlm.decode.stop import Stop
from jaxlm.decode.text import vocabulary
from jaxlm.hf.bundle import Bundle, check_bundle


@dataclass(eq=False)
class Request:
    """One answer that is asked for. Make it with `Batcher.request`, which checks it.

    prompt: token ids. seed, choice: `fold_in(key(seed), choice)` is its key. tops: alternatives
    to report at each token. stream: whether text is reported before the answer is over.
    """

    prompt: list[int]
    max_new_tokens: int
    asked: dict[str, float]
    seed: int = 0
    choice: int = 0
    strings: tuple[str, ...] = ()
    include_stop: bool = False
    stop: Stop = Stop()
    stream: bool = False
    cancelled: bool = False
    drawn: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    alternatives: list[list[tuple[int, float]]] = field(default_factory=list)
    shown: int = 0  # characters of text reported

    def another(self, choice: int) -> "Request":
        """The same for another of several answers to the prompt, whose ids they share."""
        return replace(self, choice=choice, drawn=[], logprobs=[], alternatives=[])


class Progress(NamedTuple):
    """What is new of an answer: text, and once it is over, why ("stop", "string", "length", or
    "error": the model gave a number that is not finite). The first `settled` of the request's
    tokens will not change."""

    request: Request
    text: str
    finish: str | None
    settled: int


class Batcher:
    """Answers many requests with one compiled batch, which they join and leave as they come.

    Not for several threads at once. A request's answer is the same whatever else is asked.

    Args:
      rows: answers that grow together. max_len: tokens a row can hold, prompt included.
      cache: a cache kind, or one a layer, or a name such as "kivi2".
      chunk: steps between two moments at which rows join and leave.
      piece: tokens of a prompt read at once; default 32 on a CPU, 256 elsewhere and for kinds
        that learn from a prompt's queries (SQuat), which know those of its first piece only.
      readers: prompts read together; default 4 on a CPU, whose time is in the arithmetic, and 8
        elsewhere, where it is in reading the weights. prompt_bytes: of kept prompts; 0 keeps none.
    Raises: ConfigError, ShapeError.

    Example:
      >>> from jaxlm.hf.bundle import load
      >>> batcher = Batcher(load("tiny"), rows=2, max_len=64)
      >>> batcher.add(batcher.request("Q:12+34=\\n", stop="A:"))
      >>> [progress.text for progress in batcher.run() if progress.finish]
      ['12+34=46\\n']
    """

    def __init__(
        self, bundle: Bundle, *, rows: int = 32, max_len: int = 1024,
        cache: CacheKind | Kinds | str = Dense(), chunk: int = 8, piece: int | None = None,
        readers: int | None = None, prompt_bytes: int = 256 << 20,
    ):
        check_bundle(bundle)
        if bundle.lm.labels is not None:
            raise ConfigError("this model gives labels, not text; use bundle.lm.classify")
        self.bundle, self.rows = bundle, whole("rows", rows)
        self.max_len = whole("max_len", max_len, 2, bundle.lm.config.max_len)
        cpu = backend() == "cpu"
        readers = (4 if cpu else 8) if readers is None else whole("readers", readers)
        self.sampler = RowSampler(whole("chunk", chunk))
        kinds = tuple(replace(kind, steady=True) if isinstance(kind, Dense) else kind
                      for kind in placed(bundle, self.sampler, cache))
        learn = any(getattr(kind, "learnt", None) for kind in kinds)
        piece = (32 if cpu and not learn else 256) if piece is None else whole("piece", piece)
        self.reader = Reader(bundle, self.sampler, kinds, self.max_len, min(readers, self.rows),
                             min(piece, self.max_len), whole("prompt_bytes", prompt_bytes, 0))
        self.stop = Stop(bundle.stop_ids)
        self.waiting: deque[Request] = deque()
        self.live: dict[int, Request] = {}
        self._free = list(range(self.rows))[::-1]
        self._reading: tuple[dict[tuple, list[Request]], Iterator[DecodeState | None]] | None = None
        self._state = empty_pool_jit(bundle.lm, bundle.params, self.sampler, kinds, self.rows,
                                     self.max_len)

    def request(
        self, prompt: Any, *, max_new_tokens: int | None = None, temperature: float = 0.0,
        top_k: int | None = None, top_p: float = 1.0, min_p: float = 0.0, seed: int = 0,
        choice: int = 0, stop: str | Sequence[str] = (), include_stop: bool = False,
        tops: int = 0, stream: bool = False,
    ) -> Request:
        """A checked request; `add` it.

        Args: see `generate`; max_new_tokens: default what room there is. choice: which of
          several answers to one prompt. tops: alternatives to report, 0 to 20.
        Raises: ConfigError, ShapeError, TokenizerError.
        """
        ids = to_ids(self.bundle, [prompt])[0][0]
        room = self.max_len - len(ids)
        new = max(room, 1) if max_new_tokens is None else whole("max_new_tokens", max_new_tokens)
        if new > room:
            raise ShapeError(f"the prompt has {len(ids)} tokens and {new} new ones are asked for, "
                             f"but a row holds {self.max_len}; shorten the prompt, or ask for less")
        Categorical(temperature, top_k, top_p, min_p)  # checks the ranges
        asked = {"temperature": temperature, "top_k": np.inf if top_k is None else top_k,
                 "top_p": top_p, "min_p": min_p, "tops": whole("tops", tops, 0, TOPS)}
        strings = check_strings(stop)
        if strings:
            vocabulary(self.bundle.tokenizer, self.bundle.lm.config.vocab_size)
        seed_words(seed), whole("choice", choice, 0)
        return Request(ids, new, asked, seed, choice, strings, bool(include_stop), self.stop,
                       stream)

    def warm(self) -> None:
        """Compile all programs now, on requests of no one's."""
        ids = [0] * min(self.reader.piece + 1, self.max_len - 1)
        for prompt in (ids, ids, [*ids[:-1], 1]):  # read, kept whole, kept in part
            self.add(self.request(prompt, max_new_tokens=1))
            for _ in self.run():
                pass
        self.reader.forget()

    def add(self, request: Request) -> None:
        """Let a request wait for a row."""
        self.waiting.append(request)

    @property
    def bytes(self) -> int:
        """What it may hold: its rows, the prompts that are read together, and kept prompts."""
        return nbytes(self._state) * (self.rows + self.reader.rows) // self.rows + (
            self.reader.kept.limit)

    @property
    def busy(self) -> bool:
        """Whether anything is left to do."""
        return bool(self.waiting or self.live or self._reading)

    def run(self) -> Iterator[Progress]:
        """Steps until nothing is left to do."""
        while self.busy:
            yield from self.step()

    def step(self) -> list[Progress]:
        """Let requests join, draw one chunk, let rows leave; what is new of each answer.

        At most as many pieces of prompts are read as fill the pool with short ones, so that a
        long prompt holds up the others' chunks for a bounded time.
        """
        for _ in range(max(1, self.rows // self.reader.rows)):
            if not self._admit():
                break
        self._leave([row for row, request in self.live.items() if request.cancelled])
        if not self.live:
            return []
        self._state, chunk = advance_jit(self.bundle.lm, self.bundle.params, self.sampler,
                                         self._state, self.stop)
        wants_tops = any(request.asked["tops"] for request in self.live.values())
        chunk = chunk if wants_tops else chunk.replace(top_token_BkN=(), top_logprob_BkN=())
        chunk = jax.device_get(chunk)
        out = [self._progress(row, request, chunk) for row, request in self.live.items()]
        over = {id(progress.request) for progress in out if progress.finish}
        self._leave([row for row, request in self.live.items() if id(request) in over])
        return out

    def _admit(self) -> bool:
        """Read one piece of the prompts at hand; whether there was any to read."""
        if self._reading is None:
            group = self._next_group()
            if not group:
                return False
            self._reading = group, self.reader.read(list(group))
        group, pieces = self._reading
        if (state := next(pieces)) is not None:
            self._reading = None
            self._join(state, [(source, request) for source, same in enumerate(group.values())
                               for request in same])
        return True

    def _next_group(self) -> dict[tuple, list[Request]]:
        """Requests for the free rows, by prompt, as many prompts as are read together; those
        whose prompt was kept join at once."""
        group: dict[tuple, list[Request]] = {}
        room = len(self._free)
        while self.waiting and room:
            request = self.waiting[0]
            ids = tuple(request.prompt)
            kept, length = self.reader.kept.find(ids)
            if request.cancelled:
                pass
            elif kept is not None and length == len(ids):
                self.reader.tokens_reused += length
                self._join(kept.state, [(0, request)])
            elif ids in group or len(group) < self.reader.rows:
                group.setdefault(ids, []).append(request)
            else:
                break
            room -= not request.cancelled
            self.waiting.popleft()
        return group

    def _join(self, fresh: DecodeState, requests: list[tuple[int, Request]]) -> None:
        """Put requests into free rows, from the rows of `fresh` that read their prompts."""
        requests = [(source, request) for source, request in requests if not request.cancelled]
        size = self.reader.rows
        for first in range(0, len(requests), size):
            part = requests[first: first + size]
            source, rows = np.zeros(size, np.int32), np.full(size, self.rows, np.int32)
            for i, (row, request) in enumerate(part):
                source[i], rows[i] = row, self._free.pop()
                self.live[int(rows[i])] = request
            joining = self._joining([request for _, request in part], size)
            self._state = join_jit(self._state, fresh, source, rows, len(part), joining)

    def _joining(self, requests: list[Request], size: int) -> Joining:
        """What the rows of some requests become, padded to `size`."""
        def column(values, dtype):
            values = np.asarray(values, dtype)
            return np.concatenate([values, np.zeros((size - len(values), *values.shape[1:]),
                                                    dtype)])

        length = [len(request.prompt) for request in requests]
        return Joining(
            column([seed_words(request.seed) for request in requests], np.uint32),
            column([request.choice for request in requests], np.int32),
            column(length, np.int32),
            column([n + r.max_new_tokens for n, r in zip(length, requests, strict=True)], np.int32),
            Asked(**{name: column([r.asked[name] for r in requests], np.float32)
                     for name in NEUTRAL}),
        )

    def _leave(self, rows: list[int]) -> None:
        """Free rows."""
        if not rows:
            return
        for row in rows:
            del self.live[row]
        self._free += rows
        mask = np.zeros(self.rows, bool)
        mask[rows] = True
        self._state = leave_jit(self._state, mask)

    def _progress(self, row: int, request: Request, chunk: Chunk) -> Progress:
        """Add a chunk's tokens to a request; what is new of its text, and whether it is over."""
        count = int(chunk.count_B[row])
        logprobs = chunk.logprob_Bk[row, :count]
        request.drawn += chunk.token_Bk[row, :count].tolist()
        request.logprobs += logprobs.tolist()
        if tops := int(request.asked["tops"]):
            tokens, values = chunk.top_token_BkN[row], chunk.top_logprob_BkN[row]
            request.alternatives += [list(zip(tokens[i, :tops].tolist(), values[i, :tops].tolist(),
                                              strict=True)) for i in range(count)]
        if not np.isfinite(logprobs).all():
            return Progress(request, "", "error", len(request.drawn))
        over = bool(chunk.done_B[row])
        if request.strings:
            over |= self._cut(request, count)
        if not (over or request.stream):
            return Progress(request, "", None, len(request.drawn))
        finish, _, text = continuation(self.bundle, request, request.prompt, request.drawn, over)
        new, request.shown = text[request.shown:], len(text)
        return Progress(request, new, finish if over else None, len(request.drawn))

    def _cut(self, request: Request, count: int) -> bool:
        """Drop what was drawn behind a stop string; whether there was one.

        Strings differ from row to row, so they are looked for here, at the end of a chunk, where
        a row could not have left earlier anyway.
        """
        names = vocabulary(self.bundle.tokenizer, self.bundle.lm.config.vocab_size)
        patterns = [string.encode() for string in request.strings]
        old = len(request.drawn) - count
        text = b"".join(names[token] for token in request.drawn[:old])
        text = text[-max(map(len, patterns)):]
        for end, token in enumerate(request.drawn[old:], old + 1):
            text += names[token]
            if any(pattern in text for pattern in patterns):
                del request.drawn[end:], request.logprobs[end:], request.alternatives[end:]
                return True
        return False
