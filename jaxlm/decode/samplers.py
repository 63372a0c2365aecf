"""Samplers: small pytrees whose numbers may be swept without a new compilation."""

from collections.abc import Mapping
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from jaxlm.core.errors import ConfigError, whole
from jaxlm.core.hosts import readable
from jaxlm.decode.transforms import (
    add_bias,
    draw,
    keep_min_p,
    keep_top_k,
    keep_top_p,
    keep_unsurprising,
    logprob_of,
    penalise,
    per_row,
    temper,
)
from jaxlm.models.attention import NEG


class Sampler(Protocol):
    """From logits to a token, and the token's log-probability under the sampling distribution.

    The state's leaves lead with the batch. Text that a sampler did not draw (prompts, chat
    turns) reaches it through `read_text`, which adds to every `Seen` inside the state.
    """

    def init(self, batch: int, vocab: int) -> Any:
        """The state carried from step to step, before any text."""

    def step(
        self, keys_B: jax.Array, logits_BV: jax.Array, state: Any
    ) -> tuple[jax.Array, jax.Array, Any]:
        """Tokens int32 (B,), log-probabilities float32 (B,), and the new state."""

    def logprob(self, logits_BV: jax.Array, token_B: jax.Array, state: Any) -> jax.Array:
        """What `step` would have reported, had it drawn `token_B`; float32 (B,)."""


@struct.dataclass
class Seen:
    """Which tokens a row's text holds, bool (B, V)."""

    seen_BV: jax.Array

    def add(self, tokens_BT: jax.Array, counts_B: jax.Array) -> "Seen":
        """With the first `counts_B` of T tokens."""
        batch, time = tokens_BT.shape
        read_BT = jnp.arange(time) < counts_B[:, None]
        index_BT = jnp.where(read_BT, tokens_BT, self.seen_BV.shape[1])
        rows = jnp.arange(batch)[:, None]
        return Seen(self.seen_BV.at[rows, index_BT].set(True, mode="drop"))


def read_text(state: Any, tokens_BT: jax.Array, counts_B: jax.Array) -> Any:
    """A sampler's state after text that it did not draw itself."""
    is_seen = lambda node: isinstance(node, Seen)
    add = lambda node: node.add(tokens_BT, counts_B) if is_seen(node) else node
    return jax.tree.map(add, state, is_leaf=is_seen)


@struct.dataclass
class Greedy:
    """The most likely token; log-probabilities are the model's own."""

    def init(self, batch: int, vocab: int) -> tuple:
        """Nothing to carry."""
        return ()

    def step(self, keys_B, logits_BV, state):
        """`argmax_v l_v`."""
        token_B = jnp.argmax(logits_BV, -1).astype(jnp.int32)
        return token_B, logprob_of(logits_BV, token_B), state

    def logprob(self, logits_BV, token_B, state):
        """`log softmax(l)[token]`."""
        return logprob_of(logits_BV, token_B)


