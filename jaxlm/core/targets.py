"""Chips that one may not own, and how to compile for them: real compilers, no hardware."""

import importlib.util
import os
import re
from dataclasses import dataclass
from typing import Any

from jaxlm.core.device import visible_accelerators
from jaxlm.core.errors import DeviceError

GIB = 2**30
# Memory of one device in bytes, from the vendor's public pages; a runtime keeps some for itself.
# A chip of tpu7x is two devices, each with half of its 192 GiB.
TPU_BYTES = {"v4": 32 * GIB, "v5e": 16 * GIB, "v5p": 95 * GIB, "v6e": 32 * GIB, "tpu7x": 96 * GIB}


@dataclass(frozen=True)
class Card:
    """One NVIDIA card as the compiler wants it described, from its public data sheet."""

    title: str
    memory_bytes: int
    bandwidth: int  # bytes a second
    cores: int
    lanes: int
    compute: tuple[int, int]
    shared_core: int
    shared_block: int
    l2: int
    threads_core: int = 2048
    clock_ghz: float = 1.98


CARDS = {
    "h100": Card("NVIDIA H100 80GB HBM3", 84978434048, 3352320000000, 132, 128, (9, 0),
                 233472, 232448, 52428800),
    "h200": Card("NVIDIA H200", 150754820096, 4800000000000, 132, 128, (9, 0),
                 233472, 232448, 52428800),
    "a100": Card("NVIDIA A100-SXM4-40GB", 42298834944, 1555200000000, 108, 64, (8, 0),
                 167936, 166912, 41943040, clock_ghz=1.41),
    "a100-80g": Card("NVIDIA A100-SXM4-80GB", 85100068864, 2039040000000, 108, 64, (8, 0),
                     167936, 166912, 41943040, clock_ghz=1.41),
    "t4": Card("NVIDIA Tesla T4", 15843721216, 320064000000, 40, 64, (7, 5),
               65536, 65536, 4194304, threads_core=1024),
}


@dataclass(frozen=True)
class Target:
    """A named slice: its compile-only devices and the memory of each."""

    name: str
    devices: tuple[Any, ...]
    bytes_per_device: int


def target(name: str) -> Target:
    """`v5e:2x2`, `v5p:2x2x1`, `v6e:1x1`, `v4:2x2x1`; `h100`, `h200`, `a100` (40 GB),
    `a100-80g`, `t4`, or `h100:8`.

    Raises: DeviceError for an unknown name, or when the compiler for it is not installed.
    """
    kind, _, shape = name.lower().partition(":")
    if kind in TPU_BYTES:
        return _tpu(name, kind, shape or "1x1")
    if kind in CARDS:
        return _gpu(name, CARDS[kind], shape or "1")
    raise DeviceError(
        f"target {name!r} is unknown; expected one of {sorted(TPU_BYTES)} with a shape such as "
        f"v5e:2x2, or one of {sorted(CARDS)} with an optional count such as h100:8"
    )


def target_like(device_kind: str) -> str | None:
    """The target that is one chip of the kind that jax calls `device_kind`; None where none is.

    >>> [target_like(kind) for kind in ("TPU v5 lite", "TPU v5", "NVIDIA H100 80GB HBM3", "cpu")]
    ['v5e:1x1', 'v5p:1x1', 'h100', None]
    """
    kind = re.sub(r"(v\d) lite", r"\1e", device_kind.lower())
    kind = re.sub(r"v5$", "v5p", kind)
    for name, card in CARDS.items():  # "A100" alone is the card of 40 GB
        if card.title.lower() == kind:
            return name
    for name in (*TPU_BYTES, *CARDS):
        if re.search(rf"\b{name}\b", kind):
            return name if name in CARDS else f"{name}:1x1"
    return None


def _tpu(name: str, kind: str, shape: str) -> Target:
    if not re.fullmatch(r"\d+(x\d+){1,2}", shape):
        raise DeviceError(f"target {name!r}: shape {shape!r}; expected such as 2x2 or 2x2x1")
    if importlib.util.find_spec("libtpu") is None:
        raise DeviceError(f"target {name!r} needs the TPU compiler: pip install libtpu")
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # compile only: look for no TPU host
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    if "TPU" not in visible_accelerators():  # else it complains at length that there is no host
        os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-1")
        os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    topology = _topology(name, platform="tpu", topology_name=f"{kind}:{shape}")
    return Target(name, tuple(topology.devices), TPU_BYTES[kind])


def _gpu(name: str, card: Card, count: str) -> Target:
    if not count.isdigit() or int(count) < 1:
        raise DeviceError(f"target {name!r}: count {count!r}; expected a number, as in h100:8")
    plugins = ("jax_plugins.xla_cuda13", "jax_plugins.xla_cuda12")
    if not any(_found(plugin) for plugin in plugins):
        raise DeviceError(
            f"target {name!r} needs the CUDA compiler, though no GPU: pip install 'jax[cuda13]'"
        )
    os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")
    topology = _topology(
        name, platform="cuda", topology=f"1x1x{count}", target_config=describe(card)
    )
    return Target(name, tuple(topology.devices), card.memory_bytes)


def _found(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False


def _topology(name: str, **arguments: Any) -> Any:
    from jax.experimental import topologies

    try:
        return topologies.get_topology_desc(**arguments)
    except (RuntimeError, ValueError, NotImplementedError) as error:
        raise DeviceError(f"target {name!r}: the compiler refuses it: {error}") from error


def describe(card: Card) -> str:
    """The card as the text proto that XLA's `target_config` takes."""
    fields = {
        "threads_per_block_limit": 1024, "threads_per_warp": 32,
        "shared_memory_per_block": 49152, "shared_memory_per_core": card.shared_core,
        "threads_per_core_limit": card.threads_core, "core_count": card.cores,
        "fpus_per_core": card.lanes, "block_dim_limit_x": 2**31 - 1,
        "block_dim_limit_y": 65535, "block_dim_limit_z": 65535,
        "memory_bandwidth": card.bandwidth, "l2_cache_size": card.l2,
        "clock_rate_ghz": card.clock_ghz, "device_memory_size": card.memory_bytes,
        "shared_memory_per_block_optin": card.shared_block,
        "registers_per_core_limit": 65536, "registers_per_block_limit": 65536,
    }
    lines = "\n".join(f"  {key}: {value}" for key, value in fields.items())
    major, minor = card.compute
    return (
        f"gpu_device_info {{\n{lines}\n"
        f"  cuda_compute_capability {{ major: {major} minor: {minor} }}\n}}\n"
        f'platform_name: "CUDA"\ndnn_version_info {{ major: 9 minor: 28 }}\n'
        f'device_description_str: "{card.title}"\n'
    )
