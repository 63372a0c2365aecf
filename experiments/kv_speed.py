"""Time per decoded token against cache length, for every cache kind, and for transformers' own.

A random Llama (width 512, 8 layers, 8 query and 4 kv heads of 64) decodes a batch of 8 over caches
that already hold so many tokens: 32 a turn, in which each row codes one group. Kinds take turns, so
that a busy machine slows all alike; a ratio is the median of the turns' ratios. transformers'
QuantizedCache is timed in the same turns with the same sizes and threads when its backend
(`optimum-quanto`, `hqq`) can be imported, at 2 bits; its groups are of 64, which is all that quanto
takes, and its turn is one token, which codes nothing. On an accelerator also `attention` and
`throughput` of kv_device.py: bytes a second, the fastest bfloat16 attention, equal memory.

Command: python experiments/kv_speed.py --out experiments/results/kv_speed/cpu.json
Peers: pip install --no-deps optimum-quanto hqq termcolor accelerate einops (beside torch on a CPU)
Hardware: any; a CPU of 2 cores for the figures of the README
Minutes: 15; stopped, it goes on with the next length
Expected: cpu_step_vs_quantizedcache 6.9 (wanted: 5); cpu_step_vs_dense 1.7 (wanted: at most 1.5)
"""

import argparse
import statistics
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from experiments import kv_device
from experiments._harness import parts_of, run, seconds
from jaxlm.cache.base import CacheKind
from jaxlm.cache.parse import parse_cache
from jaxlm.core.tree import Params, nbytes
from jaxlm.decode.samplers import Greedy
from jaxlm.decode.state import DecodeState, decode, prefill
from jaxlm.models.config import ModelConfig
from jaxlm.models.lm import LM

CONFIG = ModelConfig(vocab_size=512, dim=512, num_layers=8, num_heads=8, num_kv_heads=4,
                     head_dim=64, ffn_dim=1408, max_len=32768)
KINDS = ("dense", "squat2", "kivi2", "squat4", "squat8", "squat2:rope=before", "rkivi2",
         "turboquant2")
BATCH, TOKENS, PROMPT = 8, 32, 32  # rows; tokens a turn, one group of codes; the cheapest prompt


def filled(lm: LM, params: Params, kind: CacheKind, cached: int, turns: int) -> DecodeState:
    """A state that claims `cached` tokens a row: the time does not depend on what they say."""
    keys = jax.random.split(jax.random.key(0), BATCH)
    start = jax.jit(prefill, static_argnums=(0, 5, 6))
    state = start(lm, params, Greedy(), jnp.ones((BATCH, PROMPT), jnp.int32),
                  jnp.full(BATCH, PROMPT), kind, cached + turns * TOKENS, keys)
    coded = cached // 32 * 32 - 32

    def claim(cache):
        return cache | {"packed_B": jnp.full(BATCH, coded)} if "packed_B" in cache else cache

    return state.replace(length_B=jnp.full(BATCH, cached, jnp.int32),
                         caches=tuple(claim(cache) for cache in state.caches))


def stepper(
    lm: LM, params: Params, kind: CacheKind, cached: int, turns: int
) -> tuple[Callable[[], Any], int]:
    """A call that decodes TOKENS tokens and goes on from where it is, and the caches' bytes."""
    loop = jax.jit(partial(decode, lm), donate_argnums=2)
    held = [filled(lm, params, kind, cached, turns)]
    size = nbytes(held[0].caches)

    def step():
        held[0] = loop(params, Greedy(), held[0], max_new=TOKENS)
        return held[0].length_B

    return step, size


