"""Contrastive decoding: what a large model knows and a small one does not.

`contrast` takes text and gives text. Below it is a policy over two DecodeStates that hold the same
text, one of each model.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from jaxlm.cache.base import CacheKind
from jaxlm.cache.dense import Dense
from jaxlm.core.errors import ConfigError, ShapeError
from jaxlm.core.tree import Params
from jaxlm.decode.generate import Prompt, placed, prefill_jit, prepare, read
from jaxlm.decode.samplers import Greedy, Sampler, check
from jaxlm.decode.state import DecodeState, Kinds, draw_and_read, flush, flush_period
from jaxlm.decode.stop import NEVER, Stop
from jaxlm.decode.transforms import keep_min_p, logprob_of, per_row
from jaxlm.hf.bundle import Bundle
from jaxlm.models.attention import NEG
from jaxlm.models.lm import LM


@struct.dataclass
class Contrast:
    """`s_v = log p(v) - beta log q(v)` where `p(v) >= alpha max p`, and no other token.

    Args:
      alpha: in (0, 1], how plausible to the expert p a token must be.
      beta: in [0, 1000]; 1 is the paper's, 0 leaves the expert alone.
      temperature: of the amateur q, at least 0.001. Each one number, or (B,).
    Source: 2210.15097, section 3, equations 2 to 4; the same objective in logits, scaled by
      `1 + b` with `beta = b / (1 + b)`: 2309.09117.
    """

    alpha: Any = 0.1
    beta: Any = 1.0
    temperature: Any = 1.0

    def __post_init__(self):
        check(self, "alpha", low=0.0, high=1.0, above=True)
        check(self, "beta", low=0.0, high=1e3)  # beyond these, float32 has no room for the scores
        check(self, "temperature", low=1e-3)

    def scores(self, expert_BV: jax.Array, amateur_BV: jax.Array) -> jax.Array:
        """`s_BV`, float32, `NEG` for implausible tokens."""
        batch = expert_BV.shape[0]
        beta_B1 = per_row("beta", self.beta, batch)[:, None]
        heat_B1 = per_row("temperature", self.temperature, batch)[:, None]
        p_BV = jax.nn.log_softmax(keep_finite(expert_BV), -1)
        q_BV = jax.nn.log_softmax(keep_finite(amateur_BV / heat_B1), -1)
        plausible_BV = keep_min_p(p_BV, per_row("alpha", self.alpha, batch)) > NEG
        empty_B1 = (jnp.maximum(expert_BV.max(-1), NEG) == NEG)[:, None]  # nothing is left
        broken_B1 = jnp.isnan(p_BV + q_BV).any(-1, keepdims=True) | empty_B1
        scores_BV = jnp.where(plausible_BV, p_BV - keep_finite(beta_B1 * q_BV), NEG)
        return jnp.where(broken_B1, jnp.nan, scores_BV)


PAPER = Contrast()


def check_rule(name: str, rule: Any) -> None:
    """ConfigError for what is no Contrast, such as its beta alone."""
    if not isinstance(rule, Contrast):
        raise ConfigError(f"{name} is {rule!r}; expected a Contrast, such as Contrast(beta=0.5)")


@struct.dataclass
class Against:
    """A sampler that draws from the contrast with given amateur logits."""

    sampler: Any
    contrast: Contrast
    amateur_BV: jax.Array

    def init(self, batch: int, vocab: int) -> Any:
        """The inner sampler's."""
        return self.sampler.init(batch, vocab)

    def step(self, keys_B, logits_BV, state):
        """The inner sampler's step, on the scores."""
        scores_BV = self.contrast.scores(logits_BV, self.amateur_BV)
        return self.sampler.step(keys_B, scores_BV, state)

    def logprob(self, logits_BV, token_B, state):
        """Under the inner sampler, on the scores."""
        scores_BV = self.contrast.scores(logits_BV, self.amateur_BV)
        return self.sampler.logprob(scores_BV, token_B, state)


@struct.dataclass
class Forced:
    """A sampler that draws given tokens; log-probabilities are the model's own."""

    token_B: jax.Array

    def init(self, batch: int, vocab: int) -> tuple:
        """Nothing to carry."""
        return ()

    def step(self, keys_B, logits_BV, state):
        """The given tokens."""
        return self.token_B, logprob_of(logits_BV, self.token_B), state

    def logprob(self, logits_BV, token_B, state):
        """`log softmax(l)[token]`."""
        return logprob_of(logits_BV, token_B)


