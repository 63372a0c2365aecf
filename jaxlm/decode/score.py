"""Scoring: per-token log-probabilities, and perplexity over windows with a stride."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, overload

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm.core.errors import NumericsError, ShapeError, whole
from jaxlm.core.hosts import to_host
from jaxlm.core.mesh import shard_batch
from jaxlm.core.tree import Params
from jaxlm.decode.generate import BUCKET, Prompt, round_up, to_ids
from jaxlm.hf.bundle import Bundle, check_bundle
from jaxlm.models.lm import LM
from jaxlm.models.stack import STACK


@dataclass(frozen=True)
class Score:
    """`logprobs[i]` belongs to `tokens[i + 1]`: the first token has nothing before it."""

    tokens: tuple[int, ...]
    logprobs: np.ndarray

    @property
    def perplexity(self) -> float:
        """`exp(-mean log p)`."""
        return float(np.exp(-self.logprobs.mean()))


@overload
def score(
    bundle: Bundle, texts: Prompt, *, window: int | None = ..., stride: int | None = ...,
    batch: int = ...,
) -> Score: ...
@overload
def score(
    bundle: Bundle, texts: Sequence[Prompt], *, window: int | None = ..., stride: int | None = ...,
    batch: int = ...,
) -> list[Score]: ...
def score(
    bundle: Bundle, texts: Prompt | Sequence[Prompt], *, window: int | None = None,
    stride: int | None = None, batch: int = 8,
) -> Score | list[Score]:
    """Log-probability of every token of every text, float32.

    A text longer than `window` is read in windows that start `stride` tokens apart; each token
    is scored once, in the first window that holds it, with the context that window gives.

    Args:
      texts: a text or token ids, or a list of either; at least 2 tokens each.
      window: tokens a window, 2 to the model's length (the default).
      stride: 1 to window - 1; default half a window. The smaller, the more context and time.
      batch: windows computed together, at most.
    Returns: a Score, or a list of them when a list was given.
    Raises: ShapeError, ConfigError, TokenizerError before any compute; NumericsError on NaN.

    Example:
      >>> from jaxlm.hf.bundle import load
      >>> score(load("tiny"), "Q: 1+1=").perplexity > 1
      True
    """
    check_bundle(bundle)
    limit = bundle.lm.config.max_len
    window = limit if window is None else whole("window", window, 2, limit)
    stride = max(window // 2, 1) if stride is None else whole("stride", stride, 1, window - 1)
    batch = whole("batch", batch)
    ids, many = to_ids(bundle, texts, "text")
    for number, text in enumerate(ids):
        if len(text) < 2:
            raise ShapeError(f"text {number} has 1 token; scoring needs at least 2")
    jobs = [(row, *w) for row, text in enumerate(ids) for w in windows(len(text), window, stride)]
    found = window_logprobs(bundle, ids, jobs, batch)
    scores = [Score(tuple(text), line) for text, line in zip(ids, found, strict=True)]
    return scores if many else scores[0]


def window_logprobs(
    bundle: Bundle, ids: Sequence[Sequence[int]], jobs: list[tuple[int, int, int, int]],
    batch: int, progress: Callable[[Sequence[Any]], Iterable[Any]] = iter,
) -> list[np.ndarray]:
    """Log-probabilities of all tokens but the first of each text, float32, read in windows.

    Args:
      jobs: (text, start, end, first newly scored token); together they score each token.
      batch: windows computed together, at most; few of them fill fewer rows. progress: passes the
        batches on, one by one.
    Raises: NumericsError on NaN.
    """
    found = [np.full(len(text) - 1, np.nan, np.float32) for text in ids]
    jobs = sorted(jobs, key=lambda job: job[2] - job[1])
    if bundle.mesh is None:  # on a mesh the rows are spread, and must divide over its devices
        batch = min(batch, 1 << (len(jobs) - 1).bit_length())
    groups = [jobs[first: first + batch] for first in range(0, len(jobs), batch)]
    for group in progress(groups):
        logprobs = _score_group(bundle, [ids[row][a:b] for row, a, b, _ in group], batch)
        for line, (row, start, end, new) in zip(logprobs, group, strict=False):
            found[row][new - 1: end - 1] = line[new - 1 - start: end - 1 - start]
    for number, line in enumerate(found):
        if not np.isfinite(line).all():
            text = ids[number][: bundle.lm.config.max_len]
            where = broken_projection(bundle.lm, bundle.params, text)
            raise NumericsError(
                f"text {number}: log-probability {int(np.argmin(np.isfinite(line)))} is not finite"
                f"{where and f', first in {where}'}; check the weights, or load in float32"
            )
    return found


def broken_projection(lm: LM, params: Params, ids: Sequence[int]) -> str:
    """The path of the first projection whose output on a text is not finite; "" if none is."""
    if STACK in params:
        return ""
    tokens = jnp.asarray([ids], jnp.int32)
    found = replace(lm, remat=False).apply(params, tokens, logits_at=None, want=("taps",)).taps
    return next((path for path, (_, out) in (found or {}).items()
                 if not bool(jnp.isfinite(out).all())), "")


def windows(length: int, window: int, stride: int) -> list[tuple[int, int, int]]:
    """(start, end, first newly scored token) of each window over a text.

    >>> windows(10, 6, 3)
    [(0, 6, 1), (3, 9, 6), (6, 10, 9)]
    """
    out, scored, start = [], 1, 0
    while scored < length:
        end = min(start + window, length)
        out.append((start, end, scored))
        scored, start = end, start + stride
    return out


def perplexity(scores: Score | Sequence[Score]) -> float:
    """`exp` of the mean negative log-probability over all tokens of all texts, or of one."""
    scores = [scores] if isinstance(scores, Score) else scores
    if not scores:
        raise ShapeError("got no scores; expected at least one")
    return float(np.exp(-np.concatenate([s.logprobs for s in scores]).mean(dtype=np.float64)))


@partial(jax.jit, static_argnames=("lm",))
def _logprobs(lm: LM, params: Params, tokens_BT: jax.Array) -> jax.Array:
    return lm.logprobs(params, tokens_BT[:, :-1], tokens_BT[:, 1:])


def _score_group(bundle: Bundle, rows: Sequence[Sequence[int]], batch: int) -> np.ndarray:
    """One padded batch; causal attention makes right padding harmless."""
    width = round_up(max(map(len, rows)), BUCKET) + 1
    tokens = np.zeros((batch, width), np.int32)
    for row, ids in enumerate(rows):
        tokens[row, : len(ids)] = ids
    tokens_BT = shard_batch(jnp.asarray(tokens), bundle.mesh)
    return to_host(_logprobs(bundle.lm, bundle.params, tokens_BT))
