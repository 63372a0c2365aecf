"""Particle Gibbs and parallel tempering over text: Markov chains of whole answers.

The first sweep is the particle filter, multinomial at every step. A later one holds row 0 to the
chain's present answer, the reference: its tokens are forced, so that it reaches the same steps by
the same rules. All other rows choose ancestors from all at every step; the next reference is drawn
from the last set by its weights. The law `p(x) prod_t w_t / Z` is invariant, for any number of
particles from 2.

Source: Andrieu, Doucet and Holenstein 2010, section 4; for text arXiv 2502.01618, algorithms 2, 3.
The published code weighs the reference by its last score at every step, and the last factor twice:
another law (tests/search/test_gibbs.py refuses the second).
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Unpack, overload

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from jaxlm.cache.base import CacheKind
from jaxlm.cache.dense import Dense
from jaxlm.core.errors import ConfigError, whole
from jaxlm.core.hosts import to_host
from jaxlm.decode.generate import Prompt, row_keys, to_ids
from jaxlm.decode.lend import sampler_of
from jaxlm.decode.samplers import Sampler, Seen, check_sampler, read_text
from jaxlm.decode.state import Kinds
from jaxlm.hf.bundle import Bundle
from jaxlm.rewards.base import Reward
from jaxlm.search.base import Answer, SearchResult, Steps
from jaxlm.search.engine import Population
from jaxlm.search.options import GibbsOptions
from jaxlm.search.particles import LINES, WARM, Filter, filter_of
from jaxlm.search.run import (
    Task,
    checked_questions,
    final_jit,
    give_up_jit,
    grow,
    make_task,
    read,
    read_row,
    readable,
    start,
)
from jaxlm.smc.gibbs import GibbsState, swap
from jaxlm.smc.weights import normalise


@struct.dataclass
class Pinned:
    """A sampler whose rows follow given texts first: `count_B` of `tokens_BS`, then draw freely.

    The state counts what a row's text has drawn, and so moves with it; the texts stay with rows.
    """

    inner: Any
    tokens_BS: Any
    count_B: Any

    def init(self, batch: int, vocab: int) -> Any:
        """The inner state, and nothing drawn."""
        return self.inner.init(batch, vocab), jnp.zeros(batch, jnp.int32)

    def step(self, keys_B, logits_BV, state):
        """The given token, or a draw."""
        inner, drawn_B = state
        token_B, logprob_B, _ = self.inner.step(keys_B, logits_BV, inner)
        pinned_B = drawn_B < self.count_B
        at_B = jnp.minimum(drawn_B, self.tokens_BS.shape[1] - 1)
        token_B = jnp.where(pinned_B, self.tokens_BS[jnp.arange(len(at_B)), at_B], token_B)
        logprob_B = jnp.where(pinned_B, self.inner.logprob(logits_BV, token_B, inner), logprob_B)
        inner = read_text(inner, token_B[:, None], jnp.ones_like(token_B))
        return token_B, logprob_B, (inner, drawn_B + 1)

    def rows(self, index_W):
        """The texts of some rows."""
        inner = sampler_of(self.inner, index_W, len(self.count_B))
        return Pinned(inner, *(jnp.asarray(x)[index_W] for x in (self.tokens_BS, self.count_B)))

    def logprob(self, logits_BV, token_B, state):
        """The inner sampler's."""
        return self.inner.logprob(logits_BV, token_B, state[0])


@dataclass(frozen=True)
class Chain:
    """A chain of answers to one prompt.

    references: one a sweep, fewer where the reward failed (`last.failed` says why); after a few
    sweeps they are draws, not independent, from the law.
    last: the last sweep's particles; after the first its `log_evidence` is biased, the reference
    being given.
    swapped: the share of exchanges between temperatures that were accepted, NaN for one.
    tokens_drawn: as `SearchResult`'s, of all sweeps of all the prompt's chains.
    sets: the particles of every sweep, in each those of every chain; `last` is one of them.
    """

    references: tuple[Answer, ...]
    last: SearchResult
    swapped: float
    tokens_drawn: int
    sets: tuple[SearchResult, ...]

    @property
    def text(self) -> str:
        """The chosen answer's text."""
        return self.last.text


