"""generate and stream: text in, text out, over the pure functions of `decode.state`."""

import os
from collections.abc import Generator, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, Unpack, overload

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm.cache.base import CacheKind, broken_layer
from jaxlm.cache.dense import Dense
from jaxlm.cache.local import place_kind
from jaxlm.core.errors import (
    ConfigError,
    NumericsError,
    ShapeError,
    TokenizerError,
    flag,
    unicode,
    whole,
)
from jaxlm.core.hosts import to_host
from jaxlm.core.mesh import shard_batch
from jaxlm.decode.options import Options, StreamOptions
from jaxlm.decode.samplers import Greedy, Sampler, check_sampler
from jaxlm.decode.state import DecodeState, Kinds, decode, layer_kinds, prefill
from jaxlm.decode.stop import Stop
from jaxlm.decode.text import kept_bytes, text_of, text_rule, vocabulary
from jaxlm.hf.bundle import Bundle, check_bundle
from jaxlm.hf.tokenizer import Tokenizer

Prompt = str | Sequence[int]
BUCKET = 32  # prompts are padded to multiples of this, so that near lengths share a program

prefill_jit = jax.jit(prefill, static_argnames=("lm", "cache", "slots"))
decode_jit = jax.jit(decode, static_argnames="lm", donate_argnames=("state",))


@dataclass(frozen=True)
class Generation:
    """One answer. `text` continues the prompt; `logprobs` are under the sampling distribution.

    `finish` is "stop" after a stop id (kept as the last token, absent from the text), "string"
    after a stop string (its tokens are kept, the text ends before it), or "length".
    """

    prompt: str
    text: str
    tokens: tuple[int, ...]
    logprobs: np.ndarray
    finish: str


@overload
def generate(bundle: Bundle, prompts: Prompt, **options: Unpack[Options]) -> Generation: ...
@overload
def generate(
    bundle: Bundle, prompts: Sequence[Prompt], **options: Unpack[Options]
) -> list[Generation]: ...
def generate(
    bundle: Bundle, prompts: Prompt | Sequence[Prompt], *, max_new_tokens: int = 64,
    sampler: Sampler = Greedy(), cache: CacheKind | Kinds | str = Dense(),
    key: jax.Array | None = None, stop: str | Sequence[str] = (), include_stop: bool = False,
    stop_ids: Sequence[int] | None = None, max_len: int | None = None,
) -> Generation | list[Generation]:
    """Continue prompts.

    Args:
      bundle: from `load`.
      prompts: a text or a list of token ids, or a list of either.
      max_new_tokens: at least 1.
      sampler: numbers inside may be one for all rows or one a row.
      cache: a cache kind, or one a layer; or a name such as "kivi2", or a policy file's.
      key: a typed key, split by row, or one key a row; default `jax.random.key(0)`.
      stop: strings that end a row, wherever they begin and end inside tokens; looked for on the
        device, in what the row draws. include_stop: leave the string at the end of the text.
      stop_ids: default the model's own.
      max_len: room for prompt and answer together; default what they need.
    Returns: a Generation, or a list of them when a list was given.
    Raises: ShapeError, TokenizerError, ConfigError before any compute; NumericsError when the
      model yields NaN.

    Example:
      >>> from jaxlm.hf.bundle import load
      >>> answer = generate(load("tiny"), "Q:12+34=\\n", stop="A:")
      >>> answer.finish, answer.text
      ('string', '12+34=46\\n')
    """
    kinds = placed(bundle, sampler, cache)
    job = prepare(bundle, prompts, max_new_tokens, key, stop_ids, max_len, stop, include_stop,
                  settings=(sampler, kinds))
    state = prefill_jit(bundle.lm, bundle.params, sampler, job.tokens_BT, job.lengths_B,
                        kinds, job.slots, job.keys_B)
    state = decode_jit(bundle.lm, bundle.params, sampler, state, job.stop, max_new_tokens)
    answers = read(bundle, job, state)
    return answers if job.many else answers[0]


