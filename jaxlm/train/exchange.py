"""Matrices that lie in parts over a mesh: one whole to each device, and what it finds back again.

For the inside of `jax.shard_map`. The compiler, asked for the same by shardings alone, would give
every device all the matrices.
"""

import math
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

Axes = tuple[str, ...]


class Split(NamedTuple):
    """Mesh axes, by what they do to a matrix: nothing, or split its rows or its columns.

    Of as many matrices as there are devices, device (a, b, c) of the three owns the one of that
    index, the last counting fastest.
    """

    copies: Axes
    rows: Axes
    columns: Axes

    @property
    def rows_spec(self) -> PartitionSpec:
        """Where rows of a stack of matrices go."""
        return PartitionSpec(None, self.rows or None)

    @property
    def columns_spec(self) -> PartitionSpec:
        """Where what has a matrix's columns as its rows goes."""
        return PartitionSpec(None, self.columns or None)


def split_of(spec: PartitionSpec, mesh: Mesh) -> Split:
    """What a PartitionSpec of a matrix (n, m) says.

    >>> from jaxlm.core.mesh import make_mesh
    >>> split_of(PartitionSpec("fsdp", None), make_mesh(devices=jax.devices()[:1]))
    Split(copies=('data', 'tensor'), rows=('fsdp',), columns=())
    """
    names = lambda axis: (axis,) if isinstance(axis, str) else tuple(axis or ())
    rows, columns = map(names, (*spec, None, None)[:2])
    return Split(tuple(a for a in mesh.axis_names if a not in rows + columns), rows, columns)


def own(parts: list[jax.Array], split: Split) -> jax.Array:
    """This device's parts of as many matrices as there are devices -> its own matrix, (1, n, m).

    What it holds meanwhile is one matrix's worth: parts that other copies see to are not stacked.
    """
    each = len(parts) // _size(split.copies)
    blocks = [partial(jnp.stack, parts[i:i + each]) for i in range(0, len(parts), each)]
    x = jax.lax.switch(jax.lax.axis_index(split.copies), blocks) if blocks[1:] else blocks[0]()
    return _swap(_swap(x, split.rows, 0, 1), split.columns, 0, 2)


def back_by_rows(u: jax.Array, split: Split) -> jax.Array:
    """(1, n, r) of every device's own -> (devices, n / rows, r): each matrix's part."""
    x = _swap(u, split.rows, 1, 0)
    if split.columns:
        x = jax.lax.all_gather(x, split.columns, axis=1)
        x = x.reshape(-1, *x.shape[2:])
    return back(x, split.copies)


def back_by_columns(v: jax.Array, split: Split) -> jax.Array:
    """(1, m, r) of every device's own -> (devices, m / columns, r)."""
    return back(_swap(v, split.columns, 1, 0), split.copies + split.rows)


def back(x: jax.Array, axes: Axes) -> jax.Array:
    """What lies over some mesh axes by its first axis, whole on each."""
    return jax.lax.all_gather(x, axes, tiled=True) if axes else x


def _size(axes: Axes) -> int:
    return math.prod(map(jax.lax.axis_size, axes))


def _swap(x: jax.Array, axes: Axes, scattered: int, gathered: int) -> jax.Array:
    return jax.lax.all_to_all(x, axes, scattered, gathered, tiled=True) if axes else x
