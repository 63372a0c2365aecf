"""The particle filter over text, on `jaxlm.smc`.

A particle is an answer so far; a step is some text. Its law is the model's, times a weight a step:

    p(x_1:T) prod_t w_t / Z,    w_t = f(r_t)^(1 / tau),    r_t the reward of x_1:t ,

with f(r) = r / (1 - r), the odds, by default. Source: arXiv 2502.01618, sections 3.1 to 3.3.
"""

from collections.abc import Sequence
from typing import Any, Unpack, overload

import jax
import jax.numpy as jnp
from flax import struct
from jax.typing import ArrayLike

from jaxlm.cache.base import CacheKind
from jaxlm.cache.dense import Dense
from jaxlm.core.errors import ConfigError
from jaxlm.decode.generate import Prompt
from jaxlm.decode.samplers import Categorical, Sampler, check
from jaxlm.decode.state import Kinds
from jaxlm.hf.bundle import Bundle
from jaxlm.rewards.base import Reward
from jaxlm.search.base import OnResult, SearchResult, Steps
from jaxlm.search.engine import Report
from jaxlm.search.options import FilterOptions
from jaxlm.search.run import make_task, search
from jaxlm.smc import filter as smc
from jaxlm.smc.entropic import RULES, temperature
from jaxlm.smc.resample import resampler

CLIP = 1e-7  # of a score whose odds are taken
WEIGHTS = ("odds", "prob", "raw")
LINES, WARM = Steps("\n"), Categorical(0.8)


def log_weight(score: jax.Array, weight: str, tau: jax.Array | float = 1.0) -> jax.Array:
    """`log w = log f(r) / tau`, float32: f is r / (1 - r) ("odds", r clipped to [1e-7, 1 - 1e-7]),
    r itself ("prob"), or exp(r) ("raw").

    A score that is no number, or of the first two one outside [0, 1], gives NaN.

    >>> round(float(log_weight(jnp.float32(0.75), "odds")), 4)
    1.0986
    """
    r = score.astype(jnp.float32)
    if weight == "raw":
        return r / tau
    good = (r >= 0) & (r <= 1)
    clipped = jnp.clip(r, CLIP, 1 - CLIP)
    logs = {"odds": jnp.log(clipped) - jnp.log1p(-clipped),
            "prob": jnp.log(jnp.where(good, r, 1.0))}
    return jnp.where(good, logs[weight] / tau, jnp.nan)


@struct.dataclass
class Filter:
    """The filter's rule as numbers and names; `held` is a `jaxlm.smc` state without particles.

    tau: a number, or (R,). temper_below, early: the effective size, over P, and the progress below
    which ancestors are drawn less sharply. again: static, weigh ended particles at every step, as
    its_hub does.
    """

    tau: Any = 1.0
    threshold: Any = 0.5
    early: Any = 0.5
    temper_below: Any = 0.5
    weight: str = struct.field(pytree_node=False, default="odds")
    scheme: str = struct.field(pytree_node=False, default="systematic")
    temper: str | None = struct.field(pytree_node=False, default=None)
    forget: bool = struct.field(pytree_node=False, default=False)
    again: bool = struct.field(pytree_node=False, default=False)

    def init(self, prompts: int, particles: int) -> Any:
        """Equal weights, and the potential of each text, `sum_t log f(r_t)`."""
        shape = (prompts, particles)
        return smc.init((), shape), jnp.zeros(shape)

    def choose(self, keys_R, held, open_R, progress_R):
        """Resample the open prompts whose effective size is below the threshold."""
        state, potential_RP = held
        tau = 1.0 if self.temper is None else temperature(
            state.log_weights_P, progress_R, self.temper, self.temper_below, self.early)
        state, info = smc.resample(
            self._model(None), keys_R, state, jnp.where(open_R, self.threshold, 0.0), self.scheme,
            tau, self.forget)
        potential_RP = jnp.take_along_axis(potential_RP, info.ancestors_P, 1)
        return (state, potential_RP), Report(*info)

    def known(self, score_B):
        """NaN for a score without a weight: infinity, and but for "raw" one outside [0, 1]."""
        good_B = (score_B < jnp.inf) & ~jnp.isnan(log_weight(score_B, self.weight))
        return jnp.where(good_B, score_B, jnp.nan)

    def weigh(self, held, score_RP, before_RP, ended_RP, ready_R):
        """Weights of the ready prompts; others, and the ended, keep theirs.

        Where a score takes the place of another, the weight is their quotient: 1 where the text's
        end changes nothing.
        """
        state, potential_RP = held
        log_RP = log_weight(score_RP, self.weight)
        if not self.again:
            before_RP = log_weight(before_RP, self.weight)
            log_RP -= jnp.where(jnp.isfinite(before_RP), before_RP, 0.0)
        log_RP = jnp.where(ready_R[:, None], log_RP, 0.0)
        tau = jnp.broadcast_to(jnp.asarray(self.tau, jnp.float32), ready_R.shape)[:, None]
        count_RP = jnp.zeros_like(state.ended_P) if self.again else state.ended_P
        sure_RP = jnp.where(jnp.isfinite(log_RP), log_RP, -jnp.inf)
        potential_RP = potential_RP + jnp.where(count_RP, 0.0, sure_RP)
        return smc.weigh(self._model(ended_RP), state, (), log_RP / tau), potential_RP

    def final(self, held):
        """The weighted last set: it is not resampled, so that a draw from it loses nothing. Where
        the weights are not those of the target, there is no evidence: NaN."""
        state = held[0]
        other = self.again or (self.forget and self.temper is not None)
        evidence = jnp.full_like(state.log_evidence, jnp.nan) if other else state.log_evidence
        return state.log_weights_P, evidence, state.broken

    def _model(self, ended_RP) -> smc.Model:
        """The rows move in the engine; here go only their weights."""
        ended = None if self.again else lambda _: ended_RP
        return smc.Model(lambda key, x, t: x, lambda before, after, t: jnp.zeros(()), ended,
                         lambda x, index: x)