@overload
def stream(
    bundle: Bundle, prompts: Prompt, **options: Unpack[StreamOptions]
) -> Generator[str, None, Generation]: ...
@overload
def stream(
    bundle: Bundle, prompts: Sequence[Prompt], **options: Unpack[StreamOptions]
) -> Generator[list[str], None, list[Generation]]: ...
def stream(
    bundle: Bundle, prompts: Prompt | Sequence[Prompt], *, max_new_tokens: int = 64,
    sampler: Sampler = Greedy(), cache: CacheKind | Kinds | str = Dense(),
    key: jax.Array | None = None, stop: str | Sequence[str] = (), include_stop: bool = False,
    stop_ids: Sequence[int] | None = None, max_len: int | None = None, chunk: int = 8,
) -> Generator[str | list[str], None, Generation | list[Generation]]:
    """`generate` in pieces of `chunk` tokens, by the same compiled loop: the tokens are identical.

    Yields: the new text (a list of texts for a list of prompts) since the last piece. What may yet
      become a stop string, or lacks bytes of a character, waits for the next piece.
    Returns: as a generator does (`answer = yield from stream(...)`), what `generate` returns.
    Raises: as `generate`, at the call and not at the first piece.
    """
    whole("chunk", chunk)
    kinds = placed(bundle, sampler, cache)
    job = prepare(bundle, prompts, max_new_tokens, key, stop_ids, max_len, stop, include_stop,
                  settings=(sampler, kinds, chunk))
    return _pieces(bundle, job, max_new_tokens, sampler, kinds, chunk)


def _pieces(
    bundle: Bundle, job: "Job", max_new_tokens: int, sampler: Sampler, kinds: Kinds, chunk: int,
) -> Generator[str | list[str], None, Generation | list[Generation]]:
    """The loop of `stream`."""
    state = prefill_jit(bundle.lm, bundle.params, sampler, job.tokens_BT, job.lengths_B,
                        kinds, job.slots, job.keys_B)
    shown = [""] * len(job.prompts)
    for drawn in range(0, max_new_tokens, chunk):
        state = decode_jit(bundle.lm, bundle.params, sampler, state, job.stop,
                           min(chunk, max_new_tokens - drawn))
        over = bool(jnp.all(state.done_B)) or drawn + chunk >= max_new_tokens
        answers = read(bundle, job, state, over)
        texts = [answer.text for answer in answers]
        pieces = [text[len(old):] for text, old in zip(texts, shown, strict=True)]
        shown = texts
        yield pieces if job.many else pieces[0]
        if over:
            break
    return answers if job.many else answers[0]


def placed(bundle: Bundle, sampler: Sampler, cache: CacheKind | Kinds | str) -> Kinds:
    """The checked cache kinds of all layers, on the bundle's mesh; the sampler is checked too."""
    check_bundle(bundle)
    check_sampler(sampler)
    return place_kind(layer_kinds(bundle.lm, cache, bundle.params), bundle.mesh)


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
    strings: tuple[str, ...] = ()
    include_stop: bool = False


