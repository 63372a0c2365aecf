"""How much text fits a chip, by its own compiler, for every cache kind; no such chip is needed.

The decode loop of a whole model is compiled for the target; the largest batch is the one whose
memory, by the compiler's count, leaves 5% of the device free. Arguments are bilinear in layers and
rows and temporaries nearly so: four small compilations (2 and 4 layers, 8 and 16 rows) predict the
batch; the whole model is then compiled at it, and the batch moves until it compiles and fits and
one more step of rows would not, at the rows' own bytes, or half-way to a batch that the compiler
refused (`refused_batch`) is no step more. A cell that was only predicted says so (`compiled` 0). A
T4 has no bfloat16 units: its 16 bits are float16. NVIDIA cards are compiled for by another Python,
--gpu-python, whose environment `make test-gpu-targets` makes. Also the bytes of the states alone,
everything counted, as shares of 16-bit ones, and the ratio of whole memory in the setting of
SQuat's paper (Llama-2-7B, prompt 160, output 338; arXiv 2503.24358 states 2.17 to 2.82 times), of
the whole model at two batches.

Command: python experiments/kv_capacity.py --out experiments/results/kv_capacity/cpu.json
Hardware: any CPU, 8 GB of memory; libtpu for v5e, the jax CUDA wheels for T4 and H100
Minutes: 180 on 2 idle cores, reckoned; goes on where it was stopped (`--whole` alone predicts
  only). The committed table is `--stored`, of what 40 minutes of one busy core had compiled
Expected: capacity_ratio 5.2 (v5e:2x4, Llama-3.1-8B, 16k; wanted: 4.6), kv_bytes_fraction_4k 0.201
  (wanted: at most 0.204), paper_setting 1.6 at 32 rows and 2.3 at 128
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from experiments._harness import ROOT, Resumable, run, sources, versions
from experiments.fit_table import CARDS, GPU_FLAGS, GPU_PYTHON
from jaxlm.cache.parse import parse_cache
from jaxlm.core.errors import DeviceError
from jaxlm.core.targets import target as open_target
from jaxlm.core.tree import nbytes
from jaxlm.eval.fit import RESERVE, fit
from jaxlm.models.config import AttentionSpec, Rope
from jaxlm.models.lm import LM
from jaxlm.models.presets import preset

TARGETS = ("v5e:2x4", "v5e:1x1", "h100", "t4")
MODELS = ("llama-3.1-8b", "llama-3.2-3b", "qwen2.5-1.5b")
KINDS = {"bf16": "dense", "2-bit": "squat2", "4-bit": "squat4", "int8": "kivi8",
         "2-bit, 8-bit scales": "squat2:scales=int8"}
WHOLE = ("v5e:2x4,llama-3.1-8b,bf16", "v5e:2x4,llama-3.1-8b,2-bit",
         *(f"{card},{model},bf16" for card in ("h100", "t4") for model in MODELS))
CONTEXT = 16384
LAYERS, ROWS = (2, 4), (8, 16)  # of the small compilations
PAPER = ("h100", "llama-2-7b", 498, (32, 128))  # prompt 160 and output 338


class Stored(Resumable):
    """Finished compilations alone: a cell that needs another is left out."""

    def __call__(self, key: str, compute: Callable[[], Any]) -> Any:
        """The stored value. Raises: DeviceError where there is none."""
        if key not in self.parts:
            raise DeviceError(f"not compiled: {key}")
        return super().__call__(key, compute)


def compiled(model: str, target: str, context: int, cache: str, rows: int,
             layers: int | None = None) -> dict[str, Any]:
    """The compiler's memory for one program, in bytes a device."""
    config = preset(model)
    config = config if layers is None else config.replace(
        num_layers=layers, windows=config.windows[:layers])
    found = fit(config, "decode", target, batch=rows, context=context, cache=parse_cache(cache),
                dtype=sixteen(target))
    return {"total": found.program.total, "temporaries": found.program.temporaries,
            "refused": found.program.refused, "step": found.mesh["data"],
            "cache": found.cache_bytes}


def sixteen(target: str) -> Any:
    """A chip's type of 16 bits."""
    return jnp.float16 if target.startswith("t4") else jnp.bfloat16


