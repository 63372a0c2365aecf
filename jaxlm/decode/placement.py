"""Where a decode state lives on a mesh."""

from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding

from jaxlm.core.mesh import RULES, Rules, partition
from jaxlm.decode.state import DecodeState


def state_shardings(
    state: DecodeState, kv_heads: int, mesh: Mesh, rules: Rules = RULES
) -> DecodeState:
    """Rows over the batch axes; cache leaves whose second axis is the kv heads, over theirs too.

    Or fewer, where heads lie side by side (`pallas_kernels.lanes`).

    Args: state: arrays or shapes, as of `jax.eval_shape`.
    Returns: the same tree of shardings.
    """
    warned: set[tuple[str, int]] = set()

    def place(leaf: Any, cache: bool) -> NamedSharding:
        axes = ["batch"] + [""] * (leaf.ndim - 1) if leaf.ndim else []
        if cache and leaf.ndim >= 3 and kv_heads % leaf.shape[1] == 0:
            axes[1] = "kv_heads"
        spec = partition(tuple(axes), leaf.shape, mesh, rules, "decode state", warned)
        return NamedSharding(mesh, spec)

    caches = jax.tree.map(lambda leaf: place(leaf, True), state.caches)
    rest = jax.tree.map(lambda leaf: place(leaf, False), state.replace(caches=()))
    return rest.replace(caches=caches)
