"""Chains small enough to enumerate, in plain numpy, and the same chains as state-space models."""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm.smc import Model

Text = tuple[int, ...]
Law = dict[Text, float]


@dataclass(frozen=True)
class Chain:
    """Texts of up to T letters, the letter `end` being the last of a text where it comes.

    step: (V + 1, V), the probability of a letter after each letter; the last row is the first
    step's. weight: (T, V), w_t of the letter that step t adds.
    """

    step: np.ndarray
    weight: np.ndarray
    end: int = -1

    @property
    def length(self) -> int:
        """T."""
        return len(self.weight)

    def texts(self) -> Iterator[Text]:
        """All texts, each once."""
        for letters in itertools.product(range(self.step.shape[1]), repeat=self.length):
            stop = letters.index(self.end) + 1 if self.end in letters else self.length
            if all(letter == self.end for letter in letters[stop:]):
                yield letters[:stop]

    def probability(self, text: Text) -> float:
        """p(x)."""
        return float(np.prod([self.step[last, letter]
                              for last, letter in zip((-1, *text), text, strict=False)]))

    def potential(self, text: Text) -> float:
        """`prod_t w_t`."""
        return float(np.prod([self.weight[t, letter] for t, letter in enumerate(text)]))

    def masses(self, power: float = 1.0, reweigh_ended: bool = False) -> Law:
        """`p(x) prod_t w_t^power`, whose sum is Z; with the published rule's extra factors."""
        found = {}
        for text in self.texts():
            again = self.weight[len(text) - 1, text[-1]] ** (self.length - len(text))
            found[text] = self.probability(text) * self.potential(text) ** power * (
                again if reweigh_ended else 1.0)
        return found

    def evidence(self, **options: Any) -> float:
        """Z."""
        return sum(self.masses(**options).values())

    def law(self, **options: Any) -> Law:
        """`p(x) prod_t w_t^power / Z`."""
        total = self.evidence(**options)
        return {text: mass / total for text, mass in self.masses(**options).items()}

    def model(self) -> Model:
        """Particles hold their text, (..., P, T) letters or -1, and its last letter."""
        table, weight = jnp.log(jnp.asarray(self.step)), jnp.log(jnp.asarray(self.weight))

        def propose(key, x, t):
            drawn = jax.random.categorical(key, table[x["last"]], axis=-1)
            live = (x["last"] != self.end) | (t == 0)
            new = live[..., None] & (jnp.arange(self.length) == t)
            return {"text": jnp.where(new, drawn[..., None], x["text"]),
                    "last": jnp.where(live, drawn, x["last"])}

        def log_weight(before, after, t):
            wrote = jnp.maximum((after["text"] >= 0).sum(-1) - 1, 0)  # the step of its last letter
            return weight[wrote, after["last"]]

        return Model(propose, log_weight, lambda x: x["last"] == self.end)

    def start(self, *shape: int) -> dict[str, jax.Array]:
        """Empty texts."""
        return {"text": jnp.full((*shape, self.length), -1),
                "last": jnp.full(shape, self.step.shape[1])}


def letters(law: Law, at: int, count: int) -> np.ndarray:
    """The law of the letter at one place; its last cell is "the text has ended"."""
    found = np.zeros(count + 1)
    for text, p in law.items():
        found[text[at] if at < len(text) else count] += p
    return found


def lengths(law: Law, longest: int) -> np.ndarray:
    """The law of the lengths, cell n - 1 being length n."""
    found = np.zeros(longest)
    for text, p in law.items():
        found[len(text) - 1] += p
    return found


STEP = np.array([[0.5, 0.3, 0.2], [0.2, 0.5, 0.3], [0.3, 0.3, 0.4], [0.6, 0.3, 0.1]])
CHAINS = {
    # uneven weights that change from step to step
    "letters": Chain(STEP, np.array([[1.0, 3.0, 0.4], [0.5, 2.0, 1.5], [2.5, 0.7, 0.2],
                                     [1.0, 0.3, 4.0]])),
    # some steps lead nowhere
    "dead ends": Chain(STEP, np.array([[1.0, 0.0, 2.0], [0.3, 1.0, 0.0], [0.0, 1.5, 1.0],
                                       [2.0, 1.0, 0.5]])),
    # texts of 2 to 5 letters that end by a letter of a high weight, as a right answer's is
    "texts": Chain(np.array([[0.95, 0.05], [0.5, 0.5], [1.0, 0.0]]),
                   np.tile([1.0, 50.0], (5, 1)), end=1),
}
