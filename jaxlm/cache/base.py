"""What a cache kind is: a frozen description with pure functions over one layer's state."""

from typing import Any, Protocol

import jax
import jax.numpy as jnp

from jaxlm.models.config import AttentionSpec

State = Any
Attended = tuple[jax.Array, jax.Array, State]  # out_BTNH, lse_BTN, state


class CacheKind(Protocol):
    """How keys and values are kept; one kind a layer, any mix.

    Rows are compact and have their own lengths: token `i` of a row is its slot `i`. Queries and
    keys come without rotary positions; `spec.rope` rotates them here, before or after storing.
    Every leaf of a state leads with the batch, so that rows are gathered, repeated and sliced by
    ordinary tree operations. Every function returns the log-sum-exp of its scores, so that
    attention over several segments merges exactly (`jaxlm.models.attention.merge`).

    `flush_every`: a state must be flushed at least once in so many appended tokens; None: never.
    """

    @property
    def flush_every(self) -> int | None: ...

    def init(self, spec: AttentionSpec, batch: int, slots: int, dtype: Any) -> State:
        """An empty state with room for `slots` tokens a row."""

    def prefill(
        self, spec: AttentionSpec, state: State, q_BTNH: jax.Array, k_BTKH: jax.Array,
        v_BTKH: jax.Array, pos_BT: jax.Array, count_B: jax.Array,
    ) -> Attended:
        """Fill an empty state with the first `count_B` of T tokens; they attend to each other."""

    def extend(
        self, spec: AttentionSpec, state: State, q_BTNH: jax.Array, k_BTKH: jax.Array,
        v_BTKH: jax.Array, pos_BT: jax.Array, start_B: jax.Array, count_B: jax.Array,
    ) -> Attended:
        """Append the first `count_B` of T tokens after each row's `start_B` cached ones."""

    def step(
        self, spec: AttentionSpec, state: State, q_B1NH: jax.Array, k_B1KH: jax.Array,
        v_B1KH: jax.Array, pos_B: jax.Array, start_B: jax.Array,
    ) -> Attended:
        """`extend` by one token in every row."""

    def attend(
        self, spec: AttentionSpec, state: State, q_BTNH: jax.Array, pos_BT: jax.Array,
        length_B: jax.Array, first_B: jax.Array,
    ) -> tuple[jax.Array, jax.Array]:
        """Read-only: out_BTNH and lse_BTN of queries over each row's first `length_B` tokens.

        Token `i` of a row stands at position `first_B + i`. A query sees what stands at its own
        position or before; queries of several rows may be laid along T, in any order.
        """

    def flush(
        self, spec: AttentionSpec, state: State, due: jax.Array, length_B: jax.Array
    ) -> State:
        """Where `due` (bool), compress the tokens that still wait in full precision."""


def broken_layer(caches: tuple[State, ...]) -> int | None:
    """The first layer whose state holds a NaN or an infinity, or is flagged `bad` for one."""

    def broken(path, leaf) -> bool:
        flag = jax.tree_util.keystr(path).endswith("['bad']")
        return (flag and bool(leaf.any())) or (
            jnp.issubdtype(leaf.dtype, jnp.floating) and not bool(jnp.isfinite(leaf).all()))

    for layer, cache in enumerate(caches):
        if any(broken(*leaf) for leaf in jax.tree_util.tree_leaves_with_path(cache)):
            return layer
    return None


def init_caches(
    kinds: tuple[CacheKind | None, ...], specs: tuple[AttentionSpec, ...], batch: int, slots: int,
    dtype: Any,
) -> tuple[State, ...]:
    """One empty state a layer; a layer without a kind (a skipped block) gets an empty tuple."""
    return tuple(
        () if kind is None else kind.init(spec, batch, slots, dtype)
        for kind, spec in zip(kinds, specs, strict=True)
    )