def filter_of(
    weight: str, tau: Any, threshold: Any, scheme: str,
    temper: str | None = None, early: Any = 0.5, forget: bool = False, compat: str | None = None,
    temper_below: Any = 0.5,
) -> Filter:
    """A checked rule; ConfigError for a name or a number that is none."""
    if weight not in WEIGHTS:
        raise ConfigError(f"weight is {weight!r}; expected one of {WEIGHTS}")
    if temper is not None and temper not in RULES:
        raise ConfigError(f"temper is {temper!r}; expected None or one of {RULES}")
    if compat not in (None, "its_hub"):
        raise ConfigError(f"compat is {compat!r}; expected None or 'its_hub'")
    resampler(scheme)
    if compat:
        scheme, threshold, temper = "multinomial", 2.0, None
    method = Filter(tau, threshold, early, temper_below, weight, scheme, temper, forget,
                    compat is not None)
    check(method, "tau", low=0.0, above=True)
    check(method, "threshold", low=0.0)
    check(method, "early", low=0.0)
    check(method, "temper_below", low=0.0)
    return method


@overload
def particle_filter(
    bundle: Bundle, prompts: Prompt, reward: Reward, **options: Unpack[FilterOptions]
) -> SearchResult: ...
@overload
def particle_filter(
    bundle: Bundle, prompts: Sequence[Prompt], reward: Reward, **options: Unpack[FilterOptions]
) -> list[SearchResult]: ...
def particle_filter(
    bundle: Bundle, prompts: Prompt | Sequence[Prompt], reward: Reward, *, particles: int = 8,
    steps: Steps = LINES, sampler: Sampler = WARM,
    cache: CacheKind | Kinds | str = Dense(), key: jax.Array | None = None, weight: str = "odds",
    tau: ArrayLike = 1.0, threshold: ArrayLike = 0.5, scheme: str = "systematic",
    temper: str | None = None, temper_below: ArrayLike = 0.5, early: ArrayLike = 0.5,
    forget: bool = False, choose: str = "best",
    at_once: int | None = None, rows: int | None = None, quorum: int | None = None,
    memory: int | None = None, compat: str | None = None,
    questions: str | Sequence[str] | None = None, on_result: OnResult | None = None,
) -> SearchResult | list[SearchResult]:
    """Particle filter: better answers of one model, by a reward of every step.

    With a reward on the device, all steps of all prompts are one loop there; with one on the host,
    each round is one hop to the host and back.

    Args:
      bundle: from `load`. prompts: a text or a list of token ids, or a list of either.
      reward: scores answers step by step (`jaxlm.rewards.base.Reward`).
      particles: answers a prompt, P. steps: where they end. sampler: draws their tokens.
      cache: of the prompt, stored once, and of what each particle adds.
      key: a typed key, split by prompt, or one a prompt.
      weight: f, "odds", "prob" or "raw", as `log_weight`. tau: above 0; weights are f^(1 / tau).
      threshold: resample where the effective size is below `threshold * P`; above 1: at every step.
      scheme: "multinomial", "stratified", "systematic" or "residual".
      temper: resample less sharply at first, by the rule "size", "entropy" or "progress"
        (arXiv 2510.05825), where the effective size is below `temper_below * P` and progress, steps
        over `max_steps`, below `early`. forget: drop the weights that this leaves; the target is
        then another, without evidence. Published: `threshold=2.0` and `forget`.
      choose: "best", the highest last score among answers of some weight, or "draw", one draw by
        the weights.
      at_once: prompts in the batch; those that end make room for the next. Default: all.
      rows: computed in an iteration, of all `at_once * particles`. With fewer than all, rows of
        other prompts work while some wait for the slowest of theirs. Default: all. One device.
      quorum: prompts that wait at a step's end before those are resampled; more mean fewer
        resamplings, and more waiting. As many as prompts: all in step, the default for a reward
        that is a model, which is computed over all rows each time; else 1.
      memory: bytes of the device, where it does not tell itself.
      compat: "its_hub": for comparison alone, its rule: multinomial at every step and once more at
        the end, ended particles weighed again at every step. Another target, and no evidence.
      questions: what the reward is told of each prompt, as a chat's question without the chat.
        Default: the prompts. on_result: called with a prompt's number and its result, as soon as
        that is over.
    Returns: a SearchResult, or a list of them when a list was given.
    Raises: ConfigError, ShapeError, TokenizerError before any compute; DeviceError where that many
      particles do not fit; NumericsError when the model gives NaN.

    Example:
      >>> from jaxlm.hf.bundle import load
      >>> from jaxlm.rewards.base import Stateless
      >>> even = Stateless(lambda rows: 0.5 + 0.0 * rows.length_B)
      >>> found = particle_filter(load("tiny"), "Q:12+34=\\n", even, particles=2,
      ...                         steps=Steps("\\n", max_steps=3, max_new_tokens=24))
      >>> len(found.answers), round(found.log_evidence, 3)
      (2, 0.0)
    """
    method = filter_of(weight, tau, threshold, scheme, temper, early, forget, compat,
                       temper_below)
    if choose not in ("best", "draw"):
        raise ConfigError(f"choose is {choose!r}; expected 'best' or 'draw'")
    choose = "resampled" if compat else choose
    task = make_task(bundle, prompts, reward, method, particles=particles, steps=steps,
                     sampler=sampler, cache=cache, key=key, at_once=at_once, rows=rows,
                     quorum=quorum, memory=memory, choose=choose, questions=questions)
    return task.unwrap(search(task, on_result))
