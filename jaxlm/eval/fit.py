"""Does a job fit a chip? Compiles the real program for it, with no such chip present."""

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxlm.cache.base import CacheKind
from jaxlm.cache.dense import Dense
from jaxlm.cache.local import place_kind
from jaxlm.cache.policy import read_kinds
from jaxlm.core.aot import Program, compile_program
from jaxlm.core.errors import ConfigError, whole
from jaxlm.core.mesh import make_mesh, partition, shardings
from jaxlm.core.targets import Target, target
from jaxlm.core.tree import Params, nbytes
from jaxlm.decode.placement import state_shardings
from jaxlm.decode.samplers import Greedy
from jaxlm.decode.state import Kinds, decode, prefill
from jaxlm.models.config import ModelConfig
from jaxlm.models.lm import LM
from jaxlm.models.stack import stack, stack_axes
from jaxlm.train.checkpoint import place_state
from jaxlm.train.osft import Osft
from jaxlm.train.packing import fill
from jaxlm.train.step import TrainState, init_state, lm_objective, train_step, tuned_step
from jaxlm.train.subspace import blank
from jaxlm.train.tuning import Tuning

JOBS = ("decode", "prefill", "train", "osft")
TRAIN = ("train", "osft")
CONTEXT = 4096  # tokens a row where nobody says, or the model's own length where that is less
RESERVE = 0.05  # of a device: the runtime's own, the program's code, fragments


@dataclass(frozen=True)
class Fit:
    """One job on one target: the program, the memory of a device, and the parts of the state.

    context, dtype: what was compiled, asked for or by default.
    """

    target: Target
    mesh: dict[str, int]
    job: str
    program: Program
    param_bytes: int
    cache_bytes: int
    context: int
    dtype: str

    @property
    def fits(self) -> bool:
        """Whether the program's memory, by the compiler's own count, leaves `RESERVE` free."""
        usable = (1 - RESERVE) * self.target.bytes_per_device
        return self.program.refused is None and self.program.total <= usable


def fit(
    config: ModelConfig, job: str, target_name: str, *, batch: int = 1,
    context: int | None = None, cache: CacheKind | Kinds = Dense(), dtype: Any = None,
    data: int | None = None, fsdp: int | None = None, tensor: int | None = None,
    tuning: Tuning | None = None,
) -> Fit:
    """Compile one step of a job for a target and read the compiler's memory and cost analysis.

    Args:
      job: "decode" (the loop, over a full cache of `context` tokens), "prefill" (a prompt of
        `context`), "train" (AdamW in float32, bf16 compute, rematerialised), or "osft" (the same
        by `tuning`, by default `Osft()`).
      target_name: as `jaxlm.core.targets.target`.
      batch: rows in all.
      context: tokens a row, at most those that the model reads; default `CONTEXT`, or fewer.
      cache: of decode and prefill. dtype: default `default_dtype`. tuning: of osft.
      data, fsdp, tensor: mesh axes; by default tensor takes what divides the kv heads, and the
        rest goes to data (fsdp when training; "train" has no tensor axis).
    Raises: ConfigError, DeviceError.
    """
    if job not in JOBS:
        raise ConfigError(f"job is {job!r}; expected one of {JOBS}")
    batch = whole("batch", batch)
    context = min(CONTEXT, config.max_len) if context is None else whole("context", context, 2)
    if context > config.max_len:
        raise ConfigError(f"context is {context}; the model reads at most {config.max_len} tokens, "
                          "so no job has more: ask about that or less")
    cache = read_kinds(cache, config)
    if job in TRAIN and cache != Dense():
        raise ConfigError(f"cache is {cache!r}, but job {job!r} keeps none; leave it out, or ask "
                          "about decode or prefill")
    if job != "osft" and tuning is not None:
        raise ConfigError(f"tuning is {tuning!r} (form, unfreeze_ratio), of which job {job!r} "
                          "makes no use; leave it out, or ask about osft")
    dtype = jnp.dtype(default_dtype(config, job, target_name) if dtype is None else dtype)
    chips = target(target_name)
    sizes = mesh_sizes(len(chips.devices), config.num_kv_heads, job, data, fsdp, tensor)
    mesh = make_mesh(**sizes, devices=list(chips.devices))
    cache = place_kind(cache, mesh)
    build: Any = {"decode": _decode, "prefill": _prefill, "train": _train,
             "osft": partial(_tuned, tuning or Osft())}[job]
    program, param_bytes, cache_bytes = build(config, mesh, batch, context, cache, dtype)
    return Fit(chips, sizes, job, program, param_bytes, cache_bytes, context, dtype.name)


