"""Batches for the bundled model: rows of documents, with a weight for every token.

A batch is a function of (seed, step) alone, so a stopped run resumes without any data state.
"""

from dataclasses import dataclass

import numpy as np

from experiments.tiny_tokenizer import BOS, EOS, encode
from jaxlm.eval import arithmetic, recall

NOISE, STEP, VALUE = 0.05, 1.0, 3.0  # weights: unguessable text, worked steps, recalled values


@dataclass(frozen=True)
class Mix:
    """What a batch is made of: its shape, the share of recall rows, lengths and levels."""

    shape: tuple[int, int] = (16, 256)
    recall: float = 0.4
    lengths: tuple[int, int] = (64, 256)
    levels: tuple[tuple[str | arithmetic.Level, float], ...] = (
        ("easy", 0.2), ("medium", 0.35), ("hard", 0.45))
    asking: tuple[float, float] = (0.3, 0.6)  # the share of a document's tokens that are queries


def arithmetic_document(problem: arithmetic.Problem) -> tuple[list[int], list[float]]:
    """Ids and weights of a problem and its solution between `<bos>` and `<eos>`."""
    prompt, solution = encode(problem.prompt), encode(problem.solution)
    return [BOS, *prompt, *solution, EOS], [0.0, *[NOISE] * len(prompt),
                                            *[STEP] * (len(solution) + 1)]


def recall_document(document: recall.Document) -> tuple[list[int], list[float]]:
    """Ids and weights of a document of pairs and answered queries."""
    context = encode(document.context)
    answered = encode(document.text)[len(context):]
    query = [NOISE, NOISE, STEP, VALUE, VALUE, STEP]  # "?kf49\n": k nearly tells f
    return [BOS, *context, *answered, EOS], [0.0, *[NOISE] * len(context),
                                             *query * len(document.queries), NOISE]


def _fill(width: int, draw) -> tuple[np.ndarray, np.ndarray]:
    """One row of documents; `draw(room)` gives each, or None when no more fits."""
    ids, weights = np.zeros(width + 1, np.int32), np.zeros(width + 1, np.float32)
    used = 0
    while (document := draw(width + 1 - used)) is not None:
        end = used + len(document[0])
        ids[used:end], weights[used:end] = document
        used = end
    return ids, weights


def batch(mix: Mix, seed: int, step: int, split: str = "train") -> dict[str, np.ndarray]:
    """Inputs, targets and weights of one step, each (B, T); padding weighs nothing."""
    rng = np.random.default_rng([seed, step])
    names, shares = zip(*mix.levels, strict=True)
    shares = np.cumsum(shares) / np.sum(shares)

    def draw_arithmetic(room: int):  # the last one of a row is cut at its end
        level = names[int(np.searchsorted(shares, rng.random()))]
        problem = arithmetic.sample(rng, level, split)
        document = arithmetic_document(problem)
        return (document[0][:room], document[1][:room]) if room else None

    def draw_recall(room: int):
        if room < mix.lengths[0]:
            return None
        length = int(rng.integers(mix.lengths[0], min(mix.lengths[1], room) + 1))
        share = rng.uniform(*mix.asking)
        queries = max(1, int(share * length / recall.QUERY_TOKENS))
        return recall_document(recall.sample(rng, length - 1, queries, split))

    B, T = mix.shape
    rows = [_fill(T, draw_recall if rng.random() < mix.recall else draw_arithmetic)
            for _ in range(B)]
    ids, weights = (np.stack(part) for part in zip(*rows, strict=True))
    return {"inputs": ids[:, :-1], "targets": ids[:, 1:], "weights": weights[:, 1:]}
