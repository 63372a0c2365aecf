"""Sequential Monte Carlo over any state-space model; it knows nothing of language models.

Particles x_t^i with weights W_t^i stand for the law `p(x_0:t) prod_s w_s / Z_t`. One step resamples
where the weights have become unequal, moves every particle, and multiplies its weight:

    log Z += log sum_i W_{t-1}^i w_t^i,    W_t^i ~ W_{t-1}^i w_t^i .

A particle that has ended keeps its weight: its w is 1 at every later step. The last set is weighted
and not resampled, so that a draw from it, or its best particle, loses nothing.

Arrays of weights are (..., P): particles come last, problems before them.
Source: Del Moral, Doucet and Jasra 2006; for text, arXiv 2502.01618, section 3.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxlm.smc.resample import ancestors as draw_ancestors
from jaxlm.smc.weights import effective_size, normalise

Particles = Any  # a pytree; of plain arrays, leaves lead with (..., P)


class Model(NamedTuple):
    """A state-space model with its proposal.

    propose: (key, particles, t) -> particles, one step of all of them.
    log_weight: (before, after, t) -> float (..., P), the log of w_t; a dead end is -inf.
    ended: particles -> bool (..., P), those that will not change any more.
    gather: (particles, ancestors (..., P)) -> particles.
    """

    propose: Callable[[jax.Array, Particles, jax.Array], Particles]
    log_weight: Callable[[Particles, Particles, jax.Array], jax.Array]
    ended: Callable[[Particles], jax.Array] | None = None
    gather: Callable[[Particles, jax.Array], Particles] | None = None


class State(NamedTuple):
    """What is carried.

    log_weights_P: float32, since a problem was last resampled. log_scale: float32 (...), the
    evidence up to then; `log_evidence` joins the two. ended_P: bool. root_P: int32, the first
    ancestor. broken: bool (...), whether at some step every weight was zero or one was NaN.
    t: int32, steps taken.
    """

    particles: Particles
    log_weights_P: jax.Array
    log_scale: jax.Array
    ended_P: jax.Array
    root_P: jax.Array
    broken: jax.Array
    t: jax.Array


    @property
    def log_evidence(self) -> jax.Array:
        """The log of the unbiased estimate of Z, float32 (...)."""
        return self.log_scale + normalise(self.log_weights_P).log_mean


class Info(NamedTuple):
    """What one step reports.

    effective_size: before the decision to resample. resampled: bool. ancestors_P: int32.
    unique_roots: how many of the first particles still have offspring.
    """

    effective_size: jax.Array
    resampled: jax.Array
    ancestors_P: jax.Array
    unique_roots: jax.Array


def init(particles: Particles, shape: tuple[int, ...]) -> State:
    """P alike particles of every problem; `shape` is (..., P)."""
    everyone = jnp.broadcast_to(jnp.arange(shape[-1], dtype=jnp.int32), shape)
    return State(particles, jnp.zeros(shape), jnp.zeros(shape[:-1]), jnp.zeros(shape, bool),
                 everyone, jnp.zeros(shape[:-1], bool), jnp.zeros((), jnp.int32))


def step(
    model: Model, key: jax.Array, state: State, *, threshold: jax.Array | float = 0.5,
    scheme: str = "systematic", temper: jax.Array | float = 1.0, forget: bool = False,
    reweigh_ended: bool = False,
) -> tuple[State, Info]:
    """Resample where needed, move, weigh.

    Args:
      threshold: resample a problem whose effective size is below `threshold * P`; above 1: at every
        step; 0: never. May be traced, so a sweep compiles once.
      scheme: 'multinomial', 'stratified', 'systematic' or 'residual'.
      temper: draw ancestors in proportion to `W^(1 / temper)`, and carry `W^(1 - 1 / temper)` on,
        so that the target stays; above 1 keeps more kinds of particles alive. A number, or (...).
      forget: static; drop that rest instead, as published code does: another target, and evidence.
      reweigh_ended: static; multiply the weight of an ended particle by its last w again at every
        later step, as its_hub 1.2.0 does: the target becomes `p prod w w_last^(steps after the
        end)`. Only to compare with it.
    """
    chosen, info = resample(model, jax.random.fold_in(key, 0), state, threshold, scheme, temper,
                            forget)
    moved = model.propose(jax.random.fold_in(key, 1), chosen.particles, chosen.t)
    log_w = model.log_weight(chosen.particles, moved, chosen.t)
    return weigh(model, chosen, moved, log_w, reweigh_ended), info


def resample(
    model: Model, key: jax.Array, state: State, threshold: jax.Array | float, scheme: str,
    temper: jax.Array | float = 1.0, forget: bool = False,
) -> tuple[State, Info]:
    """Problems whose weights have become unequal get offspring in proportion to them."""
    count = state.log_weights_P.shape[-1]
    size = effective_size(state.log_weights_P)
    now = size < jnp.asarray(threshold) * count
    logw, power = state.log_weights_P, 1.0 / jnp.asarray(temper)[..., None]
    tempered = jnp.where(logw == -jnp.inf, -jnp.inf, power * logw)
    drawn = draw_ancestors(key, normalise(tempered).probs_P, scheme)
    same = jnp.broadcast_to(jnp.arange(count, dtype=jnp.int32), drawn.shape)
    index = jnp.where(now[..., None], drawn, same)
    take = lambda x: jnp.take_along_axis(x, index, axis=-1)
    scale = normalise(logw).log_mean
    rest = jnp.where(logw == -jnp.inf, -jnp.inf, (1 - power) * logw)  # W / W^power, whose mean
    rest += (normalise(tempered).log_mean - scale)[..., None]         # over the offspring is near 1
    rest = jnp.zeros_like(rest) if forget else rest
    state = state._replace(
        particles=(model.gather or gather)(state.particles, index),
        log_weights_P=jnp.where(now[..., None], take(rest), logw),
        log_scale=jnp.where(now, state.log_scale + scale, state.log_scale),
        ended_P=take(state.ended_P), root_P=take(state.root_P))
    roots = (state.root_P[..., :, None] == same[..., None, :]).any(-2).sum(-1)
    return state, Info(size, now, index, roots)


def weigh(
    model: Model, state: State, moved: Particles, log_w_P: jax.Array, reweigh_ended: bool = False
) -> State:
    """Multiply the weights of the live; of the ended too where `step` was asked to.

    Without any weight left the evidence is 0, for good, and the particles go on alike.
    """
    log_w = log_w_P.astype(jnp.float32)
    log_w = log_w if reweigh_ended else jnp.where(state.ended_P, 0.0, log_w)
    new = state.log_weights_P + log_w
    found = normalise(new)
    none = found.log_mean == -jnp.inf
    usable = jnp.where(jnp.isnan(new) | (new == jnp.inf), -jnp.inf, new)
    ended = state.ended_P if model.ended is None else state.ended_P | model.ended(moved)
    return state._replace(
        particles=moved, log_weights_P=jnp.where(none[..., None], 0.0, usable),
        log_scale=jnp.where(none, -jnp.inf, state.log_scale), ended_P=ended,
        broken=state.broken | found.broken, t=state.t + 1)


def gather(particles: Particles, index_P: jax.Array) -> Particles:
    """Rows of plain arrays by ancestor; leaves lead with the index's shape."""
    def take(leaf: jax.Array) -> jax.Array:
        index = index_P.reshape(index_P.shape + (1,) * (leaf.ndim - index_P.ndim))
        return jnp.take_along_axis(leaf, index, axis=index_P.ndim - 1)

    return jax.tree.map(take, particles)


def run(
    model: Model, key: jax.Array, state: State, steps: int, **options: Any
) -> tuple[State, Info]:
    """`steps` steps as one scan; `Info` is stacked over them."""
    body = lambda state, t: step(model, jax.random.fold_in(key, t), state, **options)
    return jax.lax.scan(body, state, jnp.arange(steps))
