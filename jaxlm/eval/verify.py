"""Does a checkpoint compute here what it computes in transformers?"""

import math
import os
import pathlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm.core.errors import CheckpointError, ConfigError, ShapeError
from jaxlm.core.tree import Params
from jaxlm.decode.generate import BUCKET, round_up, to_ids
from jaxlm.hf.bundle import load, resolve
from jaxlm.hf.config import labels_from_hf, read_json
from jaxlm.hf.weights import DTYPES, locate, open_file
from jaxlm.models.lm import LM

TEXTS = (
    "The river rises in the hills north of the town and, after forty miles, reaches the sea.",
    "def mean(xs):\n    return sum(xs) / len(xs)\n\nassert mean([1, 2, 3]) == 2  # 6 / 3",
    "Q: A box holds 12 pens. How many pens do 7 boxes hold?\nA: 12 * 7 = 84, so 84 pens.",
    "El niño preguntó: ¿cuánto cuesta? — 3,50 €. 漢字とかな、そして한국어.",
)


LONGEST = 4608  # tokens of the text made to exceed a window: Mistral's and Gemma 2's are 4,096
BEYOND = 64  # positions compared past a window


@dataclass(frozen=True)
class Bounds:
    """What passes: the largest logit difference and mean KL, the least top-1 agreement."""

    max_logit_error: float = math.inf
    kl: float = math.inf
    top1: float = 0.0


# By the dtype that the weights were rounded to on the way; float32 says that they were not.
BOUNDS = {
    "float32": Bounds(max_logit_error=1e-2, kl=1e-5, top1=0.99),
    "float16": Bounds(kl=1e-4, top1=0.98),
    "bfloat16": Bounds(kl=5e-3, top1=0.9),
}


@dataclass(frozen=True)
class Verification:
    """How far two implementations are apart, over all positions of all texts.

    max_logit_error: `max |l_ours - l_theirs|`. kl: mean `KL(theirs || ours)` in nats a token.
    top1, topk: fraction of positions where the likeliest token agrees, and mean overlap of the k
    likeliest. same_ids: both tokenizers gave the same ids. windows: attention windows that a text
    exceeded; unexercised: those that none did, so nothing is known of them. faults: what is out of
    bounds; passed: nothing is.
    """

    max_logit_error: float
    kl: float
    top1: float
    topk: float
    k: int
    tokens: int
    same_ids: bool
    windows: tuple[int, ...] = ()
    unexercised: tuple[int, ...] = ()
    faults: tuple[str, ...] = ()
    passed: bool = True

    def __str__(self) -> str:
        ids = "the same ids" if self.same_ids else "OTHER IDS than transformers' tokenizer"
        windows = "".join(f"; window {w} exercised" for w in self.windows)
        windows += "".join(f"; window {w} NOT exercised" for w in self.unexercised)
        return (f"{self.tokens} tokens, {ids}: max |logit difference| {self.max_logit_error:.2e}, "
                f"KL {self.kl:.2e} nats a token, top-1 agreement {self.top1:.4f}, "
                f"top-{self.k} overlap {self.topk:.4f}{windows}")


def verify(
    source: str | os.PathLike, texts: Sequence[str] = TEXTS, *,
    reference: str | os.PathLike | None = None, k: int = 5, max_tokens: int = 512,
    revision: str | None = None, tolerance: float | None = None, longest: int = LONGEST,
) -> Verification:
    """Compare next-token logits with transformers', both in float32 on the same ids, and judge.

    Where no text is longer than the model's attention window (or the reference's), a text is made
    of the same tokens in random order that is, and its last positions are compared too.

    Args:
      source: a model folder or hub id, loaded by jaxlm.
      texts: at least one.
      reference: what transformers loads; default `source`.
      k: 1 to the vocabulary.
      max_tokens: of each text; at least 1.
      tolerance: the largest logit difference that passes; the default, and the bounds of KL and
        top-1 agreement in any case, by `BOUNDS`.
      longest: tokens of the text made for a window; a longer window is not exercised.
    Raises: ConfigError where torch is absent or the model is not a language model.
    """
    if isinstance(texts, str):
        raise ShapeError("texts is one string; expected a list of them")
    if max_tokens < 1:
        raise ConfigError(f"max_tokens is {max_tokens}; expected at least 1")
    folder = resolve(source, revision)
    origin = folder if reference is None else resolve(reference, revision)
    for model in (folder, origin):
        _check_text(model)
    theirs = _Reference(origin)
    bundle = load(folder, dtype=jnp.float32)
    config = bundle.lm.config
    if not 1 <= k <= config.vocab_size:
        raise ConfigError(f"k is {k}; expected 1 to {config.vocab_size}, the vocabulary")
    ids = to_ids(bundle, list(texts))[0]
    same_ids = all(theirs.ids(text) == i for text, i in zip(texts, ids, strict=True))
    runs = [(i[: min(max_tokens, config.max_len)], 0) for i in ids]
    windows = sorted(w for w in {*config.windows, theirs.window} if w and w < config.max_len)
    runs += _beyond(windows, runs, min(longest, config.max_len))
    done = max(len(i) for i, _ in runs)
    pairs = [(_logits(bundle.lm, bundle.params, *run), theirs.logits(*run)) for run in runs]
    ours, others = (np.concatenate(side) for side in zip(*pairs, strict=True))
    found = replace(
        compare(ours, others, k, same_ids), windows=tuple(w for w in windows if w < done),
        unexercised=tuple(w for w in windows if w >= done),
    )
    rounded = stored_dtype(folder) if stored_dtype(folder) != stored_dtype(origin) else "float32"
    bounds = BOUNDS[rounded]
    return judge(found, bounds if tolerance is None else replace(bounds, max_logit_error=tolerance))


