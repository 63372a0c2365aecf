"""Outcome reward models: a checkpoint that scores a finished answer."""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm.core.errors import ConfigError, ShapeError, whole
from jaxlm.core.tree import Params
from jaxlm.decode.generate import BUCKET, round_up
from jaxlm.hf.bundle import Bundle, check_bundle
from jaxlm.models.lm import LM
from jaxlm.rewards.base import Rows
from jaxlm.rewards.host import Failures, HostReward, Seen, as_texts
from jaxlm.rewards.process import probability

Form = Callable[[str, str], str]  # (prompt, answer) -> the text that the model reads


def _scores(lm: LM, params: Params, tokens_BT: jax.Array, length_B: jax.Array) -> jax.Array:
    logits = lm.apply(params, tokens_BT, lengths_B=length_B, logits_at="last").logits
    assert logits is not None
    return probability(logits[:, 0], None)


_scores_jit = jax.jit(_scores, static_argnames="lm")


def score_answers(
    bundle: Bundle, prompts: Sequence[str], answers: Sequence[str], *, form: Form | None = None,
    batch: int = 8,
) -> np.ndarray:
    """Scores of finished answers from 0 to 1, float32 (B,).

    The model is read at the last token of `form(prompt, answer)`: one label by its logistic
    function, which keeps the order of rewards without bounds; of two, the probability of label 1.

    Args:
      bundle: a checkpoint with 1 or 2 labels.
      prompts, answers: equally many.
      form: default the one text behind the other, with the tokenizer's begin mark; a model that was
        trained on chats needs its own chat template here, to the end of the answer's turn.
      batch: texts read together.
    Returns: NaN, with a warning, for a text that is longer than the model was made for.
    Raises: ConfigError for a head of another kind, ShapeError for unequal numbers.
    """
    check_head(bundle)
    batch = whole("batch", batch)
    if len(prompts) != len(answers):
        raise ShapeError(f"got {len(prompts)} prompts and {len(answers)} answers; expected a pair "
                         "for every score")
    texts = [form(p, a) if form else p + a for p, a in zip(prompts, answers, strict=True)]
    ids = [bundle.tokenizer.encode(text, special=form is None) for text in texts]
    limit = bundle.lm.config.max_len
    if any(len(line) > limit for line in ids):
        warnings.warn(f"an answer with its prompt has {max(map(len, ids))} tokens but the reward "
                      f"model was made for {limit}: its score is NaN", stacklevel=2)
    scores = np.full(len(ids), np.nan, np.float32)
    order = sorted((i for i in range(len(ids)) if 0 < len(ids[i]) <= limit),
                   key=lambda i: len(ids[i]))
    for first in range(0, len(order), batch):
        part = order[first: first + batch]
        tokens = np.zeros((batch, round_up(max(len(ids[i]) for i in part), BUCKET)), np.int32)
        for row, i in enumerate(part):
            tokens[row, : len(ids[i])] = ids[i]
        length_B = jnp.asarray([len(ids[i]) for i in part] + [1] * (batch - len(part)), jnp.int32)
        found = _scores_jit(bundle.lm, bundle.params, jnp.asarray(tokens), length_B)
        scores[part] = np.asarray(found)[: len(part)]
    return scores


def check_head(bundle: Bundle) -> None:
    """ConfigError unless a bundle has 1 or 2 labels."""
    check_bundle(bundle)
    labels = bundle.lm.labels
    if labels not in (1, 2):
        raise ConfigError(
            f"the model has {'a vocabulary' if labels is None else f'{labels} labels'} for its "
            "output; an outcome reward model has 1 or 2 labels"
        )


@dataclass(frozen=True)
class OutcomeReward(HostReward):
    """`score_answers` as a reward of growing texts, over the host: rows are scored when they end.

    Before, a row scores `before`; 0.5, whose odds are 1, moves no particle.
    Args: as of `score_answers`.
    """

    bundle: Bundle
    form: Form | None = None
    batch: int = 8
    before: float = 0.5

    def __post_init__(self):
        check_head(self.bundle)
        whole("batch", self.batch)
        if not 0 <= self.before <= 1:
            raise ConfigError(f"before is {self.before!r}; expected a score from 0 to 1")

    def wanted(self, carry: Seen, rows: Rows) -> list[int]:
        """Rows that have ended since."""
        pairs = zip(carry.answers, as_texts(rows), np.asarray(rows.ended_B), strict=True)
        return [row for row, (old, new, ended) in enumerate(pairs) if ended and new != old]

    def values(
        self, prompts: Sequence[str], answers: Sequence[str], numbers: Sequence[int]
    ) -> tuple[np.ndarray, Failures]:
        """All at once, in batches."""
        return score_answers(self.bundle, prompts, answers, form=self.form,
                             batch=self.batch), {}
