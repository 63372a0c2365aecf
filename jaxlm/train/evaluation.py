"""What a model makes of held-out samples: loss, and whole answers that it would give itself."""

import math
from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from jaxlm.core.errors import NumericsError
from jaxlm.core.tree import Params
from jaxlm.models.lm import LM
from jaxlm.train.batches import Batches, place

TIME_CHUNK = 128  # tokens whose logits are held at once


def evaluate(
    lm: LM, params: Params, batches: Batches, mesh: Mesh | None = None, dtype: Any = jnp.float32
) -> dict[str, float]:
    """Loss, perplexity and accuracy over held-out batches.

    Returns: `loss`, the mean over weighed tokens; `perplexity`, its exponential;
      `token_accuracy`, how often the target is the likeliest token; `accuracy`, the share of
      samples where it always is, so that greedy decoding gives just that answer.
    Raises: NumericsError where the loss is not a number.
    """
    samples = max(len(row) for row in batches.rows)
    run = _evaluator(lm, samples, dtype)
    total: dict[str, float] = {}
    waiting: dict[str, jax.Array] = {}
    for i in range(len(batches)):
        sums = run(params, place(batches[i], batches.size, mesh))
        _add(total, waiting)  # one step of lag: the device has the next batch meanwhile
        waiting = sums
    _add(total, waiting)
    loss = total["nll"] / total["tokens"]
    if not math.isfinite(loss):
        raise NumericsError(f"the loss on held-out data is {loss}; the parameters hold what is "
                            "not a number, or the data ids that the model has not")
    return {"loss": loss, "perplexity": math.exp(min(loss, 700.0)),
            "token_accuracy": total["right"] / total["tokens"],
            "accuracy": total["whole"] / total["samples"]}


def _add(total: dict[str, float], sums: dict[str, jax.Array]) -> None:
    """Wait for the sums of a batch."""
    for name, value in sums.items():
        total[name] = total.get(name, 0.0) + float(value)


@lru_cache
def _evaluator(lm: LM, samples: int, dtype: Any) -> Any:
    """The jitted sums of one batch; `samples` is the most that a row holds."""
    def run(params, batch):
        params = jax.tree.map(lambda x: x.astype(dtype), params)
        tokens, weights_BT, segments_BT = batch["tokens"], batch["weights"], batch["segments"]
        final = lm.apply(params, tokens[:, :-1], logits_at=None, segments_BT=segments_BT,
                         positions_BT=batch["positions"]).final
        logprobs_BT, best_BT = _judge(lm, params, final, tokens[:, 1:])
        asked_BT = weights_BT > 0
        number = jnp.arange(1, samples + 1)
        own_BTS = (segments_BT[..., None] == number) & asked_BT[..., None]
        there_BS = own_BTS.any(1)
        failed_BS = (own_BTS & ~best_BT[..., None]).any(1)
        return {"nll": -(weights_BT * logprobs_BT).sum(), "tokens": weights_BT.sum(),
                "right": (weights_BT * best_BT).sum(), "samples": there_BS.sum(),
                "whole": (there_BS & ~failed_BS).sum()}

    return jax.jit(run)


def _judge(lm: LM, params: Params, final_BTD: jax.Array, targets_BT: jax.Array) -> Any:
    """Log-probability of each target and whether it is the likeliest, a slice of time at once."""
    batch, time, dim = final_BTD.shape
    count = -(-time // TIME_CHUNK)
    pad = count * TIME_CHUNK - time

    def pieces(x):
        x = jnp.pad(x, ((0, 0), (0, pad)) + ((0, 0),) * (x.ndim - 2))
        return jnp.moveaxis(x.reshape(batch, count, TIME_CHUNK, *x.shape[2:]), 1, 0)

    def one(part):
        hidden, targets = part
        logits = lm.head(params, hidden)
        own = jnp.take_along_axis(logits, targets[..., None], -1)[..., 0]
        return own - jax.nn.logsumexp(logits, -1), own >= logits.max(-1)

    found = jax.lax.map(one, (pieces(final_BTD), pieces(targets_BT)))
    return tuple(jnp.moveaxis(x, 0, 1).reshape(batch, -1)[:, :time] for x in found)
