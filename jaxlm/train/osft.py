"""Orthogonal subspace fine-tuning: each matrix learns only where its singular values are small.

A matrix W (n x m) of the task before is split by its singular value decomposition,

    W = U diag(s) V^T = U_h diag(s_h) V_h^T + U_l diag(s_l) V_l^T,

the k largest directions (h) being kept. Everything that training adds stays outside both of their
subspaces: `U_h^T dW = 0` and `dW V_h = 0`, so `U_h^T W x` and `W V_h` never change. With the
projectors `P_U = I - U_h U_h^T = U_l U_l^T` (the last for n <= m) and P_V alike, three forms:

    update       W = W_0 + D;  D <- D + P_U u P_V, u the last update of any optimiser
    factored     W = U_h diag(s_h) V_h^T + u diag(s) v^T;  u, s, v are trained, u and v projected
    coordinates  W = W_0 + U_o A V_o^T;  A is trained, U_o and V_o span what P_U and P_V keep

Kernels here have their input first, so this W is the transposed W of the paper, its U their V.
Source: 2504.07097.
"""

from dataclasses import dataclass
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from jaxlm.core.errors import ConfigError, whole
from jaxlm.core.mesh import shardings
from jaxlm.core.tree import flatten, map_with_path, unflatten
from jaxlm.models.axes import axes_of
from jaxlm.train import ranks
from jaxlm.train.bases import Parts as Basis
from jaxlm.train.bases import bases_of, columns, find_bases, matrix, part_axes, wide
from jaxlm.train.leak import leaks
from jaxlm.train.matrices import PROJECTIONS, as_matrix
from jaxlm.train.subspace import decompose, dot, reflect, transpose, unreflect


def project(x: jax.Array, basis: Basis) -> jax.Array:
    """`P_U x P_V`, at the least cost that the bases allow.

    Args:
      x: (..., n, m).
      basis: of each side either the kept columns, `left` (n, k) and `right` (m, k), or those that
        are free, `left_free` (n, n - k) and `right_free` (m, m - k).

    Example:
      >>> e1 = jnp.array([[1.0], [0.0]])
      >>> project(jnp.ones((2, 2)), {"left": e1, "right": e1}).tolist()
      [[0.0, 0.0], [0.0, 1.0]]
    """
    left, right = basis.get("left_free"), basis.get("right_free")
    if left is not None:
        x = dot(transpose(left), x)
    if right is not None:
        x = dot(x, right)
    if "left" in basis:
        x = x - dot(basis["left"], dot(transpose(basis["left"]), x))
    if "right" in basis:
        x = x - dot(dot(x, basis["right"]), transpose(basis["right"]))
    if right is not None:
        x = dot(x, transpose(right))
    return x if left is None else dot(left, x)


def project_corner(x: jax.Array, basis: Basis) -> jax.Array:
    """`x - U_h U_h^T x V_h V_h^T`: the paper's printed equation, weaker than its code."""
    inner = dot(dot(transpose(basis["left"]), x), basis["right"])
    return x - dot(dot(basis["left"], inner), transpose(basis["right"]))


def expand(a: jax.Array, basis: Basis) -> jax.Array:
    """`U_o A V_o^T`."""
    a = _expand(a, basis, "left")
    return transpose(_expand(transpose(a), basis, "right"))


def _expand(a: jax.Array, basis: Basis, side: str) -> jax.Array:
    """`U_o a`: by its columns, or by the reflector that has them as its last."""
    if f"{side}_free" in basis:
        return dot(basis[f"{side}_free"], a)
    return unreflect(a, basis[f"{side}_vectors"], basis[f"{side}_core"])


def reduce(x: jax.Array, basis: Basis) -> jax.Array:
    """`U_o^T x V_o`, the adjoint of `expand`."""
    x = _reduce(x, basis, "left")
    return transpose(_reduce(transpose(x), basis, "right"))


def _reduce(x: jax.Array, basis: Basis, side: str) -> jax.Array:
    if f"{side}_free" in basis:
        return dot(transpose(basis[f"{side}_free"]), x)
    vectors = basis[f"{side}_vectors"]
    return reflect(x, vectors, basis[f"{side}_core"])[..., vectors.shape[-1]:, :]


