"""The plain cache: every key and value, in full precision."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from jaxlm.cache.base import Attended, State
from jaxlm.core.errors import ConfigError, flag
from jaxlm.models.attention import Mask, attention, merge
from jaxlm.models.config import AttentionSpec
from jaxlm.models.layers import apply_rope

FLOATS = ("float32", "bfloat16", "float16")
LEAST = 64  # slots that a CPU reads at least
STEADY = 128  # the same in pieces: smaller ones take longer to merge than to read more
SPARE = 8  # slots beyond the last: rows that are done go on stepping, and write there


@dataclass(frozen=True)
class Dense:
    """Rotated keys as (B, K, H, S) and values as (B, K, S, H), as attention's products read them.

    `dtype`: of storage; None: as computed. `steady`: on a CPU, sums are over the same pieces of a
    row whatever its neighbours hold, so that its numbers do not depend on them to the last bit;
    costs a few operations a step. Elsewhere they never do.

    Raises: ConfigError for a dtype that is not float32, bfloat16 or float16.
    """

    dtype: str | None = None
    steady: bool = False

    flush_every = None

    def __post_init__(self):
        flag("steady", self.steady)
        try:
            fine = self.dtype is None or jnp.dtype(self.dtype).name in FLOATS
        except (TypeError, ValueError):
            fine = False
        if not fine:
            raise ConfigError(f"dtype is {self.dtype!r}; expected None or one of {FLOATS}; codes "
                              "of fewer bits are what kivi8, squat4 and the like keep")

    def init(self, spec: AttentionSpec, batch: int, slots: int, dtype: Any) -> State:
        """Zeros for `slots` tokens a row, and the spare slots."""
        heads, width, dtype = spec.num_kv_heads, spec.head_dim, self.dtype or dtype
        slots += SPARE
        return {"k": jnp.zeros((batch, heads, width, slots), dtype),
                "v": jnp.zeros((batch, heads, slots, width), dtype)}

    def prefill(self, spec, state, q_BTNH, k_BTKH, v_BTKH, pos_BT, count_B) -> Attended:
        """Tokens attend among themselves; slots beyond `count_B` hold padding, never seen."""
        time = q_BTNH.shape[1]
        q, k = (apply_rope(x, pos_BT, spec.rope) for x in (q_BTNH, k_BTKH))
        k, v = k.transpose(0, 2, 3, 1), v_BTKH.transpose(0, 2, 1, 3)
        valid_BT = jnp.arange(time)[None] < count_B[:, None]
        out, lse = attention(q, k, v, Mask(window=spec.window), pos_BT, pos_BT, scale=spec.scale,
                             softcap=spec.softcap, key_valid_BS=valid_BT, aligned=True)
        put = lambda buffer, x: jax.lax.dynamic_update_slice(
            buffer, x.astype(buffer.dtype), (0, 0, 0, 0)
        )
        return out, lse, {"k": put(state["k"], k), "v": put(state["v"], v)}

    def extend(self, spec, state, q_BTNH, k_BTKH, v_BTKH, pos_BT, start_B, count_B) -> Attended:
        """Write, then attend over everything a row holds."""
        q, k = (apply_rope(x, pos_BT, spec.rope) for x in (q_BTNH, k_BTKH))
        state = append(state, k, v_BTKH, start_B, count_B)
        out, lse = self._look(spec, state, q, pos_BT, start_B + count_B, pos_BT[:, 0] - start_B)
        return out, lse, state

    def step(self, spec, state, q_B1NH, k_B1KH, v_B1KH, pos_B, start_B) -> Attended:
        """One token in every row."""
        pos_B1, length_B = pos_B[:, None], start_B + 1
        q, k = (apply_rope(x, pos_B1, spec.rope) for x in (q_B1NH, k_B1KH))
        state = append_one(state, k, v_B1KH, start_B)

        def look(size, start=0):
            part = {"k": state["k"][..., start:size], "v": state["v"][:, :, start:size]}
            return self._look(spec, part, q, pos_B1, length_B, pos_B - start_B, start)

        def in_pieces(size):
            ends = [end for end in sizes if end <= size]
            return merge([look(end, start) for start, end in zip([0, *ends], ends, strict=False)])

        sizes = read_sizes(state["v"].shape[2], STEADY if self.steady else LEAST)
        out, lse = bounded(in_pieces if self.steady else look, jnp.max(length_B), sizes,
                           lambda: look(sizes[-1]))
        return out, lse, state

    def attend(self, spec, state, q_BTNH, pos_BT, length_B, first_B) -> tuple[jax.Array, jax.Array]:
        """Read-only: queries over what each row holds."""
        q = apply_rope(q_BTNH, pos_BT, spec.rope)
        return self._look(spec, state, q, pos_BT, length_B, first_B)

    def _look(self, spec, state, q_BTNH, pos_BT, length_B, first_B, start=0):
        """Rotated queries over the first `length_B` slots, the first of them at `first_B`; the
        state holds those from `start` on."""
        slot_1S = start + jnp.arange(state["v"].shape[2])[None]
        keys, values = (state[name].astype(q_BTNH.dtype) for name in ("k", "v"))
        return attention(
            q_BTNH, keys, values, Mask(window=spec.window), pos_BT, slot_1S + first_B[:, None],
            scale=spec.scale, softcap=spec.softcap, key_valid_BS=slot_1S < length_B[:, None],
        )

    def flush(self, spec, state, due, length_B) -> State:
        """Nothing waits here."""
        return state


def append(
    state: State, k_BTKH: jax.Array, v_BTKH: jax.Array, start_B: jax.Array, count_B: jax.Array
) -> State:
    """Write the first `count_B` of T tokens at each row's `start_B`; what overflows is dropped."""
    batch, time = k_BTKH.shape[:2]
    slots = state["v"].shape[2]
    step_1T = jnp.arange(time)[None]
    slot_BT = jnp.where(step_1T < count_B[:, None], start_B[:, None] + step_1T, slots)
    rows = jnp.arange(batch)[:, None]
    put = lambda ref, x: ref.set(x.astype(state["v"].dtype), mode="drop")
    return {"k": put(state["k"].at[rows, :, :, slot_BT], k_BTKH),
            "v": put(state["v"].at[rows, :, slot_BT], v_BTKH)}


