"""A model of four tokens, small enough that every text can be listed: a, b, a newline, the end."""

import itertools
import json
import math
import tempfile
from functools import lru_cache
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import tokenizers

from jaxlm.core.tree import Params
from jaxlm.decode.samplers import Categorical
from jaxlm.hf.bundle import Bundle
from jaxlm.hf.tokenizer import Tokenizer
from jaxlm.models.config import ModelConfig
from jaxlm.models.lm import LM
from jaxlm.rewards.base import Rows, Stateless
from jaxlm.search.base import Steps

NEWLINE, END, LENGTH = 2, 3, 4
PROMPT = [0, 1, 1]
SAMPLER = Categorical(1.0)
STEPS = Steps("\n", tokens=2, max_steps=4, max_new_tokens=LENGTH)  # a step: a line, or two tokens
Law = dict[tuple[int, ...], float]


@lru_cache
def tokenizer() -> Tokenizer:
    """Three letters and an end, one token each."""
    bpe = tokenizers.models.BPE({"a": 0, "b": 1, "Ċ": NEWLINE}, [])
    made = tokenizers.Tokenizer(bpe)
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(False, use_regex=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    made.add_special_tokens(["</s>"])
    folder = Path(tempfile.mkdtemp())
    made.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(
        {"eos_token": "</s>", "tokenizer_class": "PreTrainedTokenizerFast"}))
    return Tokenizer(folder)


@lru_cache
def bundle(layers: int = 1, plan: tuple = (), width: int = 8) -> Bundle:
    """A random model whose next-token distributions are far from flat."""
    lm = LM(ModelConfig(vocab_size=4, dim=16, num_layers=layers, num_heads=2, num_kv_heads=1,
                        head_dim=width, ffn_dim=16, max_len=256), plan=plan)
    params = lm.init(jax.random.key(3))
    params["embed"]["table"] = params["embed"]["table"] * 3.0
    return Bundle(lm, params, tokenizer(), stop_ids=(END,))


def score(rows: Rows) -> jax.Array:
    """From 0.2 to 0.8, by all that a row has drawn and where; on the device or the host."""
    xp = np if isinstance(rows.tokens_BS, np.ndarray) else jnp
    place = xp.arange(rows.tokens_BS.shape[1]) - rows.start_B[:, None]
    drawn = (place >= 0) & (place < (rows.length_B - rows.start_B)[:, None])
    mixed = xp.where(drawn, (rows.tokens_BS + 1) * (2 * place + 3), 0).sum(1)
    return 0.2 + 0.1 * (mixed % 7)


REWARD = Stateless(score)
HOST = Stateless(score, on_device=False)


def score_of(text: tuple[int, ...]) -> float:
    """`score`, of one answer, in plain Python."""
    return 0.2 + 0.1 * (sum((token + 1) * (2 * i + 3) for i, token in enumerate(text)) % 7)


def ends(text: tuple[int, ...]) -> list[int]:
    """Tokens drawn by the end of each step; an end alone belongs to the step before it."""
    out, since = [], 0
    for i, token in enumerate(text, 1):
        since += 1
        if token == END and since == 1 and out:
            out[-1] = i
        elif token in (NEWLINE, END) or since == 2 or i == LENGTH:
            out, since = [*out, i], 0
    return out


def log_potential(text: tuple[int, ...], power: float = 1.0) -> float:
    """`sum_t log odds(r_t)`."""
    odds = lambda r: math.log(r / (1 - r))
    return power * sum(odds(score_of(text[:end])) for end in ends(text))


def texts() -> list[tuple[int, ...]]:
    """All answers: up to the end token, or `LENGTH` tokens."""
    found = {full[: full.index(END) + 1] if END in full else full
             for full in itertools.product(range(4), repeat=LENGTH)}
    return sorted(found)


def model_law(model: Bundle) -> Law:
    """p of every answer, by full passes without a cache."""
    listed = texts()
    rows = np.zeros((len(listed), len(PROMPT) + LENGTH), np.int32)
    for row, text in zip(rows, listed, strict=True):
        row[: len(PROMPT) + len(text)] = [*PROMPT, *text]
    logp = jax.nn.log_softmax(logits_of(model.lm, model.params, jnp.asarray(rows)), -1)
    at = lambda row, text: sum(float(logp[row, len(PROMPT) - 1 + i, token])
                               for i, token in enumerate(text))
    return {text: math.exp(at(row, text)) for row, text in enumerate(listed)}


def exact(model: Bundle, power: float = 1.0) -> tuple[float, Law]:
    """Z, and the law `p prod odds^power / Z`."""
    law = {text: p * math.exp(log_potential(text, power)) for text, p in model_law(model).items()}
    total = sum(law.values())
    return total, {text: p / total for text, p in law.items()}


@lru_cache
def _jitted():
    return jax.jit(lambda lm, params, tokens: lm.apply(params, tokens).logits, static_argnums=0)


def logits_of(lm: LM, params: Params, tokens: jax.Array) -> np.ndarray:
    """Of whole texts, by a full pass, float64 (B, S, V)."""
    return np.asarray(_jitted()(lm, params, tokens), np.float64)


def z_score(log_evidence, truth: float) -> float:
    """How many standard errors the mean evidence lies from the truth."""
    z = np.exp(np.asarray(log_evidence, np.float64))
    return (z.mean() - truth) / (z.std(ddof=1) / np.sqrt(len(z)))
