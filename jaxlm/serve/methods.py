"""The seam to `jaxlm.search`: from a request's fields to a method of that package, by name."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from jaxlm.core.errors import ConfigError, DeviceError
from jaxlm.decode.automaton import MAX_STATES, states
from jaxlm.decode.batcher import Batcher
from jaxlm.decode.generate import check_stop_ids
from jaxlm.decode.pool import row_key, seed_words
from jaxlm.decode.stop import spelled
from jaxlm.decode.text import text_rule, vocabulary
from jaxlm.hf.bundle import Bundle
from jaxlm.rewards.base import Reward, RewardError, Stateless
from jaxlm.rewards.process import ProcessReward
from jaxlm.rewards.process_text import TextProcessReward
from jaxlm.search import interrupt, methods
from jaxlm.search.base import Room, Steps
from jaxlm.search.memory import device_limit
from jaxlm.search.methods import METHODS, Solution
from jaxlm.search.programs import forget_programs
from jaxlm.serve.schema import ChatRequest, CompletionRequest

BUDGET, STEPS, TOKENS, TEMPERATURE = 8, 40, 256, 0.8  # of a request that does not say
SIZES = 32  # whose programs are kept: they fill memory, and a process's 65,000 mappings
CELLS = 1 << 26  # states times tokens of the table that finds step or stop texts
LEAST = Room(32, 64, 64)  # of what is compiled
UNUSED = ("stream", "logprobs", "include_stop_str_in_output", "top_p", "top_k", "min_p")
Job = Callable[[Callable[[], bool]], Solution]


@dataclass(frozen=True)
class Methods:
    """The searches that a server offers: `reward` steers them; without one, some need none.

    The programs of `SIZES` sizes are kept; one more, and all are compiled anew when asked for.
    memory: bytes of the device that a search may fill, the parameters included; None: all.
    """

    bundle: Bundle
    reward: Reward | None = None
    cache: Any = "dense"
    max_budget: int = 64
    memory: int | None = None
    _sizes: set = field(default_factory=set, repr=False, compare=False)

    def job(
        self, given: ChatRequest | CompletionRequest, prompts: list, limit: int, seed: int
    ) -> Job:
        """A checked search, as a job for the engine.

        Args: limit: new tokens of an answer.
        Raises: ConfigError for a method that there is not, or what a search cannot honour;
          ShapeError for a prompt that the reward cannot read.
        """
        name, budget = given.method, given.budget or BUDGET
        if name not in METHODS:
            raise ConfigError(f"method is {name!r}; expected one of plain, {', '.join(METHODS)}")
        if METHODS[name].rewarded and self.reward is None:
            free = ", ".join(name for name, made in METHODS.items() if not made.rewarded)
            raise ConfigError(f"method {name} needs a reward and this server has none; start it "
                              f"with --prm, or take one of {free}")
        if budget > self.max_budget:
            raise ConfigError(f"budget is {budget}; expected at most {self.max_budget}")
        METHODS[name].check(budget)
        if ignored := [field for field in UNUSED if getattr(given, field)]:
            raise ConfigError(f"{', '.join(ignored)} cannot be had with method {name}; leave out")
        if len(prompts) > 1 or given.n not in (None, 1):
            raise ConfigError(f"method {name} gives one answer to one prompt; leave n out")
        step = given.step or "\n"
        most = given.max_steps or STEPS
        check_reward(self.reward, most, given.question or self.bundle.tokenizer.decode(prompts[0]))
        steps = Steps(step if isinstance(step, str) else tuple(step), max_steps=most,
                      stop=given.stops, max_new_tokens=limit,
                      room=room_of(len(prompts[0]), most, limit))
        check_texts(self.bundle, steps.delimiters, "step texts")
        check_texts(self.bundle, steps.stop, "stop texts")
        asked = methods.Request(
            self.bundle, self.reward, budget, cache=self.cache, steps=steps, memory=self.memory,
            temperature=TEMPERATURE if given.temperature is None else given.temperature,
            questions=None if given.question is None else [given.question])
        return partial(self._solve, name, asked, prompts[0], seed)

    def _solve(self, name: str, asked: methods.Request, *rest: Any) -> Solution:
        """`solve`, with the memory of compiled programs bounded."""
        steps = asked.steps
        rule = text_rule(self.bundle, steps.stop, steps.delimiters,
                         ids=check_stop_ids(self.bundle, steps.stop_ids))  # kept for the search
        tables = tuple((leaf.shape, str(leaf.dtype)) for leaf in jax.tree.leaves(rule))
        size: tuple | None = (name, asked.particles, steps.room, tables)
        try:
            return solve(name, asked, *rest)
        except DeviceError:  # it does not fit, so nothing was compiled
            size = None
            raise
        finally:
            self._keep(size)

    def _keep(self, size: tuple | None) -> None:
        """Count a size's programs, which are there now; let go of all when there are too many."""
        self._sizes.update(() if size is None else (size,))
        if len(self._sizes) > SIZES:
            forget_programs()
            self._sizes.clear()

    def warm(self, max_len: int) -> None:
        """Compile what a search that leaves all to the server runs, at the start."""
        assert self.reward is not None
        tokens = max(min(TOKENS, max_len - LEAST.prompt), 1)
        reward = self.reward if self.reward.on_device else HALF  # a program never sees the host's
        asked = methods.Request(
            self.bundle, reward, BUDGET, cache=self.cache, temperature=TEMPERATURE,
            steps=Steps("\n", max_steps=1, max_new_tokens=1,
                        room=room_of(LEAST.prompt, STEPS, tokens)))
        solve("particle-filter", asked, [0], 0, lambda: False)


