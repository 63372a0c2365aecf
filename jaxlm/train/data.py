"""Samples from jsonl files: text to tokens, with a weight for every token that is to be learnt.

A line is one of `{"messages": [{"role": ..., "content": ...}, ...]}` (through the chat template),
`{"prompt": ..., "completion": ...}` and `{"text": ...}`; other fields are not read.
"""

import difflib
import hashlib
import itertools
import json
import pathlib
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils

from jaxlm.core.errors import ConfigError, DataError, TokenizerError
from jaxlm.core.hosts import together
from jaxlm.hf.tokenizer import Tokenizer

FORMS = ({"messages"}, {"prompt", "completion"}, {"text"})
KNOWN = set().union(*FORMS)
WANTED = 'expected {"messages": [...]}, {"prompt": ..., "completion": ...} or {"text": ...}'
CUT, SKIP, REFUSE = "cut", "skip", "error"
CHUNK = 256  # lines that are tokenised at once


class Example(NamedTuple):
    """One sample: int32 tokens (n,), and the float32 weight of each as a target (n,)."""

    tokens: np.ndarray
    weights: np.ndarray


class Span(NamedTuple):
    """A text, and the ranges of characters that are the answers in it."""

    text: str
    answers: tuple[tuple[int, int], ...]
    whole: bool  # begin and end marks are the tokenizer's to add, not yet in the text


@dataclass(frozen=True)
class Reader:
    """How a line becomes an example.

    Args:
      answers: weigh the assistant's tokens, or the completion's, alone; else every token.
      template: Jinja of a chat template, in place of the tokenizer's own.
      end_id: ends a completion and a text; None adds nothing.
    """

    tokenizer: Tokenizer
    answers: bool = True
    template: str | None = None
    end_id: int | None = None

    def __call__(self, record: Any) -> Example:
        """Tokens and weights of one parsed line. Raises: DataError, without the place."""
        span = self.span(record)
        return self.example(span, *self.encode([span]))

    def encode(self, spans: Sequence[Span]) -> list[Any]:
        """Texts as `tokenizers.Encoding`s; several at once are shared by all cores."""
        found: dict[int, Any] = {}
        for whole in (True, False):
            own = [i for i, span in enumerate(spans) if span.whole == whole]
            found |= zip(own, self.tokenizer.backend_tokenizer.encode_batch(
                [spans[i].text for i in own], add_special_tokens=whole), strict=True)
        return [found[i] for i in range(len(spans))]

    def example(self, span: Span, encoding: Any) -> Example:
        """Tokens and weights of a text that is encoded. Raises: DataError, without the place."""
        text, answers, whole = span
        tokens, offsets = list(encoding.ids), list(encoding.offsets)
        if whole and self.end_id is not None:
            if tokens[-1:] != [self.end_id]:
                tokens.append(self.end_id)
                offsets.append((0, 0))
            offsets[-1] = (len(text), len(text) + 1)  # one that the tokenizer added has no place
        weights = np.ones(len(tokens), np.float32)
        if self.answers:
            starts, ends = np.asarray(offsets, np.int64).reshape(-1, 2).T
            weights = np.zeros(len(tokens), np.float32)
            for low, high in answers:
                weights[(low < ends) & (starts < high)] = 1
        weights[:1] = 0  # nothing comes before it
        if not weights.any():
            raise DataError("nothing in it is to be learnt; expected an answer with some text")
        return Example(np.asarray(tokens, np.int32), weights)

    def span(self, record: Any) -> Span:
        """The text of a record and where its answers lie. Raises: DataError, without the place."""
        span = self._span(record)
        try:
            span.text.encode()
        except UnicodeEncodeError as error:
            raise DataError(f"has half of a surrogate pair in it: {error}") from error
        return span

    def _span(self, record: Any) -> Span:
        form = form_of(record)
        if form == {"messages"}:
            return self._chat(record["messages"])
        if wrong := [name for name in sorted(form) if not isinstance(record[name], str)]:
            raise DataError(f"{wrong[0]!r} is {type(record[wrong[0]]).__name__}; expected a string")
        if form == {"text"}:
            return Span(record["text"], ((0, len(record["text"]) + 1),), True)
        text = record["prompt"] + record["completion"]
        return Span(text, ((len(record["prompt"]), len(text) + 1),), True)

    def _chat(self, messages: Any) -> Span:
        check_messages(messages)
        try:
            text = self.tokenizer.render(messages, template=self.template)
            answers = []
            for i, message in enumerate(messages):
                if self.answers and message["role"] == "assistant":
                    before = self.tokenizer.render(messages[:i], True, self.template)
                    until = self.tokenizer.render(messages[:i + 1], False, self.template).rstrip()
                    if not (text.startswith(until) and until.startswith(before)):
                        raise DataError(
                            f"the chat template writes the turns before message {i} otherwise "
                            "when it follows, so the answer cannot be told apart; train on all "
                            "tokens (loss_on: all), or give another chat_template")
                    answers.append((len(before), len(until)))
        except TokenizerError as error:
            raise DataError(f"{error}; give one with chat_template: FILE.jinja") from error
        return Span(text, tuple(answers), False)