def project_updates(constraint: str = "two_sided") -> optax.GradientTransformationExtraArgs:
    """The updates of protected matrices, projected; to be the last of a chain.

    Acting on what is finally added, it is exact for any optimiser, with clipping, momentum and
    decoupled weight decay. Its `update` takes `frozen`, as `Osft.start` gives it, as an extra
    argument: the bases are no part of the optimiser's state.
    """
    function = {"two_sided": project, "corner": project_corner}[constraint]

    def update(updates, state, params=None, *, frozen, **_):
        flat = flatten(updates)
        for path, basis in bases_of(frozen).items():
            flat[path] = function(matrix(path, flat[path]), basis).reshape(flat[path].shape)
        return unflatten(flat), state

    return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)


def project_factors(factors: Any, frozen: Any) -> Any:
    """`u <- P_U u`, `v <- P_V v` of factored matrices: of their gradients, or of themselves."""
    flat = flatten(factors)
    for path, basis in bases_of(frozen).items():
        for name, side in (("u", "left"), ("v", "right")):
            leaf = flat[f"{path}/{name}"]
            outside = project(columns(path, leaf), {"left": basis[side]})
            flat[f"{path}/{name}"] = outside.reshape(leaf.shape)
    return unflatten(flat)


def project_gradients() -> optax.GradientTransformationExtraArgs:
    """`project_factors` of the gradients; to be the first of a chain."""
    return optax.GradientTransformationExtraArgs(
        lambda params: optax.EmptyState(),
        lambda grads, state, params=None, *, frozen, **_: (project_factors(grads, frozen), state))


