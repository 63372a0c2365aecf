"""How much text fits a chip, by its own compiler, for every cache kind; no such chip is needed.

The decode loop of a whole model is compiled for the target; the largest batch is the one whose
memory, by the compiler's count, leaves 5% of the device free. Memory grows by the same bytes a row,
so two small compilations predict the batch, and a third and fourth prove it and refuse the next.
Also the bytes of the states alone, everything counted, as shares of 16-bit ones.

Command: python experiments/kv_capacity.py --out experiments/results/kv_capacity/cpu.json
Hardware: any CPU, 8 GB of memory; libtpu for v5e, the jax CUDA wheels for T4 and H100
Minutes: 60, a minute or less a cell; goes on where it was stopped
Expected: capacity_ratio 4.6 (v5e:2x4, Llama-3.1-8B, 16k), kv_bytes_fraction_4k at most 0.204
"""

import argparse
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from experiments._harness import Resumable, run
from jaxlm.cache.parse import parse_cache
from jaxlm.core.errors import DeviceError
from jaxlm.core.tree import nbytes
from jaxlm.eval.fit import RESERVE, Fit, fit
from jaxlm.models.config import AttentionSpec, ModelConfig, Rope
from jaxlm.models.presets import preset

TARGETS = ("v5e:2x4", "v5e:1x1", "t4", "h100")
MODELS = ("llama-3.1-8b", "llama-3.2-3b", "qwen2.5-1.5b")
KINDS = {"bf16": "dense", "int8": "kivi8", "4-bit": "squat4", "2-bit": "squat2",
         "2-bit, 8-bit scales": "squat2:scales=int8"}
CONTEXTS = (16384, 4096)
PROBES = (8, 16)  # rows of the two compilations that predict


def largest(config: ModelConfig, target: str, context: int, cache: str) -> dict[str, Any]:
    """The largest batch that fits, its memory, and the next one's refusal."""
    compile_for = lambda batch: fit(config, "decode", target, batch=batch, context=context,
                                    cache=parse_cache(cache))
    few, more = (compile_for(batch) for batch in PROBES)
    row = (more.program.total - few.program.total) / (PROBES[1] - PROBES[0])
    usable = (1 - RESERVE) * few.target.bytes_per_device
    batch = int((usable - few.program.total) / row) + PROBES[0]
    tried: dict[int, Fit] = {PROBES[0]: few, PROBES[1]: more}
    look = lambda batch: tried.setdefault(batch, tried.get(batch) or compile_for(batch))
    while batch > 0 and not look(batch).fits:
        batch -= 1
    while batch > 0 and look(batch + 1).fits:
        batch += 1
    if batch < 1:
        return {"batch": 0, "bytes": few.program.total, "usable": int(usable)}
    found = look(batch)
    return {"batch": batch, "bytes": found.program.total, "usable": int(usable),
            "temporaries": found.program.temporaries, "next_bytes": look(batch + 1).program.total,
            "cache_bytes": found.cache_bytes, "compilations": len(tried)}


def fraction(cache: str, slots: int, head_dim: int = 128) -> float:
    """Bytes of one layer's state over those of 16-bit keys and values for the same tokens."""
    spec = AttentionSpec(32, 8, head_dim, 1.0, Rope())
    size = lambda name: nbytes(jax.eval_shape(
        lambda: parse_cache(name).init(spec, 1, slots, jnp.bfloat16)))
    return size(cache) / size("dense")


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Fractions of bytes, and a table of the largest batches."""
    metrics: dict[str, Any] = {}
    for name, cache in KINDS.items():
        for label, slots in (("4k", 4096), ("16k", 16384)):
            metrics[f"fraction {label} {name}"] = fraction(cache, slots)
    metrics["kv_bytes_fraction_4k"] = metrics["fraction 4k 2-bit"]
    metrics["kv_bytes_fraction_4k_8bit_scales"] = metrics["fraction 4k 2-bit, 8-bit scales"]
    metrics["kv_bytes_fraction_16k"] = metrics["fraction 16k 2-bit"]
    metrics["rows"] = rows = []
    if args.smoke:
        return metrics
    kept = Resumable(Path(args.parts), {"probes": PROBES, "reserve": RESERVE})
    for target in args.targets:
        for model in args.models:
            for context in args.contexts:
                for name in args.kinds:
                    key = f"{target} {model} {context} {KINDS[name]}"
                    cell = {"target": target, "model": model, "context": context, "kind": name}
                    try:
                        cell |= kept(key, lambda m=model, t=target, c=context, n=name: largest(
                            preset(m), t, c, KINDS[n]))
                    except DeviceError as error:
                        cell |= {"left_out": str(error)}
                    rows.append(cell)
                    print(cell, flush=True)
    batches = {cell["kind"]: cell.get("batch", 0) for cell in rows if
               (cell["target"], cell["model"], cell["context"]) == (TARGETS[0], MODELS[0], 16384)}
    if batches.get("bf16") and batches.get("2-bit"):
        metrics["capacity_ratio"] = batches["2-bit"] / batches["bf16"]
        metrics["capacity_ratio_8bit_scales"] = (
            batches.get("2-bit, 8-bit scales", 0) / batches["bf16"])
    return metrics


def arguments(parser: argparse.ArgumentParser) -> None:
    """Parts of the table."""
    parser.add_argument("--targets", nargs="+", default=list(TARGETS))
    parser.add_argument("--models", nargs="+", default=list(MODELS))
    parser.add_argument("--contexts", nargs="+", type=int, default=list(CONTEXTS))
    parser.add_argument("--kinds", nargs="+", default=list(KINDS), choices=list(KINDS))
    parser.add_argument("--parts", default="kv_capacity.parts.json", help="finished cells")


if __name__ == "__main__":
    run(__file__, __doc__, measure, arguments)
