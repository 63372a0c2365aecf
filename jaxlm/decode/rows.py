"""Rows of a DecodeState: many from one prompt, resampling, and release of those that wait."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm.cache.base import CacheKind
from jaxlm.cache.kivi import Kivi
from jaxlm.cache.shared import Shared, SharedState, gather_cache
from jaxlm.core.errors import ConfigError, ShapeError, whole
from jaxlm.core.hosts import readable
from jaxlm.core.tree import Params, gather_rows
from jaxlm.decode.state import DecodeState
from jaxlm.models.lm import LM

MOVED = ("tokens_BS", "length_B", "logits_BV", "logprob_BS", "limit_B", "done_B", "hold_B",
         "match_B2", "sampler")  # with the text; keys stay with the row


def repeat(state: DecodeState, particles: int) -> DecodeState:
    """Every row `particles` times, each with a key of its own; caches are copied too."""
    particles = check_particles(particles)
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
    Raises: ConfigError for particles or slots that are no whole number of at least 1.

    Memory a layer: `R * prompt slots + R * particles * slots` tokens, where `repeat` would need
    `R * particles * (prompt slots + slots)`.
    """
    particles, slots = check_particles(particles), whole("slots", slots)
    batch, dtype = state.tokens_BS.shape[0] * particles, params["embed"]["table"].dtype
    kinds, caches = list(state.kinds), list(state.caches)
    for layer, (kind, prompt) in enumerate(zip(state.kinds, state.caches, strict=True)):
        if kind is not None:
            new = own or (kind.own if isinstance(kind, Shared) else kind)
            added = new.init(lm.config.attention(layer), batch, slots, dtype)
            if isinstance(new, Kivi):
                added = new.inherit(added, prompt, particles, kind)
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
    Raises: ShapeError when the indices do not cover the rows by prompt, or are outside [0, P); in
      a jit the latter cannot be seen, and gives the row NaN logits.
    """
    ancestors_RP = check_ancestors(state, ancestors_RP)
    move = state.since_flush >= 0 if when is None else when  # true, and the compiler cannot know
    caches = tuple(gather_cache(cache, ancestors_RP, move) for cache in state.caches)
    rows = gather_rows(moved_fields(state), ancestors_RP)
    lost_RP = (ancestors_RP < 0) | (ancestors_RP >= ancestors_RP.shape[1])
    rows["logits_BV"] = jnp.where(lost_RP.reshape(-1, 1), jnp.nan, rows["logits_BV"])
    return state.replace(caches=caches, **rows)


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


def check_particles(particles: int) -> int:
    """The number of particles; ConfigError unless there is at least one."""
    return whole("particles", particles)


def check_ancestors(state: DecodeState, ancestors_RP: Any) -> jax.Array:
    """Ancestors as an array; ShapeError unless each row has one, among those of its prompt."""
    given = ancestors_RP if isinstance(ancestors_RP, jax.Array) else np.asarray(ancestors_RP)
    shape, rows = given.shape, state.length_B.shape[0]
    if len(shape) != 2 or given.size != rows or not jnp.issubdtype(given.dtype, jnp.integer):
        raise ShapeError(f"ancestors are {given.dtype} {shape}; expected whole numbers (prompts, "
                         f"particles) with a product of {rows} rows")
    shared = [len(cache.length_R) for cache in state.caches if isinstance(cache, SharedState)]
    if shared and shape[0] != shared[0]:  # rows would go on from another prompt's text
        raise ShapeError(f"ancestors are {shape}; the rows share {shared[0]} prompts, so expected "
                         f"{(shared[0], rows // shared[0])}")
    if readable(given) and ((host := np.asarray(given)) < 0).any() | (host >= shape[1]).any():
        raise ShapeError(f"ancestors are {host.tolist()}; expected indices from 0 to "
                         f"{shape[1] - 1}, of particles of the same prompt")
    return jnp.asarray(given)
