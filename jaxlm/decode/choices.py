"""Which of a few answers a model finds likeliest: a prompt is read once, each answer extends it."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm.cache.dense import Dense
from jaxlm.core.errors import NumericsError, ShapeError, whole
from jaxlm.core.hosts import to_host
from jaxlm.core.mesh import shard_batch
from jaxlm.core.tree import Params
from jaxlm.decode.generate import BUCKET, round_up, to_ids
from jaxlm.decode.samplers import Greedy
from jaxlm.decode.state import extend, prefill
from jaxlm.hf.bundle import Bundle, check_bundle
from jaxlm.models.lm import LM


@dataclass(frozen=True)
class Choices:
    """Prompts, and the answers to choose among after each, as right-padded ids.

    A tokenizer may join the end of a prompt with the beginning of an answer: what all of a prompt's
    texts have in common is the prompt, the rest of each is its answer.

    Args:
      prompts_NT, lengths_N: int32, the common beginnings.
      answers_NCA, counts_NC: int32, what follows in each of C texts.
    """

    prompts_NT: np.ndarray
    lengths_N: np.ndarray
    answers_NCA: np.ndarray
    counts_NC: np.ndarray

    @classmethod
    def encode(
        cls, bundle: Bundle, prompts: Sequence[str], choices: Sequence[str], end: int | None = None
    ) -> "Choices":
        """Texts as ids; `end`, where given, follows every answer."""
        check_bundle(bundle)
        _check(prompts, "prompts")
        _check(choices, "choices")
        last = [] if end is None else [end]
        heads: list[list[int]] = []
        tails: list[list[list[int]]] = []
        for prompt in prompts:
            ids, _ = to_ids(bundle, [prompt + choice for choice in choices])
            alike = common([*ids, bundle.tokenizer.encode(prompt)] if prompt else ids)
            heads.append(ids[0][:alike])
            tails.append([text[alike:] + last for text in ids])
            _check_pair(prompt, choices, heads[-1], tails[-1], bundle.lm.config.max_len)
        lengths_N = np.array([len(ids) for ids in heads], np.int32)
        counts_NC = np.array([[len(ids) for ids in row] for row in tails], np.int32)
        prompts_NT = np.zeros((len(heads), round_up(int(lengths_N.max()), BUCKET)), np.int32)
        answers_NCA = np.zeros((*counts_NC.shape, int(counts_NC.max())), np.int32)
        for n, (head, row) in enumerate(zip(heads, tails, strict=True)):
            prompts_NT[n, :len(head)] = head
            for c, tail in enumerate(row):
                answers_NCA[n, c, :len(tail)] = tail
        return cls(prompts_NT, lengths_N, answers_NCA, counts_NC)

    def logprobs(self, bundle: Bundle, batch: int = 32) -> np.ndarray:
        """float32 (N, C). Raises: NumericsError on NaN."""
        count, batch = len(self.lengths_N), whole("batch", batch)
        if bundle.mesh is None:  # on a mesh the rows are spread, and must divide over its devices
            batch = min(batch, 1 << (count - 1).bit_length())
        fields = (self.prompts_NT, self.lengths_N, self.answers_NCA, self.counts_NC)
        found = []
        for first in range(0, count, batch):
            at = np.minimum(np.arange(first, first + batch), count - 1)  # the last fills up
            rows = shard_batch([jnp.asarray(x[at]) for x in fields], bundle.mesh)
            found.append(to_host(_logprobs(bundle.lm, bundle.params, *rows)))
        logprobs_NC = np.concatenate(found)[:count]
        if not np.isfinite(logprobs_NC).all():
            n, c = np.argwhere(~np.isfinite(logprobs_NC))[0]
            raise NumericsError(f"prompt {n}: the log-probability of choice {c} is not finite; "
                                "check the weights, or load in float32")
        return logprobs_NC


def choice_logprobs(
    bundle: Bundle, prompts: Sequence[str], choices: Sequence[str], *, end: bool = False,
    batch: int = 32,
) -> np.ndarray:
    """`log p(choice | prompt)` of every prompt and choice: classification without training.

    Every prompt is read once and its cache extended by each choice. Longer choices have lower
    probabilities: divide by their lengths, or subtract what they have after an empty question,
    where that is not wanted.

    Args:
      prompts: texts. choices: texts that follow them, usually with a space at their beginning.
      end: the end mark belongs to the answer, which tells "a" from "a b".
      batch: prompts computed together, at most.
    Returns: float32 (prompts, choices).
    Raises: ShapeError where there is nothing to score, or more than the model can read;
      NumericsError on NaN.

    Example:
      >>> from jaxlm.hf.bundle import load
      >>> question = "Q: 2+3*4\\nA:\\n3*4=12\\n2+12="
      >>> choice_logprobs(load("tiny"), [question], ["14", "15"]).argmax(1).tolist()
      [0]
    """
    mark = bundle.tokenizer.id_of("eos_token") if end else None
    if end and mark is None:
        mark = bundle.stop_ids[0] if bundle.stop_ids else None
    return Choices.encode(bundle, prompts, choices, mark).logprobs(bundle, batch)


def common(texts: Sequence[Sequence[int]]) -> int:
    """How many ids all texts begin with.

    >>> common([[1, 2, 3], [1, 2], [1, 2, 4, 5]])
    2
    """
    alike = 0
    for ids in zip(*texts, strict=False):
        if len(set(ids)) > 1:
            break
        alike += 1
    return alike


def _check(texts: Sequence[str], name: str) -> None:
    if isinstance(texts, str) or not isinstance(texts, Sequence) or not texts or not all(
            isinstance(text, str) for text in texts):
        raise ShapeError(f"{name} is {texts!r}; expected a list of one or more texts")


def _check_pair(
    prompt: str, choices: Sequence[str], head: list[int], tails: list[list[int]], limit: int
) -> None:
    if not head:
        raise ShapeError(f"prompt {prompt!r} has no token that all of its choices follow; expected "
                         "a prompt that is not empty, or a tokenizer with a begin mark")
    for choice, tail in zip(choices, tails, strict=True):
        if not tail:
            raise ShapeError(f"choice {choice!r} adds no token to prompt {prompt!r}; expected one")
        if len(head) + len(tail) > limit:
            raise ShapeError(f"a prompt and choice {choice!r} have {len(head) + len(tail)} tokens; "
                             f"the model reads {limit}; shorten the prompt")


@partial(jax.jit, static_argnames=("lm",))
def _logprobs(
    lm: LM, params: Params, prompts_BT: jax.Array, lengths_B: jax.Array, answers_BCA: jax.Array,
    counts_BC: jax.Array,
) -> jax.Array:
    """float32 (B, C)."""
    batch, time = prompts_BT.shape
    room = answers_BCA.shape[-1]
    keys_B = jax.random.split(jax.random.key(0), batch)  # nothing is drawn
    state = prefill(lm, params, Greedy(), prompts_BT, lengths_B, Dense(), time + room, keys_B)

    def one(answer):
        tokens_BA, counts_B = answer
        _, later_BAV = extend(lm, params, state, tokens_BA, counts_B, "all")
        assert later_BAV is not None  # asked for
        logits_BAV = jnp.concatenate([state.logits_BV[:, None], later_BAV[:, :-1]], 1)
        own_BA = jnp.take_along_axis(logits_BAV, tokens_BA[..., None], -1)[..., 0]
        logprobs_BA = own_BA - jax.nn.logsumexp(logits_BAV, -1)
        return jnp.where(jnp.arange(room) < counts_B[:, None], logprobs_BA, 0.0).sum(-1)

    return jax.lax.map(one, (answers_BCA.swapaxes(0, 1), counts_BC.T)).T
