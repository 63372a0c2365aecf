"""generate and stream: text in, text out, over the pure functions of `decode.state`."""

from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm.cache.base import CacheKind
from jaxlm.cache.dense import Dense
from jaxlm.core.errors import ConfigError, NumericsError, ShapeError, TokenizerError
from jaxlm.core.mesh import shard_batch
from jaxlm.decode.samplers import Greedy, Sampler
from jaxlm.decode.state import DecodeState, Kinds, Stop, decode, prefill
from jaxlm.hf.bundle import Bundle

Prompt = str | Sequence[int]
BUCKET = 32  # prompts are padded to multiples of this, so that near lengths share a program

prefill_jit = jax.jit(prefill, static_argnames=("lm", "cache", "slots"))
decode_jit = jax.jit(decode, static_argnames="lm", donate_argnames=("state",))


@dataclass(frozen=True)
class Generation:
    """One answer. `text` continues the prompt; `logprobs` are under the sampling distribution.

    `finish` is "stop" after a stop id (kept as the last token, absent from the text) or "length".
    """

    prompt: str
    text: str
    tokens: tuple[int, ...]
    logprobs: np.ndarray
    finish: str


def generate(
    bundle: Bundle, prompts: Prompt | Sequence[Prompt], *, max_new_tokens: int = 64,
    sampler: Sampler = Greedy(), cache: CacheKind | Kinds = Dense(),
    key: jax.Array | None = None, stop_ids: Sequence[int] | None = None,
    max_len: int | None = None,
) -> Any:
    """Continue prompts.

    Args:
      bundle: from `load`.
      prompts: a text or a list of token ids, or a list of either.
      max_new_tokens: at least 1.
      sampler: numbers inside may be one for all rows or one a row.
      cache: a cache kind, or one a layer.
      key: a typed key, split by row, or one key a row; default `jax.random.key(0)`.
      stop_ids: default the model's own.
      max_len: room for prompt and answer together; default what they need.
    Returns: a Generation, or a list of them when a list was given.
    Raises: ShapeError, TokenizerError, ConfigError before any compute; NumericsError when the
      model yields NaN.

    Example:
      >>> from jaxlm.hf.bundle import load
      >>> generate(load("tiny"), "Q:", max_new_tokens=3).finish in ("stop", "length")
      True
    """
    job = prepare(bundle, prompts, max_new_tokens, key, stop_ids, max_len)
    state = prefill_jit(bundle.lm, bundle.params, sampler, job.tokens_BT, job.lengths_B, cache,
                        job.slots, job.keys_B)
    state = decode_jit(bundle.lm, bundle.params, sampler, state, job.stop, max_new_tokens)
    answers = read(bundle, job, state)
    return answers if job.many else answers[0]


def stream(
    bundle: Bundle, prompts: Prompt | Sequence[Prompt], *, max_new_tokens: int = 64,
    sampler: Sampler = Greedy(), cache: CacheKind | Kinds = Dense(),
    key: jax.Array | None = None, stop_ids: Sequence[int] | None = None,
    max_len: int | None = None, chunk: int = 8,
) -> Generator[Any, None, Any]:
    """`generate` in pieces of `chunk` tokens, by the same compiled loop: the tokens are identical.

    Yields: the new text (a list of texts for a list of prompts) since the last piece.
    Returns: as a generator does (`answer = yield from stream(...)`), what `generate` returns.
    """
    if chunk < 1:
        raise ConfigError(f"chunk is {chunk}; expected at least 1")
    job = prepare(bundle, prompts, max_new_tokens, key, stop_ids, max_len)
    state = prefill_jit(bundle.lm, bundle.params, sampler, job.tokens_BT, job.lengths_B, cache,
                        job.slots, job.keys_B)
    shown = [""] * len(job.prompts)
    for drawn in range(0, max_new_tokens, chunk):
        state = decode_jit(bundle.lm, bundle.params, sampler, state, job.stop,
                           min(chunk, max_new_tokens - drawn))
        over = bool(jnp.all(state.done_B)) or drawn + chunk >= max_new_tokens
        answers = read(bundle, job, state)
        texts = [answer.text for answer in answers]
        # a character may still lack its last bytes; hold it back until it is whole
        texts = texts if over else [text.rstrip("\ufffd") for text in texts]
        pieces = [text[len(old):] for text, old in zip(texts, shown, strict=True)]
        shown = texts
        yield pieces if job.many else pieces[0]
        if over:
            break
    return answers if job.many else answers[0]


@dataclass(frozen=True)
class Job:
    """Checked, padded prompts."""

    prompts: list[list[int]]
    many: bool
    tokens_BT: jax.Array
    lengths_B: jax.Array
    keys_B: jax.Array
    slots: int
    stop: Stop


