"""Every way to spend a budget of answers on a prompt, by name.

Methods that only select draw by the particle filter that never resamples: the same program, the
same step scores, so that a comparison differs in nothing else.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm.core.errors import ConfigError, whole
from jaxlm.decode.generate import Prompt
from jaxlm.decode.rows import check_particles
from jaxlm.decode.samplers import Categorical
from jaxlm.hf.bundle import Bundle
from jaxlm.rewards.answers import Same, extract, same
from jaxlm.rewards.base import Reward, RewardError, Stateless
from jaxlm.search import perplexity, select
from jaxlm.search.base import OnResult, SearchResult, Steps
from jaxlm.search.beam import beam_search, check_width, dvts
from jaxlm.search.gibbs import Chain, particle_gibbs
from jaxlm.search.particles import particle_filter
from jaxlm.search.select import Choice, Rollouts, rollouts

WIDTH, SWEEPS = 4, 2
SPREAD = (0.6, 0.8, 1.0, 1.2)  # temperatures of the vote, as multiples of the one that is asked for


def even(rows: Any) -> jax.Array:
    """The score of a method that has no reward: all alike, of odds 1."""
    return jnp.full(rows.length_B.shape, 0.5)


EVEN = Stateless(even)


@dataclass(frozen=True)
class Request:
    """What a method needs beside prompts and keys.

    particles: the budget, answers a prompt. rows: computed in an iteration, None for all (as
    `particle_filter`). extract: a text -> its final answer, or None. equal:
    whether two final answers are the same. at_once: prompts in the batch, None for all. questions:
    one a prompt, what the reward is told of it; None: the prompts. on_solution: called with a
    prompt's number and its Solution, as soon as that is there. memory: bytes of the device, None:
    what it says.
    """

    bundle: Bundle
    reward: Reward | None = None
    particles: int = 16
    steps: Steps = Steps(("\n",))
    temperature: float = 0.8
    cache: Any = "dense"
    extract: Callable[[str], str | None] = extract
    equal: Same = same
    rows: int | None = None
    at_once: int | None = None
    questions: Sequence[str] | None = None
    on_solution: Callable[[int, "Solution"], Any] | None = None
    memory: int | None = None

    def sampler(self, temperature: float | None = None) -> Categorical:
        """At a temperature, by default the request's."""
        return Categorical(self.temperature if temperature is None else temperature)


@dataclass(frozen=True)
class Solution:
    """One prompt's answer.

    text: as written. answer: taken out of it, or None. score: the reward's, of that text, or what
    the vote gave its answer. log_evidence: of a particle method, else NaN. ess: by step. tokens:
    that the model computed, losers included; of chains, those of all sweeps.
    """

    text: str
    answer: str | None
    score: float
    log_evidence: float
    ess: tuple[float, ...]
    tokens: int
    flags: tuple[str, ...]
    finish: str = "stop"  # as `Answer.finish`
    failed: str | None = None  # as `SearchResult.failed`


Run = Callable[[Request, Sequence[Prompt], jax.Array], list[Solution]]


def draw(
    request: Request, prompts: Sequence[Prompt], keys_R: jax.Array, count: int | None = None,
    temperature: float | None = None, on_result: OnResult | None = None,
) -> list[SearchResult]:
    """`count` independent answers to each prompt, scored at every step."""
    return particle_filter(
        request.bundle, list(prompts), request.reward or EVEN, threshold=0.0, key=keys_R,
        particles=request.particles if count is None else count, steps=request.steps,
        sampler=request.sampler(temperature), cache=request.cache, rows=request.rows,
        at_once=request.at_once, questions=request.questions, on_result=on_result,
        memory=request.memory)


def as_rollouts(
    request: Request, results: Sequence[SearchResult], temperatures: Sequence[float] | None = None
) -> Rollouts:
    """All answers of several draws for one prompt.

    Raises: RewardError where the reward failed: what was drawn until then is no fair sample.
    """
    if lost := first_failed(results):
        raise RewardError(f"the reward failed: {lost.failed}", [0], [str(lost.failed)])
    answers = [answer for result in results for answer in result.answers]
    at = temperatures or [request.temperature] * len(results)
    return rollouts(
        [answer.text for answer in answers], [request.extract(a.text) for a in answers],
        equal=request.equal, logprobs=[answer.logprob for answer in answers],
        lengths=[len(answer.tokens) for answer in answers],
        rewards=[answer.score if answer.log_weight > -math.inf else math.nan
                 for answer in answers] if request.reward else None,
        temperatures=np.repeat(at, [len(result.answers) for result in results]).tolist())


