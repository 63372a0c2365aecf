"""Log-probabilities of target tokens without the full matrix of logits."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from jaxlm.core.errors import whole
from jaxlm.models.attention import NEG
from jaxlm.models.layers import against_rows


def token_logprobs(
    hidden_BTD: jax.Array,
    table_VD: jax.Array,
    targets_BT: jax.Array,
    shape_logits: Callable[[jax.Array], jax.Array] = lambda logits: logits,
    chunk: int = 8192,
) -> jax.Array:
    """`log softmax(f(h W^T))[target]`, one slice of the vocabulary at a time.

    `log p_y = l_y - log sum_v exp(l_v)`, the sum carried over slices as a running peak and total.

    Args:
      hidden_BTD: final hidden states, any float dtype.
      table_VD: output weights.
      targets_BT: int32 ids in [0, V); any other gives NaN.
      shape_logits: elementwise scale and cap on float32 logits.
      chunk: vocabulary rows held at once; at least 1.
    Returns: float32 (B, T), at most 0. The backward pass recomputes each slice.
    """
    vocab, dim = table_VD.shape
    chunk = min(whole("chunk", chunk), vocab)
    count = -(-vocab // chunk)
    slices = jnp.pad(table_VD, ((0, count * chunk - vocab), (0, 0))).reshape(count, chunk, dim)
    # a matrix from the start: reshaped in each slice, a TPU would move more bytes
    hidden, targets = hidden_BTD.reshape(-1, dim), targets_BT.reshape(-1)

    @jax.checkpoint
    def fold(carry, inputs):
        peak, total, target_logit = carry
        index, rows = inputs
        ids = index * chunk + jnp.arange(chunk)
        logits = shape_logits(against_rows(hidden, rows))
        logits = jnp.where(ids < vocab, logits, NEG)
        new_peak = jnp.maximum(peak, jax.lax.stop_gradient(logits).max(-1))
        total = total * jnp.exp(peak - new_peak) + jnp.exp(logits - new_peak[..., None]).sum(-1)
        local = targets - index * chunk
        here = (local >= 0) & (local < chunk) & (targets < vocab)
        found = jnp.take_along_axis(logits, jnp.clip(local, 0, chunk - 1)[..., None], -1)[..., 0]
        return (new_peak, total, jnp.where(here, found, target_logit)), None

    start = tuple(jnp.full(len(targets), x, jnp.float32) for x in (NEG, 0.0, jnp.nan))
    (peak, total, target_logit), _ = jax.lax.scan(fold, start, (jnp.arange(count), slices))
    return (target_logit - peak - jnp.log(total)).reshape(targets_BT.shape)