def form_of(record: Any) -> set[str]:
    """The fields of a record that are read: one of `FORMS`; messages are a sample by themselves.

    >>> sorted(form_of({"prompt": "a", "completion": "b", "id": 3}))
    ['completion', 'prompt']

    Raises: DataError where none is whole, or it cannot be told which is meant.
    """
    names = set(record) if isinstance(record, dict) else set()
    whole = [form for form in FORMS if form <= names]
    if whole and (whole[0] == {"messages"} or not names & KNOWN - whole[0]):
        return whole[0]
    got = sorted(names) if isinstance(record, dict) else type(record).__name__
    near = {name: found[0] for name in sorted(names - KNOWN)
            if (found := difflib.get_close_matches(name, sorted(KNOWN - names), 1))}
    hint = "".join(f"; is {name!r} meant to be {known!r}?" for name, known in near.items())
    raise DataError(f"is {got}; {WANTED}{hint}")


def check_messages(messages: Any) -> None:
    """DataError unless these are messages with an answer among them."""
    fine = isinstance(messages, list) and messages and all(
        isinstance(m, dict) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str)
        for m in messages)
    if not fine:
        raise DataError('"messages" is no list of {"role": ..., "content": ...} of strings')
    if not any(m["role"] == "assistant" for m in messages):
        raise DataError("no message has the role 'assistant', so there is nothing to learn")


@dataclass
class Examples:
    """Samples of some files, tokenised when asked for and then kept.

    `kept` are the numbers of the samples to use, `lengths` their tokens after cutting. `group`
    tells the file of each. `counts`: what became of the lines. `unread`: other fields than those of
    a form, and in how many lines.
    """

    read: Reader
    places: list[tuple[pathlib.Path, int, int]]  # file, line, byte offset
    group: np.ndarray
    limit: int
    digest: str
    lengths: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int32))
    counts: dict[str, int] = field(default_factory=dict)
    cache: dict[int, Example] = field(default_factory=dict)
    unread: Counter = field(default_factory=Counter)

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, i: int) -> Example:
        if i not in self.cache:
            self.tokenise([i])
        tokens, weights = self.cache[i]
        return Example(tokens[:self.limit], weights[:self.limit])

    def where(self, i: int) -> str:
        """`FILE:LINE` of a sample."""
        return f"{self.places[i][0]}:{self.places[i][1]}"

    def tokenise(self, numbers: Sequence[int]) -> None:
        """Read some samples, and keep them."""
        spans = [self._read(i) for i in numbers]
        for i, span, encoding in zip(numbers, spans, self.read.encode(spans), strict=True):
            with self._named(i):
                self.cache[i] = self.read.example(span, encoding)

    def _read(self, i: int) -> Span:
        path, _, offset = self.places[i]
        with open(path, "rb") as file:
            file.seek(offset)
            line = file.readline()
        with self._named(i):
            record = json.loads(line.rstrip())  # else what is cut short is missed on the next line
            span = self.read.span(record)
            self.unread.update(set(record) - form_of(record))
            return span

    @contextmanager
    def _named(self, i: int) -> Iterator[None]:
        """What is wrong with a sample, with its place."""
        try:
            yield
        except UnicodeDecodeError as error:
            raise DataError(f"{self.where(i)} is not UTF-8 text: {error}") from error
        except json.JSONDecodeError as error:
            raise DataError(f"{self.where(i)} is not JSON: {error.msg} at column "
                            f"{error.colno}; {WANTED}, one a line") from error
        except DataError as error:
            raise DataError(f"{self.where(i)}: {error}") from error


