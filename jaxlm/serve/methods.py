"""The seam to `jaxlm.search`: from a request's fields to a method of that package, by name."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax.numpy as jnp

from jaxlm.core.errors import ConfigError
from jaxlm.decode.pool import row_key, seed_words
from jaxlm.hf.bundle import Bundle
from jaxlm.rewards.base import Reward, RewardError
from jaxlm.search import methods
from jaxlm.search.base import Steps
from jaxlm.search.beam import beam_search, dvts
from jaxlm.search.methods import METHODS, Solution
from jaxlm.serve.schema import ChatRequest, CompletionRequest

BEAMS: dict[str, Callable[..., Any]] = {"beam": beam_search, "dvts": dvts}
NAMES = (*METHODS, *BEAMS)
WIDTH = 4  # of a beam, as far as it divides the budget
BUDGET = 8  # of a request that does not say
UNUSED = ("stream", "logprobs", "include_stop_str_in_output", "top_p", "top_k", "min_p")


@dataclass(frozen=True)
class Methods:
    """The searches that a server offers: `reward` steers them; without one, some need none."""

    bundle: Bundle
    reward: Reward | None = None
    cache: Any = "dense"
    max_budget: int = 64

    def job(
        self, given: ChatRequest | CompletionRequest, prompts: list, limit: int, seed: int
    ) -> Callable[[], Solution]:
        """A checked search, as a job for the engine.

        Args: limit: new tokens of an answer.
        Raises: ConfigError for a method that there is not, or what a search cannot honour.
        """
        name, budget = given.method, given.budget or BUDGET
        if name not in NAMES:
            raise ConfigError(f"method is {name!r}; expected one of plain, {', '.join(NAMES)}")
        if name not in BEAMS:
            methods.method(name, self.reward)
        elif self.reward is None:
            raise ConfigError(f"{name} needs a reward; start the server with --prm")
        if budget > self.max_budget:
            raise ConfigError(f"budget is {budget}; expected at most {self.max_budget}")
        if ignored := [field for field in UNUSED if getattr(given, field)]:
            raise ConfigError(f"{', '.join(ignored)} cannot be had with method {name}; leave out")
        if len(prompts) > 1 or given.n not in (None, 1):
            raise ConfigError(f"method {name} gives one answer to one prompt; leave n out")
        step = given.step or "\n"
        ends = step if isinstance(step, str) else tuple(step)
        asked = methods.Request(
            self.bundle, self.reward, budget, cache=self.cache,
            steps=Steps(ends, max_steps=given.max_steps or 40, stop=given.stops,
                        max_new_tokens=limit),
            temperature=0.8 if given.temperature is None else given.temperature)
        return partial(solve, name, asked, prompts[0], seed)


def solve(name: str, asked: methods.Request, prompt: Any, seed: int) -> Solution:
    """Run a method on one prompt; RewardError where the reward failed."""
    found = answer(name, asked, prompt, seed)
    if found.failed is not None:
        raise RewardError(f"the reward failed: {found.failed}", [0], [found.failed])
    return found


def answer(name: str, asked: methods.Request, prompt: Any, seed: int) -> Solution:
    """What a method makes of one prompt."""
    keys_R = row_key(jnp.asarray(seed_words(seed)), jnp.int32(0))[None]
    if name not in BEAMS:
        return METHODS[name].run(asked, [prompt], keys_R)[0]
    found = BEAMS[name](
        asked.bundle, [prompt], asked.reward, budget=asked.particles, key=keys_R,
        width=math.gcd(WIDTH, asked.particles), steps=asked.steps, sampler=asked.sampler(),
        cache=asked.cache)
    return methods.solution(asked, found[0])
