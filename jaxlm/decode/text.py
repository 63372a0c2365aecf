"""Between drawn tokens and text: the stop rules of a bundle, and the text that they leave."""

from collections.abc import Sequence
from functools import lru_cache

import numpy as np

from jaxlm.decode.stop import Stop, as_texts, cut, stop_rule
from jaxlm.decode.vocabulary import token_bytes
from jaxlm.hf.bundle import Bundle
from jaxlm.hf.tokenizer import Tokenizer


def text_rule(
    bundle: Bundle, strings: Sequence[str] = (), delimiters: Sequence[str] = (),
    ids: Sequence[int] | None = None,
) -> Stop:
    """A stop rule over a bundle's own tokens; kept, so that asking again costs nothing.

    Args:
      strings: texts that end a row. delimiters: texts that hold it until `release`.
      ids: tokens that end a row; default the model's own.
    Returns: a rule for `decode`, as an ordinary argument under jit.
    Raises: ConfigError for an empty string, or one that no tokens can spell; TokenizerError for a
      tokenizer whose bytes cannot be read.

    Example:
      >>> from jaxlm.hf.bundle import load
      >>> text_rule(load("tiny"), delimiters=["\\n"]).strings is None
      True
    """
    texts = as_texts(strings, "strings"), as_texts(delimiters, "delimiters")
    ids = bundle.stop_ids if ids is None else tuple(ids)
    return _rule(bundle.tokenizer, bundle.lm.config.vocab_size, ids, *texts)


@lru_cache(maxsize=8)
def vocabulary(tokenizer: Tokenizer, size: int) -> tuple[bytes, ...]:
    """Every token's bytes, read once a tokenizer."""
    return tuple(token_bytes(tokenizer, size))


@lru_cache(maxsize=32)
def _rule(
    tokenizer: Tokenizer, size: int, ids: tuple[int, ...], strings: tuple[str, ...],
    delimiters: tuple[str, ...],
) -> Stop:
    if not (strings or delimiters):
        return Stop(ids)
    return stop_rule(vocabulary(tokenizer, size), ids, strings, delimiters)


def kept_bytes(drawn: bytes, strings: Sequence[str], include: bool) -> tuple[int, bool]:
    """Bytes of what a row drew that are text for certain, and whether a string has ended it.

    Of an open row, what may yet become a stop string is not counted.

    >>> kept_bytes(b"4\\n\\nQ:", ["\\n\\n"], include=False), kept_bytes(b"4\\n", ["\\n\\n"], False)
    ((1, True), (1, False))
    """
    patterns = [string.encode() for string in strings]
    if any(pattern in drawn for pattern in patterns):
        return len(cut(drawn, patterns, after=include)), True
    begun = [n for p in patterns for n in range(len(p)) if drawn.endswith(p[:n])]
    return len(drawn) - max(begun, default=0), False


def text_of(
    tokenizer: Tokenizer, prompt: list[int], drawn: list[int], texts: Sequence[bytes], keep: int
) -> str:
    """Prompt and drawn tokens as text, without what comes after `keep` drawn bytes.

    Args: texts: every drawn token's bytes; a special token counts, and is not shown.
    """
    ends = np.cumsum([len(text) for text in texts], dtype=np.int64)
    count = int(np.searchsorted(ends, keep, side="right"))  # tokens kept whole
    begin = int(ends[count - 1]) if count else 0
    if begin == keep:
        return tokenizer.decode(prompt + drawn[:count])
    rest = texts[count][keep - begin:].decode(errors="replace")
    return tokenizer.decode(prompt + drawn[: count + 1]).removesuffix(rest)
