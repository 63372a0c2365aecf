"""Samples into rows of one width, several to a row, none of which sees another."""

from bisect import bisect_left, insort
from collections.abc import Iterable, Sequence

import numpy as np

from jaxlm.train.data import Example

BUFFER = 1024  # samples that are fitted together; more waste less, and mix less


def pack(lengths: Sequence[int], order: Iterable[int], width: int) -> list[tuple[int, ...]]:
    """Rows of samples whose lengths sum to at most `width`: best fit, longest first, by buffers.

    A buffer of samples in their random order is packed at a time, so a row holds samples that
    were near each other.

    Args:
      lengths: tokens of every sample, at most `width`.
      order: the samples to pack.
    Returns: the samples of each row; all of `order`, each as often as it stands there.

    Example:
      >>> pack([5, 3, 4, 2], [0, 1, 2, 3], width=8)
      [(0, 1), (2, 3)]
    """
    order, rows = list(order), []
    for start in range(0, len(order), BUFFER):
        part = order[start:start + BUFFER]
        rows.extend(_fit([int(lengths[i]) for i in part], part, width))
    return rows


def _fit(lengths: list[int], samples: list[int], width: int) -> list[tuple[int, ...]]:
    """Best fit decreasing: each goes to the fullest row that still has room."""
    rows: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (what is left, row), sorted
    for i in sorted(range(len(samples)), key=lambda i: (-lengths[i], i)):
        at = bisect_left(room, (lengths[i], -1))
        if at == len(room):
            rows.append([])
            left, row = width, len(rows) - 1
        else:
            left, row = room.pop(at)
        rows[row].append(i)
        if left > lengths[i]:
            insort(room, (left - lengths[i], row))
    rows = sorted((sorted(row) for row in rows), key=lambda row: row[0])  # the random order again
    return [tuple(samples[i] for i in row) for row in rows]


def fill(examples: Sequence[Example], width: int, pad: int = 0) -> dict[str, np.ndarray]:
    """One row from samples that fit it.

    Positions restart with every sample and segments count from 1; padding is segment 0 and
    weighs nothing, nor does the first token of a sample.

    Args: width: tokens of the row, T + 1.
    Returns: tokens int32 (T + 1,); weights float32, segments and positions int32, each (T,).

    Example:
      >>> one = Example(np.array([7, 8, 9]), np.array([0., 1., 1.]))
      >>> row = fill([one, one], width=8)
      >>> row["tokens"].tolist(), row["segments"].tolist()
      ([7, 8, 9, 7, 8, 9, 0, 0], [1, 1, 1, 2, 2, 2, 0])
      >>> row["weights"].tolist(), row["positions"].tolist()
      ([1.0, 1.0, 0.0, 1.0, 1.0, 0.0, 0.0], [0, 1, 2, 0, 1, 2, 0])
    """
    tokens, weights = np.full(width, pad, np.int32), np.zeros(width, np.float32)
    segments, positions = np.zeros(width, np.int32), np.zeros(width, np.int32)
    start = 0
    for number, example in enumerate(examples, 1):
        here = slice(start, start + len(example.tokens))
        tokens[here], weights[here], segments[here] = *example, number
        weights[start] = 0
        positions[here] = np.arange(len(example.tokens))
        start = here.stop
    return {"tokens": tokens, "weights": weights[1:], "segments": segments[:-1],
            "positions": positions[:-1]}