@struct.dataclass
class Categorical:
    """`p_v` proportional to `exp(l'_v)`, with l' the logits after, in this order, logit bias,
    repetition penalty, temperature, top-k, top-p and min-p. None leaves a transform out;
    the temperature is always a number.

    A cold row (temperature 0) takes the argmax of l'; its log-probability is stated at
    temperature 1, since a certainty of 0 would say nothing. Tokens that tie with the last one
    that top-k or top-p keeps are kept. All numbers are leaves, top-k too: a sweep compiles once.

    Args:
      temperature: at least 0. top_k: whole, at least 1; the vocabulary's size or more keeps all.
      top_p: in (0, 1]. min_p: in [0, 1]. repetition_penalty: above 0; 1 changes nothing; counts
        the row's whole text, prompt included. Each one number, or (B,).
      logit_bias: (V,) or (B, V), finite, or -inf to ban a token, but not all; see `bias_array`.
    Raises: ConfigError for a concrete number outside its range.

    Example:
      >>> sampler = Categorical(0.8, top_k=2)
      >>> logits = jnp.array([[0.0, 8.0, 8.8, 1.0]])
      >>> logprob_B = sampler.logprob(logits, jnp.array([1]), sampler.init(1, 4))
      >>> print(f"{logprob_B[0]:.3f}")
      -1.313
    """

    temperature: Any = 1.0
    top_k: Any = None
    top_p: Any = None
    min_p: Any = None
    repetition_penalty: Any = None
    logit_bias: Any = None

    def __post_init__(self):
        check(self, "temperature", low=0.0)
        check(self, "top_k", low=1.0, whole=True, optional=True)
        check(self, "top_p", low=0.0, high=1.0, above=True, optional=True)
        check(self, "min_p", low=0.0, high=1.0, optional=True)
        check(self, "repetition_penalty", low=0.0, above=True, optional=True)
        check(self, "logit_bias", low=float("-inf"), above=None, optional=True)
        bias = concrete(self.logit_bias)
        if bias is not None and bias.ndim and (bias <= NEG).all(-1).any():
            raise ConfigError("logit_bias bans every token; expected at least one in a row that "
                              "is left to draw")

    def init(self, batch: int, vocab: int) -> Any:
        """The tokens seen, where they are penalised."""
        if self.repetition_penalty is None:
            return ()
        return Seen(jnp.zeros((batch, vocab), bool))

    def step(self, keys_B, logits_BV, state):
        """One draw from the transformed logits."""
        changed_BV, cold_B = self.transform(logits_BV, state)
        token_B = draw(keys_B, changed_BV, cold_B)
        state = read_text(state, token_B[:, None], jnp.ones_like(token_B))
        return token_B, logprob_of(changed_BV, token_B), state

    def logprob(self, logits_BV, token_B, state):
        """`log softmax(l')[token]`."""
        return logprob_of(self.transform(logits_BV, state)[0], token_B)

    def transform(self, logits_BV: jax.Array, state: Any) -> tuple[jax.Array, jax.Array]:
        """The logits drawn from, float32 (B, V), and which rows are cold."""
        l = logits_BV.astype(jnp.float32)
        if self.logit_bias is not None:
            l = add_bias(l, self.logit_bias)
        if self.repetition_penalty is not None:
            l = penalise(l, state.seen_BV, self.repetition_penalty)
        l, cold_B = temper(l, self.temperature)
        if self.top_k is not None:
            l = keep_top_k(l, self.top_k)
        if self.top_p is not None:
            l = keep_top_p(l, self.top_p)
        if self.min_p is not None:
            l = keep_min_p(l, self.min_p)
        return l, cold_B


Temperature = Categorical  # the plain case: Temperature(0.8)


