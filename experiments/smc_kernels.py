"""Rows of the particle Gibbs kernel and the flows of swaps, by enumeration and by sampling."""

import itertools
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.smc_chains import Chain, Law, Text
from jaxlm.smc.filter import Model
from jaxlm.smc.gibbs import GibbsState, swap, sweep

PARTICLES = 3
CHAINS = {  # with two letters; of the first the second letter ends a text
    "texts that end": Chain(np.array([[0.6, 0.4], [0.5, 0.5], [0.7, 0.3]]),
                            np.array([[1.0, 0.5], [2.0, 3.0], [0.4, 1.5]]), end=1),
    "texts of one length": Chain(np.array([[0.7, 0.3], [0.2, 0.8], [0.6, 0.4]]),
                                 np.array([[1.0, 3.0], [0.5, 2.0], [2.5, 0.7]])),
}
POWERS = (1.0, 0.3)


def go(chain: Chain, path: Text, letter: int) -> tuple[float, float]:
    """Probability and weight of the next letter; after its end a path repeats it, with weight 1."""
    if path and path[-1] == chain.end:
        return float(letter == chain.end), 1.0
    return float(chain.step[path[-1] if path else -1, letter]), chain.weight[len(path), letter]


def kernel_row(chain: Chain, reference: Text, ancestors: bool) -> Law:
    """One row of the exact kernel of a particle Gibbs sweep with 3 particles.

    Every choice of ancestors and of letters is followed, with its probability. Slot 0 keeps the
    reference; with `ancestors` its past is drawn by `W_i p(x_t | x^i) w_t` of its next letter.
    """
    sets: dict[tuple[tuple[Text, float], ...], float] = {(((), 1.0),) * PARTICLES: 1.0}
    for t in range(chain.length):
        later: dict[tuple[tuple[Text, float], ...], float] = {}
        for slots, p in sets.items():
            for moved, q in moves(chain, slots, reference[t], ancestors):
                later[moved] = later.get(moved, 0.0) + p * q
        sets = later
    row: Law = {}
    for slots, p in sets.items():
        total = sum(weight for _, weight in slots)
        for path, weight in slots:
            row[path] = row.get(path, 0.0) + p * weight / total
    return row


def moves(chain: Chain, slots: tuple[tuple[Text, float], ...], letter: int, ancestors: bool):
    """What a set of (path, weight) may become in a step, each with its probability."""
    total = sum(weight for _, weight in slots)
    past = [weight * np.prod(go(chain, path, letter)) for path, weight in slots]
    past = past if ancestors else [1.0] + [0.0] * (PARTICLES - 1)
    free: dict[tuple[Text, float], float] = {}
    pinned: dict[tuple[Text, float], float] = {}
    for (path, weight), p in zip(slots, past, strict=True):
        slot = (*path, letter), go(chain, path, letter)[1]
        pinned[slot] = pinned.get(slot, 0.0) + p / sum(past)
        for new in range(chain.step.shape[1]):
            q, w = go(chain, path, new)
            slot = (*path, new), w
            free[slot] = free.get(slot, 0.0) + weight / total * q
    for chosen in itertools.product(pinned.items(), *[free.items()] * (PARTICLES - 1)):
        if p := float(np.prod([q for _, q in chosen])):
            yield tuple(slot for slot, _ in chosen), p


def model(chain: Chain) -> Model:
    """Particles are their last letter alone, so that a past can be exchanged."""
    step, weight = jnp.log(jnp.asarray(chain.step)), jnp.log(jnp.asarray(chain.weight))

    def propose(key, x, t):
        drawn = jax.random.categorical(key, step[x], axis=-1)
        return jnp.where(x == chain.end, x, drawn)

    return Model(propose, lambda before, after, t: weight[t, after], lambda x: x == chain.end)


