"""The reference's own policy and settings, for numbers to compare with its; not to decode fast.

What `Kivi` and `Squat` do otherwise on purpose is taken back: keys are coded a full window at
once, a value when `window` newer ones have come, lambda is not divided by anything, and later
keys are compensated by the prompt's matrices as they are, not by a sketch of them.

The tail is the newest `window` tokens, and one more within a step. A window's values are coded
with its keys, which changes no code, for each depends on its token alone; until a value leaves
the window the tail is what is read, with coded keys as their codes have them. `packed_B` is where
the tail begins, `coded_B` how many keys have codes.
"""

from dataclasses import dataclass, fields
from functools import partial
from typing import ClassVar

import jax
import jax.numpy as jnp

from jaxlm.cache import quantised
from jaxlm.cache.kivi import Kivi
from jaxlm.cache.local import per_head
from jaxlm.cache.squat import Squat
from jaxlm.core.errors import ConfigError
from pallas_kernels.quant_flush.reference import quantised as grids_of
from pallas_kernels.squat import Compensation, compensation, query_gram

FREE = ("k_bits", "v_bits", "group", "window", "rope", "scales", "mesh", "block", "lam", "rank")


@dataclass(frozen=True)
class ReferenceKivi(Kivi):
    """`Kivi` as its reference has it: `parse_cache("kivi2:compat=reference")`.

    A step flushes. Plain XLA alone serves it, and the state holds more than `Kivi`'s. The window
    moves with every token: a row that goes on beyond its room loses text, which `Kivi` keeps.

    Args: k_bits, v_bits, group, window and rope of `Kivi`; scales, float32 unless said. The
      others are refused.
    Raises: ConfigError.

    Example:
      >>> ReferenceKivi(2, 2).tail
      33

    Source: arXiv 2402.02750, section 3, and the code of arXiv 2503.24358 with a lambda of 0.
    """

    scales: str = "float32"
    shrinks: tuple[float, ...] = (1.0,)
    implementation: str | None = "xla"

    def __post_init__(self):
        super().__post_init__()
        for field in fields(self):
            if field.name not in FREE and getattr(self, field.name) != field.default:
                raise ConfigError(
                    f"{field.name} is {getattr(self, field.name)!r}; with compat=reference it is "
                    f"{field.default!r}, as the reference has it: leave it out")

    @property
    def flush_every(self) -> int:
        """Every step: a value leaves the window with every token."""
        return 1

    @property
    def keep(self) -> int:
        """Room among the codes is for every token."""
        return 0

    @property
    def tail(self) -> int:
        """A window, and the token of a step."""
        return self.window + 1

    def init(self, spec, batch, slots, dtype):
        """As the kind without `compat`, and no keys coded."""
        return super().init(spec, batch, slots, dtype) | {"coded_B": jnp.zeros(batch, jnp.int32)}

    def keep_prompt(self, state, k_BKTH, v_BKTH, count_B, code_keys):
        """A prompt is coded as later tokens are."""
        return self._pack(state, (k_BKTH, v_BKTH), count_B, count_B)

    @partial(jax.jit, static_argnums=0)
    def _pack(self, state, new, count_B, ready_B):
        """Of `count_B` tokens from `packed_B` on, `new` or (None) the tail, code whole windows of
        keys and let the oldest values go; of rows where `ready_B`."""
        size = self.window

        def pack(state, new, count_B, ready_B):
            k_BKSH, v_BKSH = (state["k"], state["v"]) if new is None else new
            begin_B = state["coded_B"] - state["packed_B"]  # of the keys without codes
            full_B = jnp.where(ready_B > 0, (count_B - begin_B) // size, 0)
            state = quantised.first_center(state, k_BKSH, count_B, full_B)
            write, comp = self.writer(state), self.later_coder(state)

            def code(i, carry):
                packed, k_BKSH = carry
                at_B, mine_B = begin_B + i * size, i < full_B
                keys, values = (quantised.leftover(x, at_B, count_B, size)
                                for x in (k_BKSH, v_BKSH))
                back = grids_of(packed, keys, values, comp, self.format,
                                getattr(self, "block", 1), False)[0].value
                packed = write(packed, keys, values, state["coded_B"] + i * size, mine_B)
                place_BS = jnp.arange(k_BKSH.shape[2]) - at_B[:, None]
                inside_BS = (place_BS >= 0) & (place_BS < size) & mine_B[:, None]
                place_BS = jnp.clip(place_BS, 0, size - 1)
                back = jnp.take_along_axis(back, place_BS[:, None, :, None], 2)
                return packed, jnp.where(inside_BS[:, None, :, None], back.astype(k_BKSH.dtype),
                                         k_BKSH)

            packed, k_BKSH = jax.lax.fori_loop(0, jnp.max(full_B), code,
                                               (state["packed"], k_BKSH))
            gone_B = jnp.where(ready_B > 0, jnp.maximum(count_B - size, 0), 0)
            state = state | {"packed": packed, "packed_B": state["packed_B"] + gone_B,
                             "coded_B": state["coded_B"] + full_B * size}
            return quantised.keep_tail(state, k_BKSH, v_BKSH, gone_B, count_B)

        return per_head(pack, self.mesh, state["k"].shape[1], state, new, count_B, ready_B)


@dataclass(frozen=True)
class ReferenceSquat(ReferenceKivi, Squat):
    """`Squat` as its reference has it: `parse_cache("squat2:compat=reference")`.

    As `ReferenceKivi`; besides, each row keeps an H x H matrix a kv head.

    Args: those of `ReferenceKivi`; block, lam and rank of `Squat`, the defaults being those of
      the reference's commands.
    Raises: ConfigError.

    Example:
      >>> ReferenceSquat(2, 2).lam_mode
      'reference'

    Source: the code of arXiv 2503.24358.
    """

    block: int = 64
    lam: float = 1e-3
    lam_mode: str = "reference"
    rank: int | None = 20
    energy_order: bool = False
    guard: bool = False
    ahead: int = 0

    learnt: ClassVar[str] = "moves"
    learnt_by: ClassVar[tuple[str, ...]] = (*Squat.learnt_by, "block")

    def init(self, spec, batch, slots, dtype):
        """No keys coded, and no matrix before queries are seen."""
        state = super().init(spec, batch, slots, dtype)
        del state["sketch"]
        shape = (batch, spec.num_kv_heads, spec.head_dim, spec.head_dim)
        return state | {"moves": jnp.zeros(shape, jnp.float32)}

    def read_prompt(self, spec, state, q_BTNH, k_BKTH, valid_BT):
        """The matrix of the prompt's queries."""
        return state | {"moves": self._moves(spec, q_BTNH, valid_BT)}, None

    def read_queries(self, spec, state, q_BTNH, start_B, count_B):
        """A piece of several tokens that begins a row is its prompt, if it has none to share."""
        if q_BTNH.shape[1] == 1:
            return state
        first_B = self._knows_nothing(state, start_B) & (count_B > 0)
        valid_BT = jnp.arange(q_BTNH.shape[1]) < count_B[:, None]
        learn = lambda: jnp.where(first_B[:, None, None, None],
                                  self._moves(spec, q_BTNH, valid_BT), state["moves"])
        return state | {"moves": jax.lax.cond(first_B.any(), learn, lambda: state["moves"])}

    def later_coder(self, state) -> Compensation:
        """The matrix, of channels in their own order."""
        moves = state["moves"]
        order = jnp.broadcast_to(jnp.arange(moves.shape[-1], dtype=jnp.int32), moves.shape[:-1])
        return Compensation(moves, order, moves)  # without a guard, no Gram is read

    def _moves(self, spec, q_BTNH, valid_BT):
        gram = query_gram(q_BTNH, spec.num_kv_heads, valid_BT)
        return compensation(gram, self.block, self.lam, self.lam_mode, self.rank, None,
                            self.energy_order).matrix
