"""Step-level beam search and diverse verifier tree search, on the particles' engine.

Of the N rows of a prompt the N / M with the best scores go on, each M times; M is the width. They
maximise the reward and stand for no law: no evidence, no weights.
Source: Snell et al. 2024 (arXiv 2408.03314), section 5.1; trees: Beeching et al. 2024, "Scaling
test-time compute with open models", whose code, search-and-learn, has the same N / M and M = 4.
its_hub keeps as many as its `beam_width` says: here, a width of N / `beam_width`.
"""

from collections.abc import Sequence
from typing import Any, Unpack, overload

import jax
import jax.numpy as jnp
from flax import struct

from jaxlm.cache.base import CacheKind
from jaxlm.cache.dense import Dense
from jaxlm.core.errors import ConfigError, whole
from jaxlm.decode.generate import Prompt
from jaxlm.decode.rows import check_particles
from jaxlm.decode.samplers import Sampler
from jaxlm.decode.state import Kinds
from jaxlm.hf.bundle import Bundle
from jaxlm.rewards.base import Reward
from jaxlm.search.base import OnResult, SearchResult, Steps
from jaxlm.search.engine import Report
from jaxlm.search.options import BeamOptions
from jaxlm.search.particles import LINES, WARM
from jaxlm.search.run import make_task, search


@struct.dataclass
class Beams:
    """The best of all rows go on, `width` times each; or, `trees`, the best of every `width`
    neighbours.

    held: the last scores (R, P), -inf where one was no number, whether one was (R,), and roots.
    """

    width: int = struct.field(pytree_node=False)
    trees: bool = struct.field(pytree_node=False, default=False)

    def init(self, prompts: int, particles: int) -> Any:
        """No score yet."""
        everyone = jnp.broadcast_to(jnp.arange(particles, dtype=jnp.int32), (prompts, particles))
        return jnp.zeros((prompts, particles)), jnp.zeros(prompts, bool), everyone

    def choose(self, keys_R, held, open_R, progress_R):
        """Rows by rank, ties to the first."""
        score_RP, broken_R, root_RP = held
        same = jnp.broadcast_to(jnp.arange(score_RP.shape[1], dtype=jnp.int32), score_RP.shape)
        pick = best_of_trees if self.trees else best_of_all
        index = jnp.where(open_R[:, None], pick(score_RP, self.width), same)
        score_RP, root_RP = (jnp.take_along_axis(x, index, 1) for x in (score_RP, root_RP))
        roots_R = (root_RP[:, :, None] == same[:, None, :]).any(1).sum(1)
        size_R = jnp.full(open_R.shape, score_RP.shape[1], jnp.float32)
        return (score_RP, broken_R, root_RP), Report(size_R, open_R, index, roots_R)

    def known(self, score_B):
        """NaN for an infinity."""
        return jnp.where(jnp.isfinite(score_B), score_B, jnp.nan)

    def weigh(self, held, score_RP, before_RP, ended_RP, ready_R):
        """The new scores; what is no number is the last in rank, and flagged."""
        old_RP, broken_R, root_RP = held
        strange = jnp.isnan(score_RP)
        score_RP = jnp.where(strange, -jnp.inf, score_RP)
        return (jnp.where(ready_R[:, None], score_RP, old_RP),
                broken_R | (ready_R & strange.any(1)), root_RP)

    def final(self, held):
        """All alike, but for scores that are no number; no evidence."""
        return (jnp.where(held[0] == -jnp.inf, -jnp.inf, 0.0),
                jnp.full(held[1].shape, jnp.nan), held[1])


def best_of_all(score_RP: jax.Array, width: int) -> jax.Array:
    """The P / width best rows of each prompt, each `width` times.

    >>> best_of_all(jnp.array([[0.1, 0.9, 0.5, 0.5, 0.2, 0.3]]), 2).tolist()
    [[1, 1, 2, 2, 3, 3]]
    """
    kept = score_RP.shape[1] // width
    order = jnp.argsort(-score_RP, axis=1, stable=True)[:, :kept].astype(jnp.int32)
    return jnp.repeat(order, width, axis=1)