def check_verifiable(source: str | os.PathLike, revision: str | None = None) -> None:
    """What `verify` will ask for, before a model is converted for it.

    Raises: ConfigError where torch is absent, or `source` is no language model.
    """
    _theirs()
    _check_text(resolve(source, revision))


def _check_text(folder: pathlib.Path) -> None:
    """ConfigError for a reward model or a classifier."""
    if labels_from_hf(read_json(folder / "config.json"))[0] is not None:
        raise ConfigError(
            f"{folder} is a model that gives labels; verification compares the logits of language "
            "models. Leave it out, and compare bundle.lm.classify with transformers' own class"
        )


def _theirs() -> tuple[Any, Any]:
    """torch, which is in an extra, and transformers, which is slow to import."""
    try:
        import torch
        import transformers
    except ImportError as error:
        raise ConfigError(
            f"verification compares with transformers on torch, which is not here ({error}); "
            "pip install torch"
        ) from error
    return torch, transformers


def judge(found: Verification, bounds: Bounds) -> Verification:
    """The figures with `faults` and `passed`; other token ids are a fault whatever the logits.

    >>> found = compare(np.eye(4), -np.eye(4), k=1)
    >>> judge(found, Bounds(max_logit_error=0.5)).faults
    ('max |logit difference| is 2.00e+00; expected at most 0.5',)
    """
    faults = [] if found.same_ids else ["the tokenizers gave other ids; expected the same"]
    if not found.max_logit_error <= bounds.max_logit_error:
        faults.append(f"max |logit difference| is {found.max_logit_error:.2e}; expected at most "
                      f"{bounds.max_logit_error:g}")
    if not found.kl <= bounds.kl:
        faults.append(f"KL is {found.kl:.2e} nats a token; expected at most {bounds.kl:g}")
    if not found.top1 >= bounds.top1:
        faults.append(f"top-1 agreement is {found.top1:.4f}; expected at least {bounds.top1:g}")
    return replace(found, faults=tuple(faults), passed=not faults)


def stored_dtype(folder: pathlib.Path) -> str:
    """The least exact dtype among a folder's tensors; float32 where there is no safetensors."""
    try:
        files = locate(folder)
    except CheckpointError:
        return "float32"
    found = set()
    for path in set(files.values()):
        with open_file(path) as file:
            found |= {file.get_slice(name).get_dtype() for name in file.keys()}
    stored = {DTYPES.get(name) for name in found}
    return next((name for name in ("bfloat16", "float16") if name in stored), "float32")


def _beyond(
    windows: list[int], runs: list[tuple[list[int], int]], longest: int
) -> list[tuple[list[int], int]]:
    """A run past the smallest window, if no run is and one may be: its ids, and where to begin."""
    tokens = sorted({token for ids, _ in runs for token in ids})
    if not windows or windows[0] < max(len(ids) for ids, _ in runs) or windows[0] >= longest:
        return []
    length = min(windows[0] + BEYOND, longest)
    drawn = np.random.default_rng(0).choice(tokens, length)
    return [(drawn.tolist(), windows[0])]


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
def _forward(lm: LM, params: Params, tokens_BT: jax.Array, at_BM: jax.Array) -> jax.Array:
    with jax.default_matmul_precision("highest"):  # else bfloat16 on a TPU and TF32 on a GPU
        logits = lm.apply(params, tokens_BT, logits_at=at_BM).logits
    assert logits is not None
    return logits[0]


def _logits(lm: LM, params: Params, ids: list[int], first: int = 0) -> np.ndarray:
    """Logits (T - first, V); padded on the right, which causal attention does not see."""
    padded = np.zeros((1, round_up(len(ids), BUCKET)), np.int32)
    padded[0, : len(ids)] = ids
    at = jnp.arange(first, padded.shape[1])[None]
    return np.asarray(_forward(lm, params, jnp.asarray(padded), at))[: len(ids) - first]


class _Reference:
    """transformers' model and tokenizer of a folder, on the CPU."""

    def __init__(self, folder: os.PathLike):
        self.torch, transformers = _theirs()
        self.model: Any = transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype=self.torch.float32, attn_implementation="eager", local_files_only=True,
            trust_remote_code=False,
        ).eval()
        self.tokenizer: Any = transformers.AutoTokenizer.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        )

    def ids(self, text: str) -> list[int]:
        """Token ids, special ones as the tokenizer has it."""
        return list(self.tokenizer(text)["input_ids"])

    @property
    def window(self) -> int | None:
        """The width of its sliding layers, as transformers read it."""
        return getattr(self.model.config.get_text_config(), "sliding_window", None)

    def logits(self, ids: list[int], first: int = 0) -> np.ndarray:
        """Logits (T - first, V)."""
        with self.torch.no_grad():
            found = self.model(self.torch.tensor([ids]), use_cache=False,
                               logits_to_keep=len(ids) - first)
        return found.logits[0].numpy()
