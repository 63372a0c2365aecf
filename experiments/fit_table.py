"""Presets x jobs x caches x chips: what a device would hold, and whether it fits.

Each cell is one `jaxlm fit` in a process of its own: the chip's real compiler, without the chip.
Finished cells are kept beside --out, as .cells, until none has failed: a run that was stopped goes
on, and what failed is tried again. NVIDIA cards are compiled for by another Python, --gpu-python,
whose environment `make test-gpu-targets` makes; where it is absent the cells say so.

Command: python experiments/fit_table.py --out experiments/results/fit_table/cpu.json
Hardware: a CPU; libtpu for TPUs, the CUDA compiler (jax[cuda13]) for NVIDIA cards
Minutes: 60 on one busy core, 42 of them processor time, for all 70 cells; --models, --targets,
  --jobs and --caches choose
Expected: failed 0, fit 54; compile_s_max, the longest compile, with the machine's load beside each
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from experiments import _harness

DOCS = _harness.ROOT / "docs" / "fit.md"
BEGIN, END = "<!-- table: experiments/fit_table.py -->", "<!-- end of table -->"
GPU_PYTHON = _harness.ROOT / ".venv-gpu" / "bin" / "python"
GPU_FLAGS = {"JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1", "XLA_FLAGS":
             "--xla_gpu_autotune_level=0 --xla_gpu_enable_triton_gemm=false"}
CARDS = ("h100", "h200", "a100", "a100-80g", "t4")
SIZES = {"decode": (8, 8192), "prefill": (4, 2048), "train": (8, 2048)}  # rows, tokens a row
CACHES = {"decode": ("dense", "squat8", "squat2"), "prefill": ("dense",), "train": ("dense",)}
MODELS = ("qwen2.5-1.5b", "llama-3.1-8b")
TARGETS = ("v5e:1x1", "v5e:2x2", "v5p:2x2x1", "v6e:1x1", "h100", "a100", "t4")
LIMIT_S = 1200
TINY = {"model_type": "llama", "vocab_size": 512, "hidden_size": 256, "intermediate_size": 512,
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 128,
        "max_position_embeddings": 8192, "rms_norm_eps": 1e-5, "rope_theta": 1e4}
Cell = tuple[str, str, str, str]


class NotCompiled(Exception):
    """A cell without a result: its compiler is not here, or it failed."""


def arguments(parser: argparse.ArgumentParser) -> None:
    """The script's own arguments."""
    parser.add_argument("--models", nargs="+", default=MODELS)
    parser.add_argument("--targets", nargs="+", default=TARGETS)
    parser.add_argument("--jobs", nargs="+", default=tuple(SIZES), choices=tuple(SIZES))
    parser.add_argument("--caches", nargs="+", help="default: some for each job")
    parser.add_argument("--gpu-python", type=Path, default=GPU_PYTHON)
    parser.add_argument("--docs", action="store_true",
                        help="only write the committed result's table into docs/fit.md")


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Every chosen cell, compiled now or found from before."""
    if args.docs:
        DOCS.write_text(rewritten(DOCS.read_text(), _harness.RESULTS / "fit_table" / "cpu.json"))
        raise SystemExit(0)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch, "two-layers")
        if args.smoke:
            folder.mkdir()
            (folder / "config.json").write_text(json.dumps(TINY))
            args.models, args.targets, args.jobs = [str(folder)], ["v5e:1x1"], ["decode"]
            args.caches = args.caches or ["squat2"]
        kept = args.out or Path(scratch, "x")
        parts = _harness.Resumable(kept.with_suffix(".cells"), compilers())
        metrics = summary(all_cells(args, parts))
        if not metrics["failed"]:
            parts.done()
    return metrics


def compilers() -> dict[str, str]:
    """What a stored cell depends on."""
    from jaxlm.core.device import versions

    return {name: version for name, version in versions().items()
            if name in ("jax", "jaxlib", "libtpu")}


def all_cells(args: argparse.Namespace, parts: _harness.Resumable) -> dict[str, Any]:
    """`name of the cell -> what it takes`, or why there is nothing."""
    cells = [(model, job, cache, target) for target in args.targets for model in args.models
             for job in args.jobs for cache in args.caches or CACHES[job]]
    found = {}
    for cell in cells:
        name = " ".join((Path(cell[0]).name, *cell[1:]))
        try:
            found[name] = parts(name, lambda cell=cell: compile_cell(cell, args.gpu_python))
        except NotCompiled as error:
            found[name] = {"not_compiled": str(error)}
        print(f"{name}: {found[name]}", file=sys.stderr, flush=True)
    return found


def compile_cell(cell: Cell, gpu_python: Path) -> dict[str, Any]:
    """`jaxlm fit` of a cell."""
    model, job, cache, target = cell
    card = target.split(":")[0] in CARDS
    if card and not gpu_python.exists():
        raise NotCompiled("no CUDA compiler here: make test-gpu-targets installs it")
    batch, context = SIZES[job]
    dtype = "float16" if target.startswith("t4") else "bfloat16"  # a T4 has no bfloat16
    options = {"model": model, "target": target, "job": job, "cache": cache, "batch": batch,
               "context": context, "dtype": dtype}
    return asked(str(gpu_python if card else sys.executable), options, card) | {"dtype": dtype}


def asked(python: str, options: dict[str, Any], card: bool = False) -> dict[str, Any]:
    """One `jaxlm fit`, its processor time, and the load of the machine when it began."""
    flags = [text for name, value in options.items() for text in (f"--{name}", str(value))]
    command = [python, "-m", "jaxlm", "fit", *flags, "--json"]
    environment = {**os.environ, "PYTHONPATH": str(_harness.ROOT), "JAX_PLATFORMS": "cpu",
                   "JAX_ENABLE_COMPILATION_CACHE": "false", **(GPU_FLAGS if card else {})}
    load, before = os.getloadavg()[0], cpu_seconds()
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True,
                              timeout=LIMIT_S)
    except subprocess.TimeoutExpired:
        raise NotCompiled(f"no end after {LIMIT_S} s") from None
    if done.returncode:
        raise NotCompiled((done.stderr.strip().splitlines() or ["no message"])[-1][-300:])
    return json.loads(done.stdout) | {"load": round(load, 1),
                                      "cpu_seconds": cpu_seconds() - before}


def cpu_seconds() -> float:
    """Processor time of the processes that this one started and that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def summary(cells: dict[str, Any]) -> dict[str, Any]:
    """The cells, and what they come to."""
    done = [cell for cell in cells.values() if "total_bytes" in cell]
    absent = [cell for cell in cells.values() if "no CUDA" in cell.get("not_compiled", "")
              or "pip install libtpu" in cell.get("not_compiled", "")]
    return {
        "sizes": {job: {"batch": rows, "context": tokens} for job, (rows, tokens) in SIZES.items()},
        "compiled": len(done), "fit": sum(cell["fits"] for cell in done),
        "without_compiler": len(absent), "failed": len(cells) - len(done) - len(absent),
        "compile_s_max": max((cell["compile_seconds"] for cell in done), default=0.0),
        "cells": cells,
    }


