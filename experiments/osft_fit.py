"""OSFT of large Llamas on slices of 8 to 512 chips: what a device would hold, and would send.

Each row is one `jaxlm fit --job osft` in a process of its own: the chip's real compiler, without
the chip. As many rows of 1,024 tokens as there are chips, half of the singular directions free,
AdamW with clipping, bfloat16 weights and compute, float32 bases, changes and moments. Finished rows
are kept beside --out, as .cells: a run that was stopped goes on. `commit` of a row is that which it
was compiled from.

Command: python experiments/osft_fit.py --out experiments/results/osft_fit/cpu.json
Hardware: a CPU, with libtpu
Minutes: 20 on 2 cores
Expected: failed 0; the form update of Llama-3.1-8B fits v5e:4x4 and more, that of 70B v5p:4x4x4
"""

import argparse
import json
import math
import sys
import tempfile
from pathlib import Path
from typing import Any

from experiments import _harness
from experiments.fit_table import TINY, NotCompiled, asked, compilers

CONTEXT = 1024
SLICES = ("v5e:2x4", "v5e:4x4", "v5e:4x8", "v5e:8x8", "v5e:8x16", "v5e:16x16", "v5p:8x8x8")
ROWS = [("llama-3.1-8b", "update", name) for name in SLICES] + [
    ("llama-3.1-8b", "coordinates", "v5e:4x4"), ("llama-3.1-70b", "update", "v5p:4x4x4")]
KEPT = ("fits", "device_bytes", "total_bytes", "argument_bytes", "temporary_bytes", "flops",
        "collective_bytes", "compile_seconds", "mesh", "refused", "cpu_seconds", "load")


def chips(target: str) -> int:
    """How many chips a slice has.

    >>> chips("v5e:4x8")
    32
    """
    return math.prod(int(size) for size in target.partition(":")[2].split("x"))


def row(model: str, form: str, target: str) -> dict[str, Any]:
    """What `jaxlm fit` says of a slice, as many rows as chips."""
    found = asked(sys.executable, {"model": model, "target": target, "job": "osft", "form": form,
                                   "batch": chips(target), "context": CONTEXT})
    kept = {name: found.get(name) for name in KEPT}
    return kept | {"commit": _harness.origin(Path(__file__))["commit"]}


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Every row, compiled now or found from before."""
    rows, found = ROWS, {}
    with tempfile.TemporaryDirectory() as scratch:
        if args.smoke:
            Path(scratch, "config.json").write_text(json.dumps(TINY))
            rows = [(scratch, "update", "v5e:2x2")]
        kept = args.out or Path(scratch, "x")
        parts = _harness.Resumable(kept.with_suffix(".cells"), compilers())
        for one in rows:
            name = " ".join((Path(one[0]).name, *one[1:]))
            try:
                found[name] = parts(name, lambda one=one: row(*one)) | {"chips": chips(one[2])}
            except NotCompiled as error:
                found[name] = {"not_compiled": str(error)}
            print(f"{name}: {found[name]}", file=sys.stderr, flush=True)
        failed = sum("not_compiled" in cell for cell in found.values())
        if not failed:
            parts.done()
    return {"rows": found, "context": CONTEXT, "failed": failed,
            "fit": sum(bool(cell.get("fits")) for cell in found.values())}


def table(metrics: dict[str, Any]) -> list[list[str]]:
    """For docs/fit.md: a line a slice; bytes are those of one device."""
    gib = lambda value: "" if value is None else f"{value / 2**30:.1f}"
    cells = [["model", "form", "slice", "chips", "fsdp x tensor", "arguments", "temporaries",
              "of", "fits", "collectives a step"], ["---"] * 10]
    for name, one in metrics["rows"].items():
        if "not_compiled" not in one:
            cells.append([*name.split(), str(one["chips"]),
                          "{fsdp} x {tensor}".format(**one["mesh"]), gib(one["argument_bytes"]),
                          "" if one["refused"] else gib(one["temporary_bytes"]),
                          f"{gib(one['device_bytes'])} GiB",
                          "yes" if one["fits"] else "**no**", gib(one["collective_bytes"])])
    return cells


if __name__ == "__main__":
    _harness.run(__file__, __doc__, measure)
