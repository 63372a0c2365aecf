"""KIVI: plain asymmetric min-max codes, keys per channel and values per token."""

from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from jaxlm.cache import quantised
from jaxlm.cache.base import Attended, State
from jaxlm.cache.local import implementations, local_heads, per_head
from jaxlm.core.errors import ConfigError
from jaxlm.models.attention import Mask, attention
from jaxlm.models.config import AttentionSpec
from jaxlm.models.layers import apply_rope
from pallas_kernels.lanes import side_by_side
from pallas_kernels.quant import QuantFormat, key_center, quantise_keys
from pallas_kernels.squat import Compensation

ROPE = ("after", "before")
IMPLEMENTATIONS = (None, "xla", "tpu", "gpu")


@dataclass(frozen=True)
class Kivi:
    """Codes of 2, 4 or 8 bits, and the newest tokens of every row in full precision.

    A group of `n = 2^bits - 1` steps is kept as `code = round((x - min) / scale)`, `scale =
    (max - min) / n`: keys share a scale over `group` tokens of a channel, values over
    `gcd(group, H)` channels of a token. Rows are flushed together every `flush_every` tokens; a
    row then codes its oldest group if `keep` newer tokens remain. Codes take
    `(k_bits + v_bits) H / 8` bytes a token and kv head, 16-bit scales `8 H / group` more, and
    the tail has room for `window + 2 flush_every` tokens a row. Rooms are rounded up to whole
    tiles of `32 / min(k_bits, v_bits) * group` tokens, sliding-window layers included.

    Args:
      k_bits, v_bits: 2, 4 or 8, independently.
      group: tokens of a key scale, a multiple of 8.
      window: a multiple of `group`. Of a long text the newest tokens are in full precision: `keep`
        (`window - group + flush_every`) at least, one less than the tail's room at most.
      scales: 'float32', 'float16', 'bfloat16' or 'int8'.
      shrinks: tried widths of a group's grid, relative to min-max; the least squared error wins.
      rope: keys are stored 'after' rotary positions, or 'before' them and rotated as read.
      implementation: of attention and flush: None (the devices' best), 'xla', 'tpu', 'gpu'.
      mesh: where rows and kv heads lie, if on several devices; `generate` sets it.
    Raises: ConfigError.

    Example:
      >>> Kivi(k_bits=2, v_bits=4).format.tile
      512

    Source: arXiv 2402.02750, section 3.
    """

    k_bits: int = 2
    v_bits: int = 2
    group: int = 32
    window: int = 32
    scales: str = "bfloat16"
    shrinks: tuple[float, ...] = (1.0, 0.9, 0.8, 0.7)
    rope: str = "after"
    implementation: str | None = None
    mesh: Mesh | None = None

    turns: ClassVar[bool] = False  # whether keys are turned after rotary positions
    learnt: ClassVar[str | None] = None  # what a state knows of the prompt's queries, if anything

    def __post_init__(self):
        try:
            fmt = self.format
        except ValueError as error:
            raise ConfigError(f"{type(self).__name__}: {error}") from None
        if not isinstance(self.window, int) or self.window < 1 or self.window % fmt.group:
            raise ConfigError(f"window is {self.window!r}; expected a multiple of group, "
                              f"{fmt.group}: whole groups leave it")
        if self.rope not in ROPE:
            raise ConfigError(f"rope is {self.rope!r}; expected one of {ROPE}")
        if self.implementation not in IMPLEMENTATIONS:
            raise ConfigError(f"implementation is {self.implementation!r}; expected one of "
                              f"{IMPLEMENTATIONS}")

    @property
    def format(self) -> QuantFormat:
        """How the codes are laid out."""
        return QuantFormat(self.k_bits, self.v_bits, self.group, self.scales, self.shrinks)

    @property
    def flush_every(self) -> int:
        """Tokens between flushes: few, so that the tail need not hold two windows."""
        return min(8, self.window // 2)

    @property
    def keep(self) -> int:
        """A row's newest tokens that no flush codes."""
        return self.window - self.group + self.flush_every

    @property
    def tail(self) -> int:
        """Tokens a row's tail holds: what is kept, a group, and what comes between flushes."""
        return self.keep + self.group + self.flush_every

    def init(self, spec: AttentionSpec, batch: int, slots: int, dtype: Any) -> State:
        """No tokens yet; room for `slots` a row."""
        capacity = max(slots - self.keep, 1)
        return quantised.empty(spec, batch, capacity, self.tail, self.format, dtype,
                               self.side_by_side(spec))

    def inherit(self, state: State, prompt: State, particles: int, kind: Any) -> State:
        """Empty rows, `particles` a prompt, take from it the origin of 8-bit minima, if its `kind`
        turns keys as this one does."""
        kind, prompt = (getattr(x, "own", x) for x in (kind, prompt))  # of a fork forked again
        alike = isinstance(kind, Kivi) and kind.rope == self.rope and kind.turns == self.turns
        center = quantised.center_of(prompt) if alike else None
        if self.scales != "int8" or center is None:
            return state
        return quantised.with_center(state, jnp.repeat(center, particles, axis=0))

    def side_by_side(self, spec: AttentionSpec) -> int:
        """kv heads that share the lanes of a TPU, those of one device; elsewhere 1."""
        if self.rope == "before" or "tpu" not in implementations(self.implementation, self.mesh):
            return 1
        return side_by_side(spec.head_dim, local_heads(spec.num_kv_heads, self.mesh))

    def prefill(self, spec, state, q_BTNH, k_BTKH, v_BTKH, pos_BT, count_B) -> Attended:
        """Tokens attend among themselves in full precision; then whole groups are coded."""
        q, rotated = (self.place(spec, x, pos_BT) for x in (q_BTNH, k_BTKH))
        valid_BT = jnp.arange(q.shape[1]) < count_B[:, None]
        heads_first = lambda x: jnp.where(valid_BT[..., None, None], x, 0).swapaxes(1, 2)
        v = heads_first(v_BTKH)
        out, lse = attention(
            q, heads_first(rotated).swapaxes(2, 3), v, Mask(window=spec.window), pos_BT, pos_BT,
            scale=spec.scale, softcap=spec.softcap, key_valid_BS=valid_BT, aligned=True)
        state = state | {"bad": quantised.not_finite(k_BTKH, v_BTKH, count_B)}
        k = heads_first(k_BTKH if self.rope == "before" else rotated)
        state, code_keys = self.read_prompt(spec, state, q, k, valid_BT)
        state = self.keep_prompt(state, k, v, count_B, code_keys)
        return flagged(out, state), lse, state

    def extend(self, spec, state, q_BTNH, k_BTKH, v_BTKH, pos_BT, start_B, count_B) -> Attended:
        """New tokens see the codes, the tail and one another, these two in full precision; then
        whole groups are coded. A row without room for its tokens gets none of them."""
        start_B, count_B = start_B.astype(jnp.int32), count_B.astype(jnp.int32)
        room = state["packed"].k_words.shape[2] * 32 // self.k_bits + self.keep
        count_B = jnp.where(start_B + count_B <= room, count_B, 0)
        q, k = self._rotate(spec, q_BTNH, k_BTKH, pos_BT)
        held_B = start_B - state["packed_B"]
        put = lambda old, new: quantised.join(old, new.swapaxes(1, 2), held_B, count_B)
        k, v = put(state["k"], k), put(state["v"], v_BTKH)
        state = state | {"bad": state["bad"] | quantised.not_finite(k_BTKH, v_BTKH, count_B)}
        out, lse = self.attend_many(
            spec, state, q, pos_BT, k, v, start_B + count_B, pos_BT[:, 0] - start_B)
        state = self.read_queries(spec, state, q, start_B, count_B)
        ready_B = quantised.ready_groups(held_B + count_B, self.keep, self.group)
        state = self._pack(state, (k, v), held_B + count_B, ready_B)
        return flagged(out, state), lse, state

    def step(self, spec, state, q_B1NH, k_B1KH, v_B1KH, pos_B, start_B) -> Attended:
        """One token in every row joins the tail; codes and tail are read in one call."""
        q, k = self._rotate(spec, q_B1NH, k_B1KH, pos_B[:, None])
        rows, slot_B = jnp.arange(len(start_B)), start_B - state["packed_B"]
        put = lambda tail, x: tail.at[rows, :, slot_B].set(x[:, 0].astype(tail.dtype), mode="drop")
        one_B = jnp.ones_like(start_B)
        state = state | {"k": put(state["k"], k), "v": put(state["v"], v_B1KH), "bad":
                         state["bad"] | quantised.not_finite(k_B1KH, v_B1KH, one_B)}
        state = self.read_queries(spec, state, q, start_B, one_B)
        out, lse = self.attend_one(spec, state, q, pos_B, start_B + 1, pos_B - start_B)
        return flagged(out, state), lse, state

    def attend(self, spec, state, q_BTNH, pos_BT, length_B, first_B) -> tuple[jax.Array, jax.Array]:
        """Read-only: queries over each row's first `length_B` tokens, the first at `first_B`."""
        q = self.place(spec, q_BTNH, pos_BT)
        if q.shape[1] == 1:
            out, lse = self.attend_one(spec, state, q, pos_BT[:, 0], length_B, first_B)
        else:
            out, lse = self.attend_many(spec, state, q, pos_BT, state["k"], state["v"], length_B,
                                        first_B)
        return flagged(out, state), lse

    def flush(self, spec, state, due, length_B) -> State:
        """Where due, every row with more than `keep` and a group in its tail codes its oldest."""
        count_B = length_B - state["packed_B"]
        ready_B = quantised.ready_groups(count_B, self.keep, self.group)
        ready_B = jnp.where(due, jnp.minimum(ready_B, 1), 0)
        return self._pack(state, None, count_B, ready_B)

    def read_prompt(self, spec, state, q_BTNH, k_BKTH, valid_BT):
        """What a prompt tells the coder of keys: the state, and how to code this prompt's."""
        if self.scales == "int8":
            state = quantised.with_center(state, key_center(k_BKTH, valid_BT))
        center = quantised.center_of(state)
        return state, lambda k: quantise_keys(k, self.format, center)

    def read_queries(self, spec, state, q_BTNH, start_B, count_B) -> State:
        """What later queries tell the coder of keys: nothing."""
        return state

    def later_coder(self, state: State) -> Compensation | None:
        """How later tokens' keys are coded: plainly."""
        return None

    @partial(jax.jit, static_argnums=0)  # traced and lowered once for all layers
    def _pack(self, state, new, count_B, ready_B):
        """Of `count_B` uncoded tokens a row, `new` or (None) the tail, code `ready_B` groups."""
        def pack(state, new, count_B, ready_B):
            def code(state):
                k_BKSH, v_BKSH = (state["k"], state["v"]) if new is None else new
                state = quantised.first_center(state, k_BKSH, count_B, ready_B)
                return quantised.pack_ready(state, k_BKSH, v_BKSH, count_B, ready_B, self.group,
                                            self.writer(state))

            if new is not None:
                k_BKSH, v_BKSH = new
                state = quantised.keep_tail(state, k_BKSH, v_BKSH, jnp.zeros_like(count_B),
                                            count_B)
            return quantised.once_if(jnp.max(ready_B) > 0, code, state)

        return per_head(pack, self.mesh, state["k"].shape[1], state, new, count_B, ready_B)

    def _rotate(self, spec, q_BTNH, k_BTKH, pos_BT):
        """Queries to attend with and keys to store."""
        q = self.place(spec, q_BTNH, pos_BT)
        return q, k_BTKH if self.rope == "before" else self.place(spec, k_BTKH, pos_BT)

    # what kinds with other codes replace

    def place(self, spec, x_BTNH, pos_BT):
        """Queries or keys as they meet."""
        return apply_rope(x_BTNH, pos_BT, spec.rope)

    def keep_prompt(self, state, k_BKTH, v_BKTH, count_B, code_keys) -> State:
        """An empty state with a prompt's tokens in it, whole groups coded."""
        gone_B = quantised.ready_groups(count_B, self.keep, self.group) * self.group
        packed = self.fill(state["packed"], k_BKTH, v_BKTH, code_keys)
        state = quantised.keep_tail(state, k_BKTH, v_BKTH, gone_B, count_B)
        return state | {"packed": packed, "packed_B": gone_B}

    def fill(self, packed, k_BKTH, v_BKTH, code_keys):
        """Empty codes with a prompt's tokens in them."""
        return quantised.fill(packed, k_BKTH, v_BKTH, self.format, code_keys)

    def writer(self, state) -> quantised.Write:
        """How groups of later tokens are written."""
        block = getattr(self, "block", 1)
        names = implementations(self.implementation, self.mesh)
        return quantised.flusher(self.format, self.later_coder(state), block, names)

    def attend_one(self, spec, state, q_B1NH, pos_B, length_B, first_B):
        """One placed query a row over codes and tail."""
        return self._attend_codes(spec, state, q_B1NH, pos_B, length_B, first_B)

    @partial(jax.jit, static_argnums=(0, 1))
    def _attend_codes(self, spec, state, q_B1NH, pos_B, length_B, first_B):
        return quantised.attend_one(spec, state, q_B1NH, pos_B, length_B, first_B, self.format,
                                    self.rope == "before",
                                    implementations(self.implementation, self.mesh), self.mesh)

    def attend_many(self, spec, state, q_BTNH, pos_BT, k_BKSH, v_BKSH, length_B, first_B):
        """Placed queries over codes and the uncoded tokens behind them."""
        return quantised.attend_many(spec, state, q_BTNH, pos_BT, k_BKSH, v_BKSH, length_B, first_B,
                                     self.format, self.rope == "before")


def flagged(out_BTNH: jax.Array, state: State) -> jax.Array:
    """NaN from heads that took in a NaN or an infinity."""
    batch, time, heads, width = out_BTNH.shape
    out = out_BTNH.reshape(batch, time, state["bad"].shape[1], -1, width)
    return jnp.where(state["bad"][:, None, :, None], jnp.nan, out).reshape(out_BTNH.shape)
