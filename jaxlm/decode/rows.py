"""Rows of a DecodeState: many from one prompt, resampling, and release of those that wait."""

from typing import Any

import jax
import jax.numpy as jnp

from jaxlm.cache.base import CacheKind
from jaxlm.cache.kivi import Kivi
from jaxlm.cache.shared import Shared, SharedState, gather_cache
from jaxlm.core.errors import ConfigError, ShapeError
from jaxlm.core.tree import Params, gather_rows
from jaxlm.decode.state import DecodeState
from jaxlm.models.lm import LM

MOVED = ("tokens_BS", "length_B", "logits_BV", "logprob_BS", "limit_B", "done_B", "hold_B",
         "match_B2", "sampler")  # with the text; keys stay with the row


def repeat(state: DecodeState, particles: int) -> DecodeState:
    """Every row `particles` times, each with a key of its own; caches are copied too."""
    check_particles(particles)
    if any(isinstance(kind, Shared) for kind in state.kinds):
        raise ConfigError("rows that share a prompt cannot be repeated; fork them once more")
    copied = repeat_rows({"caches": state.caches} | moved_fields(state), particles)
    return state.replace(keys_B=split_keys(state.keys_B, particles), **copied)


def fork(
    lm: LM, params: Params, state: DecodeState, particles: int, slots: int,
    own: CacheKind | None = None,
) -> DecodeState:
    """From R prompts to `R * particles` rows that share them.

    Args:
      state: R rows, fresh from `prefill` or `extend`. Its caches become the prompts, stored once,
        so it needs no more slots than the prompts have tokens.
      particles: rows a prompt, static. slots: tokens a row can add to its prompt, static.
      own: the cache kind of what rows add; None: each layer's own.
    Returns: rows `r * particles + p`. Rows that were full are live again.
    Raises: ConfigError for fewer than one particle or slot.

    Memory a layer: `R * prompt slots + R * particles * slots` tokens, where `repeat` would need
    `R * particles * (prompt slots + slots)`.
    """
    check_particles(particles)
    if slots < 1:
        raise ConfigError(f"slots is {slots}; expected room for at least 1 token after a prompt")
    batch, dtype = state.tokens_BS.shape[0] * particles, params["embed"]["table"].dtype
    kinds, caches = list(state.kinds), list(state.caches)
    for layer, (kind, prompt) in enumerate(zip(state.kinds, state.caches, strict=True)):
        if kind is not None:
            new = own or (kind.own if isinstance(kind, Shared) else kind)
            added = new.init(lm.config.attention(layer), batch, slots, dtype)
            if isinstance(new, Kivi):
                added = new.inherit(added, prompt, particles)
            kinds[layer] = Shared(kind, new)
            length_R = jnp.array(state.length_B)  # a buffer of its own: states are donated
            caches[layer] = SharedState(prompt, added, length_R)
    rows = repeat_rows(moved_fields(state), particles)
    full_B = rows["length_B"] >= rows["limit_B"]
    longer = lambda x: jnp.pad(x, ((0, 0), (0, slots)))
    rows |= {
        "tokens_BS": longer(rows["tokens_BS"]), "logprob_BS": longer(rows["logprob_BS"]),
        "limit_B": rows["length_B"] + slots, "done_B": rows["done_B"] & ~full_B,
    }
    return state.replace(
        kinds=tuple(kinds), caches=tuple(caches), keys_B=split_keys(state.keys_B, particles),
        since_flush=jnp.zeros((), jnp.int32), **rows,
    )


def gather(
    state: DecodeState, ancestors_RP: jax.Array, when: jax.Array | None = None
) -> DecodeState:
    """Resample: row `p` of prompt `r` goes on from row `ancestors_RP[r, p]` of that prompt.

    Texts, logits, caches and sampler states move; a key stays with its row, or clones would go
    on alike; shared prompts stay where they are. Each layer moves in a loop of one trip, which the
    compiler does in place: the room of one layer is needed beside the state, not that of all.

    Draws are keyed by row and place in the text. A row that gets a shorter text than its own would
    repeat draws at places it has been at: give rows new keys, as `jaxlm.search.engine.move` does.

    Args: when: bool, whether caches move at all; False only where all ancestors are themselves.
      Or bool (R,), by prompt: the time is then that of the prompts that move; on one device alone.
    Raises: ShapeError when the indices do not cover the rows.
    """
    if ancestors_RP.ndim != 2 or ancestors_RP.size != state.length_B.shape[0]:
        raise ShapeError(f"ancestors are {ancestors_RP.shape}; expected (prompts, particles) with "
                         f"a product of {state.length_B.shape[0]} rows")
    move = state.since_flush >= 0 if when is None else when  # true, and the compiler cannot know
    caches = tuple(gather_cache(cache, ancestors_RP, move) for cache in state.caches)
    return state.replace(caches=caches, **gather_rows(moved_fields(state), ancestors_RP))


def release(state: DecodeState, rows_B: jax.Array | None = None) -> DecodeState:
    """Let rows that a delimiter holds go on: all of them, or where `rows_B` (bool)."""
    released_B = jnp.ones_like(state.hold_B) if rows_B is None else rows_B
    return state.replace(hold_B=state.hold_B & ~released_B)


def moved_fields(state: DecodeState) -> dict[str, Any]:
    """What goes with a row's text, caches aside."""
    return {name: getattr(state, name) for name in MOVED}


def repeat_rows(tree: Any, particles: int) -> Any:
    """Every row of every leaf `particles` times, in place."""
    return jax.tree.map(lambda x: jnp.repeat(x, particles, axis=0), tree)


def split_keys(keys_R: jax.Array, particles: int) -> jax.Array:
    """A key for each of a row's copies, (R * particles,)."""
    each = lambda key: jax.vmap(lambda p: jax.random.fold_in(key, p))(jnp.arange(particles))
    return jax.vmap(each)(keys_R).reshape(-1)


def check_particles(particles: int) -> None:
    """Raise ConfigError unless there is at least one."""
    if not isinstance(particles, int) or particles < 1:
        raise ConfigError(f"particles is {particles!r}; expected a whole number of at least 1")
