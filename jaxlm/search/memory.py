"""What a search will hold in memory, and how many particles fit."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from jaxlm.core.errors import DeviceError
from jaxlm.core.tree import nbytes
from jaxlm.decode.rows import fork
from jaxlm.decode.samplers import Greedy
from jaxlm.decode.state import Kinds, prefill
from jaxlm.hf.bundle import Bundle
from jaxlm.models.lm import LM

RESERVE = 0.05  # of a device: the runtime's own, the program's code, fragments


@dataclass(frozen=True)
class Memory:
    """Bytes of a search: parameters, prompts (once each), what the particles add (caches, and
    texts with their logits), and one layer's suffix again, for resampling."""

    params: int
    prompts: int
    suffixes: int
    texts: int
    layer: int

    @property
    def total(self) -> int:
        """All of it."""
        return self.params + self.prompts + self.suffixes + self.texts + self.layer


def estimate(
    lm: LM, params, kinds: Kinds, prompts: int, width: int, particles: int, slots: int
) -> Memory:
    """The memory of `prompts` prompts of `width` tokens, with `particles` answers of up to `slots`
    tokens each; from shapes, with nothing computed.

    The reward's own is not counted, nor a step's activations; logits are counted twice.
    """
    def forked(params):
        keys = jax.random.split(jax.random.key(0), prompts)
        state = prefill(lm, params, Greedy(), jnp.zeros((prompts, width), jnp.int32),
                        jnp.ones(prompts, jnp.int32), kinds, width, keys)
        return fork(lm, params, state, particles, slots)

    state = jax.eval_shape(forked, params)
    own = [nbytes(cache.own) for cache in state.caches if cache != ()]
    shared = sum(nbytes(cache.prompt) for cache in state.caches if cache != ())
    texts = nbytes((state.tokens_BS, state.logprob_BS, state.logits_BV, state.logits_BV))
    return Memory(nbytes(params), shared, sum(own), texts, max(own, default=0))


def check_memory(
    bundle: Bundle, kinds: Kinds, prompts: int, width: int, particles: int, slots: int,
    limit: int | None,
) -> Memory:
    """The estimate, where it fits the device.

    Args: limit: bytes; None: what the device says it has, if it does. On a mesh, of all its
      devices together.
    Raises: DeviceError that names the number of particles that fits.
    """
    found = estimate(bundle.lm, bundle.params, kinds, prompts, width, particles, slots)
    limit = device_limit(bundle) if limit is None else limit
    if limit is None or found.total <= limit:
        return found
    each = -(-(found.suffixes + found.texts + found.layer) // particles)
    fits = max((limit - found.params - found.prompts) // each, 0)
    size = lambda n: f"{n / 2**20:,.1f} MiB"
    raise DeviceError(
        f"{particles} particles for each of {prompts} prompts need {size(found.total)} (parameters "
        f"{size(found.params)}, prompts {size(found.prompts)}, particles {size(each)} each), but "
        f"the device has {size(limit)}; {fits} particles fit: lower particles, prompts at once, or "
        "max_new_tokens, or take a quantised cache")


def device_limit(bundle: Bundle) -> int | None:
    """Bytes of the devices that hold the parameters, less a reserve; None where none says."""
    leaf = jax.tree.leaves(bundle.params)[0]
    devices = list(leaf.devices()) if isinstance(leaf, jax.Array) else []
    limits = [(device.memory_stats() or {}).get("bytes_limit") for device in devices
              if device.process_index == jax.process_index()]
    known = [limit for limit in limits if limit]
    return int((1 - RESERVE) * sum(known)) if known and len(known) == len(devices) else None