def overview(metrics: dict[str, Any]) -> str:
    """What fits, a column a chip; then, of each model, the chips that it fits for no job here."""
    compiled = {tuple(name.split()): cell for name, cell in metrics["cells"].items()
                if "total_bytes" in cell}
    memory = {name[3]: cell["device_bytes"] for name, cell in compiled.items()}
    head = ["model", "job", "cache", *(f"{chip} ({memory[chip] / 2**30:.1f})" for chip in memory)]
    lines = [head, ["---"] * len(head)]
    for job in dict.fromkeys(name[:3] for name in compiled):
        lines.append([*job, *(share(compiled.get((*job, chip))) for chip in memory)])
    said = []
    for model in dict.fromkeys(name[0] for name in compiled):
        here = {name: cell for name, cell in compiled.items() if name[0] == model}
        fit = {name[3] for name, cell in here.items() if cell["fits"]}
        none = " or ".join(dict.fromkeys(
            f"**{name[3]}** ({memory[name[3]] / 2**30:.1f} GiB)" for name in here
            if name[3] not in fit))
        weights = [cell["parameter_bytes_all"] for name, cell in here.items() if name[1] != "train"]
        said.append(f"- {model}: " + (
            f"weights of 16 bits alone are {weights[0] / 2**30:.1f} GiB. " if weights else "") + (
            f"No job here fits {none}." if none else "Every chip here fits some job."))
    return "\n".join(["| " + " | ".join(line) + " |" for line in lines] + ["", *said])


def share(cell: dict[str, Any] | None) -> str:
    """GiB that a device holds, and the share of its memory.

    >>> share({"total_bytes": 2**30, "device_bytes": 2**34, "fits": True})
    '1.0 (6%)'
    >>> share({"total_bytes": 2**35, "device_bytes": 2**34, "fits": False})
    '**no**: 32.0 (200%)'
    """
    if cell is None:
        return ""
    part = cell["total_bytes"] / cell["device_bytes"]
    return ("" if cell["fits"] else "**no**: ") + f"{cell['total_bytes'] / 2**30:.1f} ({part:.0%})"


def table(metrics: dict[str, Any]) -> str:
    """One line a cell; bytes and FLOPs are those of one device and one step."""
    lines = ["| model | job | cache | chip | a device holds | fits | GFLOPs | moves | compile | "
             "processor | load |", "|---|---|---|---|---|---|---|---|---|---|---|"]
    for name, cell in metrics["cells"].items():
        start = "| " + " | ".join(name.split()) + " | "
        if "not_compiled" in cell:
            lines.append(start + f"{cell['not_compiled']} | | | | | | |")
            continue
        gib = lambda name, cell=cell: f"{cell[name] / 2**30:.1f}"
        fits = "yes" if cell["fits"] else "**no**"
        mark = "" if cell["flops_source"] == "compiler" else "*"  # counted before optimisation
        work = [f"{cell['flops'] / 1e9:.0f}{mark}", f"{gib('bytes_accessed')}{mark} GiB"]
        lines.append(start + " | ".join([
            f"{gib('total_bytes')} of {gib('device_bytes')} GiB", fits, *work,
            f"{cell['compile_seconds']:.0f} s", f"{cell['cpu_seconds']:.0f} s",
            f"{cell['load']:.0f}"]) + " |")
    return "\n".join(lines)


def rewritten(page: str, result: Path) -> str:
    """The page with the table of a result between its two marks."""
    if page.count(BEGIN) != 1 or page.count(END) != 1:
        raise ValueError(f"the page needs {BEGIN!r} and {END!r} once each")
    made = "No result is committed yet: run the command above."
    if result.exists():
        metrics = json.loads(result.read_text())["metrics"]
        made = f"{overview(metrics)}\n\n{table(metrics)}"
    before, rest = page.split(BEGIN)
    return f"{before}{BEGIN}\n{made}\n{END}{rest.split(END)[1]}"


if __name__ == "__main__":
    _harness.run(__file__, __doc__, measure, arguments)
