"""Process reward models: a checkpoint that scores every step, its cache going with the particle.

A partial answer of steps x_1 ... x_k has the step scores

    s_j = p(right | problem, x_1, ..., x_j),

read where the layout says, and one score: their product, their least, the last of them, or that of
the whole partial answer read as a single step ("model"; arXiv 2502.01618, section 3.3).

A problem is read once and shared by its particles; a step is appended to what its row has read
before. So T tokens of an answer cost T tokens of the reward model, and not T times the steps. With
"model" what stands behind the answer moves with every step: it is read and taken back, at a cost of
its own tokens a step (one for Qwen's layout, a turn's header for RLHFlow's).
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from jaxlm.cache.dense import Dense
from jaxlm.core.errors import ConfigError, TokenizerError, whole
from jaxlm.core.tree import Params, gather_rows
from jaxlm.decode.generate import BUCKET, prefill_jit, round_up
from jaxlm.decode.rows import fork, gather
from jaxlm.decode.samplers import Greedy
from jaxlm.decode.state import DecodeState, extend
from jaxlm.decode.text import vocabulary
from jaxlm.hf.bundle import Bundle, check_bundle
from jaxlm.models.lm import LM
from jaxlm.rewards.base import Prompts, Rows
from jaxlm.rewards.layout import (
    PLAIN,
    PROBLEM,
    Layout,
    Words,
    check_layout,
    first_difference,
    layout_of,
    words,
)

if TYPE_CHECKING:  # it imports this file
    from jaxlm.rewards.process_text import TextProcessReward

AGGREGATES = ("prod", "min", "last", "model")

fork_jit = jax.jit(fork, static_argnames=("lm", "particles", "slots"))


class Carry(struct.PyTreeNode):
    """What goes with B rows.

    state: the reward model's caches and, at its last read token, its logits. read_B: int32, answer
    tokens that were looked at. steps_B: int32, steps scored. score_B: float32, aggregated.
    lost_B: bool, rows that outgrew their room. appended_B: int32, tokens read for the row in this
    place since `init`, separators included; it stays when rows are resampled.
    """

    state: DecodeState
    read_B: jax.Array
    steps_B: jax.Array
    score_B: jax.Array
    lost_B: jax.Array
    appended_B: jax.Array


class ProcessReward(struct.PyTreeNode):
    """A process reward model on the device, for a policy whose token ids it shares.

    Made by `process_reward`. Before the first step a score is 1; a row without new tokens (a stop
    id alone is none) keeps its score; one that outgrows its room or the length that the model was
    made for, and a NaN in the parameters, give NaN for good.

    params: the model's. trim_V: bool, tokens that end no step: stop ids, and white space where the
    layout strips. lead_2L: int32, what precedes the first and every later step, padded; lead_2 its
    lengths. after_A: int32, what follows a step.
    """

    params: Params
    trim_V: jax.Array
    lead_2L: jax.Array
    lead_2: jax.Array
    after_A: jax.Array
    lm: LM = struct.field(pytree_node=False)
    words: Words = struct.field(pytree_node=False)
    layout: Layout = struct.field(pytree_node=False)
    pair: tuple[int, int] | None = struct.field(pytree_node=False)
    aggregate: str = struct.field(pytree_node=False)
    steps: int = struct.field(pytree_node=False)
    chunk: int = struct.field(pytree_node=False)
    on_device: bool = struct.field(pytree_node=False, default=True)

    costly = True

    def init(self, prompts: Prompts, particles: int, slots: int) -> Carry:
        """Read the problems, once each."""
        tokens_RT: Any = prompts.tokens_RT
        length_R: Any = prompts.length_R
        if self.layout.prompt != PROBLEM:
            tokens_RT, length_R = problem_ids(
                self.words, self.layout, prompts.texts, tokens_RT.shape[1])
        extra = self.after_A.shape[0] + self.lead_2L.shape[1]
        room = slots + extra * min(self.steps, slots)
        state = read_problems(self.lm, self.params, tokens_RT, length_R, particles, room)
        B = len(state.length_B)
        none = jnp.zeros(B, jnp.int32)
        return Carry(state, none, none, jnp.ones(B), jnp.zeros(B, bool), none)

    def score(self, carry: Carry, rows: Rows) -> tuple[jax.Array, Carry]:
        """Append each row's new step, and read its score."""
        S = rows.tokens_BS.shape[1]
        at_B = rows.start_B + carry.read_B
        slot_S, unread_BS = jnp.arange(S), rows.tokens_BS
        new_BS = (slot_S >= at_B[:, None]) & (slot_S < rows.length_B[:, None])
        kept_BS = new_BS & ~self.trim_V.at[unread_BS].get(mode="fill", fill_value=False)
        end_B = jnp.max(jnp.where(kept_BS, slot_S + 1, at_B[:, None]), axis=1)
        grew_B = end_B > at_B
        later_B = jnp.minimum(carry.steps_B, 1)
        lead_B = self.lead_2[later_B]
        one = self.aggregate == "model"
        if one:  # the steps run on as one
            lead_B = jnp.where(later_B > 0, 0, lead_B)
        size_B = lead_B + end_B - at_B

        def token_at(index_BT):
            lead = self.lead_2L[later_B[:, None], jnp.minimum(index_BT, self.lead_2L.shape[1] - 1)]
            own = at_B[:, None] + index_BT - lead_B[:, None]
            step = jnp.take_along_axis(unread_BS, jnp.clip(own, 0, S - 1), axis=1)
            behind = self._after_at(index_BT - size_B[:, None])
            step = jnp.where(index_BT < size_B[:, None], step, behind)
            return jnp.where(index_BT < lead_B[:, None], lead, step)

        count_B = jnp.where(grew_B, size_B + len(self.after_A), 0)
        lost_B = carry.lost_B | (count_B > carry.state.limit_B - carry.state.length_B)
        count_B = jnp.where(lost_B, 0, count_B)
        state = self._read(carry.state, token_at, count_B)
        found_B = probability(state.logits_BV, self.pair)
        if one:  # what stands behind moves on: forgotten, and written over by the next step
            taken_B = jnp.where(count_B > 0, len(self.after_A), 0)
            state = state.replace(length_B=state.length_B - taken_B)
        fresh_B = merge_scores(self.aggregate, carry.score_B, found_B)
        score_B = jnp.where(grew_B, fresh_B, carry.score_B)
        score_B = jnp.where(lost_B, jnp.nan, score_B)
        looked_B = (end_B if one else rows.length_B) - rows.start_B  # strip only at the very end
        return score_B, carry.replace(
            state=state, read_B=looked_B.astype(jnp.int32), steps_B=carry.steps_B + grew_B,
            score_B=score_B, lost_B=lost_B, appended_B=carry.appended_B + count_B)

    def gather(self, carry: Carry, ancestors_RP: jax.Array) -> Carry:
        """Caches and scores go with their rows, if any moves; the problems stay where they are."""
        moved = {name: getattr(carry, name) for name in ("read_B", "steps_B", "score_B", "lost_B")}
        moves = jnp.any(ancestors_RP != jnp.arange(ancestors_RP.shape[1]))
        return carry.replace(state=gather(carry.state, ancestors_RP, moves),
                             **gather_rows(moved, ancestors_RP))

    def _after_at(self, index_BT: jax.Array) -> jax.Array:
        """Tokens behind a step; 0 where there are none, which is never read."""
        if not len(self.after_A):
            return jnp.zeros_like(index_BT)
        return self.after_A[jnp.clip(index_BT, 0, len(self.after_A) - 1)]

    def _read(
        self, state: DecodeState, token_at: Callable[[jax.Array], jax.Array], count_B: jax.Array
    ) -> DecodeState:
        """Append `count_B` tokens a row, `chunk` of them at a time."""
        def more(carry):
            return jnp.any(carry[0] < count_B)

        def step(carry):
            done_B, state = carry
            take_B = jnp.clip(count_B - done_B, 0, self.chunk)
            tokens_BT = token_at(done_B[:, None] + jnp.arange(self.chunk))
            state, _ = extend(self.lm, self.params, state, tokens_BT.astype(jnp.int32), take_B)
            return done_B + take_B, state

        return jax.lax.while_loop(more, step, (jnp.zeros_like(count_B), state))[1]