@overload
def particle_gibbs(
    bundle: Bundle, prompts: Prompt, reward: Reward, **options: Unpack[GibbsOptions]
) -> Chain: ...
@overload
def particle_gibbs(
    bundle: Bundle, prompts: Sequence[Prompt], reward: Reward, **options: Unpack[GibbsOptions]
) -> list[Chain]: ...
def particle_gibbs(
    bundle: Bundle, prompts: Prompt | Sequence[Prompt], reward: Reward, *, particles: int = 8,
    sweeps: int = 4, temperatures: Sequence[float] = (1.0,), steps: Steps = LINES,
    sampler: Sampler = WARM, cache: CacheKind | Kinds | str = Dense(),
    key: jax.Array | None = None, weight: str = "odds", choose: str = "best",
    rows: int | None = None, memory: int | None = None,
    questions: str | Sequence[str] | None = None,
) -> Chain | list[Chain]:
    """Particle Gibbs; with several temperatures, parallel tempering with swaps between them.

    Chain k has the law `p prod f(r_t)^(1 / temperature_k)`; after each sweep neighbours exchange
    references by a Metropolis test (`jaxlm.smc.swap`). Of the chains, the first one's is returned.

    Args:
      particles: rows a chain, the reference included, at least 2. sweeps: at least 1; the first has
        no reference yet and is the plain filter (`scheme="multinomial"`, `threshold=2.0`).
        temperatures: above 0. Each is a chain with a prompt cache of its own.
      choose: of the last sweep, "best" or "draw". sampler: a `Categorical` or `Greedy`; one whose
        state depends on its own draws is refused. The others: as `particle_filter`.
    Returns: a Chain, or a list of them when a list was given.
    Raises: as `particle_filter`.
    """
    if whole("particles", particles) < 2:
        raise ConfigError("particles is 1; expected at least 2, one of them the reference")
    whole("sweeps", sweeps)
    check_stateless(sampler)
    ids, many = to_ids(bundle, prompts)
    tau = np.asarray(temperatures, np.float32)
    if tau.ndim != 1 or not len(tau) or not (np.isfinite(tau) & (tau > 0)).all():
        raise ConfigError(f"temperatures are {temperatures!r}; expected numbers above 0")
    keys_R = row_keys(key, len(ids))
    keys_B = jax.vmap(lambda k: jax.random.split(k, len(tau)))(keys_R).reshape(-1)
    batch, room = len(ids) * len(tau) * particles, steps.program.max_new_tokens
    free = Pinned(sampler, np.zeros((batch, room), np.int32), np.zeros(batch, np.int32))
    method = filter_of(weight, np.tile(tau, len(ids)), 2.0, "conditional")
    asked = checked_questions(questions, len(ids))
    if asked is not None:
        asked = tuple(question for question in asked for _ in tau)
    task = make_task(bundle, [prompt for prompt in ids for _ in tau], reward, method,
                     particles=particles, steps=steps, sampler=free, cache=cache, key=keys_B,
                     rows=rows, memory=memory, choose=choose, questions=asked)
    found = run_chains(task, keys_R, sweeps, tau)
    return found if many else found[0]