def best_of_trees(score_RP: jax.Array, width: int) -> jax.Array:
    """The best of each `width` neighbours, `width` times.

    >>> best_of_trees(jnp.array([[0.1, 0.9, 0.5, 0.5]]), 2).tolist()
    [[1, 1, 2, 2]]
    """
    grouped = score_RP.reshape(len(score_RP), -1, width)
    first = jnp.arange(grouped.shape[1], dtype=jnp.int32) * width
    return jnp.repeat(first + jnp.argmax(grouped, -1).astype(jnp.int32), width, axis=1)


@overload
def beam_search(
    bundle: Bundle, prompts: Prompt, reward: Reward, **options: Unpack[BeamOptions]
) -> SearchResult: ...
@overload
def beam_search(
    bundle: Bundle, prompts: Sequence[Prompt], reward: Reward, **options: Unpack[BeamOptions]
) -> list[SearchResult]: ...
def beam_search(
    bundle: Bundle, prompts: Prompt | Sequence[Prompt], reward: Reward, *, budget: int = 16,
    width: int = 4, steps: Steps = LINES, sampler: Sampler = WARM,
    cache: CacheKind | Kinds | str = Dense(), key: jax.Array | None = None,
    at_once: int | None = None, rows: int | None = None, quorum: int | None = None,
    memory: int | None = None, questions: str | Sequence[str] | None = None,
    on_result: OnResult | None = None,
) -> SearchResult | list[SearchResult]:
    """Beam search over steps: of `budget` rows the `budget / width` best go on, `width` times each.

    Ended answers stay, and compete; the best last score is chosen.

    Args: budget: rows a prompt, a multiple of `width`. width: 1 to `budget`, what a row becomes.
      The others: as `particle_filter`.
    Returns: a SearchResult, or a list of them when a list was given; `log_evidence` is NaN.
    Raises: as `particle_filter`; ConfigError where the width does not divide the budget.
    """
    return ranked(bundle, prompts, reward, Beams(check_width(budget, width)), particles=budget,
                  steps=steps, sampler=sampler, cache=cache, key=key, at_once=at_once,
                  rows=rows, quorum=quorum, memory=memory, questions=questions,
                  on_result=on_result)


@overload
def dvts(
    bundle: Bundle, prompts: Prompt, reward: Reward, **options: Unpack[BeamOptions]
) -> SearchResult: ...
@overload
def dvts(
    bundle: Bundle, prompts: Sequence[Prompt], reward: Reward, **options: Unpack[BeamOptions]
) -> list[SearchResult]: ...
def dvts(
    bundle: Bundle, prompts: Prompt | Sequence[Prompt], reward: Reward, *, budget: int = 16,
    width: int = 4, steps: Steps = LINES, sampler: Sampler = WARM,
    cache: CacheKind | Kinds | str = Dense(), key: jax.Array | None = None,
    at_once: int | None = None, rows: int | None = None, quorum: int | None = None,
    memory: int | None = None, questions: str | Sequence[str] | None = None,
    on_result: OnResult | None = None,
) -> SearchResult | list[SearchResult]:
    """Diverse verifier tree search: `budget / width` trees that never meet; in each the best of
    `width` rows goes on, `width` times.

    Args, Returns, Raises: as `beam_search`.
    """
    return ranked(bundle, prompts, reward, Beams(check_width(budget, width), True),
                  particles=budget, steps=steps, sampler=sampler, cache=cache, key=key,
                  at_once=at_once, rows=rows, quorum=quorum, memory=memory, questions=questions,
                  on_result=on_result)


def ranked(
    bundle: Bundle, prompts: Prompt | Sequence[Prompt], reward: Reward, method: Beams,
    on_result: OnResult | None = None, **options: Any,
) -> SearchResult | list[SearchResult]:
    """The search that both are."""
    task = make_task(bundle, prompts, reward, method, **options)
    return task.unwrap(search(task, on_result))


def check_width(budget: int, width: int) -> int:
    """The width; ConfigError unless it divides the budget."""
    check_particles(budget)
    width = whole("width", width, 1, budget)
    if budget % width:
        raise ConfigError(f"budget {budget} is not a multiple of width {width}; budget / width "
                          "rows go on, width times each")
    return width
