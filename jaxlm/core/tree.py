"""Trees with path names: `layers_0/attn/q/kernel` is one leaf."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np

Params = dict[str, Any]


def flatten(tree: Params, prefix: str = "") -> dict[str, Any]:
    """Nested dicts to one dict keyed by slash-joined paths, in the tree's own order.

    >>> flatten({"a": {"b": 1}, "c": 2})
    {'a/b': 1, 'c': 2}
    """
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        path = f"{prefix}{name}"
        flat.update(flatten(value, f"{path}/") if isinstance(value, dict) else {path: value})
    return flat


def unflatten(flat: dict[str, Any]) -> Params:
    """The inverse of `flatten`.

    >>> unflatten({'a/b': 1, 'c': 2})
    {'a': {'b': 1}, 'c': 2}
    """
    tree: Params = {}
    for path, value in flat.items():
        *parents, name = path.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = value
    return tree


def map_with_path(function: Callable[[str, Any], Any], tree: Params) -> Params:
    """`function(path, leaf)` at every leaf."""
    return unflatten({path: function(path, leaf) for path, leaf in flatten(tree).items()})


def size(tree: Any) -> int:
    """How many numbers the leaves hold; works on arrays and on shapes."""
    return int(sum(np.prod(leaf.shape, dtype=np.int64) for leaf in jax.tree.leaves(tree)))


def nbytes(tree: Any) -> int:
    """How many bytes the leaves hold; works on arrays and on shapes."""
    leaves = jax.tree.leaves(tree)
    return int(sum(np.prod(x.shape, dtype=np.int64) * x.dtype.itemsize for x in leaves))


def gather_rows(tree: Any, ancestors_RP: jax.Array) -> Any:
    """Row `p` of prompt `r` becomes row `ancestors_RP[r, p]` of the same prompt.

    Every leaf leads with `B = R * P`. The take is vmapped over prompts, so that rows sharded
    over devices by prompt move without a collective (a flat index would gather the whole tree).
    """
    prompts, particles = ancestors_RP.shape

    def take(leaf):
        grouped = leaf.reshape(prompts, particles, *leaf.shape[1:])
        picked = jax.vmap(lambda x, index: x[index])(grouped, ancestors_RP)
        return picked.reshape(leaf.shape)

    return jax.tree.map(take, tree)
