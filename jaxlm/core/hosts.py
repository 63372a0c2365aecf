"""Several processes that run one program: what they share, and how none is left waiting.

Every process must make the same calls in the same order, for an operation on a shared array is a
meeting that all must attend.
"""

import hashlib
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from jaxlm.core.errors import ConfigError, DeviceError

MESSAGE_BYTES = 512


def spans_processes(tree: Any) -> bool:
    """Whether some array (or mesh) among the leaves has parts that this process cannot see."""
    leaves = jax.tree.leaves(tree)
    return any(
        leaf.is_multi_process if isinstance(leaf, jax.sharding.Mesh)
        else isinstance(leaf, jax.Array) and not leaf.is_fully_addressable for leaf in leaves
    )


def readable(x: Any) -> bool:
    """Whether an array's numbers can be looked at here and now: not while jax traces, nor where
    another process holds a part of them."""
    return not isinstance(x, jax.core.Tracer) and not spans_processes(x)


def to_host(tree: Any) -> Any:
    """The whole of every leaf as numpy, in every process.

    Arrays that span processes are gathered one by one, so that a device holds one of them whole;
    this is a meeting of all processes.

    Example:
      >>> to_host({"a": jax.numpy.arange(3)})
      {'a': array([0, 1, 2], dtype=int32)}
    """

    def whole(leaf: Any) -> Any:
        if not spans_processes(leaf) or leaf.is_fully_replicated:
            return leaf
        return multihost_utils.process_allgather(leaf, tiled=True)

    return jax.device_get(jax.tree.map(whole, tree))


def check_same(what: str, tree: Any) -> None:
    """Raise ConfigError, in every process, unless all hold the same numbers; a meeting of all.

    Else each process would compute on its own part of something that does not exist. Leaves that
    are no arrays are compared as `repr` shows them.
    """
    digest = hashlib.sha256(_shown(jax.tree.structure(tree)))
    for leaf in jax.tree.leaves(tree):
        spread = isinstance(leaf, jax.Array) and not leaf.is_fully_addressable
        array_like = isinstance(leaf, jax.Array | np.ndarray | np.generic)
        if spread or not array_like:
            digest.update(_shown(leaf.aval if spread else leaf))
            continue
        keys = jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
        array = np.asarray(jax.random.key_data(leaf) if keys else leaf)
        digest.update(f"{array.dtype} {array.shape}".encode() + array.tobytes())
    mine = np.frombuffer(digest.digest(), np.uint8)
    found = np.atleast_2d(multihost_utils.process_allgather(mine))
    if other := [i for i, theirs in enumerate(found) if (theirs != found[0]).any()]:
        raise ConfigError(
            f"{what} of process {other[0]} is not that of process 0; give every process the same "
            "prompts, keys and settings"
        )


def _shown(value: Any) -> bytes:
    """What `repr` says, without the addresses of memory that differ between processes."""
    return re.sub(r" at 0x[0-9a-f]+", "", repr(value)).encode()


def is_writer(shared: bool = True) -> bool:
    """Whether this process writes: of those that share an object, the first alone."""
    return not shared or jax.process_index() == 0


@contextmanager
def together(shared: bool) -> Iterator[None]:
    """Every process that shares an object leaves this block well, or every one raises.

    Without it, a process that fails alone would leave the others waiting for it. The block itself
    must hold no meeting. `shared` is False for an object of this process alone: nothing is done.

    Raises: the block's own error; DeviceError, with the other's message, where another failed.
    """
    failure: Exception | None = None
    try:
        yield
    except Exception as error:
        failure = error
    if not shared:
        if failure is not None:
            raise failure
        return
    said = f"{type(failure).__name__}: {failure}" if failure else ""
    line = np.zeros(MESSAGE_BYTES, np.uint8)
    encoded = np.frombuffer(said.encode()[:MESSAGE_BYTES], np.uint8)
    line[: len(encoded)] = encoded
    lines = np.atleast_2d(multihost_utils.process_allgather(line))
    if failure is not None:
        raise failure
    for process, text in enumerate(lines):
        if text.any():
            words = text.tobytes().rstrip(b"\0").decode(errors="replace")
            raise DeviceError(f"process {process} failed, so all stop: {words}")