@struct.dataclass
class Mirostat2:
    """Text of steady surprise: keep tokens of at most mu bits, then `mu -= eta (s - tau)`.

    `s = -log2 p` of the drawn token under the truncated distribution; mu starts at `2 tau`.

    Args: tau: the surprise aimed at, bits a token, above 0. eta: the rate, at least 0.
      temperature: at least 0; 0 is greedy. Each one number, or (B,).
    Raises: ConfigError for a concrete number outside its range.
    Source: 2007.14966, section 5 (the second, simpler algorithm of its authors' code).

    Example:
      >>> Mirostat2(tau=3.0).init(2, vocab=50).tolist()
      [6.0, 6.0]
    """

    tau: Any = 5.0
    eta: Any = 0.1
    temperature: Any = 1.0

    def __post_init__(self):
        check(self, "tau", low=0.0, above=True)
        check(self, "eta", low=0.0)
        check(self, "temperature", low=0.0)

    def init(self, batch: int, vocab: int) -> jax.Array:
        """`mu_B = 2 tau`."""
        return 2.0 * per_row("tau", self.tau, batch)

    def step(self, keys_B, logits_BV, state):
        """Truncate at mu, draw, correct mu; logits without a number leave mu alone."""
        changed_BV, cold_B = self.transform(logits_BV, state)
        token_B = draw(keys_B, changed_BV, cold_B)
        logprob_B = logprob_of(changed_BV, token_B)
        batch = token_B.shape[0]
        error_B = -logprob_B / jnp.log(2.0) - per_row("tau", self.tau, batch)
        mu_B = state - per_row("eta", self.eta, batch) * error_B
        return token_B, logprob_B, jnp.where(jnp.isfinite(mu_B), mu_B, state)

    def logprob(self, logits_BV, token_B, state):
        """Under the distribution truncated at the row's present mu."""
        return logprob_of(self.transform(logits_BV, state)[0], token_B)

    def transform(self, logits_BV: jax.Array, mu_B: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The logits drawn from, float32 (B, V), and which rows are cold."""
        l, cold_B = temper(logits_BV.astype(jnp.float32), self.temperature)
        return keep_unsurprising(l, mu_B), cold_B


def check_sampler(sampler: Any) -> None:
    """ConfigError for what is no sampler, a class of samplers for one, or holds no numbers."""
    if isinstance(sampler, type) or not (hasattr(sampler, "init") and hasattr(sampler, "step")):
        shown = f"the class {sampler.__name__}" if isinstance(sampler, type) else repr(sampler)
        raise ConfigError(f"sampler is {shown}; expected an instance, such as jaxlm.Greedy() or "
                          "jaxlm.Temperature(0.8)")
    for leaf in jax.tree.leaves(sampler):  # jax rebuilds trees around any object; here it is used
        if leaf is not sampler and not isinstance(leaf, int | float) and not hasattr(leaf, "dtype"):
            raise ConfigError(f"sampler holds {leaf!r}; expected numbers or arrays of them")


def bias_array(biases: Mapping[int, float], vocab: int) -> np.ndarray:
    """Biases by token id as a float32 (V,) array.

    Raises: ConfigError for an id outside the vocabulary, or a bias that is not finite, -inf apart.

    >>> bias_array({1: float("-inf")}, 3).tolist()
    [0.0, -inf, 0.0]
    """
    if not isinstance(biases, Mapping):
        raise ConfigError(f"logit_bias is {biases!r}; expected biases by token id, such as "
                          "{13: -1.5}")
    bias_V, largest = np.zeros(vocab, np.float32), float(np.finfo(np.float32).max)
    for token, value in biases.items():
        index, number = whole("a token id of logit_bias", token, 0, vocab - 1), concrete(value)
        fine = number is not None and number.ndim == 0 and number.dtype.kind in "iuf"
        if not fine or not (abs(value) <= largest or value == -np.inf):
            raise ConfigError(f"logit_bias of token {index} is {value!r}; expected a number, or "
                              "-inf to ban the token")
        bias_V[index] = value
    return bias_V


def concrete(value: Any) -> np.ndarray | None:
    """The numbers of a value; None where it holds none that can be read, as while jax traces."""
    if isinstance(value, jax.Array):
        return np.asarray(value) if readable(value) else None
    numbers = int, float, complex, np.ndarray, np.generic
    return np.asarray(value) if isinstance(value, numbers) else None


def check(
    sampler: Any, name: str, low: float, high: float = float("inf"), above: bool | None = False,
    whole: bool = False, optional: bool = False,
) -> None:
    """Hold a concrete number to its range, and store it as float32.

    Numbers of any type become one array type, so that 0, 0.5 and np.float64(0.5) share one
    compilation. `above`: low itself is excluded; None: -inf is allowed. `optional`: so is None.
    What stands for a number while jax traces or rebuilds the tree passes unchecked.
    Raises: ConfigError.
    """
    value = getattr(sampler, name)
    if value is None and optional:
        return
    end = ")" if high == float("inf") else "]"
    kind = "whole numbers" if whole else "numbers"
    wanted = f"{kind} in {'(' if above else '['}{low:g}, {high:g}{end}"
    if value is None or isinstance(value, (bool, str, list, tuple, dict)):
        raise ConfigError(f"{name} is {value!r}; expected {wanted}, or an array of them")
    array = concrete(value)
    if array is None:
        return
    if array.dtype.kind not in "iuf" and not jnp.issubdtype(array.dtype, jnp.floating):
        raise ConfigError(f"{name} holds {array.dtype}; expected {wanted}")
    with np.errstate(over="ignore"):  # beyond float32 is infinite, and refused
        array = array.astype(np.float32)
    inside = (array >= low) & (array <= high)
    inside &= array > low if above else True
    inside &= array < np.inf if above is None else np.isfinite(array)
    inside &= array == np.floor(array) if whole else True
    if not inside.all():
        raise ConfigError(f"{name} is {value}; expected {wanted}")
    of_jax = isinstance(value, jax.Array)  # it stays where it is
    object.__setattr__(sampler, name, value.astype(jnp.float32) if of_jax else array)
