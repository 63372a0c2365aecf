"""Does a checkpoint compute here what it computes in transformers?"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm.core.errors import ConfigError, ShapeError
from jaxlm.core.tree import Params
from jaxlm.decode.generate import BUCKET, round_up, to_ids
from jaxlm.hf.bundle import load, resolve
from jaxlm.models.lm import LM

TEXTS = (
    "The river rises in the hills north of the town and, after forty miles, reaches the sea.",
    "def mean(xs):\n    return sum(xs) / len(xs)\n\nassert mean([1, 2, 3]) == 2  # 6 / 3",
    "Q: A box holds 12 pens. How many pens do 7 boxes hold?\nA: 12 * 7 = 84, so 84 pens.",
    "El niño preguntó: ¿cuánto cuesta? — 3,50 €. 漢字とかな、そして한국어.",
)


@dataclass(frozen=True)
class Verification:
    """How far two implementations are apart, over all positions of all texts.

    max_logit_error: `max |l_ours - l_theirs|`. kl: mean `KL(theirs || ours)` in nats a token.
    top1, topk: fraction of positions where the likeliest token agrees, and mean overlap of the k
    likeliest. same_ids: both tokenizers gave the same ids.
    """

    max_logit_error: float
    kl: float
    top1: float
    topk: float
    k: int
    tokens: int
    same_ids: bool

    def __str__(self) -> str:
        ids = "the same ids" if self.same_ids else "OTHER IDS than transformers' tokenizer"
        return (f"{self.tokens} tokens, {ids}: max |logit difference| {self.max_logit_error:.2e}, "
                f"KL {self.kl:.2e} nats a token, top-1 agreement {self.top1:.4f}, "
                f"top-{self.k} overlap {self.topk:.4f}")


def verify(
    source: str | os.PathLike, texts: Sequence[str] = TEXTS, *,
    reference: str | os.PathLike | None = None, k: int = 5, max_tokens: int = 512,
    revision: str | None = None,
) -> Verification:
    """Compare next-token logits with transformers', both in float32 on the same ids.

    Args:
      source: a model folder or hub id, loaded by jaxlm.
      texts: at least one; give one longer than the model's window to exercise it.
      reference: what transformers loads; default `source`.
      k: 1 to the vocabulary.
      max_tokens: of each text; at least 1.
    Raises: ConfigError where torch is absent or the model is not a language model.
    """
    if isinstance(texts, str):
        raise ShapeError("texts is one string; expected a list of them")
    if max_tokens < 1:
        raise ConfigError(f"max_tokens is {max_tokens}; expected at least 1")
    folder = resolve(source, revision)
    theirs = _Reference(folder if reference is None else resolve(reference, revision))
    bundle = load(folder, dtype=jnp.float32)
    vocab = bundle.lm.config.vocab_size
    if not 1 <= k <= vocab:
        raise ConfigError(f"k is {k}; expected 1 to {vocab}, the vocabulary")
    ids = to_ids(bundle, list(texts))[0]
    same_ids = all(theirs.ids(text) == i for text, i in zip(texts, ids, strict=True))
    limit = min(max_tokens, bundle.lm.config.max_len)
    pairs = [(_logits(bundle.lm, bundle.params, i[:limit]), theirs.logits(i[:limit]))
             for i in ids]
    ours, others = (np.concatenate(side) for side in zip(*pairs, strict=True))
    return compare(ours, others, k, same_ids)


def compare(
    ours_TV: np.ndarray, theirs_TV: np.ndarray, k: int, same_ids: bool = True
) -> Verification:
    """The figures from two arrays of logits.

    Raises: ShapeError for unequal shapes and for NaN or infinity.

    >>> compare(np.eye(4), np.eye(4), k=1).top1
    1.0
    """
    ours, theirs = ours_TV.astype(np.float64), theirs_TV.astype(np.float64)
    if ours.shape != theirs.shape or not (np.isfinite(ours).all() and np.isfinite(theirs).all()):
        raise ShapeError(
            f"logits are {ours.shape} and {theirs.shape}; expected equal shapes and finite numbers"
        )
    log_p, log_q = (x - _logsumexp(x) for x in (theirs, ours))
    kl = float((np.exp(log_p) * (log_p - log_q)).sum(-1).mean())
    best = [np.argsort(-x, axis=-1, kind="stable")[:, :k] for x in (ours, theirs)]
    overlap = [len(set(a) & set(b)) / k for a, b in zip(*best, strict=True)]
    return Verification(
        float(np.abs(ours - theirs).max()), max(kl, 0.0),
        float((best[0][:, 0] == best[1][:, 0]).mean()), float(np.mean(overlap)), k, len(ours),
        same_ids,
    )


def _logsumexp(x_TV: np.ndarray) -> np.ndarray:
    peak = x_TV.max(-1, keepdims=True)
    return peak + np.log(np.exp(x_TV - peak).sum(-1, keepdims=True))


@partial(jax.jit, static_argnames="lm")
def _forward(lm: LM, params: Params, tokens_BT: jax.Array) -> jax.Array:
    logits = lm.apply(params, tokens_BT).logits
    assert logits is not None
    return logits[0]


def _logits(lm: LM, params: Params, ids: list[int]) -> np.ndarray:
    """Logits (T, V); padded on the right, which causal attention does not see."""
    padded = np.zeros((1, round_up(len(ids), BUCKET)), np.int32)
    padded[0, : len(ids)] = ids
    return np.asarray(_forward(lm, params, jnp.asarray(padded)))[: len(ids)]


class _Reference:
    """transformers' model and tokenizer of a folder, on the CPU."""

    def __init__(self, folder: os.PathLike):
        try:
            import torch
            from transformers import AutoModelForCausalLM, AutoTokenizer
        except ImportError as error:
            raise ConfigError(
                f"verification compares with transformers on torch, which is not here ({error}); "
                "pip install torch"
            ) from error
        self.torch: Any = torch
        self.model: Any = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, attn_implementation="eager", local_files_only=True,
            trust_remote_code=False,
        ).eval()
        self.tokenizer: Any = AutoTokenizer.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        )

    def ids(self, text: str) -> list[int]:
        """Token ids, special ones as the tokenizer has it."""
        return list(self.tokenizer(text)["input_ids"])

    def logits(self, ids: list[int]) -> np.ndarray:
        """Logits (T, V)."""
        with self.torch.no_grad():
            return self.model(self.torch.tensor([ids]), use_cache=False).logits[0].numpy()