def merge_scores(aggregate: str, before_B: jax.Array, new_B: jax.Array) -> jax.Array:
    """The score of an answer with one more step."""
    if aggregate == "prod":
        return before_B * new_B
    return jnp.minimum(before_B, new_B) if aggregate == "min" else new_B


def probability(logits_BV: jax.Array, pair: tuple[int, int] | None) -> jax.Array:
    """That a step is right, float32 (B,): of label 1 of 2, of a single label by its logistic
    function, or of the first token of a pair against the second."""
    if pair is not None:
        return jax.nn.sigmoid(logits_BV[:, pair[0]] - logits_BV[:, pair[1]])
    if logits_BV.shape[1] == 1:
        return jax.nn.sigmoid(logits_BV[:, 0])
    return jax.nn.softmax(logits_BV, axis=-1)[:, 1]


def read_problems(
    lm: LM, params: Params, tokens_RT: Any, length_R: Any, particles: int, room: int
) -> DecodeState:
    """The problems, each read once and shared by `particles` rows with `room` tokens of their own,
    or fewer: as many as leave a row no longer than the model was made for.
    """
    R, T = tokens_RT.shape
    keys_R = jax.random.split(jax.random.key(0), R)  # nothing is drawn
    state = prefill_jit(lm, params, Greedy(), tokens_RT, length_R, Dense(), T, keys_R)
    state = fork_jit(lm, params, state, particles, room)
    return state.replace(limit_B=jnp.minimum(state.limit_B, lm.config.max_len))


