"""Everything that needs a real accelerator, in one command.

Command: python experiments/device_suite.py --out experiments/results/device_suite/h200.json
Hardware: one GPU or TPU; on a CPU the parts that need one say "skipped: no accelerator".
Minutes: 9 at most; a part that does not fit is reported as not run; run again to go on with it.
Expected: every `within` true: answers, logits against the CPU's, kernels against XLA; copy
  bandwidth of 0.8 of the card's data sheet. On an H200 decode attention over 2-bit codes at 0.23 of
  that bandwidth, 1.2 times as fast as cuDNN's over bfloat16 (4 bits: 0.57, 1.8 times).

The committed H200 result ends with `library`. It was measured with XLA's autotuning and its Triton
products off (`device_info.xla_flags`), which compiles sooner.
"""

import argparse
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from experiments import _harness, device_checks, kv_device

BUDGET_S = 530
Measure = Callable[[argparse.Namespace], dict[str, Any]]


@dataclass(frozen=True)
class Part:
    """One measurement, `measure(args) -> metrics`, and about how long it takes."""

    name: str
    measure: Measure
    expect_s: float


def device_info(args: argparse.Namespace) -> dict[str, Any]:
    """What jax sees."""
    import jax

    first = jax.devices()[0]
    memory = first.memory_stats() or {}
    return {
        "kind": first.device_kind,
        "count": jax.device_count(),
        "backend": jax.default_backend(),
        "compute_capability": getattr(first, "compute_capability", ""),
        "bytes_limit": memory.get("bytes_limit", 0),
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
    }


def copy_bandwidth(args: argparse.Namespace) -> dict[str, Any]:
    """Bytes read plus bytes written by an elementwise pass over one array, a second."""
    import jax

    megabytes = 16 if args.smoke or jax.default_backend() == "cpu" else 2048
    rate = kv_device.copy_rate(megabytes, 5)
    return {"megabytes": megabytes, "gb_per_s": rate / 1e9}


def matmul(args: argparse.Namespace) -> dict[str, Any]:
    """Multiply-adds of a square bf16 matrix product, a second."""
    import jax
    import jax.numpy as jnp

    n = 512 if args.smoke or jax.default_backend() == "cpu" else 8192
    a = jax.random.normal(jax.random.key(args.seed), (n, n), jnp.bfloat16)
    wall = _harness.median_seconds(jax.jit(jnp.matmul), a, a, repeats=5 if args.smoke else 20)
    return {"size": n, "seconds": wall, "tflop_per_s": 2 * n**3 / wall / 1e12}


def on_accelerator(part: Measure) -> Measure:
    """The part, or on a CPU, where its figures would say nothing, that it was skipped."""
    return lambda args: device_checks.SKIPPED if device_checks.on_cpu() else part(args)


# Add a part here; the most telling first.
PARTS = [
    Part("device_info", device_info, 5),
    Part("copy_bandwidth", copy_bandwidth, 10),
    Part("kv_attention", on_accelerator(kv_device.attention_rates), 50),
    Part("attention_kernel", device_checks.attention_kernel, 60),
    Part("library", device_checks.library, 40),
    Part("kv_throughput", on_accelerator(kv_device.throughput), 110),
    Part("flush_kernel", device_checks.flush_kernel, 60),
    Part("decode_speed", device_checks.decode_speed, 60),
    Part("matmul", matmul, 10),
]


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Every part that fits into the budget; one that fails is reported, the others still run."""
    end = time.monotonic() + args.budget
    parts = (args.out or Path("report/device_suite")).with_suffix(".parts")
    settings = {"smoke": args.smoke, "seed": args.seed, "sources": _harness.sources(Path(__file__))}
    keep = _harness.Resumable(parts, settings)
    results: dict[str, Any] = {}
    for part in PARTS:
        if part.name not in keep.parts and time.monotonic() + part.expect_s > end:
            results[part.name] = {"not_run": f"needs {part.expect_s:.0f} s more: run it again"}
            continue
        try:
            results[part.name] = keep(part.name, lambda part=part: part.measure(args))
        except Exception as error:  # one broken kernel must not cost the other answers
            results[part.name] = {"failed": f"{type(error).__name__}: {error}"[:500]}
        print(f"{part.name}: {results[part.name]}", flush=True)
    if len(keep.parts) == len(PARTS):
        keep.done()
    return results


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The suite's own argument."""
    parser.add_argument("--budget", type=float, default=BUDGET_S, help="seconds in all")


if __name__ == "__main__":
    _harness.run(__file__, __doc__, measure, add_arguments)