def peers(cached: int) -> Iterator[tuple[str, Callable[[], Any]]]:
    """transformers' caches over the same model: one token a call."""
    try:
        import torch
        import transformers
    except ImportError:
        return
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=512, hidden_size=512, intermediate_size=1408, num_hidden_layers=8,
        num_attention_heads=8, num_key_value_heads=4, head_dim=64, max_position_embeddings=32768)
    model = transformers.LlamaForCausalLM(config).eval()
    makers = {"transformers dense": lambda: transformers.DynamicCache(config=config)}
    for backend in ("quanto", "hqq"):
        makers[f"transformers {backend} 2 bits"] = partial(
            transformers.QuantizedCache, backend=backend, config=config, nbits=2, q_group_size=64,
            axis_key=0 if backend == "quanto" else 1, axis_value=0 if backend == "quanto" else 1)
    for name, make in makers.items():
        try:
            cache = make()
            k, v = (torch.randn(BATCH, 4, cached, 64) for _ in range(2))
            for layer in range(8):
                cache.update(k, v, layer)
        except (ImportError, ValueError, RuntimeError) as error:
            print(f"{name} is left out: {error}")
            continue

        def step(cache=cache):
            with torch.no_grad():
                return model(torch.ones(BATCH, 1, dtype=torch.long), past_key_values=cache,
                             use_cache=True).logits.sum().item()

        yield name, step


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Milliseconds a token for every kind and length, and the ratios of the longest CPU case."""
    lm = LM(CONFIG.replace(num_layers=2) if args.smoke else CONFIG)
    params = lm.init(jax.random.key(args.seed))
    lengths = (256,) if args.smoke else tuple(args.lengths)
    rows: list[dict[str, Any]] = []
    metrics: dict[str, Any] = {"rows": rows, "batch": BATCH}
    chosen = {name: str(getattr(args, name)) for name in ("kinds", "repeats", "no_peers")}
    parts = parts_of(args, __file__, smoke=args.smoke, **chosen)
    for cached in lengths:
        found = parts(f"{cached} tokens", partial(timed, lm, params, cached, args))
        rows += found["rows"]
        if cached == max(lengths) and jax.default_backend() == "cpu":  # the peers are on the CPU
            metrics |= ratios(found["turns"])
    parts.done()
    if jax.default_backend() != "cpu":
        metrics |= {"attention": kv_device.attention_rates(args),
                    "throughput": kv_device.throughput(args)}
    return metrics


def timed(lm: LM, params: Params, cached: int, args: argparse.Namespace) -> dict[str, Any]:
    """Every kind and peer at one length, in turns."""
    made = {name: stepper(lm, params, parse_cache(name), cached, 1 + args.repeats)
            for name in (args.kinds[:3] if args.smoke else args.kinds)}
    steps = {name: (step, TOKENS, size) for name, (step, size) in made.items()}
    if not (args.smoke or args.no_peers):
        steps |= {name: (step, 1, None) for name, step in peers(cached)}
    for step, _, _ in steps.values():
        step()
    turns = [{name: seconds(step) / tokens for name, (step, tokens, _) in steps.items()}
             for _ in range(args.repeats)]
    times = {name: [turn[name] for turn in turns] for name in steps}
    rows = [{"kind": name, "cached": cached, "ms": 1e3 * statistics.median(times[name]),
             "ms_min": 1e3 * min(times[name]), "bytes": size}
            for name, (_, _, size) in steps.items()]
    return {"rows": rows, "turns": turns}


def ratios(turns: list[dict[str, float]]) -> dict[str, float]:
    """Of squat2 to our dense cache, and of transformers' fastest 2-bit cache to squat2."""
    if "squat2" not in turns[0]:
        return {}
    found = {}
    if "dense" in turns[0]:
        found["cpu_step_vs_dense"] = statistics.median(t["squat2"] / t["dense"] for t in turns)
    rivals = [name for name in turns[0] if name.endswith("2 bits")]
    if rivals:
        found["cpu_step_vs_quantizedcache"] = statistics.median(
            min(turn[name] for name in rivals) / turn["squat2"] for turn in turns)
    return found


def arguments(parser: argparse.ArgumentParser) -> None:
    """Which lengths and kinds."""
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024, 4096])
    parser.add_argument("--kinds", nargs="+", default=list(KINDS))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--no-peers", action="store_true", help="our own kinds only")


if __name__ == "__main__":
    run(__file__, __doc__, measure, arguments)
