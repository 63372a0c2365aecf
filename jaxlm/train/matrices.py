"""Which parameters are matrices, and how a kernel of several axes reads as one."""

import math
from collections.abc import Iterable
from typing import NamedTuple

from jaxlm.core.errors import ConfigError
from jaxlm.core.tree import Params, flatten
from jaxlm.models.stack import STACK

PROJECTIONS = ("q", "k", "v", "o", "gate", "up", "down")


class Matrix(NamedTuple):
    """A kernel of axes `(lead, inputs, outputs)` as matrices (n, m); stacked layers lead."""

    lead: tuple[int, ...]
    n: int
    m: int


def input_axes(path: str) -> int:
    """How many axes of a kernel are its input's: heads and their width for `o`, else one.

    >>> input_axes("layers_0/attn/o/kernel"), input_axes("layers_0/mlp/up/kernel")
    (2, 1)
    """
    return 2 if path.endswith("/o/kernel") else 1


def as_matrix(path: str, shape: tuple[int, ...]) -> Matrix:
    """A kernel's shape as that of a matrix.

    >>> as_matrix("layers_0/attn/q/kernel", (8, 2, 4))
    Matrix(lead=(), n=8, m=8)
    """
    lead = int(path.startswith(f"{STACK}/"))
    split = lead + input_axes(path)
    return Matrix(shape[:lead], math.prod(shape[lead:split]), math.prod(shape[split:]))


def projections(params: Params, targets: Iterable[str] = PROJECTIONS) -> dict[str, Matrix]:
    """The kernels of the named projections, by path.

    Raises: ConfigError for a name that the model has not.
    """
    flat = flatten(params)
    found = {}
    for target in targets:
        paths = [path for path in flat if path.endswith(f"/{target}/kernel")]
        if not paths:
            raise ConfigError(f"tuning.targets names {target!r}; expected some of "
                              f"{', '.join(PROJECTIONS)}")
        found.update({path: as_matrix(path, flat[path].shape) for path in paths})
    return {path: found[path] for path in flat if path in found}