def prepare(
    bundle: Bundle, prompts: Prompt | Sequence[Prompt], max_new: int, key: jax.Array | None,
    stop_ids: Sequence[int] | None, max_len: int | None,
) -> Job:
    """Check everything that can be wrong with a request, and pad it."""
    if isinstance(max_new, bool) or not isinstance(max_new, int) or max_new < 1:
        raise ConfigError(f"max_new_tokens is {max_new!r}; expected a whole number above 0")
    vocab = bundle.lm.config.vocab_size
    ids, many = to_ids(bundle, prompts)
    longest = max(map(len, ids))
    room = max_len or longest + max_new
    if longest + max_new > room:
        raise ShapeError(
            f"prompt {np.argmax([len(i) for i in ids])} has {longest} tokens and {max_new} new "
            f"ones are asked for, but max_len is {room}; pass max_len>={longest + max_new}"
        )
    if max_len is None and room > bundle.lm.config.max_len:
        raise ShapeError(
            f"prompt and answer need {room} tokens but the model was made for "
            f"{bundle.lm.config.max_len}; shorten them, or pass max_len={room} to go beyond"
        )
    width = min(round_up(longest, BUCKET), round_up(room, BUCKET))
    tokens = np.zeros((len(ids), width), np.int32)
    for row, prompt in enumerate(ids):
        tokens[row, : len(prompt)] = prompt
    stops = bundle.stop_ids if stop_ids is None else tuple(sorted(set(stop_ids)))
    if any(not 0 <= i < vocab for i in stops):
        raise TokenizerError(f"stop_ids are {stops}; expected ids from 0 to {vocab - 1}")
    batch = shard_batch(
        (jnp.asarray(tokens), jnp.asarray([len(i) for i in ids], jnp.int32)), bundle.mesh
    )
    return Job(ids, many, *batch, row_keys(key, len(ids)), round_up(room, BUCKET), Stop(stops))


def to_ids(
    bundle: Bundle, prompts: Prompt | Sequence[Prompt]
) -> tuple[list[list[int]], bool]:
    """Prompts as checked lists of ids, and whether a list was given."""
    if bundle.lm.labels is not None:
        raise ConfigError("this model gives labels, not text; use bundle.lm.classify")
    one = isinstance(prompts, str) or (
        len(prompts) > 0 and isinstance(prompts[0], int | np.integer)
    )
    given = [prompts] if one else list(prompts)
    if not given:
        raise ShapeError("got no prompts; expected at least one")
    vocab, out = bundle.lm.config.vocab_size, []
    for number, prompt in enumerate(given):
        encode = bundle.tokenizer.encode
        ids = encode(prompt) if isinstance(prompt, str) else [int(i) for i in prompt]
        if not ids or prompt == "":
            raise ShapeError(f"prompt {number} is empty; expected at least one token")
        if wrong := [i for i in ids if not 0 <= i < vocab]:
            raise TokenizerError(
                f"prompt {number} has token id {wrong[0]}; expected 0 to {vocab - 1}. Was it "
                "made with another model's tokenizer?"
            )
        out.append(ids)
    return out, not one


def read(bundle: Bundle, job: Job, state: DecodeState) -> list[Generation]:
    """The answers so far."""
    tokens_BS, logprob_BS, length_B = jax.device_get(
        (state.tokens_BS, state.logprob_BS, state.length_B)
    )
    answers = []
    for row, prompt in enumerate(job.prompts):
        drawn = tokens_BS[row, len(prompt): length_B[row]].tolist()
        logprobs = logprob_BS[row, len(prompt): length_B[row]]
        if not np.isfinite(logprobs).all():
            raise NumericsError(
                f"row {row}: the model gave a logit that is NaN or infinite at token "
                f"{int(np.argmin(np.isfinite(logprobs)))}; check the weights, or load in float32"
            )
        stopped = bool(drawn) and drawn[-1] in job.stop.ids
        before = bundle.tokenizer.decode(prompt)
        whole = bundle.tokenizer.decode(prompt + (drawn[:-1] if stopped else drawn))
        answers.append(Generation(
            before, whole[len(before):], tuple(drawn), logprobs, "stop" if stopped else "length"
        ))
    return answers


def row_keys(key: jax.Array | None, batch: int) -> jax.Array:
    """One key a row: from one key, or as given."""
    key = jax.random.key(0) if key is None else key
    if key.ndim == 1:
        if len(key) != batch:
            raise ShapeError(f"got {len(key)} keys for {batch} prompts; give one, or one a prompt")
        return key
    return jax.random.split(key, batch)


def round_up(value: int, step: int) -> int:
    """The least multiple of `step` that is at least `value`."""
    return -(-value // step) * step
