"""The plain cache: every key and value, in full precision."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from jaxlm.cache.base import Attended, State
from jaxlm.models.attention import Mask, attention
from jaxlm.models.config import AttentionSpec
from jaxlm.models.layers import apply_rope


@dataclass(frozen=True)
class Dense:
    """Rotated keys and values as (B, K, S, H). `dtype`: of storage; None: as computed."""

    dtype: str | None = None

    flush_every = None

    def init(self, spec: AttentionSpec, batch: int, slots: int, dtype: Any) -> State:
        """Zeros for `slots` tokens a row."""
        shape = (batch, spec.num_kv_heads, slots, spec.head_dim)
        return {name: jnp.zeros(shape, self.dtype or dtype) for name in ("k", "v")}

    def prefill(self, spec, state, q_BTNH, k_BTKH, v_BTKH, pos_BT, count_B) -> Attended:
        """Tokens attend among themselves; slots beyond `count_B` hold padding, never seen."""
        time = q_BTNH.shape[1]
        q, k = (apply_rope(x, pos_BT, spec.rope) for x in (q_BTNH, k_BTKH))
        k, v = (x.transpose(0, 2, 1, 3) for x in (k, v_BTKH))
        valid_BT = jnp.arange(time)[None] < count_B[:, None]
        out, lse = attention(q, k, v, Mask(window=spec.window), pos_BT, pos_BT, scale=spec.scale,
                             softcap=spec.softcap, key_valid_BS=valid_BT)
        put = lambda buffer, x: jax.lax.dynamic_update_slice(
            buffer, x.astype(buffer.dtype), (0, 0, 0, 0)
        )
        return out, lse, {"k": put(state["k"], k), "v": put(state["v"], v)}

    def extend(self, spec, state, q_BTNH, k_BTKH, v_BTKH, pos_BT, start_B, count_B) -> Attended:
        """Write, then attend over everything a row holds."""
        q, k = (apply_rope(x, pos_BT, spec.rope) for x in (q_BTNH, k_BTKH))
        state = {"k": append(state["k"], k, start_B, count_B),
                 "v": append(state["v"], v_BTKH, start_B, count_B)}
        out, lse = self._look(spec, state, q, pos_BT, start_B + count_B, pos_BT[:, 0] - start_B)
        return out, lse, state

    def attend(self, spec, state, q_BTNH, pos_BT, length_B, first_B) -> tuple[jax.Array, jax.Array]:
        """Read-only: queries over what each row holds."""
        q = apply_rope(q_BTNH, pos_BT, spec.rope)
        return self._look(spec, state, q, pos_BT, length_B, first_B)

    def _look(self, spec, state, q_BTNH, pos_BT, length_B, first_B):
        """Rotated queries over the first `length_B` slots, the first of them at `first_B`."""
        slot_1S = jnp.arange(state["k"].shape[2])[None]
        keys, values = (state[name].astype(q_BTNH.dtype) for name in ("k", "v"))
        return attention(
            q_BTNH, keys, values, Mask(window=spec.window), pos_BT, slot_1S + first_B[:, None],
            scale=spec.scale, softcap=spec.softcap, key_valid_BS=slot_1S < length_B[:, None],
        )

    def step(self, spec, state, q_B1NH, k_B1KH, v_B1KH, pos_B, start_B) -> Attended:
        """One token in every row."""
        return self.extend(
            spec, state, q_B1NH, k_B1KH, v_B1KH, pos_B[:, None], start_B, jnp.ones_like(start_B)
        )

    def flush(self, spec, state, due, length_B) -> State:
        """Nothing waits here."""
        return state


def append(
    buffer_BKSH: jax.Array, x_BTKH: jax.Array, start_B: jax.Array, count_B: jax.Array
) -> jax.Array:
    """Write the first `count_B` of T tokens at each row's `start_B`; what overflows is dropped."""
    batch, time = x_BTKH.shape[:2]
    slots = buffer_BKSH.shape[2]
    x_BTKH = x_BTKH.astype(buffer_BKSH.dtype)
    if batch == 1 and time == 1:  # a slice update is far cheaper than a scatter
        at = (0, 0, jnp.minimum(start_B[0], slots - 1), 0)
        new = x_BTKH.transpose(0, 2, 1, 3)
        old = jax.lax.dynamic_slice(buffer_BKSH, at, new.shape)
        fits = (count_B[0] > 0) & (start_B[0] < slots)
        return jax.lax.dynamic_update_slice(buffer_BKSH, jnp.where(fits, new, old), at)
    step_1T = jnp.arange(time)[None]
    slot_BT = jnp.where(step_1T < count_B[:, None], start_B[:, None] + step_1T, slots)
    rows = jnp.arange(batch)[:, None]
    return buffer_BKSH.at[rows, :, slot_BT].set(x_BTKH, mode="drop")
