"""lm-evaluation-harness on a bundle: log-likelihoods, rolling log-likelihoods, generation.

`Evaluator` answers the harness's three kinds of request and needs no harness; `lm_eval_model` makes
it one of the harness's models. Command: `python -m jaxlm.eval.lm_eval run --model jaxlm
--model_args pretrained=FOLDER --tasks TASK`, with the arguments of `lm_eval`.
"""

import sys
import warnings
from collections.abc import Iterable, Sequence
from functools import cache as remember
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm.cache.base import CacheKind
from jaxlm.cache.dense import Dense
from jaxlm.core.errors import ConfigError, NumericsError, ShapeError, number, whole
from jaxlm.core.hosts import to_host
from jaxlm.core.mesh import shard_batch
from jaxlm.core.tree import Params
from jaxlm.decode.generate import BUCKET, check_strings, generate, round_up
from jaxlm.decode.samplers import Categorical, Greedy, Sampler
from jaxlm.decode.score import window_logprobs
from jaxlm.decode.state import Kinds, layer_kinds
from jaxlm.decode.text import vocabulary
from jaxlm.hf.bundle import Bundle, load
from jaxlm.hf.tokenizer import Tokenizer
from jaxlm.models.lm import LM, count_params, pick

SLICE = 32  # positions whose logits are held at once
LENGTH_NAMES = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
SAMPLING = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
LOADING = ("dtype", "revision", "device")
OPTIONS = ("batch_size", "max_length", "max_gen_toks", "cache", "seed", "prefix_token_id")
NEUTRAL = {"num_beams": 1, "use_cache": True, "num_return_sequences": 1}