def default_dtype(config: ModelConfig, job: str, target_name: str) -> str:
    """bfloat16, but on a T4, which has none.

    There it is float16, or float32 for Gemma, whose activations outgrow float16, and for training,
    which `jaxlm.train` does not do in float16.

    >>> small = ModelConfig(8, 8, 1, 1, 1, 8, 8)
    >>> [default_dtype(small, job, "t4") for job in ("decode", "train")]
    ['float16', 'float32']
    """
    if target_name.lower().partition(":")[0] != "t4":
        return "bfloat16"
    return "float32" if job in TRAIN or config.family.startswith("gemma") else "float16"


def mesh_sizes(
    devices: int, kv_heads: int, job: str, data: int | None = None, fsdp: int | None = None,
    tensor: int | None = None,
) -> dict[str, int]:
    """Mesh axes for a number of devices; given ones are kept.

    OSFT has a tensor axis up to the root of all, for its right bases lie along that alone. Whether
    the product of given axes is the number of devices is for `make_mesh` to say.

    >>> mesh_sizes(16, 8, "decode")
    {'data': 2, 'fsdp': 1, 'tensor': 8}
    """
    for axis, size in (("data", data), ("fsdp", fsdp), ("tensor", tensor)):
        if size is not None:
            whole(f"mesh axis {axis!r}", size)
    given = (data or 1) * (fsdp or 1)
    if tensor is None:
        fit_in = [n for n in range(1, kv_heads + 1)
                  if kv_heads % n == 0 and devices % (n * given) == 0
                  and (job != "osft" or n * n <= devices)]
        tensor = max(fit_in, default=1) if job != "train" else 1
    sizes = {"data": data, "fsdp": fsdp}
    rest = max(devices // (given * tensor), 1)
    for name in ("fsdp", "data") if job in TRAIN else ("data", "fsdp"):
        if sizes[name] is None:
            sizes[name], rest = rest, 1
    return {**{name: size or 1 for name, size in sizes.items()}, "tensor": tensor}


def _placed(shapes: Any, places: Any) -> Any:
    """Shapes with shardings, ready to be lowered."""
    return jax.tree.map(
        lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where), shapes, places
    )


def _batch(mesh: Mesh, dtype: Any, *shape: int) -> jax.ShapeDtypeStruct:
    """An array that leads with the batch."""
    spec = partition(("batch",) + ("",) * (len(shape) - 1), shape, mesh, path="batch")
    return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))


def _prompt(mesh: Mesh, batch: int, width: int) -> tuple[Any, Any, Any]:
    """tokens_BT, lengths_B and keys_B as shapes."""
    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), batch))
    return (_batch(mesh, jnp.int32, batch, width), _batch(mesh, jnp.int32, batch),
            _batch(mesh, keys.dtype, batch))


def _params(lm: LM, mesh: Mesh, dtype: Any) -> Params:
    shapes = lm.shapes(dtype)
    return _placed(shapes, shardings(lm.axes(), shapes, mesh))


def _prefill(config, mesh, batch, context, cache, dtype):
    lm = LM(config)
    params = _params(lm, mesh, dtype)
    tokens, lengths, keys = _prompt(mesh, batch, context)
    start = partial(prefill, lm, cache=cache, slots=context)
    make = lambda params, tokens, lengths, keys: start(
        params, Greedy(), tokens, lengths, keys_B=keys
    )
    state = jax.eval_shape(make, params, tokens, lengths, keys)
    places = state_shardings(state, config.num_kv_heads, mesh)
    program = compile_program(
        jax.jit(make, out_shardings=places), params, tokens, lengths, keys
    )
    return program, nbytes(params), nbytes(state.caches)


