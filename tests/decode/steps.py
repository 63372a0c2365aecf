"""The functions on DecodeState, compiled as tests use them, and a sampler that follows a script."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from jaxlm.decode import state

prefill = jax.jit(state.prefill, static_argnames=("lm", "cache", "slots"))
extend = jax.jit(state.extend, static_argnames=("lm", "logits_at"))
step = jax.jit(state.decode_step, static_argnames=("lm", "stop"))
decode = jax.jit(state.decode, static_argnames=("lm", "stop"))


@struct.dataclass
class Script:
    """Draws the tokens of a script, whatever the model says."""

    tokens_T: Any

    def init(self, batch: int, *_: Any) -> jax.Array:
        """How far each row is."""
        return jnp.zeros(batch, jnp.int32)

    def step(self, keys_B, logits_BV, at_B):
        """The next token, with log-probability 0."""
        return self.tokens_T[at_B].astype(jnp.int32), jnp.zeros(at_B.shape), at_B + 1

    def logprob(self, logits_BV, token_B, at_B):
        """0: a script is certain."""
        return jnp.zeros(token_B.shape)