def connect(chain: Chain, x: jax.Array, path: jax.Array, t: jax.Array) -> jax.Array:
    """`log p(path_{t+1} | x) w`; what comes later is alike in all particles."""
    step, weight = jnp.log(jnp.asarray(chain.step)), jnp.log(jnp.asarray(chain.weight))
    new = path[t + 1]
    over = jnp.where(new == chain.end, 0.0, -jnp.inf)
    return jnp.where(x == chain.end, over, step[x, new] + weight[t, new])


@partial(jax.jit, static_argnames=("name", "chains", "ancestors"))
def swept(key: jax.Array, path: jax.Array, name: str, chains: int, ancestors: bool) -> jax.Array:
    """The letters after one sweep from one reference, `chains` times: (chains, T)."""
    chain = CHAINS[name]
    start = jnp.full(PARTICLES, chain.step.shape[1])  # the last row of `step` is the first step's
    one = lambda k: sweep(model(chain), k, GibbsState(path, jnp.zeros(())), start, chain.length,
                          connect=partial(connect, chain) if ancestors else None)[0].path[1:]
    return jax.vmap(one)(jax.random.split(key, chains))


def padded(chain: Chain) -> list[Text]:
    """Every path of T letters, the end repeated."""
    return [(*text, *(chain.end,) * (chain.length - len(text))) for text in chain.texts()]


def rows(key: jax.Array, name: str, chains: int, ancestors: bool) -> dict[str, Any]:
    """The largest |z| of the sampled kernel's cells against the exact ones."""
    chain, z = CHAINS[name], []
    for i, reference in enumerate(padded(chain)):
        exact = kernel_row(chain, reference, ancestors)
        path = jnp.array([chain.step.shape[1], *reference])
        found = np.asarray(swept(jax.random.fold_in(key, i), path, name, chains, ancestors))
        shares = {other: float((found == np.array(other)).all(1).mean()) for other in exact}
        if abs(sum(shares.values()) - 1) > 1e-9:
            raise ValueError(f"from {reference} the kernel reached paths of probability 0")
        z += [abs(shares[x] - p) / np.sqrt(p * (1 - p) / chains) for x, p in exact.items()]
    return {"z_max": float(max(z)), "numbers": len(z), "chains": chains}


def swaps(key: jax.Array, chain: Chain, chains: int, wrong: bool = False) -> dict[str, Any]:
    """Detailed balance: of two chains at equilibrium, as many go from (x, y) to (y, x) as back.

    `wrong`: exchange without a test, as the published ratio would.
    """
    texts, count = list(chain.texts()), len(list(chain.texts()))
    laws = [jnp.array([chain.law(power=power)[text] for text in texts]) for power in POWERS]
    at = jnp.stack([jax.random.choice(jax.random.fold_in(key, i), count, (chains,), p=law)
                    for i, law in enumerate(laws)], 1)
    score = jnp.log(jnp.array([chain.potential(text) for text in texts]))
    keys = jax.random.split(jax.random.fold_in(key, 2), chains)
    states, _ = jax.vmap(swap, (0, 0, None))(keys, GibbsState(at, score[at]), jnp.array(POWERS))
    before, moved = np.asarray(at), np.asarray(at[:, ::-1] if wrong else states.path)
    flow = np.zeros((count, count))
    np.add.at(flow, tuple(before[(before != moved).any(1)].T), 1)
    pairs = [(flow[i, j], flow[j, i]) for i, j in itertools.combinations(range(count), 2)]
    z = [abs(a - b) / np.sqrt(a + b) for a, b in pairs if a + b >= 20]
    return {"z_max": float(max(z)), "numbers": len(z), "chains": chains}


def measure(key: jax.Array, chains: int) -> dict[str, dict[str, Any]]:
    """All kernels, by name."""
    keys = iter(jax.random.split(key, 6))
    found = {f"Gibbs{', ancestors sampled' * flag}: {name}": rows(next(keys), name, chains, flag)
             for name in CHAINS for flag in (False, True)}
    plain = CHAINS["texts of one length"]
    many = 10 * chains  # cheap, and spread over many pairs
    found["swaps"] = swaps(next(keys), plain, many)
    found["swaps without a test (wrong)"] = swaps(next(keys), plain, many, wrong=True)
    return found