def problem_ids(
    known: Words, layout: Layout, texts: Any, width: int
) -> tuple[np.ndarray, np.ndarray]:
    """The problems as the layout has them: int32 ids (R, T), right-padded, and lengths (R,).

    A bare problem gets the tokenizer's begin mark; a chat has its own. `width`: what the problems'
    own tokens should fit, so that another problem of the job can take the place of one that is
    done; T is larger only where they do not.
    """
    bare = layout.prompt == PROBLEM
    form = lambda text: known.tokenizer.encode(layout.prompt.replace(PROBLEM, text), special=bare)
    ids = [form(text.strip() if layout.strip else text) for text in texts]
    width = round_up(max(len(form("")) + width, *map(len, ids)), BUCKET)
    tokens = np.zeros((len(ids), width), np.int32)
    for row, line in enumerate(ids):
        tokens[row, : len(line)] = line
    return tokens, np.array([len(line) for line in ids], np.int32)


def process_reward(
    bundle: Bundle, policy: Bundle, *, layout: Layout | None = None, aggregate: str = "last",
    steps: int = 64, chunk: int = 16, on_device: bool | None = None,
) -> "ProcessReward | TextProcessReward":
    """A process reward model for the answers of `policy`.

    Args:
      bundle: a checkpoint with 1 or 2 labels, or a language model that answers a pair of tokens.
      policy: the model that answers, for its tokenizer and its stop ids.
      layout: default by the checkpoint's head and tokenizer, `layout_of`.
      aggregate: 'prod', 'min', 'last' or 'model'.
      steps: room for separators: steps a row can take. More tokens than there is room for, or than
        the model was made for (its `max_len`): NaN.
      chunk: tokens of a row that are read at once, on the device.
      on_device: whether scores are computed inside the search's program. That needs a policy whose
        token ids all mean the same here; else every step makes a hop over the host, where its text
        is read with this model's tokenizer. Default: on the device where it can be and reads what
        the layout says; a layout that strips does not where the policy joins white space to text.
    Returns: a `ProcessReward`, or a `TextProcessReward` on the host.
    Raises: ConfigError for a head, a layout or a setting that does not fit; TokenizerError for a
      separator that is no token, or for `on_device=True` with ids that are not shared.

    On the device a step is the policy's own tokens. White space that shares a token with text, such
    as Qwen's for a full stop and an empty line, stays in the step, and so does all at its start; on
    the host it goes.
    """
    for given in (bundle, policy):
        check_bundle(given)
    if aggregate not in AGGREGATES:
        raise ConfigError(f"aggregate is {aggregate!r}; expected one of {AGGREGATES}")
    steps, chunk = whole("steps", steps), whole("chunk", chunk)
    layout = layout_of(bundle) if layout is None else layout
    pair = check_layout(bundle, layout)
    known = words(bundle.tokenizer)
    if on_device is None or on_device:
        wrong = first_difference(policy.tokenizer, bundle.tokenizer)
        if wrong is not None and on_device:
            raise TokenizerError(
                f"the policy and the reward model do not share token ids: {wrong}; pass "
                "on_device=False, which reads the text of each step anew, by way of the host"
            )
        on_device = wrong is None and (
            bool(on_device) or not (layout.strip and joins_space(policy)))
    if not on_device:
        from jaxlm.rewards.process_text import TextProcessReward

        return TextProcessReward(bundle.lm, bundle.params, known, layout, pair, aggregate, steps)
    first, before, after = (bundle.tokenizer.encode(text, special=False) if text else []
                            for text in (layout.first, layout.before, layout.after))
    lead = np.zeros((2, max(len(first), len(before), 1)), np.int32)
    lead[0, : len(first)], lead[1, : len(before)] = first, before
    return ProcessReward(
        params=bundle.params, trim_V=trimmed(bundle, policy, layout.strip),
        lead_2L=jnp.asarray(lead), lead_2=jnp.asarray([len(first), len(before)], jnp.int32),
        after_A=jnp.asarray(after, jnp.int32), lm=bundle.lm, words=known, layout=layout, pair=pair,
        aggregate=aggregate, steps=steps, chunk=chunk)


def joins_space(policy: Bundle) -> bool:
    """Whether some token of a policy is text with white space behind it, as `".\\n\\n"`."""
    tokens = vocabulary(policy.tokenizer, policy.lm.config.vocab_size)
    texts = (token.decode(errors="replace") for token in tokens)
    return any(text.strip() and text != text.rstrip() for text in texts)


def trimmed(bundle: Bundle, policy: Bundle, strip: bool) -> jax.Array:
    """bool (V,): stop ids; where `strip`, tokens of nothing but white space too."""
    size = bundle.lm.config.vocab_size
    found = np.zeros(size, bool)
    found[[i for i in policy.stop_ids if i < size]] = True
    if strip:
        found |= [text.isspace() for text in vocabulary(bundle.tokenizer, size)]
    return jnp.asarray(found)


__all__ = ["PLAIN", "Carry", "ProcessReward", "merge_scores", "probability", "process_reward"]
