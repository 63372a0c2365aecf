"""Continuous batching: a batch of fixed size whose rows join and leave between chunks of steps.

A pool is a `DecodeState`. Every request's numbers (temperature, limits, key) live in its row, so
that one program serves them all, and a row's answer does not depend on its neighbours.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from jaxlm.core.errors import ConfigError, whole
from jaxlm.core.tree import Params
from jaxlm.decode.samplers import Sampler
from jaxlm.decode.state import DecodeState, Kinds, decode, flush_period, prefill
from jaxlm.decode.stop import Stop
from jaxlm.decode.transforms import draw, keep_min_p, keep_top_k, keep_top_p, logprob_of, temper
from jaxlm.models.lm import LM

TOPS = 20  # alternatives recorded at each token, where a row asks for any
NEUTRAL = {"temperature": 1.0, "top_k": np.inf, "top_p": 1.0, "min_p": 0.0, "tops": 0.0}


@struct.dataclass
class Asked:
    """What rows ask of the sampler, each float32 (B,); see `Categorical` for the ranges.

    `top_k` infinite, `top_p` 1 and `min_p` 0 change nothing. tops: alternatives to record.
    """

    temperature: Any
    top_k: Any
    top_p: Any
    min_p: Any
    tops: Any


@struct.dataclass
class Recorded:
    """A row sampler's state: what is asked, and what a chunk of k steps drew.

    at_B: int32, tokens drawn in this chunk. logprob_Bk: float32, of the drawn tokens under the
    model itself. top_token_BkN, top_logprob_BkN: the likeliest tokens, where any row asks.
    """

    asked: Asked
    at_B: jax.Array
    logprob_Bk: jax.Array
    top_token_BkN: jax.Array
    top_logprob_BkN: jax.Array


@struct.dataclass
class RowSampler:
    """`Categorical` with each row's numbers in its state, which join and leave with the row.

    Args: chunk: static, steps between two moments at which rows join and leave.
    """

    chunk: int = struct.field(pytree_node=False, default=8)

    def init(self, batch: int, vocab: int) -> Recorded:
        """Nothing asked, nothing drawn."""
        size = (batch, self.chunk, min(TOPS, vocab))
        asked = Asked(**{k: jnp.full(batch, v, jnp.float32) for k, v in NEUTRAL.items()})
        return Recorded(asked, jnp.zeros(batch, jnp.int32), jnp.zeros(size[:2], jnp.float32),
                        jnp.zeros(size, jnp.int32), jnp.zeros(size, jnp.float32))

    def step(self, keys_B, logits_BV, state):
        """One draw a row, and its record.

        The cuts and the alternatives are computed in steps where a row asks for them. A branch is
        a wall to the compiler: what comes after it is the same program either way, to the bit.
        """
        changed_BV, cold_B = self.transform(logits_BV, state)
        token_B = draw(keys_B, changed_BV, cold_B)
        return token_B, logprob_of(changed_BV, token_B), self.record(logits_BV, token_B, state)

    def logprob(self, logits_BV, token_B, state):
        """`log softmax(l')[token]`, with l' the logits drawn from."""
        return logprob_of(self.transform(logits_BV, state)[0], token_B)

    def transform(self, logits_BV: jax.Array, state: Recorded) -> tuple[jax.Array, jax.Array]:
        """The logits drawn from, float32 (B, V), and which rows are cold."""
        asked = state.asked
        l, cold_B = temper(logits_BV.astype(jnp.float32), asked.temperature)
        cut = lambda: keep_min_p(keep_top_p(keep_top_k(l, asked.top_k), asked.top_p), asked.min_p)
        any_cut = jnp.any(jnp.isfinite(asked.top_k) | (asked.top_p < 1) | (asked.min_p > 0))
        return jax.lax.cond(any_cut, cut, lambda: l), cold_B

    def record(self, logits_BV: jax.Array, token_B: jax.Array, state: Recorded) -> Recorded:
        """The state with the drawn token's own log-probability, and its alternatives."""
        many = state.top_token_BkN.shape[-1]

        def alternatives():
            best_BN, token_BN = jax.lax.top_k(logits_BV.astype(jnp.float32), many)
            return best_BN - jax.nn.logsumexp(logits_BV, -1, keepdims=True), token_BN

        nothing = lambda: (jnp.zeros((len(token_B), many)),
                           jnp.zeros((len(token_B), many), jnp.int32))
        top_BN, name_BN = jax.lax.cond(jnp.any(state.asked.tops > 0), alternatives, nothing)
        rows = jnp.arange(len(token_B))
        put = lambda old, new: old.at[rows, state.at_B].set(new, mode="drop")
        return state.replace(  # type: ignore[attr-defined]
            at_B=state.at_B + 1, top_token_BkN=put(state.top_token_BkN, name_BN),
            logprob_Bk=put(state.logprob_Bk, logprob_of(logits_BV, token_B)),
            top_logprob_BkN=put(state.top_logprob_BkN, top_BN),
        )