HALF = Stateless(lambda rows: jnp.full(len(rows.length_B), 0.5), on_device=False)


def check_reward(reward: Reward | None, steps: int, prompt: str) -> None:
    """ConfigError for more steps than the reward has room for; ShapeError for a prompt that it
    cannot read."""
    if isinstance(reward, ProcessReward | TextProcessReward) and steps > reward.steps:
        raise ConfigError(f"max_steps is {steps}; expected at most {reward.steps}, the steps that "
                          "the reward model has room for")
    if (check := getattr(reward, "check_prompt", None)) is not None:
        check(prompt)


def check_texts(bundle: Bundle, texts: Sequence[str], name: str) -> None:
    """ConfigError for texts that no tokens can spell, or whose table would be too large."""
    size = bundle.lm.config.vocab_size
    count = states(spelled(vocabulary(bundle.tokenizer, size), texts, name))
    if count > (most := min(CELLS // size, MAX_STATES)):
        raise ConfigError(f"{name} need {count} states for each of {size} tokens; expected at most "
                          f"{most}, about the bytes of all of them: give fewer, or shorter ones")


def memory_left(batcher: Batcher) -> int | None:
    """Bytes of the device that a search may fill beside the batch, the parameters included; None
    where the device does not say what it has."""
    limit = device_limit(batcher.bundle)
    return None if limit is None else limit - batcher.bytes


def room_of(prompt: int, steps: int, tokens: int) -> Room:
    """The next powers of two, so that few programs serve all that clients ask for.

    >>> room_of(40, 12, 100)
    Room(prompt=64, steps=64, tokens=128)
    """
    up = lambda number, least: max(1 << (number - 1).bit_length(), least)
    return Room(*map(up, (prompt, steps, tokens), LEAST))


def solve(
    name: str, asked: methods.Request, prompt: Any, seed: int, left: Callable[[], bool]
) -> Solution:
    """Run a method on one prompt; RewardError where the reward failed.

    left: whether nobody waits any more; `Interrupted`, between two rounds, once it is true.
    """
    keys_R = row_key(jnp.asarray(seed_words(seed)), jnp.int32(0))[None]
    with interrupt.unless(left):
        found = METHODS[name].run(asked, [prompt], keys_R)[0]
    if found.failed is not None:
        raise RewardError(f"the reward failed: {found.failed}", [0], [found.failed])
    return found
