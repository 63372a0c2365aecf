"""From strings to an automaton over tokens, on the host, in numpy.

The automaton over bytes is Aho and Corasick's (1975); a token moves it by all of its bytes.
"""

from collections import deque
from collections.abc import Sequence

import numpy as np

from jaxlm.core.errors import ConfigError

MAX_STATES = 1 << 15


def text_automaton(patterns: Sequence[bytes]) -> tuple[np.ndarray, np.ndarray]:
    """States are the patterns' prefixes, 0 the empty one.

    Returns: delta int32 (S, 256), the longest prefix that the text ends with after one more
      byte, and hit bool (S,), where that text ends with a whole pattern.
    Raises: ConfigError for more than 32768 states.
    """
    children: list[dict[int, int]] = [{}]
    ends = set()
    for pattern in patterns:
        node = 0
        for byte in pattern:
            if byte not in children[node]:
                children[node][byte] = len(children)
                children.append({})
            node = children[node][byte]
        ends.add(node)
    if len(children) > MAX_STATES:
        raise ConfigError(f"stop strings need {len(children)} states; expected up to {MAX_STATES}")
    delta = np.zeros((len(children), 256), np.int32)
    hit = np.zeros(len(children), bool)
    hit[list(ends)] = True
    queue = deque([(0, 0)])  # a state, and that of its longest proper suffix
    while queue:
        node, suffix = queue.popleft()
        hit[node] |= hit[suffix]
        delta[node] = delta[suffix]  # row 0 while node is 0: all zeros
        for byte, child in children[node].items():
            queue.append((child, int(delta[suffix, byte]) if node else 0))
            delta[node, byte] = child
    return delta, hit


def states(patterns: Sequence[bytes]) -> int:
    """How many states their automaton has, with nothing made.

    >>> states([b"ab", b"ac"]), len(text_automaton([b"ab", b"ac"])[1])
    (4, 4)
    """
    return len({pattern[:end] for pattern in patterns for end in range(len(pattern) + 1)})


def token_automaton(
    delta: np.ndarray, hit: np.ndarray, vocabulary: Sequence[bytes]
) -> np.ndarray:
    """`2 next + hit` (S, V) for every state and token; a hit starts afresh from state 0."""
    length_V = np.array([len(token) for token in vocabulary], np.int64)
    order = np.argsort(-length_V, kind="stable")  # so that tokens still unread are a prefix
    sorted_V = length_V[order]
    text = np.frombuffer(b"".join(vocabulary[i] for i in order), np.uint8)
    start_V = np.cumsum(sorted_V) - sorted_V
    state = np.repeat(np.arange(len(hit), dtype=np.int32)[:, None], len(vocabulary), axis=1)
    found = np.zeros(state.shape, bool)
    for place in range(int(length_V.max(initial=0))):
        n = int(np.searchsorted(-sorted_V, -place))  # tokens longer than `place`
        moved = delta[state[:, :n], text[start_V[:n] + place]]
        found[:, :n] |= hit[moved]
        state[:, :n] = np.where(hit[moved], 0, moved)
    codes = np.empty_like(state)
    codes[:, order] = 2 * state + found
    return codes


def compress(codes_SV: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Tokens with equal columns share a class: (class_V, table_SC), small and padded.

    Sizes are padded to powers of two (at least 32 states, 128 classes), so that rules of
    similar size compile once.
    """
    states, vocab = codes_SV.shape
    draw = np.random.default_rng(0).integers(1, 2**63, (states,), dtype=np.uint64)
    mix = np.bitwise_or(draw, np.uint64(1))
    hashes = (codes_SV.astype(np.uint64) * mix[:, None]).sum(0, dtype=np.uint64)
    _, first, class_V = np.unique(hashes, return_index=True, return_inverse=True)
    table = codes_SV[:, first]
    if not np.array_equal(table[:, class_V], codes_SV):  # two columns share a hash
        table, class_V = np.unique(codes_SV, axis=1, return_inverse=True)
    shape = (padded(states, 32), padded(table.shape[1], 128))
    padded_table = np.zeros(shape, np.min_scalar_type(2 * shape[0]))
    padded_table[:states, : table.shape[1]] = table
    narrow = np.uint16 if shape[1] <= 1 << 16 else np.int32
    return class_V.reshape(vocab).astype(narrow), padded_table


def padded(size: int, least: int) -> int:
    """The next power of two, at least `least`."""
    return max(least, 1 << (size - 1).bit_length())