@struct.dataclass
class Joining:
    """What P rows are to become as they join; numpy or jax arrays that lead with P.

    seed: uint32 (P, 2), high word first. choice: int32, which of a request's answers this is: row
    keys are `fold_in(key(seed), choice)`, those of `generate` for one key. length: int32, tokens
    of the row to keep. limit: int32, tokens it may hold in all. asked: of the sampler.
    """

    seed: Any
    choice: Any
    length: Any
    limit: Any
    asked: Asked


@struct.dataclass
class Chunk:
    """What rows drew in one chunk: the first `count_B` of k tokens. See `Recorded`."""

    token_Bk: jax.Array
    logprob_Bk: jax.Array
    count_B: jax.Array
    done_B: jax.Array
    top_token_BkN: jax.Array
    top_logprob_BkN: jax.Array


def empty_pool(
    lm: LM, params: Params, sampler: Sampler, kinds: Kinds, rows: int, slots: int
) -> DecodeState:
    """A pool without requests: every row is free.

    Args: rows, slots: static; slots are the tokens a row can hold in all.
    Raises: ConfigError where the sampler's chunk is not whole periods of the kinds' flushes: rows
      join between chunks, and are to be flushed at their own steps whenever they join.
    """
    period = flush_period(kinds)
    if isinstance(sampler, RowSampler) and period is not None and sampler.chunk % period:
        raise ConfigError(f"chunk is {sampler.chunk}; expected a multiple of {period}, the steps "
                          "between flushes of this cache")
    whole("rows", rows)
    one = jnp.ones(rows, jnp.int32)
    keys = jax.random.split(jax.random.key(0), rows)
    state = prefill(lm, params, sampler, jnp.zeros((rows, 1), jnp.int32), one, kinds, slots, keys)
    return leave(state, jnp.ones(rows, bool))


def join(
    state: DecodeState, fresh: DecodeState, source_P: jax.Array, rows_P: jax.Array,
    count: jax.Array, joining: Joining,
) -> DecodeState:
    """Put rows of one state into rows of another, in place where that one is donated.

    Args:
      state: the pool. fresh: rows of the same sizes and kinds.
      source_P, rows_P: int32, row `source_P[i]` of `fresh` becomes row `rows_P[i]` of `state`, for
        i below `count`; the other entries are not read, and their `rows_P` is the pool's size.
    """
    def put(i, leaves):
        copy = lambda big, small: jax.lax.dynamic_update_slice_in_dim(
            big, jax.lax.dynamic_slice_in_dim(small, source_P[i], 1), rows_P[i], 0)
        return jax.tree.map(copy, leaves, moved(fresh))

    state = state.replace(**jax.lax.fori_loop(0, count, put, moved(state)))
    put_small = lambda old, new: old.at[rows_P].set(new, mode="drop")
    return state.replace(
        keys_B=put_small(state.keys_B, jax.vmap(row_key)(joining.seed, joining.choice)),
        length_B=put_small(state.length_B, joining.length),
        limit_B=put_small(state.limit_B, joining.limit),
        done_B=put_small(state.done_B, joining.length >= joining.limit),
        hold_B=put_small(state.hold_B, False), match_B2=put_small(state.match_B2, 0),
        sampler=state.sampler.replace(
            asked=jax.tree.map(put_small, state.sampler.asked, joining.asked)),
    )


