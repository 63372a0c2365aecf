"""Tiny random twins of process reward models, and answers that grow step by step."""

import json
from functools import lru_cache
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tokenizers

from jaxlm.hf.bundle import Bundle, load, save
from jaxlm.hf.tokenizer import Tokenizer
from jaxlm.models.config import ModelConfig
from jaxlm.models.lm import LM
from jaxlm.rewards import Prompts, Rows

SPECIAL = ("<s>", "</s>", "<|im_start|>", "<|im_end|>", "<extra_0>")
CHAT = ("{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")
VOCAB = 264
PROBLEMS = ["Q: how many?", "Add 1 and 2", "x"]


def words(
    folder: Path, special: tuple[str, ...] = SPECIAL, chat: str | None = CHAT,
    merges: tuple[tuple[str, str], ...] = (),
) -> Tokenizer:
    """A byte-level tokenizer: one id a byte, one a merge, and special tokens."""
    folder.mkdir(parents=True, exist_ok=True)
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    known = [*alphabet, *map("".join, merges)]
    made = tokenizers.Tokenizer(tokenizers.models.BPE(
        {text: i for i, text in enumerate(known)}, list(merges)))
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(False, use_regex=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    made.add_special_tokens(list(special))
    made.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", len(known) + special.index("<s>"))])
    made.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({
        "bos_token": "<s>", "eos_token": "</s>", "tokenizer_class": "PreTrainedTokenizerFast",
        **({"chat_template": chat} if chat else {})}))
    return Tokenizer(folder)


@lru_cache
def network(labels: int | None, family: str = "qwen2", seed: int = 0) -> tuple[LM, Any]:
    """A random model whose scores are far from equal."""
    config = ModelConfig(
        vocab_size=VOCAB, dim=16, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8, ffn_dim=24,
        max_len=1024, family=family, qkv_bias=family == "qwen2")
    lm = LM(config, labels=labels, per_token=labels is not None)
    params = lm.init(jax.random.key(seed))
    if labels is not None:
        params["score"]["table"] = params["score"]["table"] * 2.0
    return lm, params


def twin(folder: Path, labels: int | None, **options: Any) -> Bundle:
    """A model as `jaxlm.load` gives it, after a round by way of a Hugging Face folder."""
    lm, params = network(labels)
    made = words(folder / "words", **options)
    bos, eos = made.id_of("bos_token"), made.id_of("eos_token")
    bare = Bundle(lm, params, made, (eos,), {"bos_token_id": bos, "eos_token_id": eos})
    return load(save(bare, folder / "model"))


def scratch(bundle: Bundle, ids: list[int]) -> np.ndarray:
    """The model's outputs at every position of one text, read at once."""
    padded = np.zeros((1, 320), np.int32)
    padded[0, : len(ids)] = ids
    return np.asarray(_apply(bundle.lm, bundle.params, jnp.asarray(padded)))[0, : len(ids)]


_apply = jax.jit(lambda lm, params, tokens: lm.apply(params, tokens).logits, static_argnums=0)


def softmax(x: np.ndarray) -> np.ndarray:
    """Along the last axis."""
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


class Growing:
    """B answers as ids, each a list of steps, in the form that a reward is given."""

    def __init__(self, tokenizer: Tokenizer, problems: list[str], particles: int, slots: int = 96):
        self.tokenizer, self.particles = tokenizer, particles
        self.prompts = [tokenizer.encode(text) for text in problems]
        self.problems = problems
        self.width = max(map(len, self.prompts)) + slots
        self.steps: list[list[list[int]]] = [[] for _ in range(len(problems) * particles)]

    def given(self) -> Prompts:
        """The problems."""
        width = max(map(len, self.prompts))
        tokens = np.full((len(self.prompts), width), 7, np.int32)
        for row, ids in enumerate(self.prompts):
            tokens[row, : len(ids)] = ids
        return Prompts(jnp.asarray(tokens), jnp.asarray([len(i) for i in self.prompts], jnp.int32),
                       self.problems)

    def rows(self, texts: bool = False) -> Rows:
        """The answers so far; what lies beyond them is noise."""
        B = len(self.steps)
        tokens = np.full((B, self.width), 3, np.int32)
        start, length = np.zeros(B, np.int32), np.zeros(B, np.int32)
        answers = []
        for row, steps in enumerate(self.steps):
            prompt, answer = self.prompts[row // self.particles], sum(steps, [])
            start[row], length[row] = len(prompt), len(prompt) + len(answer)
            tokens[row, : length[row]] = prompt + answer
            answers.append(self.tokenizer.decode(answer))
        return Rows(jnp.asarray(tokens), jnp.asarray(start), jnp.asarray(length),
                    jnp.zeros(B, bool), answers if texts else None)

    def gather(self, ancestors_RP: np.ndarray) -> None:
        """Rows go on from others of their problem."""
        base = np.arange(len(ancestors_RP))[:, None] * self.particles
        self.steps = [list(self.steps[i]) for i in (base + ancestors_RP).reshape(-1)]


class Told:
    """A reward that keeps what it was told."""

    on_device = False

    def __init__(self) -> None:
        self.prompts: list[Prompts] = []

    def init(self, prompts: Prompts, particles: int, slots: int) -> np.ndarray:
        """Keep the prompts."""
        self.prompts.append(prompts)
        return np.zeros(len(prompts.texts) * particles)

    def score(self, carry: Any, rows: Rows) -> tuple[np.ndarray, Any]:
        """All alike."""
        return np.full(len(rows.length_B), 0.5, np.float32), carry

    def gather(self, carry: Any, ancestors_RP: Any) -> Any:
        """Nothing moves."""
        return carry


def random_step(rng: np.random.Generator, size: int, end: str = "\n\n") -> list[int]:
    """Ids of a step of letters and digits, and what ends it, one id a byte."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    letters = rng.choice([c for c in alphabet if c.isascii() and c.isalnum()], size)
    newline = alphabet.index("\u010a")
    return [alphabet.index(c) for c in letters] + [newline] * len(end)
