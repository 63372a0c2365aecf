"""Rollouts of a model on arithmetic problems, labelled step by step, as batches for a reward model.

A step is a line. It is labelled at its newline: 1 where it rightly follows from what stands above,
and for the answer's line, where nothing above it is wrong either.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import jax
import numpy as np
from tqdm import tqdm

from experiments._harness import Resumable
from experiments.tiny_tokenizer import BOS, encode
from jaxlm.decode.generate import generate
from jaxlm.decode.samplers import Temperature
from jaxlm.eval import arithmetic
from jaxlm.eval.arithmetic_reward import step_verdicts
from jaxlm.eval.skills import ANSWER_TOKENS, ROOM
from jaxlm.hf.bundle import Bundle

WIDTHS = (64, 96, 128, ROOM + 16)  # rows are padded to the first that holds them
ROWS = 128  # rollouts drawn together


@dataclass(frozen=True)
class Rollout:
    """A prompt and one answer to it."""

    prompt: str
    answer: str

    @property
    def labels(self) -> list[bool]:
        """Of each line that ends in a newline: is it right?"""
        return list(step_verdicts(self.prompt, self.answer)[: self.answer.count("\n")])


def rollouts(
    bundle: Bundle, level: str, split: str, problems: int, samples: int, seed: int, keep: Resumable,
    temperature: float = 0.8,
) -> list[list[Rollout]]:
    """`samples` answers to each of `problems` problems; what `keep` holds is not drawn again."""
    rng = np.random.default_rng([seed, split == "test", list(arithmetic.LEVELS).index(level)])
    asked = [arithmetic.sample(rng, level, split).prompt for _ in range(problems)]
    group, found = max(ROWS // samples, 1), []
    for first in tqdm(range(0, problems, group), desc=f"rollouts, {level}, {split}"):
        prompts = asked[first: first + group]
        prompts += [asked[0]] * (group - len(prompts))  # one shape
        repeated = [prompt for prompt in prompts for _ in range(samples)]
        key = jax.random.fold_in(jax.random.key(seed), hash_of(level, split, first))

        def draw(repeated=repeated, key=key):
            done = generate(bundle, repeated, max_new_tokens=ANSWER_TOKENS, max_len=ROOM,
                            sampler=Temperature(temperature), key=key)
            return [answer.text for answer in done]

        count = min(group, problems - first)  # of the last part: how many are not padding
        texts = keep(f"{level} {split} {first} {count} {samples}", draw)
        for i, prompt in enumerate(asked[first: first + group]):
            found.append([Rollout(prompt, text) for text in texts[i * samples: (i + 1) * samples]])
    return found


def hash_of(level: str, split: str, first: int) -> int:
    """A whole number for a part of the rollouts, the same in every run."""
    return (list(arithmetic.LEVELS).index(level) * 2 + (split == "test")) * 100_000 + first


def rows_of(some: list[Rollout], width: int, rows: int) -> dict[str, np.ndarray]:
    """One batch: int32 tokens and labels (rows, width), label -1 where none is."""
    tokens = np.zeros((rows, width), np.int32)
    labels = np.full((rows, width), -1, np.int32)
    for row, rollout in enumerate(some):
        prompt, answer = [BOS, *encode(rollout.prompt)], encode(rollout.answer)
        ends = [i for i, char in enumerate(rollout.answer) if char == "\n"]
        tokens[row, : len(prompt) + len(answer)] = prompt + answer
        for end, label in zip(ends, rollout.labels, strict=False):  # text after an answer has none
            labels[row, len(prompt) + end] = label
    return {"tokens": tokens, "labels": labels}


def by_width(some: list[Rollout]) -> dict[int, list[int]]:
    """Indices of the rollouts that are padded to each width."""
    found: dict[int, list[int]] = {width: [] for width in WIDTHS}
    for i, rollout in enumerate(some):
        found[width_of(rollout)].append(i)
    return found


def width_of(rollout: Rollout) -> int:
    """The first of WIDTHS that holds a rollout and its first token."""
    size = 1 + len(rollout.prompt) + len(rollout.answer)
    return next(width for width in WIDTHS if size <= width)


def in_order(some: list[Rollout], rows: int) -> Iterator[tuple[list[int], dict[str, np.ndarray]]]:
    """Batches that hold each rollout once, with their indices."""
    for width, indices in by_width(some).items():
        for first in range(0, len(indices), rows):
            part = indices[first: first + rows]
            yield part, rows_of([some[i] for i in part], width, rows)
