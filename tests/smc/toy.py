"""A chain small enough to enumerate: a two-letter text that ends with its own letter."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm.smc.filter import Model

LENGTH = 4
NEXT = np.array([[0.5, 0.3, 0.2], [0.2, 0.5, 0.3], [0.4, 0.4, 0.2]])  # from a, b, start; 2 ends
REWARD = np.array([0.7, 2.5, 1.6])  # weight of a step that adds a, b, the end


def model() -> Model:
    """Particles are {"text": (..., P, LENGTH) letters or -1, "last": letter, "n": steps}."""
    table, reward = jnp.log(jnp.asarray(NEXT)), jnp.log(jnp.asarray(REWARD))

    def propose(key, x, t):
        drawn = jax.random.categorical(key, table[x["last"]], axis=-1)
        live = x["last"] != 2
        live |= t == 0
        at = jnp.arange(LENGTH) == t
        text = jnp.where(live[..., None] & at, drawn[..., None], x["text"])
        return {"text": text, "last": jnp.where(live, drawn, x["last"])}

    def log_weight(before, after, t):
        return reward[after["last"]]

    return Model(propose, log_weight, lambda x: x["last"] == 2)


def start(*shape: int):
    """All at the start; the letter 2 in `last` stands for it, and `ended` is read after a step."""
    return {"text": jnp.full((*shape, LENGTH), -1), "last": jnp.full(shape, 2)}


def exact() -> tuple[float, dict[tuple[int, ...], float]]:
    """Z, and the law of texts `p(x) prod reward / Z`."""
    law: dict[tuple[int, ...], float] = {}
    for letters in itertools.product(range(3), repeat=LENGTH):
        if 2 in letters[:-1]:
            letters = letters[:letters.index(2) + 1]
        p, last = 1.0, 2
        for letter in letters:
            p *= NEXT[last, letter] * REWARD[letter]
            last = letter
        law[letters] = p
    total = sum(law.values())
    return total, {text: p / total for text, p in law.items()}
