"""`jaxlm generate`: continue a prompt, and say how fast."""

import sys
import time
from collections.abc import Generator
from typing import Annotated, Any

import jax
import tyro

from jaxlm.cache.policy import open_cache
from jaxlm.cli.options import Device, Dtype, Model, note, open_model, read_text
from jaxlm.core.errors import ConfigError
from jaxlm.decode.generate import Generation, generate
from jaxlm.decode.generate import stream as stream_text
from jaxlm.decode.samplers import Categorical, Greedy, Sampler

Prompt = Annotated[str, tyro.conf.arg(metavar="PROMPT")]
CHUNK = 8  # tokens a piece


def run(
    model: Model, prompt: Prompt, /, max_new_tokens: int = 64, temperature: float = 0.0,
    top_k: int | None = None, top_p: float | None = None, min_p: float | None = None,
    repetition_penalty: float | None = None, seed: int = 0, stop: tuple[str, ...] = (),
    include_stop: bool = False, cache: str = "dense", stream: bool = True,
    device: Device | None = None, dtype: Dtype | None = None, revision: str | None = None,
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
      seed: of the sampling; the same seed gives the same text.
      stop: strings that end the text, as they are; $'\\n' is a line end in bash.
      include_stop: leave the stop string at the end of the text.
      cache: how keys and values are kept: dense, kivi2, squat2, squat4v2:group=64, ..., or a
        file of `jaxlm tune-cache`.
      stream: show the text while it grows.
      device: where to run; default what jax finds.
      dtype: of the parameters; default float32 on a CPU, the checkpoint's own elsewhere.
      revision: of a hub id.
    """
    began = time.perf_counter()
    bundle = open_model(model, device, dtype, revision)
    arguments: dict[str, Any] = {
        "max_new_tokens": max_new_tokens, "cache": open_cache(cache, bundle.lm.config),
        "key": jax.random.key(seed), "stop": stop, "include_stop": include_stop,
        "sampler": make_sampler(temperature, top_k, top_p, min_p, repetition_penalty),
    }
    text = read_text("-") if prompt == "-" else prompt
    if stream:
        show(stream_text(bundle, text, chunk=CHUNK, **arguments), began)
        return
    start = time.perf_counter()
    answer = generate(bundle, text, **arguments)
    spent = time.perf_counter() - start
    print(answer.text)
    count = len(answer.tokens)
    note(f"{count} tokens in {spent:.2f} s, prefill and compilation included; {ended(answer)}")


def make_sampler(
    temperature: float, top_k: int | None, top_p: float | None, min_p: float | None,
    repetition_penalty: float | None,
) -> Sampler:
    """Greedy, or the chain of what was asked for.

    Raises: ConfigError for a value outside its range, and for a cut that temperature 0 ignores.
    """
    sampler = Categorical(temperature, top_k, top_p, min_p, repetition_penalty)
    cuts = {"--top-k": top_k, "--top-p": top_p, "--min-p": min_p}
    if not temperature and any(value is not None for value in cuts.values()):
        named = ", ".join(name for name, value in cuts.items() if value is not None)
        raise ConfigError(f"{named} does nothing at temperature 0, which takes the likeliest "
                          "token; give --temperature too")
    return sampler if temperature or repetition_penalty is not None else Greedy()


def show(pieces: Generator[str, None, Generation], began: float) -> None:
    """Print pieces as they come, then the speed."""
    times = []
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
    note(f"{line}; {ended(answer)}")


def ended(answer: Generation) -> str:
    """Why the text ends where it does."""
    return {"stop": "ended by the model", "string": "ended by a stop string",
            "length": "cut at --max-new-tokens"}[answer.finish]
