"""Recall over long contexts: many random key-value pairs, then queries that name a key.

    R:kf49;qz13;ab77;
    ?qz13
    ?kf49

Nothing but the pair itself tells its value, so what a cache forgets shows as a wrong answer.
One character is one token; lengths count the leading `<bos>`.
"""

from __future__ import annotations

import string
import zlib
from dataclasses import dataclass

import numpy as np

KEYS = tuple(a + b for a in string.ascii_lowercase for b in string.ascii_lowercase)
PAIR_TOKENS, QUERY_TOKENS = 5, 6  # "kf49;" and "?kf49\n"
FRAME_TOKENS = 4  # <bos>, "R:" and the end of the first line


@dataclass(frozen=True)
class Document:
    """Pairs of a key and a value, and the indices of the pairs that are asked for."""

    pairs: tuple[tuple[str, str], ...]
    queries: tuple[int, ...]

    @property
    def context(self) -> str:
        """The line of pairs, without queries."""
        return "R:" + "".join(f"{key}{value};" for key, value in self.pairs) + "\n"

    @property
    def answers(self) -> tuple[str, ...]:
        """The value asked for by each query."""
        return tuple(self.pairs[i][1] for i in self.queries)

    @property
    def text(self) -> str:
        """The whole document, queries answered."""
        return self.context + "".join("?{}{}\n".format(*self.pairs[i]) for i in self.queries)

    def prompt(self, index: int) -> str:
        """The document up to where the value of query `index` belongs, earlier ones answered."""
        asked = "".join("?{}{}\n".format(*self.pairs[i]) for i in self.queries[:index])
        return f"{self.context}{asked}?{self.pairs[self.queries[index]][0]}"


def split_of(context: str) -> str:
    """The side a context belongs to, 'test' (one in eight) or 'train', by its CRC-32."""
    return "test" if zlib.crc32(context.encode()) % 8 == 0 else "train"


def sample(rng: np.random.Generator, length: int, queries: int, split: str = "train") -> Document:
    """Draws the largest document of at most `length` tokens, `<bos>` included.

    Args:
      rng: NumPy generator; the same state gives the same document.
      length: tokens of the whole document, queries answered.
      queries: how many keys are asked for at the end, with repetition.
      split: 'train' or 'test'.

    Returns:
      A `Document` of distinct keys.

    Raises:
      ValueError: no room for one pair, more pairs than keys, or an unknown split.

    Example:
      >>> document = sample(np.random.default_rng(0), length=64, queries=4)
      >>> len(document.text) + 1 <= 64, len(document.answers)
      (True, 4)
    """
    if split not in ("train", "test"):
        raise ValueError(f"split must be 'train' or 'test', got {split!r}")
    if queries < 1:
        raise ValueError(f"queries must be at least 1, got {queries}")
    count = (length - FRAME_TOKENS - QUERY_TOKENS * queries) // PAIR_TOKENS
    if not 1 <= count <= len(KEYS):
        raise ValueError(f"length={length} with queries={queries} leaves room for {count} pairs; "
                         f"expected 1 to {len(KEYS)}")
    while True:
        keys = rng.permutation(len(KEYS))[:count]
        values = rng.integers(0, 100, count)
        pairs = tuple((KEYS[k], f"{v:02d}") for k, v in zip(keys, values, strict=True))
        asked = tuple(int(i) for i in rng.integers(0, count, queries))
        document = Document(pairs, asked)
        if split_of(document.context) == split:
            return document


def check_answer(document: Document, index: int, text: str) -> bool:
    """Whether `text`, written after `document.prompt(index)`, begins with the value and ends there.

    Example:
      >>> check_answer(Document((("kf", "49"),), (0,)), 0, "49\\n")
      True
    """
    return text.split("\n")[0] == document.answers[index]
