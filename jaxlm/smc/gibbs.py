"""Conditional SMC, particle Gibbs and parallel tempering: Markov chains over whole paths.

One sweep runs the filter with slot 0 held to a reference path, and draws the next reference from
the last set by its weights. For any number of particles from 2 the law `p(x_0:T) prod_t w_t / Z` is
invariant. With ancestor sampling the reference may change its past at every step, which lets old
steps mix. Source: Andrieu, Doucet and Holenstein 2010, section 4; Lindsten, Jordan and Schon 2014.
For text: arXiv 2502.01618, algorithms 2 and 3.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxlm.smc.filter import Model, Particles, gather
from jaxlm.smc.resample import conditional
from jaxlm.smc.weights import normalise

Path = Any  # the states of one particle, leaves lead with (T + 1, ...)
Connect = Callable[[Particles, Path, jax.Array], jax.Array]


class GibbsState(NamedTuple):
    """path: the reference. log_potential: float32, its `sum_t log w_t`."""

    path: Path
    log_potential: jax.Array


class GibbsInfo(NamedTuple):
    """log_evidence: of the sweep; unlike the filter's it is biased, the reference being given.

    chosen: int32, the particle that became the reference. kept: float32, the share of steps at
    which the new path is still the old one's. broken: bool, whether at some step every weight was
    zero, or one was NaN or +inf, which counts as zero.
    """

    log_evidence: jax.Array
    chosen: jax.Array
    kept: jax.Array
    broken: jax.Array


def sweep(
    model: Model, key: jax.Array, state: GibbsState, particles: Particles, steps: int,
    power: jax.Array | float = 1.0, connect: Connect | None = None,
) -> tuple[GibbsState, GibbsInfo]:
    """One particle Gibbs sweep for one problem; `vmap` it over problems and chains.

    Args:
      particles: P alike particles at the start, leaves lead with P >= 2.
      steps: T, static; `state.path` has T + 1 states.
      power: the target is `p prod w^power`; an inverse temperature, may be traced.
      connect: (particles, path, t) -> (P,), the log of
        `p(path_{t+1:T} | x_t^i) prod_{s>t} w_s^power` when the path is glued to particle i after t
        steps, up to what is alike in all; with it ancestors of the reference are drawn. It must
        use the same power.
    Returns: the next reference, and what happened.
    """
    gathered = model.gather or gather
    count = jax.tree.leaves(particles)[0].shape[0]
    at = lambda path, t: jax.tree.map(lambda leaf: leaf[t], path)
    pin = lambda many, one: jax.tree.map(lambda x, y: x.at[0].set(y), many, one)

    def step(carry, t):
        x, logw, potential, ended, scale, broken = carry
        key_t = jax.random.fold_in(key, t)
        found = normalise(logw)
        index = conditional(jax.random.fold_in(key_t, 0), found.probs_P, count)
        if connect is not None:
            past = normalise(jnp.log(found.probs_P) + connect(x, state.path, t))
            index = index.at[0].set(draw(jax.random.fold_in(key_t, 2), past.probs_P))
            broken |= past.broken
        before, past_potential, ended = gathered(x, index), potential[index], ended[index]
        after = pin(model.propose(jax.random.fold_in(key_t, 3), before, t), at(state.path, t + 1))
        log_w = jnp.where(ended, 0.0, model.log_weight(before, after, t))
        broken |= normalise(log_w).broken
        log_w = jnp.where(jnp.isnan(log_w) | (log_w == jnp.inf), -jnp.inf, log_w)
        logw = jnp.where(log_w == -jnp.inf, -jnp.inf, power * log_w)
        over = ended if model.ended is None else ended | model.ended(after)
        carry = (after, logw, past_potential + log_w, over, scale + found.log_mean, broken)
        return carry, (after, index)

    first = pin(particles, at(state.path, 0))
    zeros = jnp.zeros(count)
    carry = (first, zeros, zeros, jnp.zeros(count, bool), jnp.zeros(()), jnp.zeros((), bool))
    (_, logw, potential, _, scale, broken), (later, index) = jax.lax.scan(
        step, carry, jnp.arange(steps))
    found = normalise(logw)
    chosen = draw(jax.random.fold_in(key, steps), found.probs_P)
    lineage = trace(index, chosen)
    history = jax.tree.map(lambda a, b: jnp.concatenate([a[None], b]), first, later)
    path = jax.tree.map(lambda leaf: jax.vmap(lambda row, i: row[i])(leaf, lineage), history)
    info = GibbsInfo(scale + found.log_mean, chosen, jnp.mean(lineage[1:] == 0), broken)
    return GibbsState(path, potential[chosen]), info


def draw(key: jax.Array, probs_P: jax.Array) -> jax.Array:
    """One particle by normalised weights, int32."""
    return jax.random.categorical(key, jnp.log(probs_P))


def trace(ancestors_TP: jax.Array, last: jax.Array) -> jax.Array:
    """The slot at every step of the particle that ends in slot `last`: int32 (T + 1,).

    >>> trace(jnp.array([[0, 0], [1, 0]]), jnp.array(0)).tolist()
    [0, 1, 0]
    """
    def back(slot, ancestors):
        return ancestors[slot], slot

    first, rest = jax.lax.scan(back, jnp.asarray(last, jnp.int32), ancestors_TP, reverse=True)
    return jnp.concatenate([first[None], rest])


def swap(
    key: jax.Array, states: GibbsState, powers_M: jax.Array, odd: jax.Array | bool = False
) -> tuple[GibbsState, jax.Array]:
    """Neighbouring chains exchange references: Metropolis between targets `p prod w^power`.

    `log A = (power_k - power_{k+1}) (S(x_{k+1}) - S(x_k))`, S the path's log potential: the law of
    the proposal cancels. Pairs (0, 1), (2, 3), ..., or (1, 2), (3, 4), ... when `odd`; each kind
    leaves the joint law invariant.

    Args: states: leaves lead with M chains. powers_M: inverse temperatures.
    Returns: the states, and bool (M,), which chains were exchanged.
    Source: arXiv 2502.01618, section 3.4, whose printed ratio lacks the exchange.
    """
    count = powers_M.shape[0]
    chain, offset = jnp.arange(count), jnp.asarray(odd, jnp.int32)
    other = jnp.where((chain - offset) % 2 == 0, chain + 1, chain - 1)
    other = jnp.where((other < 0) | (other >= count), chain, other)
    low = jnp.minimum(chain, other)
    score = states.log_potential
    log_accept = (powers_M - powers_M[other]) * (score[other] - score)  # alike for both of a pair
    uniform = jax.random.uniform(key, (count,))[low]
    swapped = (other != chain) & (jnp.log(uniform) < log_accept)
    index = jnp.where(swapped, other, chain)
    return jax.tree.map(lambda leaf: leaf[index], states), swapped
