"""Layouts: where a process reward model finds a problem and its steps, and where it is read."""

import hashlib
from dataclasses import dataclass, field
from functools import lru_cache

from jaxlm.core.errors import ConfigError, TokenizerError
from jaxlm.hf.bundle import Bundle
from jaxlm.hf.tokenizer import Tokenizer

SEPARATOR = "<extra_0>"
QWEN_SYSTEM = "Please reason step by step, and put your final answer within \\boxed{}."
PROBLEM = "{problem}"
_FIRST, _SECOND = "\u27e6first\u27e7", "\u27e6second\u27e7"  # stand for texts in a chat template


@dataclass(frozen=True)
class Layout:
    """A partial answer as the reward model reads it,

        prompt  first step_1 after  before step_2 after  ...  before step_k after

    and the score of step k is read at its last token. What stands behind a step stays in the text,
    so that a text with one more step begins with the text before it.

    Args:
      prompt: holds `{problem}`. first, before, after: texts around the steps.
      strip: read steps without the white space at their ends.
      pair: the two answers whose probabilities are compared, the good one first; of a language
        model. None: a model with labels.
    """

    prompt: str = PROBLEM
    first: str = ""
    before: str = ""
    after: str = ""
    strip: bool = False
    pair: tuple[str, str] | None = None

    def __post_init__(self):
        if self.prompt.count(PROBLEM) != 1:
            raise ConfigError(f"prompt is {self.prompt!r}; expected {PROBLEM} in it, once")


PLAIN = Layout()


def qwen_layout(tokenizer: Tokenizer, system: str = QWEN_SYSTEM) -> Layout:
    """Qwen2.5-Math-PRM: a chat whose answer has `<extra_0>` behind every step (arXiv 2501.07301).

    A model with two labels a token; the second one's probability is the score.
    Raises: TokenizerError when the tokenizer has no such token, or no chat template.
    """
    if tokenizer.backend_tokenizer.token_to_id(SEPARATOR) is None:
        raise TokenizerError(
            f"{tokenizer.folder}: the tokenizer has no token {SEPARATOR!r}, at which this layout "
            "is read; choose another layout, such as jaxlm.rewards.PLAIN"
        )
    chat = tokenizer.chat([{"role": "system", "content": system},
                           {"role": "user", "content": _FIRST}])
    return Layout(chat.replace(_FIRST, PROBLEM), after=SEPARATOR, strip=True)


def rlhflow_layout(tokenizer: Tokenizer) -> Layout:
    """RLHFlow's Llama 3.1 models: each step is the user's turn, answered by "+" or "-".

    Before the answer to a step, the odds of "+" are its score; behind it "+" stays in the text.
    Source: the models' own evaluation, which reads the place before the last "+".
    Raises: TokenizerError without a chat template.
    """
    turn = lambda role, content: {"role": role, "content": content}
    one = tokenizer.chat([turn("user", _FIRST)])
    two = tokenizer.chat([turn("user", _FIRST), turn("assistant", "+"), turn("user", _SECOND)])
    prompt, after = one.split(_FIRST)
    between = two.split(_FIRST)[1].split(_SECOND)[0]
    if not between.startswith(after) or two != prompt + _FIRST + between + _SECOND + after:
        raise TokenizerError(
            f"{tokenizer.folder}: its chat template changes earlier turns as a chat grows; give "
            "the layout's texts yourself, as jaxlm.rewards.Layout(...)"
        )
    return Layout(prompt + PROBLEM, " ", between[len(after):], after, True, ("+", "-"))


def layout_of(bundle: Bundle) -> Layout:
    """The layout that a checkpoint seems made for: by its head, and by whether it has `<extra_0>`.
    """
    if bundle.lm.labels is None:
        return rlhflow_layout(bundle.tokenizer)
    known = bundle.tokenizer.backend_tokenizer.token_to_id(SEPARATOR) is not None
    return qwen_layout(bundle.tokenizer) if known else PLAIN


def check_layout(bundle: Bundle, layout: Layout) -> tuple[int, int] | None:
    """The ids of `layout.pair`, or None.

    Raises: ConfigError for a head that the layout cannot be read from; TokenizerError for an answer
      that is not one token.
    """
    labels = bundle.lm.labels
    if layout.pair is None:
        if labels not in (1, 2):
            raise ConfigError(
                f"the model has {'a vocabulary' if labels is None else f'{labels} labels'} for its "
                "output; expected 1 or 2 labels, or a layout with a pair of answers"
            )
        return None
    if labels is not None:
        raise ConfigError(f"the model has {labels} labels but the layout compares {layout.pair}, "
                          "which a language model answers; choose another layout")
    found = [bundle.tokenizer.encode(answer, special=False) for answer in layout.pair]
    if any(len(ids) != 1 for ids in found):
        raise TokenizerError(f"{layout.pair} are {found} to the tokenizer; expected one token each")
    return found[0][0], found[1][0]


@dataclass(frozen=True)
class Words:
    """A tokenizer, equal to every other one with the same tokens: static under jit."""

    fingerprint: str
    tokenizer: Tokenizer = field(compare=False, repr=False)


@lru_cache(maxsize=8)
def words(tokenizer: Tokenizer) -> Words:
    """A tokenizer with its fingerprint: of its whole file, merges and all."""
    text = tokenizer.backend_tokenizer.to_str()
    return Words(hashlib.sha256(text.encode()).hexdigest(), tokenizer)


def first_difference(policy: Tokenizer, reward: Tokenizer) -> str | None:
    """A token of the policy that means something else to the reward model; None: ids are shared.

    The reward model may have tokens besides, such as its separator.
    """
    theirs = reward.backend_tokenizer.get_vocab(with_added_tokens=True)
    ours = policy.backend_tokenizer.get_vocab(with_added_tokens=True)
    wrong = {token: i for token, i in ours.items() if theirs.get(token) != i}
    if not wrong:
        return None
    token = min(wrong, key=lambda name: wrong[name])
    return f"{token!r} is {wrong[token]} to one and {theirs.get(token)} to the other"
