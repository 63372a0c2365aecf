"""How many singular directions of each matrix are kept: by a ratio, a schedule, its importance."""

import math
from collections.abc import Callable, Iterable
from fnmatch import fnmatchcase
from typing import Any

import jax
import jax.numpy as jnp

from jaxlm.core.errors import ConfigError
from jaxlm.core.tree import Params, flatten
from jaxlm.models.lm import LM
from jaxlm.models.stack import STACK, unstack
from jaxlm.train.matrices import as_matrix


def cosine(x: jax.Array, y: jax.Array, weights: jax.Array) -> jax.Array:
    """`sum_t w_t cos(x_t, y_t)`; over the sum of weights, how little a matrix turns its input.

    The longer of the two is cut to the length of the shorter, for cos needs one length; so do the
    authors in their code.

    Args: x: (..., n). y: (..., m). weights: (...), of the tokens that count.
    Source: 2504.07097, section 3.

    >>> x = jnp.array([[1.0, 0.0], [0.0, 2.0]])
    >>> float(cosine(x, 3 * x, jnp.ones(2)))
    2.0
    """
    least = min(x.shape[-1], y.shape[-1])
    x, y = (part[..., :least].astype(jnp.promote_types(part.dtype, jnp.float32))
            for part in (x, y))
    norms = jnp.linalg.norm(x, axis=-1) * jnp.linalg.norm(y, axis=-1)
    return (weights * (x * y).sum(-1) / jnp.maximum(norms, 1e-8)).sum()


def importance(
    lm: LM, params: Params, batches: Iterable[dict[str, Any]], clip: bool = True
) -> dict[str, float]:
    """`I^(l) = cosine / mean over matrices of cosine`, on data of the task before.

    Args:
      params: plain or stacked.
      batches: dicts as `lm_objective` takes them; padding, segment 0, does not count.
      clip: take a negative cosine for 0; without it, ranks follow the paper's first version to the
        letter, and the mean of small models' cosines can be near 0 or below.
    Returns: importance by module, as `layers_0/attn/q`, from the mean cosine over the tokens of all
      batches; its own mean is 1.
    Raises: ConfigError without a batch, or when the mean is not positive.
    """
    params = unstack(params) if STACK in params else params
    plain = LM(lm.config, lm.plan, mesh=lm.mesh)

    @jax.jit
    def measure(params, batch):
        tokens_BT, segments_BT = batch["tokens"][:, :-1], batch.get("segments")
        taps = plain.apply(params, tokens_BT, logits_at=None, want=("taps",),
                           segments_BT=segments_BT, positions_BT=batch.get("positions")).taps
        counts_BT = jnp.ones(tokens_BT.shape) if segments_BT is None else 1.0 * (segments_BT > 0)
        flat = lambda x: x.reshape(*tokens_BT.shape, -1)
        return {name: cosine(flat(x), flat(y), counts_BT)
                for name, (x, y) in (taps or {}).items()}, counts_BT.sum()

    found = [jax.device_get(measure(params, batch)) for batch in batches]
    if not found:
        raise ConfigError("importance needs batches of the task before; got none")
    tokens = sum(float(count) for _, count in found)
    return normalised({name: sum(float(sums[name]) for sums, _ in found) / tokens
                       for name in found[0][0]}, clip)


def normalised(cosines: dict[str, float], clip: bool = True) -> dict[str, float]:
    """Divided by their mean, negative ones taken for 0 if `clip`.

    Raises: ConfigError when the mean is not positive: no ranks follow from it.
    """
    cosines = {name: max(value, 0.0) if clip else value for name, value in cosines.items()}
    mean = sum(cosines.values()) / len(cosines)
    if not mean > 0:
        raise ConfigError(f"the mean cosine of inputs and outputs is {mean:.3g}; importance is "
                          "relative to it and needs it above 0: use ranks='uniform'"
                          + ("" if clip else ", or clip=True"))
    return {name: value / mean for name, value in cosines.items()}


def kept(least: int, ratio: float) -> int:
    """`floor(ratio * least)` within [0, least]; a product that rounds below a whole one counts.

    >>> kept(10, 1 - 0.9), kept(48, 0.5), kept(8, 1.4)
    (1, 24, 8)
    """
    return min(max(math.floor(ratio * least + 1e-9), 0), least)


def matches(module: str, pattern: str) -> bool:
    """Whether a module, as `layers_0/attn/q`, is meant by a name (`q`) or a glob (`*/mlp/*`).

    >>> matches("layers_0/attn/q", "q"), matches("layers_10/mlp/up", "layers_1/*")
    (True, False)
    """
    return fnmatchcase(module, pattern) or fnmatchcase(module.rsplit("/", 1)[-1], pattern)


def modules(path: str, layers: int | None, period: int) -> list[str]:
    """The modules that a kernel's path stands for: one, or one for each of the stacked layers.

    Args: layers: length of a stacked leaf's first axis. period: layers a step of the stack has.

    >>> modules("stack/layers_1/attn/q/kernel", 2, 3)
    ['layers_1/attn/q', 'layers_4/attn/q']
    """
    name = path.removesuffix("/kernel")
    if layers is None:
        return [name]
    layer, rest = name.removeprefix(f"{STACK}/layers_").split("/", 1)
    return [f"layers_{group * period + int(layer)}/{rest}" for group in range(layers)]


def plan(
    params: Params, targets: tuple[str, ...], keep: Callable[[str], float], beside: float
) -> dict[str, tuple[int, ...]]:
    """k of every matrix of the kernels that some target names; paths in the tree's order.

    Args:
      params: plain or stacked; shapes will do.
      keep: module -> the share of its directions that is kept.
      beside: that share for the layers of a stacked kernel that no target names.
    Raises: ConfigError for a target that no kernel has.
    """
    period, flat = len(params.get(STACK, {})), flatten(params)
    found, used = {}, set()
    for path, leaf in flat.items():
        if not path.endswith("/kernel"):
            continue
        shape = as_matrix(path, leaf.shape)
        names = modules(path, shape.lead[0] if shape.lead else None, period)
        hits = [[t for t in targets if matches(name, t)] for name in names]
        used |= {target for hit in hits for target in hit}
        if any(hits):
            found[path] = tuple(kept(min(shape.n, shape.m), keep(name) if hit else beside)
                                for name, hit in zip(names, hits, strict=True))
    if unknown := [target for target in targets if target not in used]:
        has = sorted({path.split("/")[-2] for path in flat if path.endswith("/kernel")})
        raise ConfigError(f"tuning.targets has {unknown[0]!r}, which no projection is called; "
                          f"expected names among {', '.join(has)}, or globs as '*/mlp/*'")
    return found
