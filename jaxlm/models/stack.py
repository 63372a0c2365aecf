"""Layers as one scanned stack, for programs that compile slowly when unrolled: a train step.

A stacked tree lives only inside a train state: models on disk and everywhere else keep
`layers_0 ... layers_{L-1}`. The compiler then sees one period instead of all of them.
"""

from typing import Any

import jax
import jax.numpy as jnp

from jaxlm.core.tree import Params
from jaxlm.models.config import LayerPlan, ModelConfig

STACK = "stack"


def period(config: ModelConfig, plan: tuple[LayerPlan, ...] = ()) -> int:
    """The least number of layers after which the pattern of layers repeats.

    >>> period(ModelConfig(8, 8, 6, 1, 1, 8, 8, windows=(4, None) * 3))
    2
    """
    kinds = [(config.attention(i), plan[i] if plan else None) for i in range(config.num_layers)]
    for size in range(1, config.num_layers):
        if all(kinds[i] == kinds[i % size] for i in range(config.num_layers)):
            return size
    return config.num_layers


def split(config: ModelConfig, plan: tuple[LayerPlan, ...] = ()) -> tuple[int, int]:
    """How many whole periods there are, and the period; layers beyond them stay unrolled."""
    size = period(config, plan)
    return config.num_layers // size, size


def stack(params: Params, config: ModelConfig, plan: tuple[LayerPlan, ...] = ()) -> Params:
    """`layers_i` of whole periods to `stack/j`, whose leaves lead with the number of periods."""
    groups, size = split(config, plan)
    out = {name: value for name, value in params.items()
           if not (name.startswith("layers_") and int(name[7:]) < groups * size)}
    out[STACK] = {
        f"layers_{j}": jax.tree.map(
            lambda *leaves: jnp.stack(leaves),
            *(params[f"layers_{g * size + j}"] for g in range(groups)),
        )
        for j in range(size)
    }
    return out


def unstack(params: Params) -> Params:
    """The inverse of `stack`."""
    out = {name: value for name, value in params.items() if name != STACK}
    size = len(params[STACK])
    for name, tree in params[STACK].items():
        groups = jax.tree.leaves(tree)[0].shape[0]
        for g in range(groups):
            layer = g * size + int(name.removeprefix("layers_"))
            out[f"layers_{layer}"] = jax.tree.map(lambda leaf, g=g: leaf[g], tree)
    return out


def stack_axes(axes: Params, config: ModelConfig, plan: tuple[LayerPlan, ...] = ()) -> Params:
    """Axis names of the stacked tree: a new first axis, `layers`."""
    groups, size = split(config, plan)
    out = {name: value for name, value in axes.items()
           if not (name.startswith("layers_") and int(name[7:]) < groups * size)}
    out[STACK] = {f"layers_{j}": _lead(axes[f"layers_{j}"]) for j in range(size)}
    return out


def _lead(axes: Any) -> Any:
    if isinstance(axes, dict):
        return {name: _lead(value) for name, value in axes.items()}
    return ("layers", *axes)
