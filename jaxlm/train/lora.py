"""Low-rank adapters: `W + (alpha / r) A B`, and O-LoRA's, orthogonal to those of earlier tasks."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from jaxlm.core.errors import ConfigError, number, whole
from jaxlm.core.tree import flatten, map_with_path, unflatten
from jaxlm.models.axes import axes_of
from jaxlm.train.matrices import PROJECTIONS, input_axes, projections
from jaxlm.train.tuning import Full


@dataclass(frozen=True)
class Lora(Full):
    """`W' = W + (alpha / r) A B`, A (n, r) random, B (r, m) zero at first; all else is frozen.

    Kernels have their input first, so A here is the transposed A of the paper. The two are merged
    into W wherever parameters leave training. Source: 2106.09685, section 4.1.

    Args:
      rank: r, at least 1.
      alpha: scale of the adapter, over the rank; at least 0.
      targets: names of the projections that get one, as `q`; no globs.

    Example:
      >>> from jaxlm.models.lm import LM
      >>> from jaxlm.models.config import ModelConfig
      >>> lm = LM(ModelConfig(16, 8, 1, 2, 1, 4, 16))
      >>> trained, frozen = Lora(rank=2).start(lm, lm.init(jax.random.key(0)), jax.random.key(1))
      >>> trained["layers_0"]["mlp"]["up"]["kernel"]["a"].shape
      (8, 2)
    """

    rank: int = 8
    alpha: float = 16.0
    targets: tuple[str, ...] = PROJECTIONS

    def __post_init__(self):
        whole("tuning.rank", self.rank)
        number("tuning.alpha", self.alpha)

    def start(self, lm, params, key, **calibration):
        """New adapters over these parameters."""
        trained = {}
        for i, (path, shape) in enumerate(projections(params, self.targets).items()):
            if self.rank > min(shape.n, shape.m):
                raise ConfigError(f"tuning.rank is {self.rank}; {path!r} is {shape.n} x {shape.m}")
            own = jax.random.fold_in(key, i)
            a = jax.random.normal(own, (*shape.lead, shape.n, self.rank)) / shape.n**0.5
            trained[f"{path}/a"] = a
            trained[f"{path}/b"] = jnp.zeros((*shape.lead, self.rank, shape.m))
        return unflatten(trained), {"base": params}

    def materialise(self, trained, frozen):
        """The adapters added to their matrices, in float32."""
        flat, factors = flatten(frozen["base"]), flatten(trained)
        for path, a in _first(trained).items():
            change = (self.alpha / self.rank) * (a @ factors[f"{path}/b"])
            flat[path] = flat[path] + change.reshape(flat[path].shape)
        return unflatten(flat)

    def axes(self, trained, frozen):
        """A goes with its matrix's input, B with its output; they share the rank."""
        base = map_with_path(lambda path, _: axes_of(path), frozen["base"])
        kept = {path: _factor_axes(f"{path}/a", None)
                for path in flatten(frozen.get("earlier", {}))}
        names = {"base": base} | ({"earlier": unflatten(kept)} if kept else {})
        return map_with_path(_factor_axes, trained), names


@dataclass(frozen=True)
class OLora(Lora):
    """A new adapter a task, whose inputs avoid those of the earlier ones, merged and frozen.

    `loss + weight * sum_{i < t} sum |A_i^T A_t|`. Source: 2310.14152, equations 5 to 8, and the
    authors' code, which sums absolute values.

    Args:
      weight: of the penalty; at least 0.
    """

    weight: float = 0.5

    def __post_init__(self):
        super().__post_init__()
        number("tuning.weight", self.weight)

    def start(self, lm, params, key, *, previous=None, **calibration):
        """`previous`: (trained, frozen) at the end of the task before."""
        trained, frozen = super().start(lm, params, key)
        if previous is None:
            return trained, frozen
        earlier = _first(previous[0])
        for path, a in flatten(previous[1].get("earlier", {})).items():
            earlier[path] = jnp.concatenate([a, earlier[path]], -1)
        return trained, frozen | {"earlier": unflatten(earlier)}

    def penalty(self, trained, frozen):
        """`weight * sum |A_i^T A_t|` over matrices and earlier tasks."""
        return self.weight * sum(self._overlaps(trained, frozen), jnp.zeros((), jnp.float32))

    def metrics(self, trained, frozen):
        """The sum of overlaps, without the weight."""
        return {"overlap": sum(self._overlaps(trained, frozen), jnp.zeros((), jnp.float32))}

    def _overlaps(self, trained, frozen):
        now = _first(trained)
        return [jnp.abs(jnp.swapaxes(a, -1, -2) @ now[path]).sum()
                for path, a in flatten(frozen.get("earlier", {})).items()]


def _first(trained):
    """The A of every adapter, by the path of its matrix."""
    return {path[:-2]: leaf for path, leaf in flatten(trained).items() if path.endswith("/a")}


def _factor_axes(path, _):
    """Axis names of `MATRIX/a` (n, r) or `MATRIX/b` (r, m)."""
    matrix, _, factor = path.rpartition("/")
    names = axes_of(matrix)
    lead = names[:1] if names[0] == "layers" else ()
    split = len(lead) + input_axes(matrix)
    first, second = (names[len(lead)], "rank") if factor == "a" else ("rank", names[split])
    return (*lead, first, second)