def least(model: str, target: str, context: int, cache: str) -> int:
    """Bytes of the weights and of one row's caches: what all devices hold together at the least."""
    config, dtype = preset(model), sixteen(target)
    one = lambda layer: parse_cache(cache).init(config.attention(layer), 1, context, dtype)
    row = jax.eval_shape(lambda: [one(layer) for layer in range(config.num_layers)])
    return nbytes(LM(config).shapes(dtype)) + nbytes(row)


def predicted(corners: dict[tuple[int, int], dict], layers: int, rows: float) -> float:
    """Bytes at (layers, rows): arguments as the bilinear function through the corners, and
    temporaries from the largest corner on, no slope below 0."""
    (few, many), (low, high) = LAYERS, ROWS
    held = {at: corner["total"] - corner["temporaries"] for at, corner in corners.items()}
    loose = {at: corner["temporaries"] for at, corner in corners.items()}
    at = lambda n: held[n, low] + (held[n, high] - held[n, low]) / (high - low) * (rows - low)
    arguments = at(few) + (at(many) - at(few)) / (many - few) * (layers - few)
    by_row = max(loose[many, high] - loose[many, low], 0) / (high - low)
    by_layer = max(loose[many, high] - loose[few, high], 0) / (many - few)
    extra = loose[many, high] + by_row * (rows - high) + by_layer * (layers - many)
    return arguments + max(extra, 0.0)


