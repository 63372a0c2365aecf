"""Compile a program ahead of time and read off what it would take to run it."""

import re
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxlm.core.count import Count, count
from jaxlm.core.hlo import collective_bytes

KERNEL = re.compile(r'custom_call_target="(tpu_custom_call|__gpu\$xla\.gpu\.triton)"')


@dataclass(frozen=True)
class Program:
    """What one compiled program takes, a device; bytes unless said.

    A loop counts by its trips, where the program knows them: a decode loop is one step.
    `refused` is the compiler's own message when it found that the program does not fit.
    `kernels`: Pallas kernels in it. It and `collective_bytes` are None where the program that the
    compiler made can be read neither by this jax nor from the dump that libtpu writes.
    `flops_source`: "compiler", whose estimate of `flops` and `bytes_accessed` counts a loop's body
    once, times what the trips add to the traced program's products; or "before optimisation",
    those products shared evenly by the devices, where the compiler gives no estimate: for a GPU
    that is not here, and for what it refused.
    """

    arguments: int
    outputs: int
    reused: int
    temporaries: int
    flops: float
    bytes_accessed: float
    collective_bytes: int | None
    compile_seconds: float
    refused: str | None = None
    kernels: int | None = None
    flops_source: str = "compiler"

    @property
    def total(self) -> int:
        """Memory in use at once: arguments, outputs that reuse none of them, temporaries."""
        return self.arguments + self.outputs - self.reused + self.temporaries


def compile_program(jitted: Any, *args: Any, **kwargs: Any) -> Program:
    """Lower and compile; arguments may be `jax.ShapeDtypeStruct`s with shardings.

    A program that the compiler itself finds too large for the chip gives a Program whose
    `refused` says so and whose arguments are computed from the shapes.
    """
    start = time.perf_counter()
    traced = jitted.trace(*args, **kwargs)
    platform, devices = _where((args, kwargs))
    products = count(traced.jaxpr, platform)
    lowered = traced.lower()
    with tempfile.TemporaryDirectory() as dump:
        options = {"xla_dump_to": dump} if platform == "tpu" else None
        try:
            compiled = lowered.compile(compiler_options=options)
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error) and "out of memory" not in str(error):
                raise
            seconds = time.perf_counter() - start
            message = " ".join(str(error).split())
            held = argument_bytes((args, kwargs))
            return Program(held, 0, 0, _needed(message, held), products.flops / devices,
                           products.moved / devices, None, seconds, message[:300],
                           flops_source="before optimisation")
        seconds = time.perf_counter() - start
        text = _text(compiled, Path(dump))
    memory = compiled.memory_analysis()
    cost = compiled.cost_analysis() or {}
    cost = cost[0] if isinstance(cost, list) else cost
    flops, moved, source = _work(cost, products, devices)
    return Program(
        memory.argument_size_in_bytes, memory.output_size_in_bytes, memory.alias_size_in_bytes,
        memory.temp_size_in_bytes, flops, moved,
        None if text is None else collective_bytes(text), seconds,
        kernels=None if text is None else len(KERNEL.findall(text)), flops_source=source,
    )


def _work(cost: dict[str, float], products: Count, devices: int) -> tuple[float, float, str]:
    """FLOPs and bytes moved of a device, and who says so."""
    if not cost.get("flops"):
        return products.flops / devices, products.moved / devices, "before optimisation"
    more = lambda full, once: full / once if once else 1.0
    return (cost["flops"] * more(products.flops, products.flops_once),
            cost.get("bytes accessed", 0.0) * more(products.moved, products.moved_once), "compiler")


def _where(tree: Any) -> tuple[str, int]:
    """The platform that arguments are placed on, and how many devices share the work."""
    for leaf in jax.tree.leaves(tree):
        if (sharding := getattr(leaf, "sharding", None)) is not None:
            devices = sharding.device_set
            platform = next(iter(devices)).platform
            return {"gpu": "cuda"}.get(platform, platform), len(devices)
    return jax.default_backend(), 1


def _text(compiled: Any, dump: Path) -> str | None:
    """The program as it is compiled; by libtpu's own dump, where jaxlib cannot read it."""
    try:
        return compiled.as_text()
    except jax.errors.JaxRuntimeError:  # libtpu writes operations that jaxlib cannot read back
        found = sorted(dump.glob("*.after_codegen.txt"))
        return found[-1].read_text() if found else None


def argument_bytes(tree: Any) -> int:
    """Bytes of a tree of sharded shapes on the device that holds most."""
    total = 0
    for leaf in jax.tree.leaves(tree):
        if isinstance(leaf, jax.ShapeDtypeStruct):
            shape = leaf.shape if leaf.sharding is None else leaf.sharding.shard_shape(leaf.shape)
            total += int(np.prod(shape, dtype=np.int64)) * leaf.dtype.itemsize
    return total


def _needed(message: str, held: int) -> int:
    """What the compiler says it would use beyond the arguments, where it says so.

    >>> _needed("Ran out of memory in memory space hbm. Used 3.00G of 1.00G hbm.", 2**31) == 2**30
    True
    >>> _needed("total memory required for HLO temporaries (3.00G) exceeds (1.00G)", 2**31) == 2**30
    True
    """
    found = re.search(r"[Uu]sed ([\d.]+)([KMGT]) of|\(([\d.]+)([KMGT])\) exceeds", message)
    if not found:
        return 0
    size, unit = found.group(1) or found.group(3), found.group(2) or found.group(4)
    return max(int(float(size) * 2 ** (10 * ("KMGT".index(unit) + 1))) - held, 0)