def prepare(
    bundle: Bundle, prompts: Prompt | Sequence[Prompt], max_new: int, key: jax.Array | None,
    stop_ids: Sequence[int] | None, max_len: int | None, stop: str | Sequence[str] = (),
    include_stop: bool = False, *, settings: Any = (),
) -> Job:
    """Check everything that can be wrong with a request, and pad it.

    Args: settings: whatever else all processes of a mesh must be given alike.
    """
    check_bundle(bundle)
    max_new = whole("max_new_tokens", max_new)
    ids, many = to_ids(bundle, prompts)
    longest = max(map(len, ids))
    room = longest + max_new if max_len is None else whole("max_len", max_len)
    if longest + max_new > room:
        raise ShapeError(
            f"prompt {np.argmax([len(i) for i in ids])} has {longest} tokens and {max_new} new "
            f"ones are asked for, but max_len is {room}; pass max_len>={longest + max_new}"
        )
    if max_len is None and room > bundle.lm.config.max_len:
        raise ShapeError(
            f"prompt and answer need {room} tokens but the model was made for "
            f"{bundle.lm.config.max_len}; shorten the prompt or ask for fewer tokens (from Python, "
            f"max_len={room} goes beyond)"
        )
    width = min(round_up(longest, BUCKET), round_up(room, BUCKET))
    tokens = np.zeros((len(ids), width), np.int32)
    for row, prompt in enumerate(ids):
        tokens[row, : len(prompt)] = prompt
    strings = check_strings(stop)
    flag("include_stop", include_stop)
    rule = text_rule(bundle, strings, ids=check_stop_ids(bundle, stop_ids))
    lengths = jnp.asarray([len(i) for i in ids], jnp.int32)
    tokens_BT, lengths_B, keys_B = shard_batch(
        (jnp.asarray(tokens), lengths, row_keys(key, len(ids))), bundle.mesh,
        settings=(settings, rule, strings, include_stop, max_new, room),
    )
    return Job(ids, many, tokens_BT, lengths_B, keys_B, round_up(room, BUCKET), rule, strings,
               include_stop)


def check_strings(stop: str | Sequence[str]) -> tuple[str, ...]:
    """Stop strings as a tuple: each once, in a fixed order."""
    given = (stop,) if isinstance(stop, str) else stop
    if not isinstance(given, list | tuple | set | frozenset):
        raise ConfigError(f"stop is {stop!r}; expected a string or a list of strings")
    if not all(isinstance(string, str) and string for string in given):
        raise ConfigError(f"stop is {stop!r}; expected strings that are not empty")
    for string in given:
        unicode("a stop string", string)
    return tuple(sorted(set(given)))


def check_stop_ids(bundle: Bundle, stop_ids: Sequence[int] | None) -> tuple[int, ...]:
    """Stop ids, the model's own by default: each once, in a fixed order."""
    given = bundle.stop_ids if stop_ids is None else stop_ids
    if isinstance(given, str | bytes) or not isinstance(given, Iterable):
        raise ConfigError(f"stop_ids is {given!r}; expected a list of token ids")
    vocab = bundle.lm.config.vocab_size
    return tuple(sorted({check_id(i, vocab, "stop_ids") for i in given}))


def to_ids(
    bundle: Bundle, prompts: Prompt | Sequence[Prompt], what: str = "prompt"
) -> tuple[list[list[int]], bool]:
    """Prompts as checked lists of ids, and whether a list was given; an error says `what` each is.
    """
    if bundle.lm.labels is not None:
        raise ConfigError("this model gives labels, not text; use bundle.lm.classify")
    given: Any = prompts.tolist() if isinstance(prompts, np.ndarray | jax.Array) else prompts
    one = isinstance(given, str)
    if not one and not isinstance(given, list | tuple):
        raise ShapeError(
            f"got {type(prompts).__name__} {prompts!r}; expected a text, a list of token ids, or a "
            "list of either"
        )
    if not one and len(given) == 0:
        raise ShapeError(f"got no {what}s; expected at least one")
    one = one or not isinstance(given[0], str | list | tuple | np.ndarray | jax.Array)
    vocab = bundle.lm.config.vocab_size
    out = [_prompt_ids(bundle.tokenizer, prompt, vocab, f"{what} {number}")
           for number, prompt in enumerate([given] if one else given)]
    return out, not one


def _prompt_ids(tokenizer: Tokenizer, prompt: Any, vocab: int, name: str) -> list[int]:
    """One prompt as checked ids."""
    given = prompt.tolist() if isinstance(prompt, np.ndarray | jax.Array) else prompt
    if isinstance(given, str):
        given = tokenizer.encode(given) if given else []
    if not isinstance(given, list | tuple):
        raise ShapeError(f"{name} is {prompt!r}; expected a text or a list of token ids")
    if len(given) == 0:
        raise ShapeError(f"{name} is empty; expected at least one token")
    return [check_id(i, vocab, name) for i in given]


