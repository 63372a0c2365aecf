"""DecodeState and the four functions on it: prefill, extend, decode_step, decode."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from jaxlm.cache.base import CacheKind, State, init_caches
from jaxlm.cache.policy import read_kinds
from jaxlm.core.errors import ConfigError, ShapeError
from jaxlm.core.hosts import readable
from jaxlm.core.tree import Params
from jaxlm.decode.lend import among, check_width, first_live, keep, sampler_of, spread, take
from jaxlm.decode.samplers import Sampler, check_sampler, read_text
from jaxlm.decode.stop import NEVER, Stop
from jaxlm.models.lm import LM, check_shape, check_tokens

Kinds = tuple[CacheKind | None, ...]


class DecodeState(struct.PyTreeNode):
    """Everything that a batch of growing texts carries; every leaf but `since_flush` leads with B.

    tokens_BS: int32, the text so far, prompt included; slots beyond `length_B` are unspecified.
    length_B: int32, tokens in the caches. logits_BV: float32, the next token's.
    logprob_BS: float32, each drawn token's log-probability under the sampler; 0 in the prompt.
    limit_B: int32, tokens the row may hold in all. done_B: rows that stopped or are full.
    hold_B: rows that wait behind a delimiter. match_B2: int32, where the stop rule's matchers
    stand in the text drawn so far. keys_B: a key a row, never moved with the text.
    since_flush: int32, steps since quantised kinds were flushed.
    """

    tokens_BS: jax.Array
    length_B: jax.Array
    logits_BV: jax.Array
    logprob_BS: jax.Array
    limit_B: jax.Array
    done_B: jax.Array
    hold_B: jax.Array
    match_B2: jax.Array
    keys_B: jax.Array
    caches: tuple[State, ...]
    sampler: Any
    since_flush: jax.Array
    kinds: Kinds = struct.field(pytree_node=False)


def layer_kinds(lm: LM, cache: CacheKind | Kinds | str, params: Params | None = None) -> Kinds:
    """One kind a layer; None where the plan skips attention. `params`: see `read_policy`."""
    layers = lm.config.num_layers
    found = read_kinds(cache, lm.config, params)
    kinds = found if isinstance(found, tuple) else (found,) * layers
    if len(kinds) != layers:
        raise ConfigError(f"cache has {len(kinds)} kinds for {layers} layers; give one a layer")
    if bare := [i for i in lm.attention_layers if kinds[i] is None]:
        raise ConfigError(f"cache has no kind for layers {bare}, which attend; give one a layer")
    return tuple(kinds[i] if i in lm.attention_layers else None for i in range(layers))


def prefill(
    lm: LM, params: Params, sampler: Sampler, tokens_BT: jax.Array, lengths_B: jax.Array,
    cache: CacheKind | Kinds | str, slots: int, keys_B: jax.Array,
) -> DecodeState:
    """Read the prompts and stand ready to draw the first token.

    Args:
      tokens_BT: int32 ids, right-padded; `compact` turns left padding into this.
      lengths_B: int32, 1 to T.
      cache: one kind, or one a layer; or a name such as "kivi2".
      slots: static, tokens a row can hold in all.
      keys_B: typed keys, one a row.
    Raises: ShapeError when the prompts do not fit, or the arrays do not fit together.
      A length outside 1 to T gives NaN logits.
    """
    check_sampler(sampler)
    batch, time = check_tokens(tokens_BT)
    check_shape("lengths_B", lengths_B, (batch,))
    check_shape("keys_B", keys_B, (batch,))
    if time > slots:
        raise ShapeError(f"prompts are {time} tokens wide but the cache holds {slots}; raise slots")
    kinds = layer_kinds(lm, cache, params)
    lengths_B = lengths_B.astype(jnp.int32)
    tokens_BT = jnp.where(jnp.arange(time) < lengths_B[:, None], tokens_BT, 0)  # any padding
    dtype = params["embed"]["table"].dtype
    specs = tuple(lm.config.attention(i) for i in range(lm.config.num_layers))
    caches = init_caches(kinds, specs, batch, slots, dtype)
    pos_BT = jnp.broadcast_to(jnp.arange(time, dtype=jnp.int32), (batch, time))

    def read(kind, spec, state, q, k, v):
        whole = lambda state, q, k, v: kind.prefill(spec, state, q, k, v, pos_BT, lengths_B)
        if kind.flush_every is None:
            return whole(state, q, k, v)
        return in_turn(whole, lengths_B, state, q, k, v)

    hidden, caches = cached_run(lm, params, tokens_BT, kinds, caches, read)
    logits = lm.head_at(params, hidden, "last", lengths_B)[:, 0]
    return DecodeState(
        tokens_BS=jnp.zeros((batch, slots), jnp.int32).at[:, :time].set(tokens_BT),
        length_B=lengths_B.astype(jnp.int32), logits_BV=logits,
        logprob_BS=jnp.zeros((batch, slots), jnp.float32),
        limit_B=jnp.full(batch, slots, jnp.int32), done_B=lengths_B >= slots,
        hold_B=jnp.zeros(batch, bool), match_B2=jnp.zeros((batch, 2), jnp.int32),
        keys_B=keys_B, caches=caches,
        sampler=read_text(sampler.init(batch, lm.config.vocab_size), tokens_BT, lengths_B),
        since_flush=jnp.zeros((), jnp.int32), kinds=kinds,
    )


def extend(
    lm: LM, params: Params, state: DecodeState, tokens_BT: jax.Array, counts_B: jax.Array,
    logits_at: jax.Array | str | None = None,
) -> tuple[DecodeState, jax.Array | None]:
    """Append ragged pieces of text to a live state: chat turns, chunked prefill, re-scoring.

    Args:
      tokens_BT: int32, right-padded. counts_B: tokens of each row to append, 0 to T.
      logits_at: "all", or int32 (B, M) indices into T, for logits besides the next token's.
    Returns: the state, live again where tokens came, and float32 logits (B, M, V) or None.
      In a jit a row that would outgrow its cache, or T, gets NaN logits, never wrong ones; so
      does an index that is not of a token that the row appended.
    Raises: ShapeError for arrays that do not fit together; outside a jit also for such a row.
    """
    batch, time = check_tokens(tokens_BT)
    slots = state.tokens_BS.shape[1]
    check_shape("tokens_BT", tokens_BT, (len(state.length_B), time))
    check_shape("counts_B", counts_B, (batch,))
    check_room(state, counts_B, time)
    start_B, counts_B = state.length_B, counts_B.astype(jnp.int32)
    tokens_BT = jnp.where(jnp.arange(time) < counts_B[:, None], tokens_BT, 0)  # any padding
    pos_BT = start_B[:, None] + jnp.arange(time, dtype=jnp.int32)
    fits_B = (start_B + counts_B <= state.limit_B) & (counts_B >= 0) & (counts_B <= time)
    read_B = counts_B > 0
    kept_B = jnp.where(fits_B, counts_B, 0)  # a refused row's tokens must not reach its codes
    hidden, caches = cached_run(
        lm, params, tokens_BT, state.kinds, state.caches,
        lambda kind, spec, cache, q, k, v: kind.extend(
            spec, cache, q, k, v, pos_BT, start_B, kept_B
        ),
    )
    new_BV = lm.head_at(params, hidden, "last", counts_B)[:, 0]
    new_BV = jnp.where(read_B[:, None], new_BV, state.logits_BV)
    rows = jnp.arange(batch)[:, None]
    slot_BT = jnp.where(jnp.arange(time) < counts_B[:, None], pos_BT, slots)
    length_B = jnp.where(fits_B, start_B + counts_B, start_B)
    asked = None if logits_at is None else lm.head_at(params, hidden, logits_at, counts_B)
    state = state.replace(
        tokens_BS=state.tokens_BS.at[rows, slot_BT].set(tokens_BT, mode="drop"),
        logprob_BS=state.logprob_BS.at[rows, slot_BT].set(0.0, mode="drop"),
        length_B=length_B, logits_BV=jnp.where(fits_B[:, None], new_BV, jnp.nan),
        done_B=jnp.where(read_B, length_B >= state.limit_B, state.done_B),
        hold_B=state.hold_B & ~read_B, match_B2=jnp.where(read_B[:, None], 0, state.match_B2),
        sampler=read_text(state.sampler, tokens_BT, counts_B), caches=caches,
    )
    if asked is not None:
        asked = jnp.where(fits_B[:, None, None], asked, jnp.nan)
    return state, asked


def check_room(state: DecodeState, counts_B: jax.Array, time: int) -> None:
    """ShapeError for rows that would outgrow their caches, or counts that are not of T tokens,
    where these numbers can be looked at here and now."""
    given = state.length_B, state.limit_B, counts_B
    if not all(map(readable, given)):
        return
    length_B, limit_B, count_B = map(np.asarray, given)
    lost_B = (length_B + count_B > limit_B) | (count_B < 0) | (count_B > time)
    if lost_B.any():
        row = int(lost_B.argmax())
        raise ShapeError(f"row {row} holds {length_B[row]} of {limit_B[row]} tokens and cannot "
                         f"take {count_B[row]} of a piece of {time}; expected 0 to {time} that "
                         "fit: prefill with more slots, or append fewer")


def decode_step(
    lm: LM, params: Params, sampler: Sampler, state: DecodeState, stop: Stop = NEVER
) -> DecodeState:
    """Draw exactly one token in every live row, and read it into the caches."""
    state = draw_and_read(lm, params, sampler, state, stop)
    period = flush_period(state.kinds)
    return state if period is None else flush(lm, state, state.since_flush >= period)


def decode(
    lm: LM, params: Params, sampler: Sampler, state: DecodeState, stop: Stop = NEVER,
    max_new: jax.Array | int = 1, until: Callable[[DecodeState], jax.Array] | None = None,
    width: int | None = None,
) -> DecodeState:
    """Draw up to `max_new` tokens in every live row, as one loop on the device.

    Quantised kinds are flushed by an outer loop: a flush inside every step, even a conditional
    one, would copy the codes. `max_new` may be traced. `until`: also end once it is true (bool).
    `width`: static, rows that an iteration computes, the first live ones; `max_new` then bounds
    iterations. Rows that do not work are still attended to, with queries of zero.
    Raises: ConfigError for a width that is no whole number of at least 1.
    """
    return iterate(lm, params, sampler, state, stop, max_new, until, width)[1]


def iterate(
    lm: LM, params: Params, sampler: Sampler, state: DecodeState, stop: Stop,
    max_new: jax.Array | int, until: Callable[[DecodeState], jax.Array] | None = None,
    width: int | None = None,
) -> tuple[jax.Array, DecodeState]:
    """`decode`, and how many iterations it took, int32."""
    period, width = flush_period(state.kinds), check_width(width, len(state.length_B))

    def more(carry):
        drawn, state = carry
        go_on = (drawn < max_new) & ~jnp.all(state.done_B | state.hold_B)
        return go_on if until is None else go_on & ~until(state)

    def step(carry):
        drawn, state = carry
        return drawn + 1, draw_and_read(lm, params, sampler, state, stop, width)

    carry = (jnp.zeros((), jnp.int32), state)
    if period is None:
        return jax.lax.while_loop(more, step, carry)

    def round_of_steps(carry):
        within = lambda inner: more(inner) & (inner[1].since_flush < period)
        drawn, state = jax.lax.while_loop(within, step, carry)
        return drawn, flush(lm, state, state.since_flush >= period)

    return jax.lax.while_loop(more, round_of_steps, carry)


def draw_and_read(
    lm: LM, params: Params, sampler: Sampler, state: DecodeState, stop: Stop,
    width: int | None = None,
) -> DecodeState:
    """One token a live row, or in `width` of them, without the flush; the others keep their text,
    length and logits. A kind steps in all rows: in those that do not draw, it writes beyond what
    they hold."""
    batch, slots = state.tokens_BS.shape
    live_B, at_B = ~(state.done_B | state.hold_B), state.length_B
    some = first_live(live_B, width)
    live_B = among(live_B, some)
    keys_W = jax.vmap(jax.random.fold_in)(take(state.keys_B, some), take(at_B, some))
    token_W, logprob_W, sampler_W = sampler_of(sampler, some, batch).step(
        keys_W, take(state.logits_BV, some), take(state.sampler, some))

    def attend(kind, spec, cache, *qkv):
        out, lse, cache = kind.step(spec, cache, *spread(qkv, some, batch), at_B, at_B)
        return take(out, some), lse, cache

    hidden, caches = cached_run(lm, params, token_W[:, None], state.kinds, state.caches, attend)
    logits_WV = lm.head(params, hidden)[:, 0]
    length_B = at_B + live_B
    token_B, logprob_B = spread((token_W, logprob_W), some, batch)
    match_B2, stopped_B, held_B = stop.step(state.match_B2, token_B)
    rows, slot_B = jnp.arange(batch), jnp.where(live_B, at_B, slots)
    return state.replace(
        tokens_BS=state.tokens_BS.at[rows, slot_B].set(token_B, mode="drop"),
        logprob_BS=state.logprob_BS.at[rows, slot_B].set(logprob_B, mode="drop"),
        length_B=length_B, logits_BV=keep(logits_WV, state.logits_BV, live_B, some),
        done_B=state.done_B | (live_B & stopped_B) | (length_B >= state.limit_B),
        hold_B=state.hold_B | (live_B & held_B),
        match_B2=keep(match_B2, state.match_B2, live_B, None), caches=caches,
        sampler=keep(sampler_W, state.sampler, live_B, some),
        since_flush=state.since_flush + 1,
    )


def flush(lm: LM, state: DecodeState, due: jax.Array) -> DecodeState:
    """Where due, let every layer compress what waits in full precision."""
    caches = tuple(
        cache if kind is None else kind.flush(lm.config.attention(i), cache, due, state.length_B)
        for i, (kind, cache) in enumerate(zip(state.kinds, state.caches, strict=True))
    )
    return state.replace(caches=caches, since_flush=jnp.where(due, 0, state.since_flush))


def flush_period(kinds: Kinds) -> int | None:
    """Steps between flushes that suit every layer; None when no kind needs one."""
    periods = [kind.flush_every for kind in kinds if kind is not None and kind.flush_every]
    return min(periods) if periods else None


def in_turn(
    function: Callable[..., Any], lengths_B: jax.Array, state: State, *qkv: jax.Array,
) -> Any:
    """`function(state, *qkv)`, a layer's (out, log_sum_exp, state), over before the next begins.

    Nothing reads codes before the text is drawn, so a compiler codes all layers last, and holds
    what that works with for each of them. A branch, which of them it cannot know, ends first.
    """
    shapes = jax.eval_shape(function, state, *qkv)
    nothing = lambda *_: jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    return jax.lax.cond((lengths_B != 0).any(), function, nothing, state, *qkv)


def cached_run(
    lm: LM, params: Params, tokens_BT: jax.Array, kinds: Kinds, caches: tuple[State, ...],
    operation: Callable[..., Any],
) -> tuple[jax.Array, tuple[State, ...]]:
    """Run the decoder with `operation(kind, spec, state, q, k, v)` as every layer's attention."""
    new = list(caches)

    def attend(layer, q, k, v):
        spec = lm.config.attention(layer)
        out, _, new[layer] = operation(kinds[layer], spec, caches[layer], q, k, v)
        return out

    return lm.run(params, tokens_BT, attend), tuple(new)


def compact(tokens_BT: jax.Array, valid_BT: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Move each row's valid tokens to the front, in order: left padding becomes right padding.

    Returns: tokens (B, T), with 0 behind the valid ones, and lengths (B,).
    """
    order = jnp.argsort(~valid_BT, axis=1, stable=True)
    lengths_B = valid_BT.sum(1).astype(jnp.int32)
    moved = jnp.take_along_axis(tokens_BT, order, axis=1)
    return jnp.where(jnp.arange(tokens_BT.shape[1]) < lengths_B[:, None], moved, 0), lengths_B
