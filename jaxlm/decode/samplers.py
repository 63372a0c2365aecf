"""Samplers: small pytrees whose numbers may be swept without a new compilation."""

from typing import Any, Protocol

import jax
import jax.numpy as jnp
from flax import struct

from jaxlm.core.errors import ConfigError
from jaxlm.models.attention import NEG


class Sampler(Protocol):
    """From logits to a token, and the token's log-probability under the sampling distribution."""

    def init(self, batch: int) -> Any:
        """The state carried from step to step."""

    def step(
        self, keys_B: jax.Array, logits_BV: jax.Array, state: Any
    ) -> tuple[jax.Array, jax.Array, Any]:
        """Tokens int32 (B,), log-probabilities float32 (B,), and the new state."""


@struct.dataclass
class Greedy:
    """The most likely token; log-probabilities are the model's own."""

    def init(self, batch: int) -> tuple:
        """Nothing to carry."""
        return ()

    def step(self, keys_B, logits_BV, state):
        """`argmax_v l_v`."""
        token_B = jnp.argmax(logits_BV, -1).astype(jnp.int32)
        return token_B, logprob_of(logits_BV, token_B), state


@struct.dataclass
class Temperature:
    """`p_v` proportional to `exp(l_v / temperature)`; 0 is greedy.

    Args: temperature: float or (B,), at least 0; a leaf, so a sweep compiles once.

    Example:
      >>> Temperature(0.8).temperature
      0.8
    """

    temperature: Any = 1.0

    def __post_init__(self):
        check_range("temperature", self.temperature, low=0.0)

    def init(self, batch: int) -> tuple:
        """Nothing to carry."""
        return ()

    def step(self, keys_B, logits_BV, state):
        """Gumbel-max over the tempered logits, each row with its own key."""
        scaled_BV, cold_B = temper(logits_BV, self.temperature)
        noise_BV = jax.vmap(lambda key: jax.random.gumbel(key, logits_BV.shape[1:]))(keys_B)
        drawn_BV = jnp.where(cold_B[:, None], scaled_BV, scaled_BV + noise_BV)
        token_B = jnp.argmax(drawn_BV, -1).astype(jnp.int32)
        return token_B, logprob_of(scaled_BV, token_B), state


def temper(logits_BV: jax.Array, temperature: Any) -> tuple[jax.Array, jax.Array]:
    """Logits over temperature, and which rows are cold (temperature 0, left as they are)."""
    value_B = jnp.broadcast_to(jnp.asarray(temperature, jnp.float32), logits_BV.shape[:1])
    cold_B = value_B <= 0
    return logits_BV / jnp.where(cold_B, 1.0, value_B)[:, None], cold_B


def logprob_of(logits_BV: jax.Array, token_B: jax.Array) -> jax.Array:
    """`log softmax(l)[token]`, float32."""
    logits_BV = jnp.maximum(logits_BV.astype(jnp.float32), NEG)
    chosen_B = jnp.take_along_axis(logits_BV, token_B[:, None], -1)[:, 0]
    return chosen_B - jax.nn.logsumexp(logits_BV, -1)


def check_range(name: str, value: Any, low: float, high: float = float("inf")) -> None:
    """Raise ConfigError where a concrete number is outside [low, high] or not finite."""
    if isinstance(value, jax.core.Tracer) or not isinstance(value, (int, float, jax.Array)):
        return
    array = jnp.asarray(value)
    if not bool(jnp.all(jnp.isfinite(array) & (array >= low) & (array <= high))):
        raise ConfigError(f"{name} is {value}; expected finite numbers in [{low}, {high}]")
