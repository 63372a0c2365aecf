"""Compile for accelerators that are not there: real ahead-of-time compiles, not simulations.

    compiled = compile_for(tpu("v5e:2x2"), function, x, y)   # needs libtpu; mark the test `slow`
    compiled = compile_for(gpu("h100"), function, x, y)      # mark the test `gpu_target`

The memory and cost analysis of what comes back are the compiler's own. It does not refuse what does
not fit into a GPU's memory: compare with the card's.
"""

import contextlib
import importlib.util
import os
from pathlib import Path
from typing import Any

import jax
import pytest
from jax.experimental import topologies

CARDS = Path(__file__).resolve().parent / "data" / "targets"


def tpu(name: str) -> Any:
    """A TPU topology such as v5e:2x2, v5p:2x2x1, v6e:1x1; the test is skipped without libtpu."""
    if importlib.util.find_spec("libtpu") is None:
        pytest.skip("no libtpu: make test-all installs it")
    return topologies.get_topology_desc(platform="tpu", topology_name=name)


def gpu(card: str, count: int = 1) -> Any:
    """`count` NVIDIA cards of one host: a100, h100, h200 or t4; skipped without jax[cuda13]."""
    if importlib.util.find_spec("jax_plugins.xla_cuda13") is None:
        pytest.skip("no jax[cuda13]: make test-gpu-targets installs it")
    if "JAX_SKIP_CUDA_CONSTRAINTS_CHECK" not in os.environ:
        pytest.skip("run by make test-gpu-targets, which sets what compiling without a GPU needs")
    return topologies.get_topology_desc(
        platform="cuda",
        topology=f"1x1x{count}",
        target_config=(CARDS / f"{card}.txtpb").read_text(),
    )


def compile_for(
    topology: Any, function: Any, *arguments: Any, donate: tuple[int, ...] = (),
    dump: Path | None = None,
) -> jax.stages.Compiled:
    """Compile for the topology's first device; of the arguments only shape and dtype are used.

    With an empty folder as `dump`, `jaxlm.core.aot._text` reads what comes back.
    """
    options = {"xla_dump_to": str(dump)} if dump else None
    device = jax.sharding.SingleDeviceSharding(topology.devices[0])
    shapes = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device), arguments
    )
    with _as_if_on(topology.devices[0]):
        lowered = jax.jit(function, donate_argnums=donate).lower(*shapes)
        return lowered.compile(compiler_options=options)


def _as_if_on(device: Any) -> Any:
    """Kernels ask for the device's kind while they are lowered: say it by an abstract mesh."""
    if device.platform == "tpu":
        kind = jax.sharding.AbstractDevice(device.device_kind, 1, "tpu")
    elif jax.__version_info__ >= (0, 11):  # Triton's ask since then
        kind = jax.sharding.AbstractDevice(device.device_kind, None, "gpu")
    else:
        return contextlib.nullcontext()
    auto = (jax.sharding.AxisType.Auto,)
    mesh = jax.sharding.AbstractMesh((1,), ("device",), axis_types=auto, abstract_device=kind)
    return jax.sharding.use_abstract_mesh(mesh)
