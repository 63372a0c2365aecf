"""Where a kind's kernels run: on each device alone, over its own rows and kv heads.

The compilers refuse a Mosaic or Triton kernel inside a program that they shard themselves, so a
kind that knows its mesh calls its kernels through `shard_map`. Nothing crosses devices there.
"""

import math
from collections.abc import Callable
from dataclasses import fields, is_dataclass, replace
from typing import Any

import jax
from jax.sharding import Mesh, PartitionSpec

from jaxlm.core.mesh import RULES, Rules
from pallas_kernels.dispatch import preferred


def place_kind(kind: Any, mesh: Mesh | None) -> Any:
    """The kind, or the tuple of kinds, with its kernels on a mesh; `Dense` needs none."""
    if isinstance(kind, tuple):
        return tuple(place_kind(one, mesh) for one in kind)
    if not is_dataclass(kind) or "mesh" not in {field.name for field in fields(kind)}:
        return kind
    changed: Any = replace(kind, mesh=mesh)  # type: ignore[type-var]
    return changed


def implementations(choice: str | None, mesh: Mesh | None) -> tuple[str, ...]:
    """The named implementation, or what suits the devices of the mesh (else the default ones)."""
    if choice is not None:
        return (choice,)
    return preferred(None if mesh is None else mesh.devices.flat[0])


def per_head(function: Callable, mesh: Mesh | None, kv_heads: int, *args: Any,
             rules: Rules = RULES) -> Any:
    """`function(*args)` with rows and heads split over a mesh; without one, as it is.

    Args:
      function: maps trees of arrays to trees of arrays. Every leaf leads with rows; a leaf of
        rank 2 or more has heads next, whose number is `kv_heads` or a multiple of it.
      kv_heads: a mesh axis that does not divide it, or the rows, holds copies. Leaves whose
        heads lie side by side have fewer, never less than one a device.
    """
    if mesh is None:
        return function(*args)
    rows = jax.tree.leaves(args)[0].shape[0]
    batch, heads = (_axes(rules[name], size, mesh) for name, size in
                    (("batch", rows), ("kv_heads", kv_heads)))
    specs = lambda tree: jax.tree.map(
        lambda leaf: PartitionSpec(batch, heads) if leaf.ndim > 1 else PartitionSpec(batch), tree)
    out = jax.eval_shape(function, *args)
    return jax.shard_map(function, mesh=mesh, in_specs=specs(args), out_specs=specs(out),
                         check_vma=False)(*args)


def local_heads(kv_heads: int, mesh: Mesh | None, rules: Rules = RULES) -> int:
    """kv heads of one device, under `per_head`."""
    names = () if mesh is None else _axes(rules["kv_heads"], kv_heads, mesh) or ()
    return kv_heads // math.prod(mesh.shape[name] for name in names) if mesh else kv_heads


def _axes(names: str | tuple[str, ...] | None, size: int, mesh: Mesh) -> tuple[str, ...] | None:
    """The mesh axes that share a dimension of this size, if they divide it."""
    names = (names,) if isinstance(names, str) else names or ()
    ways = math.prod(mesh.shape.get(name, 1) for name in names)
    return tuple(name for name in names if name in mesh.shape) if size % ways == 0 else None
