"""`jaxlm generate`: continue a prompt, and say how fast."""

import sys
import time
from collections.abc import Generator, Sequence
from typing import Annotated, Any

import jax
import tyro

from jaxlm.cache.policy import open_cache
from jaxlm.cli import clock
from jaxlm.cli.options import Loading, Model, note, open_model, read_text
from jaxlm.core.errors import ConfigError, whole
from jaxlm.decode.generate import Generation, generate
from jaxlm.decode.generate import stream as stream_text
from jaxlm.decode.samplers import Categorical, Greedy, Mirostat2, Sampler, bias_array

Prompt = Annotated[str, tyro.conf.arg(metavar="PROMPT")]
CHUNK = 8  # tokens a piece


def run(
    model: Model, prompt: Prompt, /, max_new_tokens: int = 64, temperature: float = 0.0,
    top_k: int | None = None, top_p: float | None = None, min_p: float | None = None,
    repetition_penalty: float | None = None, mirostat: float | None = None,
    logit_bias: tuple[str, ...] = (), seed: int = 0, stop: tuple[str, ...] = (),
    include_stop: bool = False, cache: str = "dense", stream: bool = True,
    loading: Loading = Loading(), revision: str | None = None,
) -> None:
    """Continue a prompt: the text goes to stdout, the speed to stderr.

    Args:
      model: a model folder, a hub id such as org/name, or "tiny", the bundled model.
      prompt: the text, or - to read it from stdin as it is, line ends included.
      max_new_tokens: stop after so many tokens, or before that at the model's own stop token.
      temperature: 0 takes the likeliest token; above 0 samples.
      top_k: keep only the k likeliest tokens.
      top_p: keep only the likeliest tokens that together have this probability.
      min_p: keep only tokens of at least this share of the likeliest one's probability.
      repetition_penalty: above 1 makes tokens of the text so far less likely.
      mirostat: keep the surprise of the text near so many bits a token (Mirostat 2).
      logit_bias: ID=VALUE adds to the logit of a token; ID=-inf bans it. Several may follow.
      seed: of the sampling; the same seed gives the same text.
      stop: strings that end the text, as they are; $'\\n' is a line end in bash.
      include_stop: leave the stop string at the end of the text.
      cache: how keys and values are kept: dense, kivi2, squat2, squat4v2:group=64, ..., or a
        file of `jaxlm tune-cache`.
      stream: show the text while it grows.
      revision: of a hub id.
      loading: how a model is loaded.
    """
    bundle = open_model(model, loading, revision)
    arguments: dict[str, Any] = {
        "max_new_tokens": max_new_tokens,
        "cache": open_cache(cache, bundle.lm.config, bundle.params),
        "key": jax.random.key(whole("--seed", seed, -2**63, 2**63 - 1)),
        "stop": stop, "include_stop": include_stop,
        "sampler": make_sampler(temperature, top_k, top_p, min_p, repetition_penalty, mirostat,
                                read_bias(logit_bias, bundle.lm.config.vocab_size)),
    }
    text = read_text("-") if prompt == "-" else prompt
    if stream:
        show(stream_text(bundle, text, chunk=CHUNK, **arguments))
        return
    start = time.perf_counter()
    answer = generate(bundle, text, **arguments)
    spent = time.perf_counter() - start
    print(answer.text)
    count = len(answer.tokens)
    note(f"{count} tokens in {spent:.2f} s, {count / spent:.1f} tokens/s, prefill and compilation "
         f"included; {ended(answer)}")


def make_sampler(
    temperature: float, top_k: int | None, top_p: float | None, min_p: float | None,
    repetition_penalty: float | None, mirostat: float | None = None, logit_bias: Any = None,
) -> Sampler:
    """Greedy, Mirostat 2, or the chain of what was asked for.

    Raises: ConfigError for a value outside its range, for a cut that temperature 0 ignores, and
      for what Mirostat has no place for.
    """
    sampler = Categorical(temperature, top_k, top_p, min_p, repetition_penalty, logit_bias)
    cuts = {"--top-k": top_k, "--top-p": top_p, "--min-p": min_p}
    changes = {"--repetition-penalty": repetition_penalty, "--logit-bias": logit_bias}
    given = lambda options: [name for name, value in options.items() if value is not None]
    if not temperature and (named := given(cuts | {"--mirostat": mirostat})):
        raise ConfigError(f"{', '.join(named)} does nothing at temperature 0, which takes the "
                          "likeliest token; give --temperature too")
    if mirostat is None:
        return sampler if temperature or given(changes) else Greedy()
    if named := given(cuts | changes):
        raise ConfigError(f"--mirostat makes its own cut and takes no {', '.join(named)}; leave "
                          "out one or the other")
    return Mirostat2(mirostat, temperature=temperature)


def read_bias(pairs: Sequence[str], vocab: int) -> Any:
    """Biases as a float32 (V,) array from `ID=VALUE` each; None for none.

    Raises: ConfigError for what is no pair, or an id beyond the vocabulary.

    >>> read_bias(["2=-inf", "0=1.5"], 3).tolist()
    [1.5, 0.0, -inf]
    """
    biases = {}
    for pair in pairs:
        token, _, value = pair.partition("=")
        try:
            biases[int(token)] = float(value)
        except ValueError:
            raise ConfigError(f"--logit-bias is {pair!r}; expected ID=VALUE, such as 13=-inf or "
                              "13=2.5") from None
    return bias_array(biases, vocab) if biases else None


def show(pieces: Generator[str, None, Generation]) -> None:
    """Print pieces as they come, then the speed; the start is the process's."""
    times, began = [], clock.began()
    try:
        while True:
            sys.stdout.write(next(pieces))
            sys.stdout.flush()
            times.append(time.perf_counter())
    except StopIteration as end:
        answer = end.value
    sys.stdout.write("\n")
    count = len(answer.tokens)
    line = f"first text {times[0] - began:.2f} s after the start; {count} tokens"
    if count > CHUNK:
        rate = (count - CHUNK) / (times[-1] - times[0])
        line += f", {rate:.0f} tokens/s after the first {CHUNK}"
    else:  # all came at once, so there is no time without loading to go by
        line += f", {count / (times[-1] - began):.1f} tokens/s, loading and compilation included"
    note(f"{line}; {ended(answer)}")


def ended(answer: Generation) -> str:
    """Why the text ends where it does."""
    return {"stop": "ended by the model", "string": "ended by a stop string",
            "length": "cut at --max-new-tokens"}[answer.finish]
