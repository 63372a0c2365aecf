"""Where a mesh enters: one constructor, one table of rules, one function that places a tree."""

import warnings
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jaxlm.core.device import require
from jaxlm.core.errors import DeviceError
from jaxlm.core.hosts import check_same, spans_processes
from jaxlm.core.tree import Params, flatten, unflatten

Rules = Mapping[str, str | tuple[str, ...] | None]  # those of `RULES` hold where none is given

RULES: Rules = {
    "batch": ("data", "fsdp"), "vocab": "tensor", "embed": "fsdp", "heads": "tensor",
    "kv_heads": "tensor", "mlp": "tensor", "head_dim": None, "norm": None,
}


def make_mesh(
    data: int = 1, fsdp: int = 1, tensor: int = 1, devices: list[Any] | None = None
) -> Mesh:
    """A mesh with axes `data`, `fsdp` and `tensor`, in Auto mode.

    Args: sizes of at least 1, whose product is the number of devices; `devices` defaults to all.
    Raises: DeviceError when a size is no count, or the product does not match.

    Example:
      >>> make_mesh(devices=jax.devices()[:1]).shape["tensor"]
      1
    """
    devices = list(require() if devices is None else devices)
    sizes = {"data": data, "fsdp": fsdp, "tensor": tensor}
    for name, size in sizes.items():
        if isinstance(size, bool) or not isinstance(size, int | np.integer) or size < 1:
            raise DeviceError(
                f"mesh axis {name!r} has size {size!r}; expected a whole number of at least 1, "
                "as in make_mesh(data=2, tensor=4)"
            )
    sizes = {name: int(size) for name, size in sizes.items()}
    if int(np.prod(list(sizes.values()))) != len(devices):
        raise DeviceError(
            f"mesh {sizes} needs {int(np.prod(list(sizes.values())))} devices, got {len(devices)} "
            f"({', '.join(sorted({d.platform for d in devices}))}); change an axis, so that "
            "their product is the number of devices (in Python `devices` may be fewer)"
        )
    # Explicit axes, the default of jax.make_mesh, refuse gathers and cache writes
    grid = np.asarray(devices).reshape(tuple(sizes.values()))
    return Mesh(grid, tuple(sizes), axis_types=(AxisType.Auto,) * 3)


def _axes_of(axis: str, mesh: Mesh, rules: Rules) -> tuple[str, ...]:
    """The mesh axes, of more than one device, that a dimension goes over."""
    target = rules.get(axis, RULES.get(axis))
    given = () if target is None else target
    names = tuple(given) if isinstance(given, tuple | list) else (given,)
    for name in names:
        if name not in mesh.axis_names:
            raise DeviceError(
                f"the rule of dimension {axis!r} names mesh axis {name!r}, but the mesh has "
                f"{mesh.axis_names}; change the rule, or make the mesh with jaxlm.make_mesh, as in "
                "make_mesh(data=2, tensor=4)"
            )
    return tuple(name for name in names if mesh.shape[name] > 1)


def check_mesh(mesh: Any, rules: Any = RULES) -> None:
    """DeviceError for what is no mesh or no rules, or where they do not fit one another."""
    if not isinstance(mesh, Mesh):
        raise DeviceError(f"mesh is {mesh!r}; expected a jax.sharding.Mesh, such as "
                          "jaxlm.make_mesh(data=2, tensor=4)")
    if not isinstance(rules, Mapping) or not set(rules) <= set(RULES):
        raise DeviceError(f"rules are {rules!r}; expected a mesh axis, several or None for some of "
                          f"the dimensions {', '.join(RULES)}, such as {{'heads': 'tensor'}}")
    for axis in RULES:
        _axes_of(axis, mesh, rules)


def partition(
    axes: tuple[str, ...], shape: tuple[int, ...], mesh: Mesh, rules: Rules = RULES,
    path: str = "array", warned: set[tuple[str, int]] | None = None,
) -> PartitionSpec:
    """The PartitionSpec of one array.

    A dimension that does not divide is replicated, with a warning that names it; `warned` holds the
    dimensions and sizes that need no further one, and is added to.
    Raises: DeviceError where the rules give two dimensions one mesh axis.
    """
    spec: list[str | tuple[str, ...] | None] = []
    warned = set() if warned is None else warned
    taken: dict[str, str] = {}  # mesh axis: dimension
    for axis, size in zip(axes, shape, strict=True):
        names = _axes_of(axis, mesh, rules)
        ways = int(np.prod([mesh.shape[name] for name in names], dtype=int))
        if size % ways:
            if (axis, size) not in warned:
                warnings.warn(
                    f"{path}: dimension {axis!r} of size {size} does not divide over {ways} "
                    f"devices of mesh axes {names}; replicated instead", stacklevel=2,
                )
            warned.add((axis, size))
            names = ()
        for name in names:
            if name in taken:
                raise DeviceError(
                    f"{path}: dimensions {taken[name]!r} and {axis!r} are both given mesh axis "
                    f"{name!r}; change the rule of one of them"
                )
            taken[name] = axis
        spec.append(names[0] if len(names) == 1 else names or None)
    return PartitionSpec(*spec)


def shardings(axes: Params, shapes: Params, mesh: Mesh, rules: Rules = RULES) -> Params:
    """A NamedSharding for every leaf of `shapes`, from the axis names in `axes`.

    A tuple of names is one leaf of `axes`. A dimension that does not divide gives one warning,
    however many parameters have it.
    Raises: DeviceError for what is no mesh, or for rules with an axis that it lacks.
    """
    check_mesh(mesh, rules)
    names = flatten(axes)
    warned: set[tuple[str, int]] = set()
    return unflatten({
        path: NamedSharding(mesh, partition(names[path], leaf.shape, mesh, rules, path, warned))
        for path, leaf in flatten(shapes).items()
    })


def keep_rows(x: jax.Array, mesh: Mesh | None, rules: Rules = RULES) -> jax.Array:
    """Inside a jit, hold an activation's rows over the batch axes; without a mesh, do nothing.

    The compiler else may follow a parameter split over `fsdp` and give every device all rows. A
    batch that does not divide stays as the compiler has it.
    """
    if mesh is None or mesh.size == 1:
        return x
    ways = int(np.prod([mesh.shape[name] for name in _axes_of("batch", mesh, rules)], dtype=int))
    if ways == 1 or x.shape[0] % ways:
        return x
    spec = partition(("batch",) + ("",) * (x.ndim - 1), x.shape, mesh, rules, "activation")
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, spec))


def shard_batch(
    tree: Any, mesh: Mesh | None, rules: Rules = RULES, settings: Any = ()
) -> Any:
    """Place arrays that lead with the batch; without a mesh, leave them as they are.

    Args: settings: what else the program that reads the batch is given: numbers, kinds, strings.
    Raises: ConfigError on a mesh of several processes, when they do not all give the same arrays
      and settings.
    """
    if mesh is None or not (leaves := jax.tree.leaves(tree)):
        return tree
    rows = partition(("batch",), leaves[0].shape[:1], mesh, rules, "batch")  # one warning at most
    where = NamedSharding(mesh, rows)
    if not spans_processes(mesh):
        return jax.tree.map(lambda x: jax.device_put(x, where), tree)
    check_same("the batch or a setting", (tree, settings))

    def place(leaf: Any) -> jax.Array:
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):  # numpy has no keys
            data = place(jax.random.key_data(leaf))
            return jax.random.wrap_key_data(data, impl=jax.random.key_impl(leaf))
        host = np.asarray(leaf)
        return jax.make_array_from_callback(host.shape, where, lambda index: host[index])

    return jax.tree.map(place, tree)
