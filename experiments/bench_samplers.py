"""What sampling costs a step: thresholds bit by bit against a sort, whole chains, stop tables.

Command: python experiments/bench_samplers.py --out experiments/results/bench_samplers/cpu.json
Hardware: anything; 2 CPU cores
Minutes: 1
Expected: `bits_ms` several times below `sort_ms`; `stop_build_s` below a second.
"""

import time

import jax
import jax.numpy as jnp
import numpy as np

from experiments import _harness
from jaxlm.decode.samplers import Categorical, Greedy, Mirostat2
from jaxlm.decode.stop import matcher
from jaxlm.decode.transforms import keep_top_k

ROWS = 8
SAMPLERS = {
    "greedy": Greedy(), "temperature": Categorical(0.8), "top_k": Categorical(0.8, top_k=40),
    "top_p": Categorical(0.8, top_p=0.9), "min_p": Categorical(0.8, min_p=0.05),
    "all": Categorical(0.8, top_k=40, top_p=0.9, min_p=0.05, repetition_penalty=1.1),
    "mirostat": Mirostat2(),
}


def median_ms(function, *arguments) -> float:
    """Median milliseconds a call, compiled beforehand."""
    return 1e3 * _harness.median_seconds(function, *arguments, repeats=9)


@jax.jit
def by_sorting(logits_BV, k):
    """Top-k by a whole sort."""
    return logits_BV >= jnp.sort(logits_BV, -1)[:, -k][:, None]


def stop_table(vocab: int, seed: int) -> dict[str, float]:
    """Three strings over random tokens of 1 to 12 bytes."""
    draw = np.random.default_rng(seed)
    alphabet = np.frombuffer(b"abcdefghij #\n.", np.uint8)
    tokens = [draw.choice(alphabet, draw.integers(1, 13)).tobytes() for _ in range(vocab)]
    begin = time.perf_counter()
    made = matcher(tokens, ["\n\n## a", "abcde", "\n\n.. bad"])
    seconds = time.perf_counter() - begin
    return {"stop_build_s": seconds, "stop_bytes": made.class_V.nbytes + made.table_SC.nbytes}


def measure(args):
    """Milliseconds for 8 rows, by vocabulary."""
    metrics = {}
    for vocab in (32_000,) if args.smoke else (32_000, 128_256):
        logits = 3 * jax.random.normal(jax.random.key(args.seed), (ROWS, vocab))
        keys = jax.random.split(jax.random.key(args.seed + 1), ROWS)
        step = jax.jit(lambda sampler, *arguments: sampler.step(*arguments))
        metrics[vocab] = {
            "bits_ms": median_ms(jax.jit(keep_top_k), logits, 40),
            "sort_ms": median_ms(by_sorting, logits, 40),
            **{f"{name}_ms": median_ms(step, sampler, keys, logits, sampler.init(ROWS, vocab))
               for name, sampler in SAMPLERS.items()},
            **stop_table(vocab, args.seed),
        }
    return {"rows": ROWS, **metrics}


if __name__ == "__main__":
    _harness.run(__file__, __doc__, measure)