class Evaluator:
    """The three kinds of request of lm-evaluation-harness; a request has `args`.

    Requests are sorted by length, longest first, and computed in batches; answers come in the order
    of the requests and do not depend on the batch.

    Args:
      bundle: from `load`.
      batch_size: requests computed together.
      max_length: tokens the model reads at once; default the model's own.
      max_gen_toks: new tokens where a request does not say.
      cache: of generation. seed: of sampling.
      prefix_token_id: what stands before a text without context; default the tokenizer's bos, else
        its eos.
    """

    def __init__(
        self, bundle: Bundle, *, batch_size: int = 8, max_length: int | None = None,
        max_gen_toks: int = 256, cache: CacheKind | Kinds = Dense(), seed: int = 0,
        prefix_token_id: int | None = None,
    ):
        super().__init__()
        limit, vocab = bundle.lm.config.max_len, bundle.lm.config.vocab_size
        self.bundle, self.kinds = bundle, layer_kinds(bundle.lm, cache, bundle.params)
        self.seed = whole("seed", seed, 0, 2**32 - 1)
        self.batch_size = whole("batch_size", batch_size)
        self.max_length = limit if max_length is None else whole("max_length", max_length, 2, limit)
        self.max_gen_toks = whole("max_gen_toks", max_gen_toks)
        self.prefix = (prefix_of(bundle) if prefix_token_id is None
                       else whole("prefix_token_id", prefix_token_id, 0, vocab - 1))

    @classmethod
    def create_from_arg_obj(cls, arg_dict: dict, additional_config: dict | None = None) -> Any:
        """From the harness's model_args: `pretrained`, what `load` takes, and options of both."""
        given, known = dict(arg_dict), ("pretrained", *LOADING, *OPTIONS)
        if unknown := sorted(set(given) - set(known)):
            raise ConfigError(f"model_args {unknown} are not known; expected {', '.join(known)}")
        if not isinstance(given.get("pretrained"), str):
            raise ConfigError(f"model_args has pretrained={given.get('pretrained')!r}; expected a "
                              "folder, a hub id or 'tiny', as in pretrained=FOLDER")
        size = (additional_config or {}).get("batch_size")  # its `device` is torch's
        if size is not None:
            given["batch_size"] = int(size) if str(size).isdigit() else size
        loading = {name: given.pop(name) for name in LOADING if name in given}
        return cls(load(given.pop("pretrained"), **loading), **given)

    def loglikelihood(
        self, requests: Sequence[Any], disable_tqdm: bool = False
    ) -> list[tuple[float, bool]]:
        """`(log p(continuation | context), whether greedy decoding would draw it)`, a request.

        `args` is (context, continuation). A context too long loses its beginning.
        """
        pairs = [self.encode_pair(*request.args) for request in requests]
        answers: list[Any] = [None] * len(pairs)
        for group in self.batches([len(a) + len(b) for a, b in pairs], "loglikelihood",
                                  disable_tqdm):
            found = continuations(self.bundle, [pairs[i] for i in group], self.batch_size)
            for index, answer in zip(group, found, strict=True):
                answers[index] = answer
                self.keep("loglikelihood", requests[index].args, answer)
        return answers

    def loglikelihood_rolling(
        self, requests: Sequence[Any], disable_tqdm: bool = False
    ) -> list[float]:
        """`log p(text)`, a request, in the harness's windows; `args` is (text,)."""
        texts = [[self.prefix, *self.encode(request.args[0], special=False)]
                 for request in requests]
        jobs = [(row, *window) for row, text in enumerate(texts)
                for window in rolling_windows(len(text) - 1, self.max_length)]
        shown = partial(progress, label="loglikelihood_rolling", quiet=disable_tqdm)
        found = window_logprobs(self.bundle, texts, jobs, self.batch_size, shown)
        sums = [float(line.sum(dtype=np.float64)) for line in found]
        for request, answer in zip(requests, sums, strict=True):
            self.keep("loglikelihood_rolling", request.args, answer)
        return sums

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """The text drawn up to the first of `until`, a request; `args` is (context, settings).

        Settings: until, max_gen_toks (or one of its other names), do_sample, temperature, top_k,
        top_p, min_p, repetition_penalty. A request's draws depend on its place among the requests.
        Raises: ConfigError for any other setting.
        """
        keys = jax.random.split(jax.random.key(self.seed), max(len(requests), 1))
        jobs = [self.job(*request.args) for request in requests]
        answers: list[Any] = [None] * len(jobs)
        lengths = [len(ids) for ids, *_ in jobs]
        kinds = [tuple(map(repr, rest)) for _, *rest in jobs]
        for group in self.batches(lengths, "generate_until", disable_tqdm, kinds):
            _, stop, room, numbers = jobs[group[0]]
            rows = group + group[:1] * (self.batch_size - len(group))  # one shape for all batches
            found = generate(
                self.bundle, [jobs[i][0] for i in rows], stop=stop, max_new_tokens=room,
                sampler=sampler_of(numbers), cache=self.kinds, key=keys[jnp.asarray(rows)],
            )
            for index, answer in zip(group, found, strict=False):
                answers[index] = answer.text
                self.keep("generate_until", requests[index].args, answer.text)
        return answers

    def job(
        self, context: str, settings: dict[str, Any]
    ) -> tuple[list[int], tuple[str, ...], int, dict[str, float]]:
        """A generation request as prompt ids, stop strings, new tokens and a sampler's numbers."""
        stop, room, numbers = generation_settings(settings, self.max_gen_toks)
        if room >= self.max_length:
            raise ConfigError(f"{room} new tokens leave no room for a context in the model's "
                              f"{self.max_length}; lower max_gen_toks")
        ids = self.encode(context) or [self.prefix]
        return (self.shortened(ids, self.max_length - room), spelled(self.bundle, stop), room,
                numbers)

    def encode(self, text: str, special: bool = True) -> list[int]:
        """Ids; a text that says its own begin mark, as chat templates do, gets no second one."""
        tokenizer = self.bundle.tokenizer
        bos = tokenizer.id_of("bos_token")
        mark = "" if bos is None else tokenizer.decode([bos], special=True)
        return tokenizer.encode(text, special and not (mark and text.startswith(mark)))

    def encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """Context and continuation as ids; spaces that end the context go to the continuation."""
        bare = context.rstrip()
        if not bare:
            own = self.encode(context + continuation, special=False)
            begun = own[:1] == [self.prefix]
            pair = (own[:1], own[1:]) if begun else ([self.prefix], own)
        else:
            both, before = self.encode(context + continuation), self.encode(bare)
            pair = (before, both[len(before):])
        if not pair[1]:
            raise ShapeError(f"continuation {continuation!r} adds no tokens to its context; "
                             "expected at least one")
        if len(pair[1]) > self.max_length:
            raise ShapeError(f"a continuation has {len(pair[1])} tokens, the model reads "
                             f"{self.max_length}; use loglikelihood_rolling for long texts")
        return self.shortened(pair[0], self.max_length + 1 - len(pair[1])), pair[1]

    def shortened(self, ids: list[int], room: int) -> list[int]:
        """The last `room` ids, with a warning where some are lost."""
        if len(ids) > room:
            warnings.warn(f"a context of {len(ids)} tokens was cut to its last {room}, to fit the "
                          f"model's {self.max_length}", stacklevel=3)
        return ids[-room:]

    def batches(
        self, lengths: list[int], label: str, quiet: bool, kinds: list[Any] | None = None
    ) -> Iterable[list[int]]:
        """Indices of requests that go together: of one kind, and of near lengths."""
        kinds = kinds or [()] * len(lengths)
        groups = []
        for kind in dict.fromkeys(kinds):
            order = sorted((i for i, own in enumerate(kinds) if own == kind),
                           key=lambda i: -lengths[i])
            groups += [order[i: i + self.batch_size]
                       for i in range(0, len(order), self.batch_size)]
        return progress(groups, label, quiet)

    def keep(self, kind: str, args: tuple, answer: Any) -> None:
        """Let the harness write an answer to its file at once, where it asked to (--use_cache)."""
        hook = getattr(self, "cache_hook", None)
        if hook is not None:
            hook.add_partial(kind, args, answer)

    @property
    def tokenizer_name(self) -> str:
        """What tells two chat templates apart in the harness's files."""
        return str(self.bundle.tokenizer.folder).replace("/", "__")

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """The model's chat template over messages."""
        return self.bundle.tokenizer.chat(chat_history, add_generation_prompt)

    def get_model_info(self) -> dict[str, Any]:
        """What the harness's results say of the model."""
        return {"model_num_parameters": count_params(self.bundle.lm),
                "model_dtype": str(self.bundle.params["embed"]["table"].dtype)}


