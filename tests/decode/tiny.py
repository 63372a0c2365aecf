"""A model of two layers, and its text, for tests of decoding."""

import jax
import jax.numpy as jnp

from jaxlm.cache import Dense
from jaxlm.decode.samplers import Greedy
from jaxlm.decode.state import decode, extend, prefill
from jaxlm.models.config import ModelConfig
from jaxlm.models.lm import LM

VOCAB = 61
PREFILL = jax.jit(prefill, static_argnums=(0, 5, 6))
DECODE = jax.jit(decode, static_argnums=0)
EXTEND = jax.jit(extend, static_argnums=0)
APPLY = jax.jit(lambda lm, params, tokens: lm.apply(params, tokens), static_argnums=0)


def tiny_model(seed=0, **changes):
    """A random model whose next-token distributions are far from flat."""
    sizes = dict(vocab_size=VOCAB, dim=16, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8,
                 ffn_dim=32)
    lm = LM(ModelConfig(**{**sizes, **changes}))
    params = lm.init(jax.random.key(seed))
    params["embed"]["table"] = params["embed"]["table"] * 4.0
    return lm, params


def prompts(rows=3, time=6, seed=1):
    """Random prompts of different lengths, right-padded."""
    tokens = jax.random.randint(jax.random.key(seed), (rows, time), 0, VOCAB)
    lengths = jnp.array([time, *(1 + (i * 3) % time for i in range(1, rows))], jnp.int32)
    return tokens, lengths


def start(lm, params, slots=20, sampler=None, rows=3, seed=1, cache=None):
    """A prefilled state."""
    tokens, lengths = prompts(rows, seed=seed)
    keys = jax.random.split(jax.random.key(seed + 7), rows)
    return PREFILL(lm, params, sampler or Greedy(), tokens, lengths, cache or Dense(), slots, keys)
