"""A prompt stored once and attended by many rows, merged exactly with each row's own tokens."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from jaxlm.cache.base import Attended, CacheKind, State
from jaxlm.core.errors import ConfigError
from jaxlm.core.tree import gather_rows
from jaxlm.models.attention import merge
from jaxlm.models.config import AttentionSpec


class SharedState(struct.PyTreeNode):
    """One layer's prompt, whose leaves lead with R, and its rows' own tokens, with B = R P.

    length_R: int32, tokens in the prompt.
    """

    prompt: State
    own: State
    length_R: jax.Array


@dataclass(frozen=True)
class Shared:
    """`P` rows read one prompt: `merge([attend(prompt), extend(own)])`.

    Made by `fork`, from a prefilled state. The prompt is never written to; per step it is read
    once for all of its rows, which are laid along the query axis. With `Dense` the result equals
    that of repeated rows; with quantised kinds, up to where the groups start.

    Args: prompt, own: the kinds of the two segments; they may differ.
    """

    prompt: CacheKind
    own: CacheKind

    @property
    def flush_every(self) -> int | None:
        """That of the rows' own tokens."""
        return self.own.flush_every

    def init(self, spec: AttentionSpec, batch: int, slots: int, dtype: Any) -> State:
        """Refused: a shared prompt exists only after it was read."""
        raise ConfigError("a Shared cache holds no prompt yet; prefill its rows once, then fork")

    def prefill(self, spec, state, q_BTNH, k_BTKH, v_BTKH, pos_BT, count_B) -> Attended:
        """Refused, as `init`."""
        raise ConfigError("a Shared cache was prefilled before it was forked; use extend")

    def extend(self, spec, state, q_BTNH, k_BTKH, v_BTKH, pos_BT, start_B, count_B) -> Attended:
        """Append to the rows' own tokens, and attend to both segments."""
        own_B = start_B - prompt_length(state, start_B)
        own = self.own.extend(spec, state.own, q_BTNH, k_BTKH, v_BTKH, pos_BT, own_B, count_B)
        return self._with_prompt(spec, state, q_BTNH, pos_BT, own)

    def step(self, spec, state, q_B1NH, k_B1KH, v_B1KH, pos_B, start_B) -> Attended:
        """`extend` by one token in every row."""
        own_B = start_B - prompt_length(state, start_B)
        own = self.own.step(spec, state.own, q_B1NH, k_B1KH, v_B1KH, pos_B, own_B)
        return self._with_prompt(spec, state, q_B1NH, pos_B[:, None], own)

    def attend(self, spec, state, q_BTNH, pos_BT, length_B, first_B) -> tuple[jax.Array, jax.Array]:
        """Read-only, over both segments; so that a fork may be forked again."""
        prompt_B = prompt_length(state, length_B)
        own = self.own.attend(
            spec, state.own, q_BTNH, pos_BT, length_B - prompt_B, first_B + prompt_B
        )
        return merge([self._over_prompt(spec, state, q_BTNH, pos_BT, first_B), own])

    def flush(self, spec, state, due, length_B) -> State:
        """The rows' own tokens; the prompt stays as it was when it was forked."""
        own_B = length_B - prompt_length(state, length_B)
        return state.replace(own=self.own.flush(spec, state.own, due, own_B))

    def _with_prompt(self, spec, state, q_BTNH, pos_BT, own: Attended) -> Attended:
        """The own segment's answer, merged with the prompt's."""
        out, lse, own_state = own
        over_prompt = self._over_prompt(spec, state, q_BTNH, pos_BT, jnp.zeros_like(pos_BT[:, 0]))
        out, lse = merge([over_prompt, (out, lse)])
        return out, lse, state.replace(own=own_state)

    def _over_prompt(self, spec, state, q_BTNH, pos_BT, first_B) -> tuple[jax.Array, jax.Array]:
        """Attention over the prompts, the P rows of each as P T queries of one row."""
        prompts = state.length_R.shape[0]
        together = lambda x: x.reshape(prompts, -1, *x.shape[2:])  # (R P, T, ...) to (R, P T, ...)
        first_R = first_B.reshape(prompts, -1)[:, 0]
        out, lse = self.prompt.attend(
            spec, state.prompt, together(q_BTNH), together(pos_BT), state.length_R, first_R
        )
        return out.reshape(q_BTNH.shape), lse.reshape(q_BTNH.shape[:3])


def prompt_length(state: SharedState, like_B: jax.Array) -> jax.Array:
    """Each row's prompt length, int32 (B,)."""
    prompts = state.length_R.shape[0]
    return jnp.repeat(state.length_R, like_B.shape[0] // prompts, total_repeat_length=len(like_B))


def gather_cache(state: State, ancestors_RP: jax.Array, when: jax.Array) -> State:
    """`gather_rows` on one layer's state, where `when`; a shared prompt stays where it is.

    Args: when: bool, for all prompts together, or (R,): those that move, one after another, which
      costs what they hold and no more, but only where all prompts lie on one device.
    """
    if isinstance(state, SharedState):
        return state.replace(own=gather_cache(state.own, ancestors_RP, when))
    if when.ndim == 0:
        take = lambda _, x: gather_rows(x, ancestors_RP)
        return jax.lax.fori_loop(0, when.astype(jnp.int32), take, state)
    first_R, particles = jnp.argsort(~when, stable=True), ancestors_RP.shape[1]

    def move(i, state):
        prompt = first_R[i]
        start, index_P = prompt * particles, ancestors_RP[prompt]
        part = lambda x: jax.lax.dynamic_slice_in_dim(x, start, particles)
        put = lambda x: jax.lax.dynamic_update_slice_in_dim(x, part(x)[index_P], start, 0)
        return jax.tree.map(put, state)

    return jax.lax.fori_loop(0, when.sum(), move, state)
