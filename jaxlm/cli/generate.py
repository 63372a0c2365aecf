"""`jaxlm generate`: continue a prompt, and say how fast."""

import sys
import time
from collections.abc import Generator
from typing import Annotated, Any

import jax
import tyro

from jaxlm.cache.policy import open_cache
from jaxlm.cli.options import Device, Dtype, Model, note, open_model, read_text
from jaxlm.decode.generate import Generation, generate
from jaxlm.decode.generate import stream as stream_text
from jaxlm.decode.samplers import Greedy, Temperature

Prompt = Annotated[str, tyro.conf.arg(metavar="PROMPT")]
CHUNK = 8  # tokens a piece


def run(
    model: Model, prompt: Prompt, /, max_new_tokens: int = 64, temperature: float = 0.0,
    seed: int = 0, stop: tuple[str, ...] = (), include_stop: bool = False, cache: str = "dense",
    stream: bool = True, device: Device | None = None, dtype: Dtype | None = None,
    revision: str | None = None,
) -> None:
    """Continue a prompt: the text goes to stdout, the speed to stderr.

    Args:
      model: a model folder, a hub id such as org/name, or "tiny", the bundled model.
      prompt: the text, or - to read it from stdin as it is, line ends included.
      max_new_tokens: stop after so many tokens, or before that at the model's own stop token.
      temperature: 0 takes the likeliest token; above 0 samples.
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
        "sampler": Temperature(temperature) if temperature else Greedy(),
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
