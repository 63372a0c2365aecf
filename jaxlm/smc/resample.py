"""Resampling: which particles have offspring. Every scheme gives particle i `n W_i` of them on
average, which is what keeps the evidence unbiased."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from jaxlm.core.errors import ConfigError

Resampler = Callable[[jax.Array, jax.Array, int], jax.Array]


def multinomial(key: jax.Array, probs_P: jax.Array, count: int) -> jax.Array:
    """`count` independent draws from `probs_P`.

    Args: probs_P: float (P,), sum to 1. count: static.
    Returns: int32 (count,), sorted.
    """
    # sorted uniforms from exponential spacings: no sort, and none reaches 1
    spacing = jax.random.exponential(key, (count + 1,))
    at = jnp.cumsum(spacing)
    return _invert(probs_P, at[:-1] / at[-1])


def stratified(key: jax.Array, probs_P: jax.Array, count: int) -> jax.Array:
    """One draw in each of `count` equal strata. Source: Kitagawa 1996, appendix."""
    return _invert(probs_P, (jnp.arange(count) + jax.random.uniform(key, (count,))) / count)


def systematic(key: jax.Array, probs_P: jax.Array, count: int) -> jax.Array:
    """One uniform shared by all strata. Source: Kitagawa 1996, appendix."""
    return _invert(probs_P, (jnp.arange(count) + jax.random.uniform(key)) / count)


def residual(key: jax.Array, probs_P: jax.Array, count: int) -> jax.Array:
    """`floor(n W_i)` offspring for certain, the rest drawn from what is left over.

    Source: Liu and Chen 1998, section 3.
    """
    expected = count * probs_P
    # n W_i that should be whole may lie a rounding below; such a particle keeps its offspring
    whole = jnp.floor(expected * (1 + 4 * jnp.finfo(expected.dtype).eps))
    rest = jnp.maximum(expected - whole, 0.0)
    sure = whole.sum().astype(jnp.int32)
    left = rest.sum()
    rest = jnp.where(left > 0, rest / jnp.where(left > 0, left, 1.0), probs_P)
    fixed = jnp.repeat(jnp.arange(len(probs_P)), whole.astype(jnp.int32),
                       total_repeat_length=count)
    drawn = multinomial(key, rest, count)
    # a prefix of sorted draws is not a sample, so the draws that count are picked by lot
    drawn = jax.random.permutation(jax.random.fold_in(key, 1), drawn)
    return jnp.where(jnp.arange(count) < sure, fixed, drawn).astype(jnp.int32)


def conditional(key: jax.Array, probs_P: jax.Array, count: int) -> jax.Array:
    """Slot 0 keeps particle 0, a reference; the others are drawn from all, it included.

    Of `count` multinomial draws one is dropped by lot, for they come sorted.
    Source: Andrieu, Doucet and Holenstein 2010, section 4.3.
    """
    drawn = multinomial(jax.random.fold_in(key, 0), probs_P, count)
    return jax.random.permutation(jax.random.fold_in(key, 1), drawn).at[0].set(0)


SCHEMES: dict[str, Resampler] = {
    "multinomial": multinomial, "stratified": stratified, "systematic": systematic,
    "residual": residual,
}


def resampler(name: str) -> Resampler:
    """A scheme by name, 'conditional' among them; ConfigError for another."""
    if name == "conditional":
        return conditional
    if name not in SCHEMES:
        raise ConfigError(f"resampling is {name!r}; expected one of {sorted(SCHEMES)}")
    return SCHEMES[name]


def ancestors(key: jax.Array, probs_P: jax.Array, scheme: str, count: int | None = None):
    """Ancestors for every leading index of (..., P), each with a key of its own; int32.

    Args: key: one, which is split; or one for every leading index.
    """
    lead = probs_P.shape[:-1]
    count = probs_P.shape[-1] if count is None else count
    draw = resampler(scheme)
    if not lead:
        return draw(key, probs_P, count)
    flat = probs_P.reshape(-1, probs_P.shape[-1])
    keys = key.reshape(-1) if key.ndim else jax.random.split(key, len(flat))
    return jax.vmap(lambda k, p: draw(k, p, count))(keys, flat).reshape(*lead, count)


def _invert(probs_P: jax.Array, at_n: jax.Array) -> jax.Array:
    """The first particle whose cumulative probability exceeds each `at`, int32.

    The float32 sum of many probabilities is not 1, so the points are stretched to what it is; and a
    particle of probability 0 adds nothing to the sum, so that it never exceeds first.
    """
    edges = jnp.cumsum(probs_P.astype(jnp.float32))
    index = jnp.searchsorted(edges, at_n * edges[-1], side="right")
    last = len(probs_P) - 1 - jnp.argmax(probs_P[::-1] > 0)
    return jnp.minimum(index, last).astype(jnp.int32)