def first_failed(results: Sequence[SearchResult]) -> SearchResult | None:
    """The first whose reward failed."""
    return next((result for result in results if result.failed is not None), None)


def solutions(
    request: Request, make: Callable[[SearchResult], Solution],
    search: Callable[[OnResult | None], list[SearchResult]],
) -> list[Solution]:
    """What `make` makes of each result of a search; `on_solution` hears of it when it is over."""
    on_solution = request.on_solution
    if on_solution is None:
        return [make(result) for result in search(None)]
    made: dict[int, Solution] = {}

    def tell(number: int, result: SearchResult) -> None:
        made[number] = make(result)
        on_solution(number, made[number])

    return [made[i] for i in range(len(search(tell)))]


def in_turn(run: Run) -> Run:
    """A method whose searches have no queue of their own: `at_once` prompts, then the next."""
    def run_parts(request, prompts, keys_R):
        found: list[Solution] = []
        count = whole("at_once", max(len(prompts), 1) if request.at_once is None
                      else request.at_once)
        for at in range(0, len(prompts), count):
            part, asked = slice(at, at + count), request.questions
            some = replace(request, at_once=None, questions=None if asked is None else asked[part])
            for one in run(some, prompts[part], keys_R[part]):
                found.append(one)
                if request.on_solution is not None:
                    request.on_solution(len(found) - 1, one)
        return found

    return run_parts


def by_search(search: Callable[..., Any], budget: str = "particles", **options: Any) -> Run:
    """A method that steers while it draws: the best of its last set is the answer.

    budget: the search's name for it.
    """
    def run(request, prompts, keys_R):
        return solutions(request, partial(solution, request), lambda tell: search(
            request.bundle, list(prompts), request.reward or EVEN, key=keys_R,
            steps=request.steps, sampler=request.sampler(), cache=request.cache,
            rows=request.rows, at_once=request.at_once, questions=request.questions,
            on_result=tell, memory=request.memory, **{budget: request.particles}, **options))

    return run


def by_width(search: Callable[..., Any]) -> Run:
    """A search in which each row that goes on becomes 4, as its authors have it, or the budget
    where that is less."""
    def run(request, prompts, keys_R):
        width = width_of(request.particles)
        return by_search(search, "budget", width=width)(request, prompts, keys_R)

    return run


def width_of(budget: int) -> int:
    """4, or the budget where that is less; ConfigError unless it divides the budget."""
    return check_width(budget, min(WIDTH, budget))


def share_of(budget: int, chains: int = 1) -> int:
    """Particles of a sweep of a chain; ConfigError where sweeps and chains cannot share a budget.

    >>> share_of(16), share_of(16, chains=2)
    (8, 4)
    """
    each, rest = divmod(budget, SWEEPS * chains)
    if each < 2 or rest:
        least = 2 * SWEEPS * chains
        raise ConfigError(f"a budget of {budget} answers is shared by {SWEEPS} sweeps of {chains} "
                          f"chains; expected a multiple of {least // 2}, at least {least}")
    return each


def by_chains(temperatures: Sequence[float] = (1.0,)) -> Run:
    """Particle Gibbs at the same number of answers: sweeps, particles and chains share it.

    The answer is the best particle of them all: the reward of a text is the same in every sweep and
    at every temperature. The law is another matter, for which `Chain.references` are there.
    """
    def run(request, prompts, keys_R):
        found = particle_gibbs(
            request.bundle, list(prompts), request.reward or EVEN, key=keys_R,
            particles=share_of(request.particles, len(temperatures)), sweeps=SWEEPS,
            temperatures=temperatures, steps=request.steps, sampler=request.sampler(),
            cache=request.cache, rows=request.rows, questions=request.questions,
            memory=request.memory)
        return [replace(solution(request, joined(chain)), log_evidence=float("nan"),
                        tokens=chain.tokens_drawn) for chain in found]

    return run


def joined(chain: Chain) -> SearchResult:
    """The last set, with the particles and the flags of all."""
    return replace(chain.last, answers=tuple(a for one in chain.sets for a in one.answers),
                   flags=tuple(sorted({flag for one in chain.sets for flag in one.flags})))


def solution(request: Request, result: SearchResult) -> Solution:
    """A search's best answer.

    As in `select`, none that cannot be read while another one can. Of those the best score of an
    answer with some weight; of equals one that came to its own end, then the first.
    """
    rank = lambda answer: (request.extract(answer.text) is not None, answer.log_weight > -math.inf,
                           answer.score, answer.finish in ("stop", "string"))
    best = max(result.answers, key=rank)
    return Solution(best.text, request.extract(best.text), best.score, result.log_evidence,
                    tuple(map(float, result.ess)), result.tokens_drawn, result.flags,
                    best.finish, result.failed)


