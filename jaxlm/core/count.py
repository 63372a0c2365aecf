"""Count the products of a traced program: every loop by its trips, without any compiler."""

from typing import Any, NamedTuple

import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr


class Count(NamedTuple):
    """Of all devices together: `flops` of matrix products, `moved` bytes that they read and write.

    `once` are the same two with the body of each loop counted once, as compilers count.
    """

    flops: float = 0.0
    moved: float = 0.0
    flops_once: float = 0.0
    moved_once: float = 0.0

    def plus(self, other: "Count", times: int = 1, trips: int = 1) -> "Count":
        """This and `other`, run `times` at once and `trips` one after another."""
        full = times * trips
        return Count(*(a + b * n for a, b, n in zip(self, other, (full, full, times, times),
                                                    strict=True)))


def count(closed: ClosedJaxpr, platform: str) -> Count:
    """Products of a traced program, rematerialised ones included, kernels of ours not.

    A dot of (M, K) and (K, N) is `2 M K N` FLOPs. A `while` whose trips are data counts once; of
    branches the dearest counts, or the one that is made for `platform` ("tpu", "cuda", "cpu").

    Example:
      >>> import jax, jax.numpy as jnp
      >>> loop = lambda x: jax.lax.scan(lambda x, _: (x @ x, None), x, length=3)[0]
      >>> found = count(jax.make_jaxpr(loop)(jnp.ones((4, 4))), "cpu")
      >>> found.flops, found.flops_once
      (384.0, 128.0)
    """
    total = Count()
    for equation in closed.jaxpr.eqns:
        total = total.plus(_one(equation, platform))
    return total


def _one(equation: Any, platform: str) -> Count:
    name, params = equation.primitive.name, equation.params
    if name == "dot_general":
        return _dot(equation)
    if name == "pallas_call":
        return Count()
    inner = [count(found, platform) for found in _inside(params)]
    if name == "cond":
        made_for = params.get("branches_platforms") or ()
        for branch, platforms in zip(inner, made_for, strict=False):
            if platforms is None or platform in platforms:
                return branch
        return max(inner)
    total = Count()
    trips = params["length"] if name == "scan" else 1
    times = params["mesh"].size if name == "shard_map" else 1
    for body in inner:
        total = total.plus(body, times, trips)
    return total


def _dot(equation: Any) -> Count:
    left, right = (x.aval for x in equation.invars)
    (contracted, _), _ = equation.params["dimension_numbers"]
    out = equation.outvars[0].aval
    depth = np.prod([left.shape[axis] for axis in contracted], dtype=float)
    flops = float(2 * np.prod(out.shape, dtype=float) * depth)
    moved = sum(float(np.prod(x.shape, dtype=float)) * x.dtype.itemsize
                for x in (left, right, out))
    return Count(flops, moved, flops, moved)


def _inside(params: dict[str, Any]) -> list[ClosedJaxpr]:
    """The programs that an equation holds."""
    found = []
    for value in params.values():
        for part in value if isinstance(value, tuple | list) else (value,):
            if isinstance(part, ClosedJaxpr):
                found.append(part)
            elif isinstance(part, Jaxpr):
                found.append(ClosedJaxpr(part, ()))
    return found
