"""Some rows of a batch, computed by themselves: more rows are resident than an iteration computes.

An index names the W rows that work; None: all do, and nothing below changes a program.
"""

from typing import Any

import jax
import jax.numpy as jnp

from jaxlm.core.errors import ConfigError, whole


def check_width(width: int | None, batch: int) -> int | None:
    """The rows an iteration computes; None where they are all rows.

    Raises: ConfigError unless it is a whole number of at least 1.

    >>> check_width(8, 8), check_width(3, 8)
    (None, 3)
    """
    return None if width is None or whole("width", width) >= batch else int(width)


def first_live(live_B: jax.Array, width: int | None) -> jax.Array | None:
    """The first `width` live rows; where fewer are live, some that are not.

    No order is better by much: a row's text is the same whenever it works, and the batch idles only
    once fewer than `width` rows are live.

    >>> first_live(jnp.array([False, True, False, True, True]), 2).tolist()
    [1, 3]
    """
    return None if width is None else jnp.argsort(~live_B, stable=True)[:width]


def among(live_B: jax.Array, index_W: jax.Array | None) -> jax.Array:
    """The live rows of those, bool (B,)."""
    if index_W is None:
        return live_B
    return live_B & jnp.zeros_like(live_B).at[index_W].set(True, unique_indices=True)


def take(tree: Any, index_W: jax.Array | None) -> Any:
    """Those rows of leaves that lead with B."""
    return tree if index_W is None else jax.tree.map(lambda x: x[index_W], tree)


def spread(tree: Any, index_W: jax.Array | None, batch: int) -> Any:
    """The rows back at their places among all B, zeros in the others."""
    put = lambda x: jnp.zeros((batch, *x.shape[1:]), x.dtype).at[index_W].set(
        x, unique_indices=True)
    return tree if index_W is None else jax.tree.map(put, tree)


def keep(new: Any, old: Any, live_B: jax.Array, index_W: jax.Array | None) -> Any:
    """Leaves that lead with B: `new` (leading with W) in the live rows, the others as they were."""
    live_W = take(live_B, index_W)

    def one(new, old):
        wide = live_W.reshape((-1,) + (1,) * (new.ndim - 1))
        kept = jnp.where(wide, new, take(old, index_W))
        return kept if index_W is None else old.at[index_W].set(kept, unique_indices=True)

    return jax.tree.map(one, new, old)


def sampler_of(sampler: Any, index_W: jax.Array | None, batch: int) -> Any:
    """The sampler of those rows; one that holds numbers for each row says by `rows` which go along.

    Raises: ConfigError for one that does not.
    """
    if index_W is None:
        return sampler
    if hasattr(sampler, "rows"):
        return sampler.rows(index_W)
    if any(jnp.shape(leaf)[:1] == (batch,) for leaf in jax.tree.leaves(sampler)):
        raise ConfigError(f"sampler {type(sampler).__name__} holds numbers for each of {batch} "
                          "rows, and fewer are computed at once; give one number for all rows, or "
                          "compute all rows at once")
    return sampler