def run_chains(task: Task, keys_R: jax.Array, sweeps: int, tau: np.ndarray) -> list[Chain]:
    """All chains of all prompts, sweep by sweep; those of a prompt whose reward fails end there."""
    prompts, chains = len(keys_R), len(tau)
    slots = list(range(prompts * chains))
    references: list[list[Answer]] = [[] for _ in range(prompts)]
    exchanged, tried, drawn = np.zeros(prompts), 0, np.zeros(prompts, np.int64)
    last: dict[int, SearchResult] = {}
    sets: list[list[SearchResult]] = [[] for _ in range(prompts)]
    for sweep in range(sweeps):
        method = task.tools.method if sweep else task.tools.method.replace(scheme="multinomial")
        here = replace(task, job=replace(task.job, keys_B=fold(task.job.keys_B, sweep)),
                       tools=task.tools._replace(method=method))
        pop, carry = start(here, slots)
        if last:
            pop = give_up_jit(pop, np.isin(np.arange(prompts).repeat(chains), list(last)))
        pop, _, failed = grow(here, pop, carry, slots, len(slots))
        odd = sweep % 2 == 1 and chains > 2
        state, swapped = next_references(
            here.steps.program, task.tools.method, fold(here.job.keys_B, 1), fold(keys_R, sweep),
            pop, 1 / tau, odd)
        host, final = readable(pop), to_host(final_jit(task.tools.method, pop.held))
        (tokens_CS, count_C, row_C), swapped_RM = to_host((state.path, swapped))
        drawn += host.drawn_R.reshape(prompts, chains).sum(1)
        exchanged, tried = exchanged + swapped_RM.sum(1) / 2, tried + (chains - odd) // 2
        for i in sorted(set(range(prompts)) - set(last)):
            first, row = i * chains, int(row_C[i * chains])
            reason = next((failed[c] for c in range(first, first + chains) if c in failed), None)
            if reason is None:
                references[i].append(read_row(here, host, task.job.prompts[first], row,
                                              float(final[0].flat[row])))
            sets[i] += [read(here, host, final, c, c, reason) for c in range(first, first + chains)]
            if reason is not None or sweep == sweeps - 1:
                last[i] = sets[i][-chains]
        task = replace(task, tools=task.tools._replace(
            sampler=pin(task.tools.sampler, tokens_CS, count_C, task.particles)))
    worked = float(host.spent[1]) / max(float(host.spent[0]), 1.0)
    rate = exchanged / tried if tried else np.full(prompts, np.nan)
    busy = lambda one: replace(one, row_utilisation=worked)
    return [Chain(tuple(references[i]), busy(last[i]), float(rate[i]), int(drawn[i]),
                  tuple(map(busy, sets[i]))) for i in range(prompts)]


@partial(jax.jit, static_argnames="steps")
def next_references(
    steps: Steps, method: Filter, keys_C: jax.Array, keys_R: jax.Array, pop: Population,
    powers_M: jax.Array, odd: jax.Array,
) -> tuple[GibbsState, jax.Array]:
    """One draw from each last set by its weights; then neighbours of a prompt may exchange theirs.

    Returns: the references of all C = R M chains: tokens, their number, the row that each was; and
      which were exchanged (R, M).
    """
    probs_CP = normalise(method.final(pop.held)[0]).probs_P
    chosen_C = jax.vmap(jax.random.categorical)(keys_C, jnp.log(probs_CP))
    chains, particles = probs_CP.shape
    row_C = jnp.arange(chains) * particles + chosen_C
    at_CS = pop.start_B[row_C, None] + jnp.arange(steps.max_new_tokens)
    tokens_CS = pop.rows.tokens_BS[row_C[:, None], at_CS.clip(max=pop.rows.tokens_BS.shape[1] - 1)]
    count_C = pop.at_B[row_C] - pop.start_B[row_C]
    state = GibbsState((tokens_CS, count_C, row_C), pop.held[1].reshape(-1)[row_C])
    by_prompt = lambda x: x.reshape(len(keys_R), -1, *x.shape[1:])
    state, swapped = jax.vmap(swap, (0, 0, None, None))(
        keys_R, jax.tree.map(by_prompt, state), powers_M, odd)
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), state), swapped


def pin(sampler: Pinned, tokens_CS: np.ndarray, count_C: np.ndarray, particles: int) -> Pinned:
    """Row 0 of every chain is to follow its reference."""
    tokens_BS, count_B = np.zeros_like(sampler.tokens_BS), np.zeros_like(sampler.count_B)
    tokens_BS[::particles], count_B[::particles] = tokens_CS, count_C
    return Pinned(sampler.inner, tokens_BS, count_B)


def fold(keys_R: jax.Array, number: int) -> jax.Array:
    """Every key with a number folded in."""
    return jax.vmap(lambda key: jax.random.fold_in(key, number))(keys_R)


def check_stateless(sampler: Any) -> None:
    """ConfigError for a sampler whose state is more than which tokens a text holds."""
    check_sampler(sampler)
    state = sampler.init(1, 1)
    is_seen = lambda node: isinstance(node, Seen)
    if not all(map(is_seen, jax.tree.leaves(state, is_leaf=is_seen))):
        raise ConfigError(f"sampler {type(sampler).__name__} keeps a state of its own draws, which "
                          "a given text cannot restore; take a Categorical or Greedy")
