"""SQuat: keys are coded so that what rounding leaves is orthogonal to the queries."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from jaxlm.cache.kivi import Kivi
from jaxlm.core.errors import ConfigError
from jaxlm.models.config import AttentionSpec
from pallas_kernels.quant import Grid, key_center, quantise_keys
from pallas_kernels.squat import (
    Compensation,
    compensation,
    logit_error,
    quantise_keys_squat,
    query_gram,
)

LAM_MODES = ("energy", "per_query", "reference")
TRIAL = 512  # prompt tokens on which coarse blocks are tried


@dataclass(frozen=True)
class Squat(Kivi):
    """`Kivi` with keys rounded under `|e|^2 + lam e^T C e`, C the Gram of the prompt's queries.

    Blocks of channels are rounded in turn, and the error of each is compensated on the channels
    still to come. The prompt's keys go in blocks of `block`; for the keys of later tokens each
    row keeps one bfloat16 matrix a kv head for blocks of `later_block`, and codes plainly if
    these would have raised the logit error on the prompt. Codes, bytes a token and reading are
    those of `Kivi`.

    Args (besides Kivi's):
      block: channels rounded together in the prompt; at the head dim or beyond this is Kivi.
      later_block: the same for later tokens; None: half the head dim.
      lam: weight of the queries. lam_mode: C divided by its mean diagonal ('energy'), by the
        number of queries ('per_query'), or as it is ('reference').
      rank: of the subspace that stands for C; None: all of C.
      energy_order: channels of most query energy first.
      guard: keep a group's plain codes where they have the smaller logit error.
      running: add later queries to C, which then stays in the state in float32, unguarded.
    Raises: ConfigError.

    Example:
      >>> Squat(k_bits=2, v_bits=4, lam=1.0).flush_every
      8

    Source: arXiv 2503.24358, section 3; the order, guard, scaling of lam and running C are ours.
    """

    block: int = 16
    later_block: int | None = None
    lam: float = 10.0
    lam_mode: str = "energy"
    rank: int | None = None
    energy_order: bool = True
    guard: bool = True
    running: bool = False

    def __post_init__(self):
        super().__post_init__()
        for name in ("block", "later_block", "rank"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or value < 1):
                raise ConfigError(f"{name} is {value!r}; expected a whole number above 0")
        if not 0 <= self.lam < float("inf"):
            raise ConfigError(f"lam is {self.lam}; expected a finite number of at least 0")
        if self.lam_mode not in LAM_MODES:
            raise ConfigError(f"lam_mode is {self.lam_mode!r}; expected one of {LAM_MODES}")

    def later(self, head_dim: int) -> int:
        """Channels rounded together in later tokens."""
        return min(self.later_block or -(-head_dim // 2), head_dim)

    def init(self, spec: AttentionSpec, batch: int, slots: int, dtype):
        """As `Kivi`, and no compensation before queries are seen."""
        lead, width = (batch, spec.num_kv_heads), spec.head_dim
        rest = width - self.later(width)
        order = jnp.broadcast_to(jnp.arange(width, dtype=jnp.int16), (*lead, width))
        state = super().init(spec, batch, slots, dtype) | {
            "moves": jnp.zeros((*lead, rest, rest), jnp.bfloat16), "order": order + 0}
        if self.running:
            state |= {"gram": jnp.zeros((*lead, width, width), jnp.float32),
                      "rows_B": jnp.zeros(batch, jnp.int32)}
        return state

    def inherit(self, state, prompt, particles: int):
        """Rows that go on from shared prompts code their keys by the prompts' queries."""
        prompt = getattr(prompt, "own", prompt)  # of a fork that is forked again
        copies = particles if "moves" in prompt else 0
        names = [name for name in ("moves", "order", "gram", "rows_B")
                 if copies and name in state and name in prompt]
        return state | {name: jnp.repeat(prompt[name], copies, axis=0) for name in names}

    def read_prompt(self, spec, state, q_BTNH, k_BKTH, valid_BT):
        """The Gram of the prompt's queries, and from it both compensations."""
        count_B = valid_BT.sum(1).astype(jnp.int32)
        gram = query_gram(q_BTNH, spec.num_kv_heads, valid_BT)
        rows_B = count_B * (spec.num_heads // spec.num_kv_heads)
        center = key_center(k_BKTH, valid_BT) if self.scales == "int8" else None
        state = state | {"packed": state["packed"]._replace(k_center=center)}
        state |= self._matrices(gram, rows_B)
        if self.guard and not self.running:
            state |= {"moves": self._guarded(state, gram, k_BKTH[:, :, :TRIAL], count_B)}
        if self.running:
            state |= {"gram": gram, "rows_B": rows_B}
        fine = self._compensation(gram, rows_B, self.block)
        code = lambda k: quantise_keys_squat(k, fine, self.format, self.block, self.guard, center)
        return state, code

    def read_queries(self, spec, state, q_BTNH, start_B, count_B):
        """With `running`, their Gram is added; a row that was empty learns from its first call."""
        if q_BTNH.shape[1] == 1 and not self.running:
            return state
        kv_heads, valid_BT = spec.num_kv_heads, jnp.arange(q_BTNH.shape[1]) < count_B[:, None]
        gram = query_gram(q_BTNH, kv_heads, valid_BT)
        rows_B = count_B * (spec.num_heads // kv_heads)
        if self.running:
            gram, rows_B = state["gram"] + gram, state["rows_B"] + rows_B
            return state | {"gram": gram, "rows_B": rows_B}
        first = (start_B == 0) & (count_B > 0)
        new = self._matrices(gram, rows_B)
        return state | {name: jnp.where(first.reshape(-1, *[1] * (x.ndim - 1)), x, state[name])
                        for name, x in new.items()}

    def later_coder(self, state) -> tuple[Compensation, int]:
        """The compensation that the state keeps, in blocks of `later_block`."""
        if self.running:
            state = state | self._matrices(state["gram"], state["rows_B"])
        return unfold(state["moves"], state["order"]), self.later(state["order"].shape[-1])

    def _compensation(self, gram, rows_B, block: int) -> Compensation:
        return compensation(gram, block, self.lam, self.lam_mode, self.rank, rows_B[:, None],
                            self.energy_order)

    def _matrices(self, gram, rows_B):
        """What a state keeps of the compensation in blocks of `later_block`."""
        block = self.later(gram.shape[-1])
        comp = self._compensation(gram, rows_B, block)
        rows = jnp.take_along_axis(comp.matrix, comp.order[..., :, None], axis=-2)
        ordered = jnp.take_along_axis(rows, comp.order[..., None, :], axis=-1)
        moves = ordered[..., :gram.shape[-1] - block, block:]
        return {"moves": moves.astype(jnp.bfloat16), "order": comp.order.astype(jnp.int16)}

    def _guarded(self, state, gram, k_BKSH, count_B):
        """The moves, or zeros where they would have raised the prompt's logit error."""
        group = self.group
        k_BKSH = jnp.pad(k_BKSH, ((0, 0), (0, 0), (0, -k_BKSH.shape[2] % group), (0, 0)))
        whole_BS = jnp.arange(k_BKSH.shape[2]) < (count_B // group * group)[:, None]

        def error(grid: Grid):
            miss = jnp.where(whole_BS[:, None, :, None], grid.value - k_BKSH, 0.0)
            return logit_error(miss[:, :, None], gram)[..., 0]

        comp, block = self.later_coder(state)
        center = state["packed"].k_center
        later = quantise_keys_squat(k_BKSH, comp, self.format, block, False, center)
        worse = error(later) > error(quantise_keys(k_BKSH, self.format, center))
        return jnp.where(worse[..., None, None], 0, state["moves"])


def unfold(moves: jax.Array, order: jax.Array) -> Compensation:
    """The compensation that a state keeps; without its Gram."""
    rest, width = moves.shape[-1], order.shape[-1]
    lead = [(0, 0)] * (moves.ndim - 2)
    ordered = jnp.pad(moves.astype(jnp.float32), [*lead, (0, width - rest), (width - rest, 0)])
    back = jnp.argsort(order, axis=-1)
    rows = jnp.take_along_axis(ordered, back[..., :, None], axis=-2)
    matrix = jnp.take_along_axis(rows, back[..., None, :], axis=-1)
    return Compensation(matrix, order.astype(jnp.int32), matrix)
