"""Which layers bear which cache: sensitivities on a calibration text, then a Pareto front.

A layer's sensitivity to a kind is the relative error of its attention's output with all other
layers exact. Layers are taken to add up, so that the front of summed error against bytes is had
by upgrading, again and again, the layer that gains most for its bytes. Points of the front are
then measured whole: the divergence of the next token's distribution from full precision's.
After KVTuner (arXiv 2502.04420), which searches over pairs of bit widths.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm.cache.base import CacheKind
from jaxlm.cache.dense import Dense
from jaxlm.cache.parse import cache_name
from jaxlm.core.errors import ConfigError, NumericsError, ShapeError
from jaxlm.core.tree import Params, nbytes
from jaxlm.decode.samplers import Greedy
from jaxlm.decode.state import Kinds, extend, prefill
from jaxlm.models.attention import Mask, attention
from jaxlm.models.layers import apply_rope
from jaxlm.models.lm import LM


@dataclass(frozen=True)
class Policy:
    """One kind a layer; bytes of the caches of one row; summed sensitivity; measured divergence."""

    kinds: tuple[CacheKind, ...]
    bytes: int
    error: float
    divergence: float | None = None


def tune(
    lm: LM, params: Params, tokens_BT: jax.Array, candidates: Sequence[CacheKind], slots: int,
    points: int = 6, budget: float | None = None,
) -> list[Policy]:
    """The Pareto front of error against bytes, cheapest first.

    Args:
      tokens_BT: int32 calibration text without padding. The first half is read as a prompt, the
        second asks what is left of it; a half must be long enough for every candidate to code
        some of it.
      candidates: kinds that a layer may get; `Dense` among them lets the front reach exactness.
      slots: tokens a row that bytes are counted for.
      points: policies whose divergence is measured, spread over the front, its ends included.
      budget: bytes, as a share of full precision in 16 bits; the front ends there. None: no end.
    Returns: the measured policies, fewest bytes first.
    Raises: ConfigError, ShapeError; before anything is measured. NumericsError for an error or a
      divergence that is no finite number.
    """
    if len(candidates) < 2 or points < 2:
        raise ConfigError(f"got {len(candidates)} candidates and {points} points; expected 2 each")
    if tokens_BT.ndim != 2 or tokens_BT.shape[1] < 4:
        raise ShapeError(f"tokens are {tokens_BT.shape}; expected (rows, at least 4)")
    if len(lm.attention_layers) != lm.config.num_layers:
        raise ConfigError("a plan that skips attention has layers without a cache; tune without it")
    check_text(tokens_BT.shape[1], candidates)
    limit = most_bytes(lm, candidates, slots, budget)
    errors_CL, bytes_CL = tables(lm, params, tokens_BT, candidates, slots)
    check_finite(errors_CL, candidates)
    path = [choice for choice in front(errors_CL, bytes_CL)
            if sum(bytes_CL[c, i] for i, c in enumerate(choice)) <= limit]
    chosen = sorted({round(i) for i in np.linspace(0, len(path) - 1, points)})
    layers = range(lm.config.num_layers)
    exact = logprobs(lm, params, tokens_BT, (Dense(),) * len(layers))
    found = []
    for choice in (path[i] for i in chosen):
        kinds = tuple(candidates[c] for c in choice)
        rough = logprobs(lm, params, tokens_BT, kinds)
        divergence = float(jnp.mean(jnp.sum(jnp.exp(exact) * (exact - rough), -1)))
        if not math.isfinite(divergence):
            raise NumericsError(f"the divergence of {[cache_name(kind) for kind in kinds]} is "
                                f"{divergence}; the model's logits are not finite there, so no "
                                "policy is known to be good")
        found.append(Policy(kinds, int(sum(bytes_CL[c, i] for i, c in enumerate(choice))),
                            float(sum(errors_CL[c, i] for i, c in enumerate(choice))), divergence))
    return found


def check_text(time: int, candidates: Sequence[CacheKind]) -> None:
    """Raise ShapeError for a text whose first half some candidate would keep uncoded: it would
    seem to cost nothing."""
    for kind in candidates:
        if kind.flush_every is not None:
            least = getattr(kind, "window", 0) + kind.flush_every  # a group, and what stays uncoded
            if time // 2 < least:
                raise ShapeError(f"the text has {time} tokens; {cache_name(kind)} codes none of "
                                 f"its first half: expected at least {2 * least}, better hundreds")


def check_finite(errors_CL: np.ndarray, candidates: Sequence[CacheKind]) -> None:
    """NumericsError for a sensitivity that is no finite number; it names the layer."""
    for kind, errors_L in zip(candidates, errors_CL, strict=True):
        if bad := [layer for layer, error in enumerate(errors_L) if not math.isfinite(error)]:
            raise NumericsError(f"the error of {cache_name(kind)} in layer {bad[0]} is "
                                f"{errors_L[bad[0]]}; keys, values or queries there are not "
                                "finite: try another dtype, or look at the checkpoint")


def most_bytes(lm: LM, candidates: Sequence[CacheKind], slots: int, budget: float | None) -> float:
    """Bytes that a share of full precision is; ConfigError where no mix takes so few."""
    if budget is None:
        return float("inf")
    layers = range(lm.config.num_layers)
    dense = sum(layer_bytes(lm, i, Dense(), slots) for i in layers)
    least = sum(min(layer_bytes(lm, i, kind, slots) for kind in candidates) for i in layers)
    if not least <= budget * dense:
        raise ConfigError(f"the cheapest mix takes {least / dense:.3f} of full precision; the "
                          f"budget is {budget}; raise it, add cheaper candidates, or count for "
                          f"more slots than {slots}")
    return budget * dense


def tables(lm: LM, params: Params, tokens_BT: jax.Array, candidates: Sequence[CacheKind],
           slots: int) -> tuple[np.ndarray, np.ndarray]:
    """Sensitivity and bytes of every candidate in every layer, (C, L) each; for `front`."""
    errors = [sensitivity(lm, params, tokens_BT, kind) for kind in candidates]
    layers = range(lm.config.num_layers)
    sizes = [[layer_bytes(lm, layer, kind, slots) for layer in layers] for kind in candidates]
    return np.stack(errors), np.array(sizes)


@partial(jax.jit, static_argnames=("lm", "kind"))
def sensitivity(lm: LM, params: Params, tokens_BT: jax.Array, kind: CacheKind) -> jax.Array:
    """Each layer's `|out^ - out|^2 / |out|^2` over the text's second half, float32 (L,)."""
    batch, time = tokens_BT.shape
    half = time // 2
    pos_BT = jnp.broadcast_to(jnp.arange(time, dtype=jnp.int32), (batch, time))
    first_B, rest_B = jnp.full(batch, half), jnp.full(batch, time - half)
    errors: dict[int, jax.Array] = {}

    def attend(layer, q, k, v):
        spec = lm.config.attention(layer)
        state = kind.init(spec, batch, time, q.dtype)
        *_, state = kind.prefill(
            spec, state, q[:, :half], k[:, :half], v[:, :half], pos_BT[:, :half], first_B
        )
        rough, *_ = kind.extend(
            spec, state, q[:, half:], k[:, half:], v[:, half:], pos_BT[:, half:], first_B, rest_B
        )
        turned = [apply_rope(x, pos_BT, spec.rope) for x in (q, k)]
        out, _ = attention(turned[0], turned[1].transpose(0, 2, 3, 1), v.swapaxes(1, 2),
                           Mask(window=spec.window), pos_BT, pos_BT, scale=spec.scale,
                           softcap=spec.softcap)
        gap = (rough - out[:, half:]).astype(jnp.float32)
        whole = out[:, half:].astype(jnp.float32)
        errors[layer] = jnp.sum(gap**2) / jnp.maximum(jnp.sum(whole**2), 1e-30)
        return out

    lm.run(params, tokens_BT, attend)
    return jnp.stack([errors[layer] for layer in range(lm.config.num_layers)])


@partial(jax.jit, static_argnames=("lm", "kinds"))
def logprobs(lm: LM, params: Params, tokens_BT: jax.Array, kinds: Kinds) -> jax.Array:
    """Next-token log-probabilities over the second half, read through the caches, (B, T/2, V)."""
    batch, time = tokens_BT.shape
    half = time // 2
    keys = jax.random.split(jax.random.key(0), batch)
    state = prefill(lm, params, Greedy(), tokens_BT[:, :half], jnp.full(batch, half), kinds, time,
                    keys)
    _, logits = extend(lm, params, state, tokens_BT[:, half:], jnp.full(batch, time - half), "all")
    assert logits is not None  # they were asked for
    return jax.nn.log_softmax(logits)


def layer_bytes(lm: LM, layer: int, kind: CacheKind, slots: int) -> int:
    """Bytes of one row's state in one layer, full precision being bfloat16."""
    spec = lm.config.attention(layer)
    return nbytes(jax.eval_shape(lambda: kind.init(spec, 1, slots, jnp.bfloat16)))


def front(errors_CL: np.ndarray, bytes_CL: np.ndarray) -> list[tuple[int, ...]]:
    """Choices of a candidate a layer, from the cheapest up by the best error saved per byte.

    >>> front(np.array([[4.0, 1.0], [1.0, 0.5]]), np.array([[1, 1], [2, 2]]))
    [(0, 0), (1, 0), (1, 1)]
    """
    layers = range(errors_CL.shape[1])
    at = [int(np.lexsort((errors_CL[:, i], bytes_CL[:, i]))[0]) for i in layers]
    path = [tuple(at)]
    while True:
        gains = [((errors_CL[at[i], i] - errors_CL[c, i]) / (bytes_CL[c, i] - bytes_CL[at[i], i]),
                  -i, c) for i in layers for c in range(len(errors_CL))
                 if bytes_CL[c, i] > bytes_CL[at[i], i] and errors_CL[c, i] < errors_CL[at[i], i]]
        if not gains:
            return path
        _, layer, candidate = max(gains)
        at[-layer] = candidate
        path.append(tuple(at))