def check_id(value: Any, vocab: int, name: str) -> int:
    """A token id as an int; TokenizerError outside the vocabulary, or for anything but an int."""
    try:
        return whole(name, value, 0, vocab - 1)
    except ConfigError as error:
        raise TokenizerError(
            f"{name} has token id {value!r}; expected a whole number from 0 to {vocab - 1}. Was it "
            "made with another model's tokenizer?"
        ) from error


def read(bundle: Bundle, job: Job, state: DecodeState, over: bool = True) -> list[Generation]:
    """The answers so far; unless `over`, without text that the next token might still change."""
    tokens_BS, logprob_BS, length_B = to_host(
        (state.tokens_BS, state.logprob_BS, state.length_B)
    )
    answers = []
    for row, prompt in enumerate(job.prompts):
        drawn = tokens_BS[row, len(prompt): length_B[row]].tolist()
        logprobs = logprob_BS[row, len(prompt): length_B[row]]
        if not np.isfinite(logprobs).all():
            layer = broken_layer(state.caches)
            where = "" if layer is None else f", first in the keys or values of layer {layer}"
            raise NumericsError(
                f"row {row}: the model gave a logit that is NaN or infinite at token "
                f"{int(np.argmin(np.isfinite(logprobs)))}{where}; check the weights, or load in "
                "float32"
            )
        finish, before, text = continuation(bundle, job, prompt, drawn, over)
        answers.append(Generation(before, text, tuple(drawn), logprobs, finish))
    return answers


class Endings(Protocol):
    """What may end a row: a stop rule, its strings, and whether they are shown."""

    @property
    def stop(self) -> Stop: ...

    @property
    def strings(self) -> tuple[str, ...]: ...

    @property
    def include_stop(self) -> bool: ...


def continuation(
    bundle: Bundle, job: Endings, prompt: list[int], drawn: list[int], over: bool
) -> tuple[str, str, str]:
    """Why a row ended, its prompt as text, and the text that continues it."""
    finish, text = ending(bundle, job, prompt, drawn, over)
    before = bundle.tokenizer.decode(prompt)
    if not text.startswith(before):  # the prompt ends inside a character
        before = os.path.commonprefix([before, text])
    text = text[len(before):]
    if finish == "length" and not over:  # a character may still lack its last bytes
        text = text.rstrip("\ufffd")
    return finish, before, text


def ending(
    bundle: Bundle, job: Endings, prompt: list[int], drawn: list[int], over: bool
) -> tuple[str, str]:
    """Why a row ended, and its text, prompt included."""
    stopped = bool(drawn) and drawn[-1] in job.stop.ids
    shown = drawn[:-1] if stopped else drawn
    if job.strings:
        names = vocabulary(bundle.tokenizer, bundle.lm.config.vocab_size)
        texts = [names[token] for token in drawn]
        keep, complete = kept_bytes(b"".join(texts), job.strings, job.include_stop)
        if complete or not (stopped or over):
            text = text_of(bundle.tokenizer, prompt, drawn, texts, keep)
            return "string" if complete else "length", text
    return "stop" if stopped else "length", bundle.tokenizer.decode(prompt + shown)


def row_keys(key: jax.Array | None, batch: int) -> jax.Array:
    """One key a row: from one key, or as given."""
    key = jax.random.key(0) if key is None else key
    if not (isinstance(key, jax.Array) and jnp.issubdtype(key.dtype, jax.dtypes.prng_key)):
        raise ConfigError(f"key is {key!r}; expected a typed key, such as jax.random.key(0)")
    if key.ndim > 1:
        raise ShapeError(f"keys are {key.shape}; expected one key, or one for each of {batch} rows")
    if key.ndim == 1:
        if len(key) != batch:
            raise ShapeError(f"got {len(key)} keys for {batch} prompts; give one, or one a prompt")
        return key
    return jax.random.split(key, batch)


def round_up(value: int, step: int) -> int:
    """The least multiple of `step` that is at least `value`."""
    return -(-value // step) * step
