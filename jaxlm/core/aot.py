"""Compile a program ahead of time and read off what it would take to run it."""

import re
import time
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

COLLECTIVE = re.compile(
    r"= (\(?[^=]*?\)?) (all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute)"
    r"(-start)?\("
)
KERNEL = re.compile(r'custom_call_target="(tpu_custom_call|__gpu\$xla\.gpu\.triton)"')
SHAPE = re.compile(r"\b([a-z]+\d+)\[([\d,]*)\]")
BITS = {"pred": 8, "s8": 8, "u8": 8, "s32": 32, "u32": 32, "s64": 64, "u64": 64, "s16": 16,
        "u16": 16, "f32": 32, "f16": 16, "bf16": 16, "f64": 64, "s4": 4, "u4": 4}


@dataclass(frozen=True)
class Program:
    """What one compiled program takes, a device; bytes unless said. A loop's body counts once.

    `refused` is the compiler's own message when it found that the program does not fit.
    `kernels`: Pallas kernels in it. It and `collective_bytes` are None where this jax cannot print
    the program that the compiler made. `flops` and `bytes_accessed` are None where the compiler
    gives no estimate: for a GPU that is not here, and for what it refused.
    """

    arguments: int
    outputs: int
    reused: int
    temporaries: int
    flops: float | None
    bytes_accessed: float | None
    collective_bytes: int | None
    compile_seconds: float
    refused: str | None = None
    kernels: int | None = None

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
    lowered = jitted.lower(*args, **kwargs)
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error) and "out of memory" not in str(error):
            raise
        seconds = time.perf_counter() - start
        message = " ".join(str(error).split())
        held = argument_bytes((args, kwargs))
        return Program(held, 0, 0, _needed(message, held), None, None, None, seconds,
                       message[:300])
    seconds = time.perf_counter() - start
    memory = compiled.memory_analysis()
    cost = compiled.cost_analysis() or {}
    cost = cost[0] if isinstance(cost, list) else cost
    text = _text(compiled)
    return Program(
        memory.argument_size_in_bytes, memory.output_size_in_bytes, memory.alias_size_in_bytes,
        memory.temp_size_in_bytes, cost.get("flops"), cost.get("bytes accessed"),
        None if text is None else collective_bytes(text), seconds,
        kernels=None if text is None else len(KERNEL.findall(text)),
    )


def _text(compiled: Any) -> str | None:
    try:
        return compiled.as_text()
    except jax.errors.JaxRuntimeError:  # libtpu writes operations that jaxlib cannot read back
        return None


def collective_bytes(hlo: str) -> int:
    """Bytes that collectives of a compiled module produce, each counted where it is written.

    >>> collective_bytes("x = f32[4,8]{1,0} all-reduce(y), replica_groups={}")
    128
    """
    total = 0
    for match in COLLECTIVE.finditer(hlo):
        for kind, dims in SHAPE.findall(match.group(1)):
            count = int(np.prod([int(d) for d in dims.split(",") if d], dtype=np.int64))
            total += count * BITS.get(kind, 32) // 8
    return total


def argument_bytes(tree: Any) -> int:
    """Bytes of a tree of sharded shapes on the device that holds most."""
    total = 0
    for leaf in jax.tree.leaves(tree):
        if isinstance(leaf, jax.ShapeDtypeStruct):
            shape = leaf.shape if leaf.sharding is None else leaf.sharding.shard_shape(leaf.shape)
            total += int(np.prod(shape, dtype=np.int64)) * leaf.dtype.itemsize
    return total


def _needed(message: str, held: int) -> int:
    """What the compiler says it would use beyond the arguments, where it says so."""
    found = re.search(r"[Uu]sed ([\d.]+)([KMG]) of", message)
    if not found:
        return 0
    used = float(found.group(1)) * {"K": 2**10, "M": 2**20, "G": 2**30}[found.group(2)]
    return max(int(used) - held, 0)
