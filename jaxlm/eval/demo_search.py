"""The demo's comparison of searches: the same hard problems, the same budget of answers."""

from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp

from jaxlm.eval.arithmetic_reward import arithmetic_reward
from jaxlm.eval.skills import Share, Tick, share
from jaxlm.eval.solve import key_for
from jaxlm.eval.tasks import ANSWER_LINE, held_out
from jaxlm.hf.bundle import Bundle
from jaxlm.rewards.answers import extract
from jaxlm.search import select
from jaxlm.search.base import Steps
from jaxlm.search.methods import METHODS, Request, as_rollouts, draw

LEVEL = "hard"
PARTS = 3  # ticks


@dataclass(frozen=True)
class SearchRow:
    """One method: its share of right answers, and the tokens that a problem took."""

    name: str
    right: Share
    tokens: float


def compare_searches(
    bundle: Bundle, problems: int, budget: int, temperature: float, seed: int,
    tick: Tick = lambda: None,
) -> list[SearchRow]:
    """Greedy, the majority, best-of-n and the particle filter; the exact checker is the reward.

    The majority and best-of-n choose among the same answers.
    """
    asked = held_out(LEVEL, problems, seed).problems
    prompts = [problem.prompt for problem in asked]
    keys_R = jnp.stack([key_for(seed, problem) for problem in asked])
    request = Request(bundle, arithmetic_reward(), budget, Steps(("\n",), None, 14, 112),
                      temperature, extract=lambda text: extract(text, ANSWER_LINE))

    def row(name: str, answers: list[str | None], tokens: float) -> SearchRow:
        right = sum(a == problem.gold for a, problem in zip(answers, asked, strict=True))
        return SearchRow(name, share(right, problems), tokens / problems)

    def steered(name: str, label: str, some: Request) -> SearchRow:
        found = METHODS[name].run(some, prompts, keys_R)
        tick()
        return row(label, [one.answer for one in found], sum(one.tokens for one in found))

    rows = [steered("greedy", "greedy", replace(request, particles=1))]
    drawn = draw(request, prompts, jax.vmap(jax.random.fold_in, (0, None))(keys_R, 1))
    tick()
    spent = sum(result.tokens_drawn for result in drawn)
    sets = [as_rollouts(request, [result]) for result in drawn]
    for name, choose in (("self-consistency", select.self_consistency),
                         ("best-of-n", select.best_of_n)):
        rows.append(row(name, [s.answers[choose(s).index] for s in sets], spent))
    return [*rows, steered("particle-filter", "particle filter", request)]