def append_one(state: State, k_B1KH: jax.Array, v_B1KH: jax.Array, start_B: jax.Array) -> State:
    """Write one token a row at its `start_B`; what does not fit goes to the last spare slot.

    A slice update that clamps, mapped over rows: any bounds check here, even the scatter's own,
    makes XLA:TPU copy the whole cache in every step of a loop.
    """
    k_BKH, v_BKH = (x[:, 0].astype(state["v"].dtype) for x in (k_B1KH, v_B1KH))
    update = jax.lax.dynamic_update_slice
    return {
        "k": jax.vmap(lambda row, x, at: update(row, x[..., None], (0, 0, at)))(
            state["k"], k_BKH, start_B),
        "v": jax.vmap(lambda row, x, at: update(row, x[:, None], (0, at, 0)))(
            state["v"], v_BKH, start_B),
    }


def read_sizes(slots: int, least: int = LEAST) -> list[int]:
    """`least` times 1, 2, 4, ..., and `slots`: what a step may read.

    >>> read_sizes(300)
    [64, 128, 300]
    """
    sizes = [least << i for i in range(slots.bit_length())]
    return [size for size in sizes if 4 * size <= 3 * slots] + [slots]


def bounded(
    look: Callable[[int], Any], longest: jax.Array, sizes: list[int], whole: Callable[[], Any]
) -> Any:
    """`look(size)` for the first of `sizes` that holds the longest row.

    On a CPU a step's time is what it reads. Cutting also keeps XLA:CPU from fusing the write into
    the read, which copies the cache in every step. A GPU would stop for each branch: `whole()`.
    """
    branch = jnp.sum(longest > jnp.asarray(sizes[:-1], jnp.int32))
    return jax.lax.platform_dependent(
        cpu=lambda: jax.lax.switch(branch, [partial(look, size) for size in sizes]), default=whole,
    )