def by_choice(choose: Callable[[Rollouts], Choice], rewarded: bool) -> Run:
    """A method that only selects."""
    def run(request, prompts, keys_R):
        return solutions(request, lambda found: chosen(request, [found], choose, rewarded),
                         lambda tell: draw(request, prompts, keys_R, on_result=tell))

    return run


def chosen(
    request: Request, results: Sequence[SearchResult], choose: Callable[[Rollouts], Choice],
    rewarded: bool, temperatures: Sequence[float] | None = None,
) -> Solution:
    """The answer that a selection makes; where the reward failed, none is made."""
    if lost := first_failed(results):
        return replace(solution(request, lost), log_evidence=float("nan"), ess=())
    choice = choose(as_rollouts(request, results, temperatures))
    answer = [answer for result in results for answer in result.answers][choice.index]
    score = answer.score if rewarded else float(choice.scores_P[choice.index])
    flags = tuple(sorted({flag for result in results for flag in result.flags}))
    return Solution(answer.text, request.extract(answer.text), score, float("nan"), (),
                    sum(result.tokens_drawn for result in results), flags, answer.finish)


def greedy(request: Request, prompts: Sequence[Prompt], keys_R: jax.Array) -> list[Solution]:
    """One answer, of the likeliest token at every place."""
    bare = lambda one: replace(solution(request, one), log_evidence=float("nan"), ess=())
    return solutions(request, bare, lambda tell: draw(request, prompts, keys_R, 1, 0.0, tell))


def several_temperatures(
    request: Request, prompts: Sequence[Prompt], keys_R: jax.Array
) -> list[Solution]:
    """The budget spread evenly over `SPREAD`; a smaller budget takes the middle ones."""
    count = min(len(SPREAD), whole("particles", request.particles))
    first = (len(SPREAD) - count + 1) // 2
    at = [request.temperature * share for share in SPREAD[first:first + count]]
    each = [len(part) for part in np.array_split(np.arange(request.particles), count)]
    keys = [jax.vmap(jax.random.fold_in, (0, None))(keys_R, i) for i in range(count)]
    found = [draw(request, prompts, k, n, t) for k, n, t in zip(keys, each, at, strict=True)]
    return [chosen(request, results, select.multi_temperature_vote, False, at)
            for results in zip(*found, strict=True)]


@dataclass(frozen=True)
class Method:
    """run: what it does. rewarded: whether it needs a reward. single: it takes no budget. check:
    of a budget, ConfigError where the method cannot share it out; `run` raises the same."""

    run: Run
    rewarded: bool
    single: bool = False
    check: Callable[[int], Any] = check_particles


METHODS: dict[str, Method] = {
    "greedy": Method(greedy, False, single=True),
    "particle-filter": Method(by_search(particle_filter), True),
    "entropic-filter": Method(by_search(particle_filter, temper="size"), True),
    "particle-gibbs": Method(in_turn(by_chains()), True, check=share_of),
    "parallel-tempering": Method(in_turn(by_chains((1.0, 2.0))), True,
                                 check=partial(share_of, chains=2)),
    "beam": Method(by_width(beam_search), True, check=width_of),
    "dvts": Method(by_width(dvts), True, check=width_of),
    "best-of-n": Method(by_choice(select.best_of_n, True), True),
    "weighted-best-of-n": Method(by_choice(select.weighted_best_of_n, False), True),
    "calibrated-best-of-n": Method(by_choice(select.calibrated_best_of_n, False), True),
    "self-consistency": Method(by_choice(select.self_consistency, False), False),
    "multi-temperature": Method(in_turn(several_temperatures), False),
    "perplexity-consistency": Method(by_choice(perplexity.perplexity_consistency, False), False),
    "rpc": Method(by_choice(perplexity.rpc, False), False),
}


def method(name: str, reward: Reward | None = None) -> Method:
    """A method by name.

    Raises: ConfigError for another name, or without the reward that it needs.

    >>> method("self-consistency").rewarded
    False
    """
    if name not in METHODS:
        raise ConfigError(f"method is {name!r}; expected one of {', '.join(METHODS)}")
    if METHODS[name].rewarded and reward is None:
        free = ", ".join(n for n, made in METHODS.items() if not made.rewarded)
        raise ConfigError(f"{name} needs a reward and got none; without one there are {free}")
    return METHODS[name]
