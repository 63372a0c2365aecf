"""SQuat: keys are coded so that what rounding leaves is orthogonal to the queries."""

from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp

from jaxlm.cache import quantised
from jaxlm.cache.kivi import Kivi
from jaxlm.core.errors import ConfigError, flag, number, whole
from jaxlm.models.config import AttentionSpec, Rope
from jaxlm.models.layers import rope_frequencies
from pallas_kernels.quant import Grid, key_center, quantise_keys
from pallas_kernels.squat import (
    Compensation,
    Sketch,
    compensation,
    logit_error,
    metric,
    quantise_keys_squat,
    query_gram,
    sketch,
    sketched_compensation,
    sketched_weight,
)

LAM_MODES = ("energy", "per_query", "reference")
TRIAL = 512  # prompt tokens on which later tokens' compensation is tried


@dataclass(frozen=True)
class Squat(Kivi):
    """`Kivi` with keys rounded under `|e|^2 + lam e^T C e`, C the Gram of the prompt's queries.

    Blocks of channels are rounded in turn, and the error of each is compensated on the channels
    still to come. For the keys of later tokens each row keeps a sketch of C, `H / 4` vectors of 8
    bits a kv head, and codes plainly if that would have raised the logit error on the prompt.
    Codes, bytes a token and reading are those of `Kivi`.

    Args (besides Kivi's):
      block: channels rounded together; at the head dim or beyond this is Kivi.
      lam: weight of the queries. lam_mode: C divided by its mean diagonal ('energy'), by the
        number of queries ('per_query'), or as it is ('reference').
      rank: of the subspace that stands for C; None: all of C.
      energy_order: channels of most query energy first.
      guard: keep a group's plain codes where they have the smaller logit error.
      ahead: keys meet queries of later positions, which rotary positions turn away from the
        prompt's; C is the mean over turns by 0 to `ahead` positions. 0: the prompt's own.
      half_life: C goes on learning from later queries, and half of it is forgotten in so many
        tokens; None: C stays the prompt's. Takes `flush_every / 2` queries a head in memory.
    Raises: ConfigError.

    Example:
      >>> Squat(k_bits=2, v_bits=4, lam=1.0).flush_every
      8

    Source: arXiv 2503.24358, section 3; the order, guard, scaling of lam, turns and forgetting
      are ours.
    """

    block: int = 16
    lam: float = 10.0
    lam_mode: str = "energy"
    rank: int | None = None
    energy_order: bool = True
    guard: bool = True
    ahead: int = 512
    half_life: int | None = None

    learnt: ClassVar[str] = "sketch"  # and the fields that it depends on:
    learnt_by: ClassVar[tuple[str, ...]] = ("lam", "lam_mode", "rank", "ahead", "rope")

    def __post_init__(self):
        super().__post_init__()
        for name, least in (("block", 1), ("rank", 1), ("half_life", 1), ("ahead", 0)):
            if getattr(self, name) is not None or name not in ("rank", "half_life"):
                whole(name, getattr(self, name), least)
        number("lam", self.lam)
        for name in ("energy_order", "guard"):
            flag(name, getattr(self, name))
        if self.lam_mode not in LAM_MODES:
            raise ConfigError(f"lam_mode is {self.lam_mode!r}; expected one of {LAM_MODES}")
        if self.half_life is not None and self.lam_mode == "reference":
            raise ConfigError("half_life needs a Gram that does not grow with the text; set "
                              "lam_mode to 'energy' or 'per_query'")

    def init(self, spec: AttentionSpec, batch: int, slots: int, dtype):
        """As `Kivi`, and no compensation before queries are seen."""
        lead, width = (batch, spec.num_kv_heads), spec.head_dim
        nothing = Sketch(jnp.zeros((*lead, -(-width // 4), width), jnp.int8),
                         jnp.zeros((*lead, -(-width // 4)), jnp.float32),
                         jnp.zeros((*lead, width), jnp.bfloat16))
        state = super().init(spec, batch, slots, dtype) | {"sketch": nothing}
        if self.half_life is not None:
            shape = (*lead, self.flush_every // 2, spec.num_heads // spec.num_kv_heads, width)
            state |= {"recent": jnp.zeros(shape, jnp.bfloat16),
                      "learned_B": jnp.zeros(batch, jnp.int32)}
        return state

    def inherit(self, state, prompt, particles: int, kind):
        """As `Kivi`; and keys are coded by the prompts' queries, if those were learnt alike."""
        state = super().inherit(state, prompt, particles, kind)
        kind, prompt = getattr(kind, "own", kind), getattr(prompt, "own", prompt)
        if type(kind) is not type(self) or any(
                getattr(kind, name) != getattr(self, name) for name in self.learnt_by):
            return state
        copies = lambda x: jnp.repeat(x, particles, axis=0)
        return state | {self.learnt: jax.tree.map(copies, prompt[self.learnt])}

    def read_prompt(self, spec, state, q_BTNH, k_BKTH, valid_BT):
        """The Gram of the prompt's queries, and from it both compensations."""
        count_B = valid_BT.sum(1).astype(jnp.int32)
        gram = query_gram(q_BTNH, spec.num_kv_heads, valid_BT)
        turned = self.seen_ahead(spec, gram)
        center = key_center(k_BKTH, valid_BT) if self.scales == "int8" else None
        state = quantised.with_center(state, center)
        rows = state["sketch"].rows.shape[2]
        state |= {"sketch": sketch(self._weight(spec, turned, count_B), rows)}
        if self.half_life is not None:
            state |= {"learned_B": count_B}
        if self.guard:
            state |= {"sketch": self._guarded(state, gram, k_BKTH[:, :, :TRIAL], count_B)}
        rows_B1 = (count_B * (spec.num_heads // spec.num_kv_heads))[:, None]
        fine = compensation(turned, self.block, self.lam, self.lam_mode, self.rank, rows_B1,
                            self.energy_order)._replace(gram=gram)
        code = lambda k: quantise_keys_squat(k, fine, self.format, self.block, self.guard, center)
        return state, code

    def read_queries(self, spec, state, q_BTNH, start_B, count_B):
        """Of single tokens every second is kept for the next flush; longer pieces are learnt from
        at once, with `half_life` or by a row that was empty and inherited nothing."""
        learns = self.half_life is not None
        if q_BTNH.shape[1] == 1:
            if not learns:
                return state
            old = state["recent"]  # B K W G H
            rows, size = jnp.arange(len(start_B)), old.shape[2]
            slot_B = jnp.where((start_B % 2 == 0) & (count_B > 0), start_B // 2 % size, size)
            q = q_BTNH.reshape(*old.shape[:2], *old.shape[3:]).astype(old.dtype)
            return state | {"recent": old.at[rows, :, slot_B].set(q, mode="drop")}
        first_B = self._knows_nothing(state, start_B) & (count_B > 0)
        share_B = jnp.where(first_B, 1.0, self._share(count_B) if learns else 0.0)
        valid_BT = jnp.arange(q_BTNH.shape[1]) < count_B[:, None]
        turned = lambda: self.seen_ahead(spec, query_gram(q_BTNH, spec.num_kv_heads, valid_BT))
        state = state | {"sketch": self._learn(spec, state, turned, count_B, share_B)}
        return state | {"learned_B": start_B + count_B} if learns else state

    def flush(self, spec, state, due, length_B):
        """As `Kivi`; with `half_life`, C first learns from the queries since the last time."""
        if self.half_life is not None:
            size = state["recent"].shape[2]
            last_B1 = ((length_B - 1) // 2)[:, None]  # token 2 last is the newest that was kept
            token_BW = 2 * (last_B1 - (last_B1 - jnp.arange(size)) % size)
            # a row on hold may have written the slot of its token to come
            fresh_BW = ((token_BW >= state["learned_B"][:, None])
                        & (token_BW > length_B[:, None] - 2 * size))
            share_B = self._share(length_B - state["learned_B"])
            share_B = jnp.where(due & fresh_BW.any(1), share_B, 0.0)
            q_BWNH = state["recent"].swapaxes(1, 2).reshape(-1, size, spec.num_heads, spec.head_dim)
            gram = lambda: self.seen_ahead(spec, query_gram(q_BWNH, spec.num_kv_heads, fresh_BW))
            found = self._learn(spec, state, gram, fresh_BW.sum(1), share_B)
            state = state | {"sketch": found,
                             "learned_B": jnp.where(due, length_B, state["learned_B"])}
        return super().flush(spec, state, due, length_B)

    def later_coder(self, state) -> Compensation:
        """The compensation of the sketch that the state keeps."""
        return sketched_compensation(state["sketch"], self.block, self.energy_order)

    def seen_ahead(self, spec, gram_BKHH) -> jax.Array:
        """The Gram of the same queries at the positions that keys will meet them at."""
        return turn_ahead(gram_BKHH, spec.rope, self.ahead)

    def _knows_nothing(self, state, start_B):
        """Empty rows that have learnt of no queries: those of a fork have, from their prompt."""
        known = [x.reshape(len(start_B), -1).any(1) for x in jax.tree.leaves(state[self.learnt])]
        return (start_B == 0) & ~jnp.stack(known).any(0)

    def _share(self, count_B):
        """How much of C so many tokens replace."""
        assert self.half_life is not None
        return 1 - 0.5 ** (count_B / self.half_life)

    def _weight(self, spec, gram, count_B) -> jax.Array:
        """`lam C` of the metric `I + lam C`."""
        rows_B1 = (count_B * (spec.num_heads // spec.num_kv_heads))[:, None]
        return metric(gram, self.lam, self.lam_mode, self.rank, rows_B1) - jnp.eye(gram.shape[-1])

    def _learn(self, spec, state, gram, count_B, share_B) -> Sketch:
        """C moved towards `gram()`; a row whose share is 0 keeps its sketch, bit for bit."""
        old: Sketch = state["sketch"]

        def learn():
            share = share_B[:, None, None, None]
            weight = share * self._weight(spec, gram(), count_B)
            new = sketch(weight + (1 - share) * sketched_weight(old), old.rows.shape[2])
            moved = lambda x, y: jnp.where((share_B > 0).reshape(-1, *[1] * (x.ndim - 1)), x, y)
            return jax.tree.map(moved, new, old)

        return jax.lax.cond((share_B > 0).any(), learn, lambda: old)

    def _guarded(self, state, gram, k_BKSH, count_B) -> Sketch:
        """The sketch, or nothing where it would have raised the prompt's logit error."""
        group = self.group
        k_BKSH = jnp.pad(k_BKSH, ((0, 0), (0, 0), (0, -k_BKSH.shape[2] % group), (0, 0)))
        whole_BS = jnp.arange(k_BKSH.shape[2]) < (count_B // group * group)[:, None]

        def error(grid: Grid):
            miss = jnp.where(whole_BS[:, None, :, None], grid.value - k_BKSH, 0.0)
            return logit_error(miss[:, :, None], gram)[..., 0]

        comp, center = self.later_coder(state), quantised.center_of(state)
        later = quantise_keys_squat(k_BKSH, comp, self.format, self.block, False, center)
        worse = error(later) > error(quantise_keys(k_BKSH, self.format, center))
        drop = lambda x: jnp.where(worse.reshape(*worse.shape, *[1] * (x.ndim - 2)), 0, x)
        return jax.tree.map(lambda x: drop(x).astype(x.dtype), state["sketch"])


def turn_ahead(gram_BKHH: jax.Array, rope: Rope, ahead: int) -> jax.Array:
    """The Gram of the same queries at later positions: the mean of `R_d C R_d^T`, d = 0 ... ahead.

    R_d turns by d positions. What two planes i, j have in common splits into a part `p + iq` that
    a turn multiplies by `exp(i (w_i - w_j) d)` and a part `r + is` that it multiplies by
    `exp(i (w_i + w_j) d)`; the means of these are Dirichlet kernels.
    """
    half, count = gram_BKHH.shape[-1] // 2, ahead + 1
    w = rope_frequencies(rope, 2 * half)

    def mean(angle):  # of exp(i angle d)
        low = jnp.sin(angle / 2)
        zero = jnp.abs(low) < 1e-6
        size = jnp.where(zero, 1.0, jnp.sin(count * angle / 2) / (count * jnp.where(zero, 1, low)))
        return size * jnp.cos(angle * ahead / 2), size * jnp.sin(angle * ahead / 2)

    def turn(x, y, angle):
        cos, sin = mean(angle)
        return x * cos - y * sin, x * sin + y * cos

    a, b = gram_BKHH[..., :half, :half], gram_BKHH[..., :half, half:]
    c, d = gram_BKHH[..., half:, :half], gram_BKHH[..., half:, half:]
    p, q = turn((a + d) / 2, (c - b) / 2, w[:, None] - w[None])
    r, s = turn((a - d) / 2, (b + c) / 2, w[:, None] + w[None])
    return jnp.concatenate([jnp.concatenate([p + r, s - q], -1),
                            jnp.concatenate([s + q, p - r], -1)], -2)