@dataclass(frozen=True)
class Osft:
    """Trains what lies outside of each matrix's leading singular subspaces.

    Bases are found by `start`, once a task, and never again: a run that goes on takes them from
    its checkpoint. Base weights keep their dtype and what is added is float32, for `W + u` rounded
    each step would leak. Where nothing of a matrix is kept it is trained as it is; where all is,
    it is not trained.

    Args:
      form: "update" (the default: any optimiser on whole matrices, its update projected),
        "factored" (the authors' parametrisation) or "coordinates" (the smallest optimiser state).
      unfreeze_ratio: u, the share of singular directions that may change, in [0, 1].
      ranks: "uniform" (k = floor((1 - u) r) of r), "scheduled" (task i of n keeps (i - 1) / n of
        them) or "importance" (see `jaxlm.train.ranks`; `start` then wants `batches`).
      task: i of "scheduled"; `jaxlm.train.continual` sets it.
      tasks: n of "scheduled"; with n = 1 nothing would be kept, so `start` refuses it.
      min_retention: the share kept at an importance of 0.
      target_retention: the share kept at an importance of 1.
      patterns: (name or glob of modules, u) that differ; the first that matches counts.
      constraint: "two_sided", or "corner", the paper's printed equation (form "update" alone).
      targets: names or globs of the projections that are protected.
      others: embeddings, head, norms, biases and other projections: "train" them as they are, with
        no protection (as the authors' code does), or "freeze" them, without which nothing is sure
        about the whole model.

    Example:
      >>> from jaxlm.models.lm import LM
      >>> from jaxlm.models.config import ModelConfig
      >>> lm = LM(ModelConfig(16, 8, 1, 2, 1, 4, 16))
      >>> tuning = Osft(unfreeze_ratio=0.25)
      >>> trained, frozen = tuning.start(lm, lm.init(jax.random.key(0)), jax.random.key(1))
      >>> frozen["bases"]["layers_0"]["mlp"]["up"]["kernel"]["left_free"].shape
      (8, 2)

    Source: 2504.07097.
    """

    form: Literal["update", "factored", "coordinates"] = "update"
    unfreeze_ratio: float = 0.5
    ranks: Literal["uniform", "scheduled", "importance"] = "uniform"
    task: int = 1
    tasks: int = 1
    min_retention: float = 0.1
    target_retention: float = 0.8
    patterns: tuple[tuple[str, float], ...] = ()
    constraint: Literal["two_sided", "corner"] = "two_sided"
    targets: tuple[str, ...] = PROJECTIONS
    others: Literal["train", "freeze"] = "train"

    def __post_init__(self):
        for name in ("form", "ranks", "constraint", "others"):
            expected = get_args(Osft.__annotations__[name])
            if getattr(self, name) not in expected:
                raise ConfigError(f"tuning.{name} is {getattr(self, name)!r}; expected one of "
                                  f"{', '.join(expected)}")
        shares = {name: getattr(self, name)
                  for name in ("unfreeze_ratio", "min_retention", "target_retention")}
        for name, value in {**shares, **dict(self.patterns)}.items():
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
                raise ConfigError(f"tuning.{name} is {value!r}; expected a share in [0, 1]")
        whole("tuning.tasks", self.tasks)
        whole("tuning.task", self.task, 1, self.tasks)
        if self.constraint == "corner" and self.form != "update":
            raise ConfigError(f"tuning.constraint 'corner' is for form 'update'; form {self.form!r}"
                              " has both sides built in")

    def start(
        self, lm, params, key, *, importance=None, batches=None, decompose=decompose,
        **calibration,
    ):
        """SVD of every protected matrix, and the bases that the form needs.

        Args:
          importance: by module (`jaxlm.train.ranks.importance`), or `batches` to find it from, as
            the objective takes them; of the task before.
          decompose: `jaxlm.train.subspace.blank` to know shapes alone.
        """
        flat = flatten(params)
        kept = self.kept(lm, params, importance, batches)
        least = {path: min(as_matrix(path, flat[path].shape)[1:]) for path in kept}
        held = {path for path, k in kept.items() if min(k) == least[path]}
        held |= set() if self.others == "train" else set(flat) - set(kept)
        split = {path: k for path, k in kept.items() if max(k) and path not in held}
        trained = {p: wide(leaf) for p, leaf in flat.items() if p not in held | set(split)}
        base = {path: flat[path] for path in flat if path in held or path in split}
        parts: dict[str, jax.Array] = {}
        found = find_bases(flat, split, self.form, self.constraint, lm.mesh, decompose)
        for path, named in found.items():
            own, basis = self._begin(path, flat[path], named)
            trained |= {f"{path}/{name}" if name else path: leaf for name, leaf in own.items()}
            parts |= {f"{path}/{name}": leaf for name, leaf in basis.items()}
        frozen = {"base": unflatten(base), "bases": unflatten(parts)}
        frozen = {name: tree for name, tree in frozen.items() if tree}
        return _place((unflatten(trained), frozen), self, lm.mesh)

    def kept(self, lm, params, importance=None, batches=None):
        """Path of a kernel -> k of each of its matrices; the arguments are those of `start`."""
        if self.ranks == "scheduled" and self.tasks == 1:
            raise ConfigError("tuning.ranks 'scheduled' of one task keeps nothing; say which of "
                              "how many it is (tuning.task, tuning.tasks), or take 'uniform'")
        if self.ranks == "importance" and importance is None:
            if batches is None:
                raise ConfigError("tuning.ranks 'importance' needs data of the task before: name "
                                  "its files in data.calibration (in Python `batches` or "
                                  "`importance` to start), or take 'uniform'")
            importance = ranks.importance(lm, params, batches)

        used: set[str] = set()

        def share(module):
            hits = [(p, ratio) for p, ratio in self.patterns if ranks.matches(module, p)]
            used.update(pattern for pattern, _ in hits)
            if hits:
                return 1 - hits[0][1]
            if self.ranks == "scheduled":
                return (self.task - 1) / self.tasks
            if self.ranks == "uniform":
                return 1 - self.unfreeze_ratio
            if module not in importance:
                raise ConfigError(f"importance has nothing for {module!r}; it has "
                                  f"{', '.join(sorted(importance)[:3])}, ...")
            span = self.target_retention - self.min_retention
            return self.min_retention + importance[module] * span

        found = ranks.plan(params, self.targets, share, float(self.others == "freeze"))
        if unused := [pattern for pattern, _ in self.patterns if pattern not in used]:
            raise ConfigError(f"tuning.patterns has {unused[0]!r}, which no target is called; "
                              "expected a name as 'q', or a glob as 'layers_3/*'")
        return found

    def _begin(self, path: str, kernel: jax.Array, found: Basis) -> tuple[Basis, Basis]:
        """What is trained of a kernel ("" is in its own place and shape), and its bases."""
        kernel = wide(kernel)
        if self.form == "update":
            return {"": jnp.zeros_like(kernel)}, found
        if self.form == "factored":
            own = {name: found.pop(name) for name in ("u", "s", "v")}
            return own, found | {"low": _low(path, own).reshape(kernel.shape)}
        parts = {name: columns(path, leaf) for name, leaf in found.items()}
        start = reduce(matrix(path, kernel), parts)
        return {"free": jnp.zeros_like(start)}, found | {"start": start}

    def _change(self, path: str, flat: dict[str, jax.Array], basis: Basis) -> jax.Array:
        """dW of one protected kernel, as matrices."""
        if self.form == "update":
            return matrix(path, flat[path])
        if self.form == "coordinates":
            return expand(flat[f"{path}/free"], basis)
        return _low(path, {name: flat[f"{path}/{name}"] for name in ("u", "s", "v")}) - basis["low"]

    def materialise(self, trained, frozen):
        """`W_0 + dW`, and the rest as it is; float32."""
        flat, bases = flatten(trained), bases_of(frozen)
        params = {path: wide(leaf) for path, leaf in flatten(frozen.get("base", {})).items()}
        for path, basis in bases.items():
            change = self._change(path, flat, basis)
            params[path] = params[path] + change.reshape(params[path].shape)
        return unflatten(params | {path: leaf for path, leaf in flat.items()
                                   if path not in bases and path.rpartition("/")[0] not in bases})

    def wrap(self, optimizer):
        """The update projected at the end of the chain, or the factors' gradients before it."""
        if self.form == "update":
            return optax.chain(optimizer, project_updates(self.constraint))
        if self.form == "factored":
            return optax.chain(project_gradients(), optimizer)
        return optax.with_extra_args_support(optimizer)

    def decayed(self, trained, frozen):
        """W itself in form "update", `U_o^T W V_o` in "coordinates", the factors in "factored"."""
        flat = flatten(trained)
        base = flatten(frozen.get("base", {}))
        for path, basis in bases_of(frozen).items():
            if self.form == "update":
                flat[path] = wide(base[path]) + flat[path]
            elif self.form == "coordinates":
                flat[f"{path}/free"] = basis["start"] + flat[f"{path}/free"]
        return unflatten(flat)

    def settle(self, trained, frozen):
        """The factors themselves projected, for an optimiser's update of a projected gradient
        leaks; the other forms stay as they are."""
        return project_factors(trained, frozen) if self.form == "factored" else trained

    def penalty(self, trained, frozen):
        """None."""
        return jnp.zeros((), jnp.float32)

    def metrics(self, trained, frozen):
        """How far the constraint is missed: see `jaxlm.train.leak.leaks`; {} where none is."""
        flat, base = flatten(trained), flatten(frozen.get("base", {}))
        return leaks({path: (self._change(path, flat, basis), wide(matrix(path, base[path])), basis)
                      for path, basis in bases_of(frozen).items()})

    def axes(self, trained, frozen):
        """Those of the kernels; what runs over singular directions is not split."""
        names = lambda tree: map_with_path(_axes, tree)
        return names(trained), {name: names(tree) for name, tree in frozen.items()}


def _axes(name: str, leaf: Any) -> tuple[str, ...]:
    path, _, part = name.rpartition("/")
    if not path.endswith("/kernel"):
        return axes_of(name)
    return axes_of(path) if part == "low" else part_axes(path, part)


def _low(path: str, factors: Basis) -> jax.Array:
    """`u diag(s) v^T`."""
    u, v = columns(path, factors["u"]), columns(path, factors["v"])
    return dot(u * factors["s"][..., None, :], transpose(v))


def _place(trees: tuple[Any, Any], tuning: Osft, mesh: Mesh | None) -> tuple[Any, Any]:
    """On the mesh, by the axes' names."""
    if mesh is None:
        return trees
    names = tuning.axes(*trees)
    own, kept = (shardings(axes, tree, mesh) for axes, tree in zip(names, trees, strict=True))
    return jax.device_put(trees[0], own), jax.device_put(trees[1], kept)