def _decode(config, mesh, batch, context, cache, dtype):
    lm = LM(config)
    params = _params(lm, mesh, dtype)
    tokens, lengths, keys = _prompt(mesh, batch, min(context, 128))
    make = lambda params, tokens, lengths, keys: prefill(
        lm, params, Greedy(), tokens, lengths, cache, context, keys
    )
    state = jax.eval_shape(make, params, tokens, lengths, keys)
    places = state_shardings(state, config.num_kv_heads, mesh)
    loop = jax.jit(
        lambda params, state, count: decode(lm, params, Greedy(), state, max_new=count),
        donate_argnums=1, out_shardings=places,
    )
    count = jax.ShapeDtypeStruct((), jnp.int32, sharding=NamedSharding(mesh, PartitionSpec()))
    program = compile_program(loop, params, _placed(state, places), count)
    return program, nbytes(params), nbytes(state.caches)


def _train(config, mesh, batch, context, cache, dtype):
    lm = LM(config, remat=True, mesh=mesh)
    shapes = jax.eval_shape(lambda tree: stack(tree, config), lm.shapes(jnp.float32))
    places = shardings(stack_axes(lm.axes(), config), shapes, mesh)
    optimizer = optax.adamw(1e-5)

    def cast(params, batch, key):
        low = jax.tree.map(lambda x: x.astype(dtype), params)
        return lm_objective(lm)(low, batch, key)

    state = jax.eval_shape(lambda tree: init_state(tree, optimizer), shapes)
    everywhere = NamedSharding(mesh, PartitionSpec())
    state_places = optax.tree.map_params(
        optimizer, lambda _, where: where, state.opt_state, places,
        transform_non_params=lambda _: everywhere,
    )
    where = state.replace(params=places, opt_state=state_places, step=everywhere)
    step = jax.jit(
        lambda state, batch: train_step(cast, optimizer, state, batch, None),
        donate_argnums=0, out_shardings=(where, everywhere),
    )
    tokens = _batch(mesh, jnp.int32, batch, context + 1)
    program = compile_program(step, _placed(state, where), {"tokens": tokens})
    return program, nbytes(shapes), 0


def _tuned(tuning, config, mesh, batch, context, cache, dtype):
    step, args, places = tuned_program(tuning, LM(config, remat=True, mesh=mesh), batch, context,
                                       dtype)
    state, frozen, _ = args
    everywhere = NamedSharding(mesh, PartitionSpec())
    jitted = jax.jit(step, donate_argnums=0, out_shardings=(places, everywhere))
    return compile_program(jitted, *args), nbytes(state.params) + nbytes(frozen), 0


def tuned_program(
    tuning: Tuning, lm: LM, batch: int, context: int, dtype: Any = jnp.bfloat16
) -> tuple[Any, tuple[Any, ...], Any]:
    """A way of tuning's train step under AdamW with clipping, layers stacked, as shapes.

    Returns: `step(state, frozen, batch)`, its arguments placed on `lm.mesh`, and where the state
      that it returns goes.
    """
    mesh, config = lm.mesh, lm.config
    assert mesh is not None
    shapes = jax.eval_shape(lambda tree: stack(tree, config), lm.shapes(dtype))
    key = jax.eval_shape(lambda: jax.random.key(0))
    trained, frozen = jax.eval_shape(
        lambda tree, key: tuning.start(LM(config), tree, key, decompose=blank), shapes, key)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-5))
    places, frozen_places = (shardings(axes, tree, mesh) for axes, tree in
                             zip(tuning.axes(trained, frozen), (trained, frozen), strict=True))
    moments = jax.eval_shape(tuning.wrap(optimizer).init, trained)
    everywhere: Any = NamedSharding(mesh, PartitionSpec())
    count: Any = jax.ShapeDtypeStruct((), jnp.int32)
    where = TrainState(places, place_state(moments, trained, places), everywhere)
    state = TrainState(trained, moments, count)

    def step(state, frozen, batch):
        return tuned_step(lm_objective(lm), tuning, optimizer, state, frozen, batch, dtype=dtype)

    row = fill([], context + 1)  # as `Batches` makes it: weights, segments and positions too
    rows = {name: _batch(mesh, x.dtype, batch, *x.shape) for name, x in row.items()}
    return step, (_placed(state, where), _placed(frozen, frozen_places), rows), where