def largest(model: str, target: str, context: int, cache: str, whole: bool,
            kept: Resumable) -> dict[str, Any]:
    """The largest batch that fits: predicted, and where asked for proved by the whole model."""
    chip = open_target(target)
    usable, held = int((1 - RESERVE) * chip.bytes_per_device), least(model, target, context, cache)
    if held > usable * len(chip.devices):  # no need to compile anything
        return {"usable": usable, "compiled": 0, "batch": 0, "bytes": held // len(chip.devices)}
    look = lambda rows, layers=None: kept(
        f"{target} {model} {context} {cache} {rows} rows {layers or 'all'} layers",
        partial(compiled, model, target, context, cache, rows, layers))
    corners = {(n, rows): look(rows, n) for n in LAYERS for rows in ROWS}
    layers, step = preset(model).num_layers, corners[LAYERS[0], ROWS[0]]["step"]
    memory = partial(predicted, corners, layers)
    row = memory(1) - memory(0)
    floor = lambda rows: max(int(rows // step) * step, 0)
    batch = floor((usable - memory(0)) / row)
    cell = {"usable": usable, "bytes_a_row": int(row), "predicted": batch, "compiled": 0}
    if batch < step or not whole:
        return cell | {"batch": batch, "bytes": int(memory(batch))}
    fits, refused, compilations = 0, None, 0  # batches known to fit, and not to
    while batch > fits:
        found, compilations = look(batch), compilations + 1
        over = found["total"] - usable
        if found["refused"] or over > 0:  # a refusal tells little of how much was missing
            refused = batch
            less = floor(0.97 * batch) if found["refused"] else floor(batch - over / row)
            batch = max(min(less, batch - step), fits)
            continue
        fits, cell = batch, cell | {
            "batch": batch, "bytes": found["total"], "temporaries": found["temporaries"],
            "cache_bytes": found["cache"], "refused_batch": refused}
        more = floor(batch - over / row)  # what the rows' own bytes leave room for
        batch = more if refused is None else min(more, floor((fits + refused) / 2))
    return {"batch": 0, "bytes": int(memory(0))} | cell | {"compiled": compilations}


def fraction(cache: str, slots: int, head_dim: int = 128) -> float:
    """Bytes of one layer's state over those of 16-bit keys and values for the same tokens."""
    spec = AttentionSpec(32, 8, head_dim, 1.0, Rope())
    size = lambda name: nbytes(jax.eval_shape(
        lambda: parse_cache(name).init(spec, 1, slots, jnp.bfloat16)))
    return size(cache) / size("dense")


def paper_ratios(kept: Resumable) -> list[dict[str, Any]]:
    """Whole memory with 16-bit caches over that with 2-bit ones, in the paper's setting."""
    target, model, context, batches = PAPER
    memory = lambda cache, rows: kept(
        f"{target} {model} {context} {cache} {rows} rows all layers",
        partial(compiled, model, target, context, cache, rows))["total"]
    held = [(rows, memory("dense", rows), memory("squat2", rows)) for rows in batches]
    return [{"rows": rows, "bf16_bytes": full, "2-bit_bytes": less, "ratio": full / less}
            for rows, full, less in held]


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
    kept = (Stored if args.stored else Resumable)(Path(args.parts), {
        "layers": LAYERS, "rows": ROWS, "versions": versions(),
        "sources": sources(ROOT / "jaxlm" / "eval" / "fit.py")})  # of what is compiled
    by_another = another_python(args.gpu_python)
    rows += table(args, kept, [t for t in args.targets if not (by_another and is_card(t))])
    if by_another:
        cards = of_cards(args)
        rows += cards["rows"]
        metrics |= {name: found for name, found in cards.items() if name.startswith("paper_")}
    else:
        try:
            metrics["paper_setting"] = paper_ratios(kept)
        except DeviceError as error:
            metrics["paper_setting_left_out"] = str(error)
    batches = {cell["kind"]: cell.get("batch", 0) for cell in rows if
               (cell["target"], cell["model"], cell["context"]) == (TARGETS[0], MODELS[0], 16384)}
    for name, metric in (("2-bit", "capacity_ratio"),
                         ("2-bit, 8-bit scales", "capacity_ratio_8bit_scales")):
        if batches.get("bf16") and batches.get(name):
            metrics[metric] = batches[name] / batches["bf16"]
    return metrics


def table(args: argparse.Namespace, kept: Resumable, targets: list[str]) -> list[dict[str, Any]]:
    """The chosen cells of some targets."""
    rows = []
    cells = [(t, m, c, n) for t in targets for m in args.models for c in args.contexts
             for n in args.kinds]
    for target, model, context, name in cells:
        cell = {"target": target, "model": model, "context": context, "kind": name}
        whole = any(",".join(part) in args.whole for part in (
            (target,), (target, model), (target, model, name)))
        try:
            cell |= largest(model, target, context, KINDS[name], whole, kept)
        except DeviceError as error:
            cell |= {"left_out": str(error)}
        rows.append(cell)
        print(cell, flush=True)
    return rows


def is_card(target: str) -> bool:
    """Whether a target is an NVIDIA card."""
    return target.split(":")[0] in CARDS


def another_python(gpu_python: Path) -> bool:
    """Whether the Python of the cards is there, and is not this one."""
    return gpu_python.exists() and not gpu_python.parent.parent.samefile(sys.prefix)


def of_cards(args: argparse.Namespace) -> dict[str, Any]:
    """The metrics of this script for the cards among the targets, run by their Python."""
    chosen = {"targets": filter(is_card, args.targets), "models": args.models,
              "contexts": args.contexts, "kinds": args.kinds, "whole": args.whole,
              "parts": [Path(args.parts).with_suffix(".cards.cells")]}
    flags = [str(text) for name, values in chosen.items() for text in (f"--{name}", *values)]
    flags += ["--stored"] if args.stored else []
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", **GPU_FLAGS}
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch, "cards.json")
        subprocess.run([str(args.gpu_python), __file__, *flags, "--out", str(out)],
                       env=environment, check=True)
        return json.loads(out.read_text())["metrics"]


def arguments(parser: argparse.ArgumentParser) -> None:
    """Parts of the table."""
    parser.add_argument("--targets", nargs="*", default=list(TARGETS))
    parser.add_argument("--models", nargs="+", default=list(MODELS))
    parser.add_argument("--contexts", nargs="+", type=int, default=[CONTEXT])
    parser.add_argument("--kinds", nargs="+", default=list(KINDS)[:4], choices=list(KINDS))
    parser.add_argument("--whole", nargs="*", default=list(WHOLE),
                        help="what the whole model proves: TARGET, or with ,MODEL or ,MODEL,KIND")
    parser.add_argument("--parts", default="kv_capacity.cells", help="finished compilations")
    parser.add_argument("--stored", action="store_true",
                        help="compile nothing: cells that lack a compilation are left out")
    parser.add_argument("--gpu-python", type=Path, default=GPU_PYTHON)


if __name__ == "__main__":
    run(__file__, __doc__, measure, arguments)