def continuations(
    bundle: Bundle, pairs: Sequence[tuple[list[int], list[int]]], batch: int
) -> list[tuple[float, bool]]:
    """`(sum log p, whether each token is the likeliest)` of some continuations.

    Equal logits count as greedy decoding takes them: the lowest id first.
    Raises: NumericsError on NaN.
    """
    width = round_up(max(len(a) + len(b) for a, b in pairs) - 1, BUCKET)
    count = round_up(max(len(b) for _, b in pairs), SLICE)
    tokens, at, targets = (np.zeros((batch, n), np.int32) for n in (width, count, count))
    for row, (before, after) in enumerate(pairs):
        ids, n = before + after, len(after)
        tokens[row, : len(ids) - 1] = ids[:-1]  # right padding is harmless to causal attention
        at[row, :n] = np.arange(len(before) - 1, len(ids) - 1)
        targets[row, :n] = after
    arrays = shard_batch(tuple(map(jnp.asarray, (tokens, at, targets))), bundle.mesh)
    logprob_BM, greedy_BM = to_host(_continuations(bundle.lm, bundle.params, *arrays))
    found = []
    for row, (_, after) in enumerate(pairs):
        line = logprob_BM[row, : len(after)]
        if not np.isfinite(line).all():
            raise NumericsError("a log-probability is not finite; check the weights, or load in "
                                "float32")
        likeliest = bool((greedy_BM[row, : len(after)] == after).all())
        found.append((float(line.sum(dtype=np.float64)), likeliest))
    return found