def open_examples(
    files: Sequence[str | pathlib.Path], read: Reader, window: int,
    long: str = CUT, watch: Callable[[Sequence[int]], Iterable[int]] = iter,
) -> Examples:
    """Find every line, tokenise all once, and count what is too long.

    Several processes that run together tokenise a share of the lines each.

    Args:
      window: a row's inputs; a sample may have one token more, its last target.
      long: what becomes of a longer sample: "cut" (its beginning is kept), "skip", or "error".
      watch: wraps the numbers of the lines, as a progress bar does.
    Raises: DataError with file and line for what is empty or malformed.
    Warns: once, of fields that are not read.
    """
    shared = jax.process_count() > 1
    with together(shared):
        places, group, digest = find_lines(files)
        found = Examples(read, places, np.asarray(group, np.int32), window + 1, digest)
        lengths = np.zeros(len(places), np.int32)
        useful = np.zeros(len(places), np.int32)
        mine = iter(watch(range(jax.process_index(), len(places), jax.process_count())))
        while some := list(itertools.islice(mine, CHUNK)):
            found.tokenise(some)
            for i in some:
                weights = found[i].weights
                lengths[i], useful[i] = len(found.cache[i].tokens), bool(weights.any())
    if found.unread:
        listed = ", ".join(f"{name!r} (lines: {n})" for name, n in found.unread.most_common(8))
        warnings.warn(f"{', '.join(map(str, files))}: not read are {listed}", stacklevel=2)
    if shared:
        lengths, useful = multihost_utils.process_allgather((lengths, useful))
        lengths, useful = lengths.sum(0), useful.sum(0)
    over = lengths > window + 1
    if over.any() and long == REFUSE:
        first = int(np.argmax(over))
        raise DataError(f"{found.where(first)} has {lengths[first]} tokens; a row holds "
                        f"{window + 1}: raise the window, or say long: cut or long: skip")
    dropped = (over & (long == SKIP)) | (useful == 0)
    if dropped.all():
        raise DataError(f"all {len(places)} samples of {', '.join(map(str, files))} are longer "
                        f"than a window of {window} allows; raise it")
    found.lengths = np.where(dropped, 0, np.minimum(lengths, window + 1))
    found.counts = {"samples": len(places), "cut": int((over & ~dropped).sum()),
                    "skipped": int(dropped.sum()), "tokens": int(found.lengths.sum())}
    return found


def find_lines(
    files: Sequence[str | pathlib.Path],
) -> tuple[list[tuple[pathlib.Path, int, int]], list[int], str]:
    """Where each line that is not blank begins, its file's number, and a digest of all files."""
    if not files:
        raise ConfigError("no data file is named; expected one or more, as in [a.jsonl]")
    places: list[tuple[pathlib.Path, int, int]] = []
    group: list[int] = []
    digest = hashlib.sha256()
    for number, name in enumerate(files):
        path, offset, before = pathlib.Path(name).expanduser(), 0, len(places)
        try:
            with open(path, "rb") as file:
                for line, text in enumerate(file, 1):
                    digest.update(text)
                    if text.strip():
                        places.append((path, line, offset))
                        group.append(number)
                    offset += len(text)
        except OSError as error:
            raise DataError(f"cannot read {path}: {error.strerror}") from error
        if len(places) == before:
            raise DataError(f"{path}:1: the file is empty; {WANTED}, one a line")
    return places, group, digest.hexdigest()
