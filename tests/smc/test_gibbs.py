"""Particle Gibbs and tempering: the invariant law by enumeration; wrong kernels are refused."""

import itertools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.smc.filter import Model
from jaxlm.smc.gibbs import GibbsState, swap, sweep, trace

V, T, CHAINS = 2, 3, 60_000
FIRST = np.array([0.6, 0.4])
NEXT = np.array([[0.7, 0.3], [0.2, 0.8]])
REWARD = np.array([[1.0, 3.0], [0.5, 2.0], [2.5, 0.7]])  # by step and letter


def log_p(before, letter, t):
    return jnp.where(t == 0, jnp.log(FIRST)[letter], jnp.log(NEXT)[before, letter])


def toy() -> Model:
    """A particle is the letter it stands at."""
    def propose(key, x, t):
        logits = jnp.where(t == 0, jnp.log(FIRST), jnp.log(NEXT)[x])
        return jax.random.categorical(key, logits, axis=-1)

    return Model(propose, lambda before, after, t: jnp.log(REWARD)[t, after])


def law(power=1.0):
    found = np.zeros((V,) * T)
    for path in itertools.product(range(V), repeat=T):
        p, before = 1.0, None
        for t, letter in enumerate(path):
            p *= FIRST[letter] if t == 0 else NEXT[before, letter]
            p *= REWARD[t, letter] ** power
            before = letter
        found[path] = p
    return found / found.sum()


def references(key, power):
    """Independent exact draws, as paths with their potential."""
    flat = jax.random.choice(key, V**T, (CHAINS,), p=jnp.asarray(law(power).ravel()))
    letters = jnp.stack(jnp.unravel_index(flat, (V,) * T), 1)
    potential = jnp.log(REWARD)[jnp.arange(T), letters].sum(1)
    return GibbsState(jnp.concatenate([jnp.zeros((CHAINS, 1), int), letters], 1), potential)


def connect(x, path, t):
    """Only the next step meets the particle; what comes later is alike in all."""
    return log_p(x, path[t + 1], t)


@partial(jax.jit, static_argnames=("particles", "ancestors", "model"))
def after(key, states, power, particles, ancestors=False, model=None):
    one = lambda key, state: sweep(model or toy(), key, state, jnp.zeros(particles, int), T, power,
                                   connect if ancestors else None)
    return jax.vmap(one)(jax.random.split(key, CHAINS), states)


def worst(states, power):
    """The largest |z| of the paths' frequencies against the exact law."""
    found = np.zeros((V,) * T)
    np.add.at(found, tuple(np.asarray(states.path)[:, 1:].T), 1 / CHAINS)
    exact = law(power)
    return np.abs((found - exact) / np.sqrt(exact * (1 - exact) / CHAINS)).max()


@pytest.mark.parametrize("particles", [2, 5])
@pytest.mark.parametrize("ancestors", [False, True])
@pytest.mark.parametrize("power", [1.0, 0.4])
def test_the_target_is_invariant(particles, ancestors, power):
    start = references(jax.random.key(0), power)
    assert worst(start, power) < 4
    states, info = after(jax.random.key(1), start, power, particles, ancestors)
    assert worst(states, power) < 4  # Bonferroni at 1% over 64 frequencies: 3.8
    letters = states.path[:, 1:]
    expected = jnp.log(REWARD)[jnp.arange(T), letters].sum(1)
    np.testing.assert_allclose(states.log_potential, expected, atol=1e-5)
    assert 0.0 < float(info.kept.mean()) < 1.0


def test_a_reference_reweighted_by_its_last_factor_is_refused():
    """The published chain uses the last factor twice; the same test must see it."""
    def twice(before, x, t):
        return jnp.log(REWARD)[t, x] * jnp.where(t == T - 1, 2.0, 1.0)

    wrong = toy()._replace(log_weight=twice)
    states, _ = after(jax.random.key(2), references(jax.random.key(0), 1.0), 1.0, 3, False, wrong)
    assert worst(states, 1.0) > 10


def test_ancestor_sampling_renews_the_early_steps():
    start = references(jax.random.key(3), 1.0)
    plain = after(jax.random.key(4), start, 1.0, 2, False)[1].kept.mean()
    mixed = after(jax.random.key(4), start, 1.0, 2, True)[1].kept.mean()
    assert float(mixed) < float(plain)


