"""What a search will hold in memory, and how many particles fit."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from jaxlm.core.device import host_memory_left
from jaxlm.core.errors import DeviceError
from jaxlm.core.tree import nbytes
from jaxlm.decode.rows import fork
from jaxlm.decode.samplers import Greedy
from jaxlm.decode.state import Kinds, prefill
from jaxlm.hf.bundle import Bundle
from jaxlm.models.lm import LM
from jaxlm.rewards.base import Prompts

RESERVE = 0.05  # of a device: the runtime's own, the program's code, fragments


@dataclass(frozen=True)
class Memory:
    """Bytes of a search: parameters, prompts (once each), what the particles add (caches, and
    texts with their logits), one layer's suffix again, for resampling; and what a reward on the
    device holds, as `reward_bytes`."""

    params: int
    prompts: int
    suffixes: int
    texts: int
    layer: int
    reward: int = 0

    @property
    def total(self) -> int:
        """All of it."""
        return self.params + self.prompts + self.suffixes + self.texts + self.layer + self.reward


def estimate(
    lm: LM, params, kinds: Kinds, prompts: int, width: int, particles: int, slots: int
) -> Memory:
    """The memory of `prompts` prompts of `width` tokens, with `particles` answers of up to `slots`
    tokens each; from shapes, with nothing computed.

    The reward's own is counted by `reward_bytes`, a step's activations are not; logits are counted
    twice.
    """
    state = forked.eval_shape(lm, params, kinds, prompts, width, particles, slots)
    own = [nbytes(cache.own) for cache in state.caches if cache != ()]
    shared = sum(nbytes(cache.prompt) for cache in state.caches if cache != ())
    texts = nbytes((state.tokens_BS, state.logprob_BS, state.logits_BV, state.logits_BV))
    return Memory(placed_bytes(params), shared, sum(own), texts, max(own, default=0))


@partial(jax.jit, static_argnums=(0, 2, 3, 4, 5, 6))  # never run: each size is traced once
def forked(lm: LM, params, kinds: Kinds, prompts: int, width: int, particles: int, slots: int):
    """The state in which a search takes its first step."""
    keys = jax.random.split(jax.random.key(0), prompts)
    state = prefill(lm, params, Greedy(), jnp.zeros((prompts, width), jnp.int32),
                    jnp.ones(prompts, jnp.int32), kinds, width, keys)
    return fork(lm, params, state, particles, slots)


def placed_bytes(tree: Any) -> int:
    """How many bytes the leaves hold on all their devices together, copies included."""
    def one(leaf):
        if not isinstance(leaf, jax.Array):
            return nbytes(leaf)
        shard = math.prod(leaf.sharding.shard_shape(leaf.shape))
        return shard * leaf.dtype.itemsize * len(leaf.sharding.device_set)

    return sum(map(one, jax.tree.leaves(tree)))


def reward_bytes(reward: Any, prompts: Prompts, particles: int, slots: int) -> int:
    """What a reward that computes on the device holds: its parameters, and what `init` makes, from
    shapes.

    0 for any other on the host: what its own code holds is not known here.
    """
    if not (reward.on_device or getattr(reward, "costly", False)):
        return 0
    arrays = lambda tree: [leaf for leaf in jax.tree.leaves(tree) if isinstance(leaf, jax.Array)]
    try:
        carry = jax.eval_shape(lambda: arrays(reward.init(prompts, particles, slots)))
    except jax.errors.JAXTypeError:  # an init that looks at numbers cannot be asked for shapes
        carry = []
    return placed_bytes(arrays(reward if reward.on_device else vars(reward))) + nbytes(carry)


def check_memory(
    bundle: Bundle, kinds: Kinds, prompts: int, width: int, particles: int, slots: int,
    limit: int | None, reward: Callable[[int], int] = lambda particles: 0,
) -> Memory | None:
    """The estimate, where it fits the device; None, with nothing traced, for one without a limit.

    Args: limit: bytes; None: what the device says it has, if it does. On a mesh, of all its
      devices together. reward: bytes of the reward for so many particles.
    Raises: DeviceError that names the number of particles that fits.
    """
    limit = device_limit(bundle) if limit is None else limit
    if limit is None:
        return None
    found = estimate(bundle.lm, bundle.params, kinds, prompts, width, particles, slots)
    found = replace(found, reward=reward(particles))
    if found.total <= limit:
        return found
    more = reward(particles + 1) - found.reward  # each row holds as much as another
    fixed = found.params + found.prompts + found.reward - particles * more
    each = -(-(found.suffixes + found.texts + found.layer) // particles) + more
    fits = max((limit - fixed) // each, 0)
    size = lambda n: f"{n / 2**20:,.1f} MiB"
    judge = f"reward {size(found.reward - particles * more)}, " if found.reward else ""
    raise DeviceError(
        f"{particles} particles for each of {prompts} prompts need {size(found.total)} (parameters "
        f"{size(found.params)}, prompts {size(found.prompts)}, {judge}particles {size(each)} "
        f"each), but the device has {size(limit)}; {fits} particles fit: lower particles, prompts "
        "at once, or max_new_tokens, or take a quantised cache")


def device_limit(bundle: Bundle) -> int | None:
    """Bytes of the devices that hold the parameters, less a reserve; None where none says.

    A CPU's are what the host has left, with what jax holds of it already.
    """
    leaf = jax.tree.leaves(bundle.params)[0]
    devices = list(leaf.devices()) if isinstance(leaf, jax.Array) else []
    here = [device for device in devices if device.process_index == jax.process_index()]
    if not here or len(here) < len(devices):
        return None
    limits = [(device.memory_stats() or {}).get("bytes_limit") for device in here]
    if all(device.platform == "cpu" for device in here):  # all of them share one memory
        left = host_memory_left()
        limits = [None if left is None else left + placed_bytes(jax.live_arrays("cpu"))]
    known = [limit for limit in limits if limit]
    return int((1 - RESERVE) * sum(known)) if len(known) == len(limits) else None
