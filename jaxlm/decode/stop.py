"""Stop rules decided on the device: token ids, and strings as an automaton over the vocabulary."""

import zlib
from collections.abc import Sequence
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from jaxlm.core.errors import ConfigError
from jaxlm.decode.automaton import compress, text_automaton, token_automaton

Text = TypeVar("Text", str, bytes)


@struct.dataclass
class Matcher:
    """Strings looked for in the text of drawn tokens, one table look-up a token.

    class_V: uint16 or int32, tokens that act alike share a class. table_SC: `2 next + hit` for
    automaton state and class, in the smallest unsigned type. base: int32, a fingerprint of the
    strings and the vocabulary; a row keeps `base + state`, so that a state left by another
    matcher counts as none.
    """

    class_V: jax.Array
    table_SC: jax.Array
    base: jax.Array

    def step(self, match_B: jax.Array, token_B: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The rows' new states int32 (B,), and where a string ended inside the token."""
        state_B = match_B - self.base
        own_B = (state_B >= 0) & (state_B < self.table_SC.shape[0])
        code_B = self.table_SC[jnp.where(own_B, state_B, 0), self.class_V[token_B]]
        known_B = token_B < self.class_V.shape[0]  # a padded id breaks whatever had begun
        code_B = jnp.where(known_B, code_B.astype(jnp.int32), 0)
        return self.base + code_B // 2, code_B % 2 == 1


@struct.dataclass
class Stop:
    """When a row is done, and when it is held.

    A row is done once it draws one of `ids`, or once one of `strings` is complete in the text it
    drew; it is held once one of `delimiters` is, until `release`. A string may begin and end
    inside tokens. Delimiters do not overlap: after one, matching starts afresh.

    `ids` are static. The matchers are arrays of padded shapes: pass a rule that has any as an
    ordinary argument of a jitted function, and other strings need no new compilation. A rule of
    ids alone is hashable and may be static. Make matchers with `stop_rule`.
    """

    ids: tuple[int, ...] = struct.field(pytree_node=False, default=())
    strings: Matcher | None = None
    delimiters: Matcher | None = None

    def __post_init__(self):
        good = isinstance(self.ids, tuple) and all(
            isinstance(token, (int, np.integer)) and not isinstance(token, bool) and token >= 0
            for token in self.ids
        )
        if not good:
            raise ConfigError(f"stop ids are {self.ids!r}; expected a tuple of token ids")

    def step(
        self, match_B2: jax.Array, token_B: jax.Array
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """After one drawn token: the matchers' states, and which rows are done and held."""
        done_B = jnp.isin(token_B, jnp.asarray(self.ids, jnp.int32))
        hold_B = jnp.zeros_like(done_B)
        string_B, delimiter_B = match_B2[:, 0], match_B2[:, 1]
        if self.strings is not None:
            string_B, complete_B = self.strings.step(string_B, token_B)
            done_B |= complete_B
        if self.delimiters is not None:
            delimiter_B, hold_B = self.delimiters.step(delimiter_B, token_B)
        return jnp.stack([string_B, delimiter_B], 1), done_B, hold_B


NEVER = Stop()


def stop_rule(
    vocabulary: Sequence[bytes], ids: Sequence[int] = (), strings: Sequence[str] = (),
    delimiters: Sequence[str] = (),
) -> Stop:
    """A rule with strings, for the tokens of one vocabulary.

    Args:
      vocabulary: each token's bytes by id; `jaxlm.decode.vocabulary.token_bytes` reads them.
      ids: tokens that end a row. strings: texts that end it. delimiters: texts that hold it.
    Raises: ConfigError for an empty string, one that no tokens can spell, or an id out of range.

    Example:
      >>> rule = stop_rule([b"a", b"b", b"ab"], strings=["aab"])
      >>> match, done, _ = rule.step(jnp.zeros((1, 2), jnp.int32), jnp.array([0]))
      >>> match, done, _ = rule.step(match, jnp.array([2]))
      >>> done.tolist()
      [True]
    """
    if beyond := [token for token in ids if not 0 <= token < len(vocabulary)]:
        raise ConfigError(f"stop ids {beyond} are not in a vocabulary of {len(vocabulary)}")
    made = [matcher(vocabulary, texts, name) if as_texts(texts, name) else None
            for name, texts in (("strings", strings), ("delimiters", delimiters))]
    return Stop(tuple(ids), *made)


def as_texts(texts: Sequence[str], name: str) -> tuple[str, ...]:
    """Texts as a tuple; ConfigError for anything but a sequence of strings that are not empty."""
    if not isinstance(texts, list | tuple | set | frozenset):
        raise ConfigError(f"stop {name} are {texts!r}; expected a sequence of strings")
    if not all(isinstance(text, str) and text for text in texts):
        raise ConfigError(f"stop {name} are {list(texts)}; expected strings that are not empty")
    return tuple(texts)


def matcher(vocabulary: Sequence[bytes], texts: Sequence[str], name: str = "strings") -> Matcher:
    """The automaton of some texts over a vocabulary, as arrays padded to a few sizes."""
    patterns = spelled(vocabulary, as_texts(texts, name), f"stop {name}")
    delta, hit = text_automaton(patterns)
    classes, table = compress(token_automaton(delta, hit, vocabulary))
    words = zlib.crc32(b"\0".join(sorted(patterns)), zlib.crc32(b"\0".join(vocabulary)))
    base = np.int32(words & 0x7FFF0000)  # the low 16 bits are the state's
    return Matcher(jnp.asarray(classes), jnp.asarray(table), jnp.asarray(base))


def spelled(vocabulary: Sequence[bytes], texts: Sequence[str], name: str) -> list[bytes]:
    """Texts as bytes; ConfigError for one that no tokens can spell."""
    patterns, known = [text.encode() for text in texts], set(b"".join(vocabulary))
    for text, pattern in zip(texts, patterns, strict=True):
        if missing := bytes(set(pattern) - known):
            raise ConfigError(f"{name} hold {text!r}, but no token contains {missing!r}")
    return patterns


def cut(text: Text, strings: Sequence[Text], after: bool = False) -> Text:
    """Text up to the stop string that is complete first; with `after`, the string included.

    >>> cut("4. So 4\\n\\n## Step", ["##", "\\n\\n#"])
    '4. So 4'
    """
    found = [(text.find(s) + len(s), text.find(s)) for s in strings if s in text]
    if not found:
        return text
    end, start = min(found)  # of those that end together, the one that starts first
    return text[:end] if after else text[:start]