def test_swaps_leave_every_chain_its_law():
    powers = jnp.array([1.0, 0.6, 0.2])
    chains = [references(jax.random.key(10 + i), float(p)) for i, p in enumerate(powers)]
    joint = jax.tree.map(lambda *x: jnp.stack(x, 1), *chains)  # CHAINS runs of 3 chains
    for odd in (False, True):
        keys = jax.random.split(jax.random.key(20 + odd), CHAINS)
        joint, swapped = jax.vmap(swap, (0, 0, None, None))(keys, joint, powers, odd)
        assert 0.1 < float(swapped.mean()) < 1
    for i, power in enumerate(powers):
        assert worst(jax.tree.map(lambda x: x[:, i], joint), float(power)) < 4  # noqa: B023


def test_swapping_without_a_test_is_refused():
    """Between powers that are alike every exchange is accepted."""
    powers = jnp.array([1.0, 0.2])
    chains = [references(jax.random.key(30 + i), float(p)) for i, p in enumerate(powers)]
    joint = jax.tree.map(lambda *x: jnp.stack(x, 1), *chains)
    keys = jax.random.split(jax.random.key(32), CHAINS)
    tested, some = jax.vmap(swap, (0, 0, None))(keys, joint, powers)
    always, every = jax.vmap(swap, (0, 0, None))(keys, joint, jnp.ones(2))
    assert bool(every.all()) and 0.1 < float(some.mean()) < 0.9
    for i, power in enumerate(powers):
        one = lambda states, i=i: jax.tree.map(lambda x: x[:, i], states)
        assert worst(one(tested), float(power)) < 4
        assert worst(one(always), float(power)) > 10


def weighing(value, step, slot=2):
    """The toy with another log-weight in one slot, or in all (None), at one step."""
    def log_weight(before, after, t):
        found = toy().log_weight(before, after, t)
        here = (t == step) & ((jnp.arange(len(found)) == slot) | (slot is None))
        return jnp.where(here, value, found)

    return toy()._replace(log_weight=log_weight)


@pytest.mark.parametrize("value", [jnp.nan, jnp.inf])
@pytest.mark.parametrize("step", [1, T - 1])
def test_a_weight_that_is_no_number_is_zero_and_flagged(value, step):
    start = references(jax.random.key(40), 1.0)
    states, info = after(jax.random.key(41), start, 1.0, 3, False, weighing(value, step))
    assert bool(info.broken.all()) and bool(jnp.isfinite(info.log_evidence).all())
    assert bool(jnp.isfinite(states.log_potential).all())
    if step == T - 1:
        assert set(np.unique(info.chosen)) == {0, 1}
    none = after(jax.random.key(41), start, 1.0, 3, False, weighing(-jnp.inf, step))
    np.testing.assert_array_equal(states.path, none[0].path)  # an honest dead end
    assert not bool(none[1].broken.any())


def test_without_any_weight_particles_are_drawn_alike():
    start = references(jax.random.key(42), 1.0)
    _, info = after(jax.random.key(43), start, 1.0, 3, False, weighing(-jnp.inf, T - 1, None))
    share = np.bincount(np.asarray(info.chosen), minlength=3) / CHAINS
    assert np.abs(share - 1 / 3).max() < 4 * np.sqrt(2 / 9 / CHAINS)
    assert bool(info.broken.all()) and bool((info.log_evidence == -jnp.inf).all())


def test_an_ancestor_that_connects_by_no_number_is_not_drawn():
    """Where only its own past connects, the reference keeps it."""
    only = lambda x, path, t: jnp.array([0.0, -jnp.inf, jnp.nan])
    start = references(jax.random.key(44), 1.0)
    keys = jax.random.split(jax.random.key(45), CHAINS)
    one = lambda connect: jax.jit(jax.vmap(lambda key, state: sweep(
        toy(), key, state, jnp.zeros(3, int), T, 1.0, connect)))(keys, start)
    (found, info), (plain, other) = one(only), one(None)
    np.testing.assert_array_equal(found.path, plain.path)
    assert bool(info.broken.all()) and not bool(other.broken.any())


def test_trace_follows_ancestors_back():
    ancestors = jnp.array([[0, 0, 2], [2, 1, 0], [1, 1, 0]])
    assert trace(ancestors, jnp.array(2)).tolist() == [2, 2, 0, 2]