def leave(state: DecodeState, rows_B: jax.Array) -> DecodeState:
    """Free the rows where `rows_B` (bool): nothing is drawn in them, and reads are not longer for
    what they held."""
    neutral = lambda old, value: jnp.where(rows_B, jnp.float32(value), old)
    asked = Asked(**{k: neutral(getattr(state.sampler.asked, k), v) for k, v in NEUTRAL.items()})
    return state.replace(
        done_B=state.done_B | rows_B, length_B=jnp.where(rows_B, 0, state.length_B),
        sampler=state.sampler.replace(asked=asked),
    )


def advance(
    lm: LM, params: Params, sampler: RowSampler, state: DecodeState, stop: Stop
) -> tuple[DecodeState, Chunk]:
    """Up to `sampler.chunk` tokens in every live row.

    Flushes are counted anew: a chunk is whole periods, so that only a batch whose rows are all
    done stands between two flushes, and those rows leave.
    """
    start_B, steps = state.length_B, jnp.arange(sampler.chunk)
    recorded = state.sampler.replace(at_B=jnp.zeros_like(start_B))
    state = state.replace(sampler=recorded, since_flush=jnp.zeros((), jnp.int32))
    state = decode(lm, params, sampler, state, stop, sampler.chunk)
    at_Bk = jnp.minimum(start_B[:, None] + steps, state.tokens_BS.shape[1] - 1)
    drawn = state.sampler
    return state, Chunk(
        jnp.take_along_axis(state.tokens_BS, at_Bk, 1), drawn.logprob_Bk,
        state.length_B - start_B, state.done_B, drawn.top_token_BkN, drawn.top_logprob_BkN,
    )


def take(state: DecodeState, row: jax.Array) -> tuple[DecodeState, jax.Array]:
    """One row as a state of its own, and whether its logits are finite."""
    one = lambda x: jax.lax.dynamic_slice_in_dim(x, row, 1)
    logits_1V = one(state.logits_BV)
    return state.replace(**jax.tree.map(one, moved(state))), jnp.isfinite(logits_1V).all()


def moved(state: DecodeState) -> dict[str, Any]:
    """The leaves that lead with rows, large ones; what `join` sets for itself is left out."""
    names = ("tokens_BS", "logits_BV", "logprob_BS", "caches", "length_B", "limit_B", "done_B",
             "hold_B", "match_B2", "keys_B", "sampler")
    return {name: getattr(state, name) for name in names}


def row_key(seed_2: jax.Array, choice: jax.Array) -> jax.Array:
    """The key of one answer to a request: what `split(key(seed), n)[choice]` is.

    >>> key = row_key(jnp.array([0, 3], jnp.uint32), 1)
    >>> bool(key == jax.random.split(jax.random.key(3), 2)[1])
    True
    """
    low, high = jax.random.key(seed_2[1]), seed_2[0]
    words = jnp.where(high > 0, jax.random.key_data(jax.random.fold_in(low, high)),
                      jax.random.key_data(low))
    return jax.random.fold_in(jax.random.wrap_key_data(words), choice)


def seed_words(seed: int) -> np.ndarray:
    """A 64-bit seed, signed or not, as uint32 (2,), high word first.

    >>> seed_words(-1).tolist(), seed_words(3).tolist()
    ([4294967295, 4294967295], [0, 3])
    """
    seed = whole("seed", seed, -2**63, 2**64 - 1) % 2**64
    return np.array([seed >> 32, seed & 0xFFFFFFFF], np.uint32)


empty_pool_jit = jax.jit(empty_pool, static_argnames=("lm", "sampler", "kinds", "rows", "slots"))
join_jit = jax.jit(join, donate_argnames="state")
leave_jit = jax.jit(leave, donate_argnames="state")
take_jit = jax.jit(take)
advance_jit = partial(jax.jit, static_argnames=("lm", "sampler"), donate_argnames="state")(advance)
