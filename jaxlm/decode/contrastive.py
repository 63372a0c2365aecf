"""Contrastive decoding: what a large model knows and a small one does not.

`contrast` takes text and gives text. Below it is a policy over two DecodeStates that hold the same
text, one of each model.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any, Unpack, overload

import jax
import jax.numpy as jnp
from flax import struct

from jaxlm.cache.base import CacheKind
from jaxlm.cache.dense import Dense
from jaxlm.core.errors import ConfigError, ShapeError
from jaxlm.core.hosts import readable
from jaxlm.core.tree import Params
from jaxlm.decode.generate import Generation, Prompt, placed, prefill_jit, prepare, read, to_ids
from jaxlm.decode.options import Options
from jaxlm.decode.samplers import Greedy, Sampler, check
from jaxlm.decode.state import DecodeState, Kinds, draw_and_read, flush, flush_period
from jaxlm.decode.stop import NEVER, Stop
from jaxlm.decode.transforms import keep_min_p, logprob_of, per_row
from jaxlm.hf.bundle import Bundle, is_padding
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
        """`s_BV`, float32, `NEG` for implausible tokens, and for those that the amateur lacks."""
        batch, size = expert_BV.shape
        shared = min(size, amateur_BV.shape[1])  # what one has beyond is padding
        expert_BV, amateur_BV = expert_BV[:, :shared], amateur_BV[:, :shared]
        beta_B1 = per_row("beta", self.beta, batch)[:, None]
        heat_B1 = per_row("temperature", self.temperature, batch)[:, None]
        p_BV = jax.nn.log_softmax(keep_finite(expert_BV), -1)
        q_BV = jax.nn.log_softmax(keep_finite(amateur_BV / heat_B1), -1)
        plausible_BV = keep_min_p(p_BV, per_row("alpha", self.alpha, batch)) > NEG
        empty_B1 = (jnp.maximum(expert_BV.max(-1), NEG) == NEG)[:, None]  # nothing is left
        broken_B1 = jnp.isnan(p_BV + q_BV).any(-1, keepdims=True) | empty_B1
        scores_BV = jnp.where(plausible_BV, p_BV - keep_finite(beta_B1 * q_BV), NEG)
        scores_BV = jnp.where(broken_B1, jnp.nan, scores_BV)
        return jnp.pad(scores_BV, ((0, 0), (0, size - shared)), constant_values=NEG)


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


class ContrastOptions(Options, total=False):
    """Of `contrast`, for type checkers."""

    rule: Contrast


@overload
def contrast(
    expert: Bundle, amateur: Bundle, prompts: Prompt, **options: Unpack[ContrastOptions]
) -> Generation: ...
@overload
def contrast(
    expert: Bundle, amateur: Bundle, prompts: Sequence[Prompt], **options: Unpack[ContrastOptions]
) -> list[Generation]: ...
def contrast(
    expert: Bundle, amateur: Bundle, prompts: Prompt | Sequence[Prompt], *, rule: Contrast = PAPER,
    max_new_tokens: int = 64, sampler: Sampler = Greedy(),
    cache: CacheKind | Kinds | str = Dense(), key: jax.Array | None = None,
    stop: str | Sequence[str] = (), include_stop: bool = False,
    stop_ids: Sequence[int] | None = None, max_len: int | None = None,
) -> Generation | list[Generation]:
    """Continue prompts by the contrast of two models.

    Args:
      expert, amateur: from `load`, of one vocabulary, on one mesh if any. One may have more
        padding, which is never drawn. What is stated of a model in `generate` (its stop ids, its
        length) is the expert's.
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
    to_ids(amateur, job.prompts)  # no id is beyond its vocabulary
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
    shared = _shared_tokens(expert.lm, amateur.lm)
    if expert.tokenizer is not amateur.tokenizer:
        ours, theirs = (_words(bundle, shared) for bundle in (expert, amateur))
        if differ := ours.items() ^ theirs.items():
            token, _ = min(differ)
            raise ConfigError(
                f"expert and amateur have tokenizers that give other ids: {token!r} is "
                f"{ours.get(token)} and {theirs.get(token)}; expected models of one vocabulary, "
                "such as two sizes of one family")
    if expert.mesh != amateur.mesh:
        raise ConfigError(f"expert and amateur lie on meshes {expert.mesh} and {amateur.mesh}; "
                          "load both with the same mesh")


def _words(bundle: Bundle, size: int) -> dict[str, int]:
    """The ids below `size` by their tokens, added ones too."""
    vocab = bundle.tokenizer.backend_tokenizer.get_vocab(with_added_tokens=True)
    return {token: index for token, index in vocab.items() if index < size}


def _shared_tokens(expert: LM, amateur: LM) -> int:
    """How many tokens both models have; ConfigError where one has more than padding explains."""
    sizes = expert.config.vocab_size, amateur.config.vocab_size
    if not is_padding(min(sizes), max(sizes)):
        raise ConfigError(f"expert and amateur have {sizes[0]} and {sizes[1]} tokens; expected "
                          "models of one vocabulary, padding apart")
    return min(sizes)


def _same_texts(state: DecodeState, amateur_state: DecodeState) -> jax.Array:
    """Which rows of two states hold one text, bool (B,); ConfigError if it is seen that not all."""
    length_B, theirs_B = state.length_B, amateur_state.length_B
    if length_B.shape != theirs_B.shape:
        raise ShapeError(f"the states have {len(length_B)} and {len(theirs_B)} rows; expected one "
                         "of each model for every text")
    width = min(state.tokens_BS.shape[1], amateur_state.tokens_BS.shape[1])
    alike_BS = state.tokens_BS[:, :width] == amateur_state.tokens_BS[:, :width]
    unread_BS = jnp.arange(width) >= length_B[:, None]
    same_B = (length_B == theirs_B) & (alike_BS | unread_BS).all(-1)
    if readable(same_B) and not same_B.all():
        raise ConfigError(f"rows {jnp.flatnonzero(~same_B).tolist()} of the two states hold other "
                          "texts; expected both prefilled with the same, and gone on together")
    return same_B


def contrastive_decode(
    expert: tuple[LM, Params], amateur: tuple[LM, Params], state: DecodeState,
    amateur_state: DecodeState, contrast: Contrast = PAPER, sampler: Sampler = Greedy(),
    stop: Stop = NEVER, max_new: jax.Array | int = 1,
) -> tuple[DecodeState, DecodeState]:
    """Draw up to `max_new` tokens in every live row from the contrast of two models.

    Args:
      expert, amateur: models of one vocabulary, padding apart. state, amateur_state: of the same
        texts, each prefilled with its model; the expert's with `sampler`.
      sampler: applied to the scores as if they were logits; temperature 0 or Greedy is greedy.
    Returns: both states, one text. The expert's `logprob_BS` is under the sampling distribution,
      the amateur's its own.
    Raises: ConfigError for models of different vocabularies, or states of different texts; under a
      jit the latter cannot be seen, and gives the row NaN log-probabilities.
    """
    check_rule("contrast", contrast)
    _shared_tokens(expert[0], amateur[0])
    same_B1 = _same_texts(state, amateur_state)[:, None]
    state = state.replace(logits_BV=jnp.where(same_B1, state.logits_BV, jnp.nan))

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
