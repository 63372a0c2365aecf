"""What samplers are made of: small pure functions from logits to logits, every number per row.

A removed token gets `NEG`. Values broadcast from a scalar to (B,), and all of them may be traced,
so that a sweep compiles once. NaN logits are never repaired: they end as a NaN log-probability.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxlm.core.errors import ShapeError
from jaxlm.models.attention import NEG


def per_row(name: str, value: Any, batch: int) -> jax.Array:
    """A number, or one a row, as float32 (B,)."""
    array = jnp.asarray(value, jnp.float32)
    if array.shape not in ((), (1,), (batch,)):
        raise ShapeError(f"{name} is {array.shape}; expected one number, or one for {batch} rows")
    return jnp.broadcast_to(array, (batch,))


def temper(logits_BV: jax.Array, temperature: Any) -> tuple[jax.Array, jax.Array]:
    """`(l - max l) / temperature`, and which rows are cold (0: only the maximum is taken off).

    Without the maximum taken off, a small temperature would overflow.
    """
    value_B = per_row("temperature", temperature, logits_BV.shape[0])
    cold_B = value_B <= 0
    peak_B1 = jnp.max(logits_BV, -1, keepdims=True)
    return (logits_BV - peak_B1) / jnp.where(cold_B, 1.0, value_B)[:, None], cold_B


def add_bias(logits_BV: jax.Array, bias: Any) -> jax.Array:
    """`l_v + b_v`; bias (V,) or (B, V), -inf to ban a token."""
    bias = jnp.asarray(bias, jnp.float32)
    if bias.shape not in (logits_BV.shape[1:], logits_BV.shape):
        raise ShapeError(f"logit_bias is {bias.shape}; expected {logits_BV.shape[1:]} or "
                         f"{logits_BV.shape}, as the logits")
    return logits_BV + bias


def penalise(logits_BV: jax.Array, seen_BV: jax.Array, penalty: Any) -> jax.Array:
    """`l_v / penalty` where positive, `l_v * penalty` where negative, for tokens seen before.

    Source: 1909.05858, section 4.1, with the sign handled as in published implementations.
    """
    value_B1 = per_row("repetition_penalty", penalty, logits_BV.shape[0])[:, None]
    changed = jnp.where(logits_BV > 0, logits_BV / value_B1, logits_BV * value_B1)
    return jnp.where(seen_BV, changed, logits_BV)


def keep_top_k(logits_BV: jax.Array, k: Any) -> jax.Array:
    """The k largest logits, and whatever ties with the k-th. Source: 1805.04833, section 5.4."""
    k_B = per_row("top_k", k, logits_BV.shape[0])
    kept = shortest_top(logits_BV, lambda top_BV: top_BV.sum(-1) >= k_B)
    return jnp.where(kept, logits_BV, NEG)


def keep_top_p(logits_BV: jax.Array, p: Any) -> jax.Array:
    """The fewest tokens, likeliest first, whose mass reaches p, and ties. Source: 1904.09751."""
    p_B = per_row("top_p", p, logits_BV.shape[0])
    mass_BV = jax.nn.softmax(logits_BV, -1)
    kept = shortest_top(
        logits_BV, lambda top_BV: jnp.sum(mass_BV, -1, where=top_BV) >= p_B
    )
    return jnp.where(kept | (p_B >= 1.0)[:, None], logits_BV, NEG)  # rounding must not cut at 1


def keep_min_p(logits_BV: jax.Array, min_p: Any) -> jax.Array:
    """Tokens at least `min_p` times as likely as the likeliest. Source: 2407.01082, section 3."""
    value_B = per_row("min_p", min_p, logits_BV.shape[0])
    floor_B = jnp.max(logits_BV, -1) + jnp.log(jnp.maximum(value_B, 1e-38))
    cut_BV = (logits_BV < floor_B[:, None]) & (value_B > 0)[:, None]
    return jnp.where(cut_BV, NEG, logits_BV)


def keep_unsurprising(logits_BV: jax.Array, bits: Any) -> jax.Array:
    """Tokens with `-log2 p_v <= bits`, the likeliest always. Source: 2007.14966, section 5."""
    logprob_BV = jax.nn.log_softmax(logits_BV, -1)
    best_B = jnp.max(logprob_BV, -1)
    floor_B = jnp.minimum(-jnp.log(2.0) * per_row("bits", bits, logits_BV.shape[0]), best_B)
    return jnp.where(logprob_BV < floor_B[:, None], NEG, logits_BV)


def shortest_top(
    logits_BV: jax.Array, enough: Callable[[jax.Array], jax.Array]
) -> jax.Array:
    """The smallest set `{v: l_v >= threshold}` that is `enough`; everything if none is.

    Args: enough: bool (B, V) -> bool (B,), true for every superset of a set it is true for.
    Returns: bool (B, V).

    The threshold is found bit by bit, from the highest of 32, over integers that order as the
    floats do: 32 passes and no sort, which costs several times more
    (`experiments/bench_samplers.py`).
    """
    order_BV = _ordered_bits(logits_BV)

    def settle(bit, threshold_B):
        raised_B = threshold_B | (jnp.uint32(1) << (31 - bit).astype(jnp.uint32))
        return jnp.where(enough(order_BV >= raised_B[:, None]), raised_B, threshold_B)

    start_B = jnp.zeros(logits_BV.shape[0], jnp.uint32)
    threshold_B = jax.lax.fori_loop(0, 32, settle, start_B)
    return order_BV >= jnp.minimum(threshold_B, jnp.max(order_BV, -1))[:, None]  # never empty


def _ordered_bits(x: jax.Array) -> jax.Array:
    """uint32 in the order of the floats: negative ones reversed, positive ones above them."""
    x = jnp.where(x == 0, 0.0, x.astype(jnp.float32))  # -0.0 ties with 0.0
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    return jnp.where(bits >> 31 == 1, ~bits, bits | jnp.uint32(1 << 31))


def draw(keys_B: jax.Array, logits_BV: jax.Array, cold_B: jax.Array) -> jax.Array:
    """A token a row by Gumbel-max, each row with its own key; cold rows take the argmax."""
    noise_BV = jax.vmap(lambda key: jax.random.gumbel(key, logits_BV.shape[1:]))(keys_B)
    drawn_BV = jnp.where(cold_B[:, None], logits_BV, logits_BV + noise_BV)
    return jnp.argmax(drawn_BV, -1).astype(jnp.int32)


def logprob_of(logits_BV: jax.Array, token_B: jax.Array) -> jax.Array:
    """`log softmax(l)[token]`, float32; of a removed token hugely negative, but finite.

    NaN where a row's logits hold a NaN or leave no token at all: a number there would be a lie.
    """
    logits_BV = jnp.maximum(logits_BV.astype(jnp.float32), NEG)
    chosen_B = jnp.take_along_axis(logits_BV, token_B[:, None], -1)[:, 0]
    some_B = jnp.max(logits_BV, -1) > NEG  # false for NaN too
    return jnp.where(some_B, chosen_B - jax.nn.logsumexp(logits_BV, -1), jnp.nan)