@partial(jax.jit, static_argnames="lm")
def _continuations(
    lm: LM, params: Params, tokens_BT: jax.Array, at_BM: jax.Array, targets_BM: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """`log p(target_m | tokens up to at_m)` and the likeliest token, (B, M) each."""
    hidden_BMD, _ = pick(lm.apply(params, tokens_BT, logits_at=None).final, at_BM, None)

    def some(inputs):
        hidden_BmD, targets_Bm = inputs
        logits_BmV = lm.head(params, hidden_BmD)
        logprobs = jax.nn.log_softmax(logits_BmV, -1)
        return (jnp.take_along_axis(logprobs, targets_Bm[..., None], -1)[..., 0],
                jnp.argmax(logits_BmV, -1).astype(jnp.int32))

    split = lambda x: jnp.moveaxis(x.reshape(x.shape[0], -1, SLICE, *x.shape[2:]), 1, 0)
    join = lambda x: jnp.moveaxis(x, 0, 1).reshape(targets_BM.shape)
    found = jax.lax.map(some, (split(hidden_BMD), split(targets_BM)))
    return join(found[0]), join(found[1])


def rolling_windows(length: int, window: int) -> list[tuple[int, int, int]]:
    """(start, end, first newly scored token) over a prefix token and `length` tokens.

    The model reads `window` tokens at once; windows do not overlap, but the last one takes as much
    context as fits.

    >>> rolling_windows(10, 4)
    [(0, 5, 1), (4, 9, 5), (6, 11, 9)]
    """
    out, scored = [], 1
    while scored <= length:
        end = min(scored + window, length + 1)
        out.append((max(end - window - 1, 0), end, scored))
        scored = end
    return out


def generation_settings(
    settings: dict[str, Any], default_room: int
) -> tuple[tuple[str, ...], int, dict[str, float]]:
    """Stop strings, new tokens, and the sampler's numbers ({} is greedy), from a request's own.

    Raises: ConfigError for what is not known, and for values that cannot be.

    >>> generation_settings({"until": ["\\n"], "do_sample": False, "temperature": 0.7}, 256)
    (('\\n',), 256, {})
    """
    given = {key: value for key, value in settings.items() if value is not None}
    until = given.pop("until", [])
    until = [until] if isinstance(until, str) else until
    if not isinstance(until, list | tuple):
        raise ConfigError(f"until is {until!r}; expected a string or a list of strings")
    stop = check_strings([string for string in until if string != ""])  # the harness ignores ""
    rooms = [given.pop(name) for name in LENGTH_NAMES if name in given]
    room = whole("max_gen_toks", rooms[0] if rooms else default_room)
    numbers = {name: given.pop(name) for name in SAMPLING if name in given}
    for name, value in numbers.items():
        number(name, value)
    sample = given.pop("do_sample", numbers.get("temperature", 0.0) > 0)
    if not isinstance(sample, bool):
        raise ConfigError(f"do_sample is {sample!r}; expected true or false")
    if unknown := {k: v for k, v in given.items() if NEUTRAL.get(k) != v}:
        known = ", ".join(("until", "do_sample", *LENGTH_NAMES, *SAMPLING))
        raise ConfigError(f"generation settings {unknown} are not known; expected {known}")
    penalty = numbers.get("repetition_penalty", 1.0)
    cold = {} if penalty == 1 else {"temperature": 0.0, "repetition_penalty": penalty}
    used = {"temperature": 1.0} | numbers if sample else cold
    sampler_of(used)  # holds them to their ranges
    return stop, room, used


def sampler_of(numbers: dict[str, float]) -> Sampler:
    """The sampler of `generation_settings`' numbers; a top_k of 0 is none."""
    numbers = {k: v for k, v in numbers.items() if not (k == "top_k" and v == 0)}
    return Categorical(**numbers) if numbers else Greedy()


def spelled(bundle: Bundle, strings: tuple[str, ...]) -> tuple[str, ...]:
    """The strings that the vocabulary can spell; the others never come."""
    known = _bytes_of(bundle.tokenizer, bundle.lm.config.vocab_size) if strings else frozenset()
    return tuple(string for string in strings if known.issuperset(string.encode()))


@remember
def _bytes_of(tokenizer: Tokenizer, size: int) -> frozenset[int]:
    return frozenset(b"".join(vocabulary(tokenizer, size)))


def prefix_of(bundle: Bundle) -> int:
    """The token that stands where there is no context."""
    names = [bundle.tokenizer.id_of(name) for name in ("bos_token", "eos_token")]
    found = [*names, bundle.extra.get("bos_token_id"), *bundle.stop_ids]
    for token in found:
        if isinstance(token, int):
            return token
    raise ConfigError("the tokenizer names neither a bos nor an eos token; pass prefix_token_id=")


def progress(items: Sequence[Any], label: str, quiet: bool) -> Iterable[Any]:
    """The items with a bar on stderr, unless `quiet`."""
    from tqdm import tqdm

    return tqdm(items, desc=label, disable=quiet)


@remember
def lm_eval_class() -> type:
    """`Evaluator` as a subclass of the harness's LM, registered there as "jaxlm"."""
    try:
        from lm_eval.api.model import LM as HarnessLM
        from lm_eval.api.registry import register_model
    except ImportError as error:
        raise ConfigError(
            f"lm-evaluation-harness is not here ({error}); pip install 'lm_eval>=0.4.10'"
        ) from error

    class JaxLM(Evaluator, HarnessLM):
        """A bundle, or what `load` takes under the harness's name `pretrained`."""

        @classmethod
        def create_from_arg_string(cls, arg_string, additional_config=None):
            from lm_eval.utils import simple_parse_args_string

            return cls.create_from_arg_obj(simple_parse_args_string(arg_string), additional_config)

    register_model("jaxlm")(JaxLM)
    return JaxLM


def lm_eval_model(bundle: Bundle, **options: Any) -> Any:
    """A bundle as a model for `lm_eval.simple_evaluate(model=...)`; options as `Evaluator`'s."""
    return lm_eval_class()(bundle, **options)


if __name__ == "__main__":
    from jaxlm.eval.lm_eval import lm_eval_class as known  # this file under its own name

    known()
    from lm_eval.__main__ import cli_evaluate

    sys.exit(cli_evaluate())