def contrast(
    expert: Bundle, amateur: Bundle, prompts: Prompt | Sequence[Prompt], *, rule: Contrast = PAPER,
    max_new_tokens: int = 64, sampler: Sampler = Greedy(),
    cache: CacheKind | Kinds | str = Dense(), key: jax.Array | None = None,
    stop: str | Sequence[str] = (), include_stop: bool = False,
    stop_ids: Sequence[int] | None = None, max_len: int | None = None,
) -> Any:
    """Continue prompts by the contrast of two models.

    Args:
      expert, amateur: from `load`, of one vocabulary, on one mesh if any. What is stated of a
        model in `generate` (its stop ids, its length) is the expert's.
      rule: how far the amateur counts, and among which tokens.
      cache: of both models.
      prompts, sampler, key, stop and all else: as `generate`'s; the sampler draws from the scores.
    Returns: a Generation, or a list of them; log-probabilities are under the sampling distribution.
    Raises: as `generate`; ConfigError for models of different vocabularies or meshes.

    Example:
      >>> from jaxlm.hf.bundle import load
      >>> tiny = load("tiny")
      >>> contrast(tiny, tiny, "Q:12+34=\\n", rule=Contrast(beta=0.5), stop="A:").text
      '12+34=46\\n'
    """
    check_rule("rule", rule)
    kinds, amateur_kinds = placed(expert, sampler, cache), placed(amateur, Greedy(), cache)
    _check_pair(expert, amateur)
    job = prepare(expert, prompts, max_new_tokens, key, stop_ids, max_len, stop, include_stop,
                  settings=(sampler, kinds, amateur_kinds, rule))
    room = max(map(len, job.prompts)) + max_new_tokens
    if max_len is None and room > (limit := amateur.lm.config.max_len):
        raise ShapeError(f"prompt and answer need {room} tokens but the amateur was made for "
                         f"{limit}; shorten them, or pass max_len={room} to go beyond")
    begin = lambda bundle, sampler, kinds: prefill_jit(
        bundle.lm, bundle.params, sampler, job.tokens_BT, job.lengths_B, kinds, job.slots,
        job.keys_B)
    states = begin(expert, sampler, kinds), begin(amateur, Greedy(), amateur_kinds)
    state = _contrast(expert.lm, amateur.lm, expert.params, amateur.params, *states, rule, sampler,
                      job.stop, max_new_tokens)
    answers = read(expert, job, state)
    return answers if job.many else answers[0]


@partial(jax.jit, static_argnames=("lm", "amateur_lm"), donate_argnames="state")
def _contrast(
    lm: LM, amateur_lm: LM, params: Params, amateur_params: Params, state: DecodeState,
    amateur_state: DecodeState, rule: Contrast, sampler: Sampler, stop: Stop, max_new: Any,
) -> DecodeState:
    """The expert's state after the whole loop."""
    return contrastive_decode((lm, params), (amateur_lm, amateur_params), state, amateur_state,
                              rule, sampler, stop, max_new)[0]


def _check_pair(expert: Bundle, amateur: Bundle) -> None:
    """Both models mean the same by a token, and lie on the same devices."""
    _check_vocabularies(expert.lm, amateur.lm)
    ours, theirs = expert.tokenizer, amateur.tokenizer
    words = lambda tokenizer: tokenizer.backend_tokenizer.get_vocab(with_added_tokens=False)
    if ours is not theirs and words(ours) != words(theirs):
        raise ConfigError("expert and amateur have tokenizers that give other ids; expected models "
                          "of one vocabulary, such as two sizes of one family")
    if expert.mesh != amateur.mesh:
        raise ConfigError(f"expert and amateur lie on meshes {expert.mesh} and {amateur.mesh}; "
                          "load both with the same mesh")


def _check_vocabularies(expert: LM, amateur: LM) -> None:
    sizes = expert.config.vocab_size, amateur.config.vocab_size
    if sizes[0] != sizes[1]:
        raise ConfigError(f"expert and amateur have {sizes[0]} and {sizes[1]} tokens; expected "
                          "models of one vocabulary")


def contrastive_decode(
    expert: tuple[LM, Params], amateur: tuple[LM, Params], state: DecodeState,
    amateur_state: DecodeState, contrast: Contrast = PAPER, sampler: Sampler = Greedy(),
    stop: Stop = NEVER, max_new: jax.Array | int = 1,
) -> tuple[DecodeState, DecodeState]:
    """Draw up to `max_new` tokens in every live row from the contrast of two models.

    Args:
      expert, amateur: models of one vocabulary. state, amateur_state: of the same texts, each
        prefilled with its model; the expert's with `sampler`.
      sampler: applied to the scores as if they were logits; temperature 0 or Greedy is greedy.
    Returns: both states, one text. The expert's `logprob_BS` is under the sampling distribution,
      the amateur's its own.
    Raises: ConfigError for models of different vocabularies.
    """
    check_rule("contrast", contrast)
    _check_vocabularies(expert[0], amateur[0])

    def due(s):
        period = flush_period(s.kinds)
        return jnp.zeros((), bool) if period is None else s.since_flush >= period

    def step(carry):
        drawn, e, a = carry
        waits_B = e.done_B | a.done_B | e.hold_B
        at_B = jnp.minimum(e.length_B, e.tokens_BS.shape[1] - 1)
        against = Against(sampler, contrast, a.logits_BV)
        new = draw_and_read(*expert, against, e.replace(hold_B=waits_B), stop)
        token_B = jnp.take_along_axis(new.tokens_BS, at_B[:, None], 1)[:, 0]
        read = draw_and_read(*amateur, Forced(token_B), a.replace(hold_B=waits_B), NEVER)
        done_B = new.done_B | read.done_B  # a row ends for both models
        hold_B = e.hold_B | new.hold_B & ~waits_B
        return drawn + 1, new.replace(done_B=done_B, hold_B=hold_B), read.replace(
            done_B=done_B, hold_B=a.hold_B
        )

    def more(carry):
        drawn, e, a = carry
        return (drawn < max_new) & ~jnp.all(e.done_B | a.done_B | e.hold_B)

    def round_of_steps(carry):
        within = lambda inner: more(inner) & ~(due(inner[1]) | due(inner[2]))
        drawn, e, a = jax.lax.while_loop(within, step, carry)
        return drawn, flush(expert[0], e, due(e)), flush(amateur[0], a, due(a))

    carry = (jnp.zeros((), jnp.int32), state, amateur_state)
    _, state, amateur_state = jax.lax.while_loop(more, round_of_steps, carry)
    return state, amateur_state


def keep_finite(logits_BV: jax.Array) -> jax.Array:
    """float32 logits with banned tokens at `NEG / 4`, so that differences stay finite."""
    return jnp.maximum(logits_BV.astype(jnp.float32), NEG / 4)
