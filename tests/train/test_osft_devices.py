"""OSFT over eight devices: the SVD by layers, the projection with two small all-reduces."""

import re
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from jaxlm.core.hlo import COLLECTIVE, INDEX, collective_bytes
from jaxlm.core.mesh import make_mesh, shard_batch, shardings
from jaxlm.eval.fit import tuned_program
from jaxlm.models.config import ModelConfig
from jaxlm.models.lm import LM
from jaxlm.train import subspace
from jaxlm.train.osft import Osft, project
from jaxlm.train.step import TrainState, lm_objective, tuned_step
from jaxlm.train.subspace import LARGE, decompose, leading, shared, svd
from jaxlm.train.tuning import Full

N, M, K = 64, 96, 16
FORMS = ("update", "coordinates", "factored")


def compiled(mesh, basis_columns):
    """The text of a projection of an update P(fsdp, tensor) with bases split by their rows."""
    put = lambda shape, *spec: jax.ShapeDtypeStruct(
        shape, jnp.float32, sharding=NamedSharding(mesh, PartitionSpec(*spec)))
    basis = {name: put((N if name.startswith("left") else M, basis_columns),
                       "fsdp" if name.startswith("left") else "tensor", None)
             for name in ("left", "right")}
    out = NamedSharding(mesh, PartitionSpec("fsdp", "tensor"))
    step = jax.jit(project, out_shardings=out)
    return step.lower(put((N, M), "fsdp", "tensor"), basis).compile().as_text()


def test_a_projection_adds_two_small_all_reduces_and_no_gather():
    mesh = make_mesh(fsdp=4, tensor=2)
    text = compiled(mesh, K)
    kinds = [match.group(2) for match in map(COLLECTIVE.search, text.splitlines()) if match]
    assert kinds == ["all-reduce", "all-reduce"]
    assert collective_bytes(text) == 4 * (K * M // 2 + N // 4 * K)


def test_an_update_gathers_nothing_for_its_bases():
    """An update's chain alone, on a model: per protected matrix two all-reduces."""
    config = ModelConfig(vocab_size=32, dim=16, num_layers=1, num_heads=2, num_kv_heads=2,
                         head_dim=8, ffn_dim=32)
    lm = LM(config, mesh=make_mesh(fsdp=4, tensor=2))
    params = jax.device_put(lm.init(jax.random.key(0)),
                            shardings(lm.axes(), lm.shapes(), lm.mesh))
    tuning = Osft(unfreeze_ratio=0.5)
    trained, frozen = tuning.start(lm, params, jax.random.key(1))
    wrapped = tuning.wrap(optax.sgd(0.1))
    state = wrapped.init(trained)
    places = jax.tree.map(lambda x: x.sharding, trained)
    step = jax.jit(lambda g, frozen: wrapped.update(g, state, frozen=frozen)[0],
                   out_shardings=places)
    text = INDEX.sub("", step.lower(trained, frozen).compile().as_text())
    kinds = [match for match in map(COLLECTIVE.search, text.splitlines()) if match]
    carried = sum(len(re.findall(r"f32\[", match.group(1))) for match in kinds)
    assert {match.group(2) for match in kinds} == {"all-reduce"}
    assert carried == 2 * 7  # the compiler may join several in one operation


CONFIG = ModelConfig(vocab_size=16, dim=16, num_layers=2, num_heads=2, num_kv_heads=2, head_dim=8,
                     ffn_dim=24)


def collectives(tuning):
    """Kind and shape of what a step's collectives make: AdamW, clipping, stacked layers."""
    lm = LM(CONFIG, mesh=make_mesh(fsdp=4, tensor=2))
    step, args, places = tuned_program(tuning, lm, 8, 16, jnp.float32)
    jitted = jax.jit(step, donate_argnums=0, out_shardings=(places, None))
    text = INDEX.sub("", jitted.lower(*args).compile().as_text())
    return Counter((match.group(2), shape)
                   for match in filter(None, map(COLLECTIVE.search, text.splitlines()))
                   for shape in re.findall(r"\w+\[[\d,]*\]", match.group(1)))


def test_a_whole_step_adds_small_all_reduces_alone():
    """To what a full step sends: two of each stack of matrices; nothing more is gathered."""
    full, osft = collectives(Full()), collectives(Osft())
    added = osft - full
    assert not full - osft and {kind for kind, _ in added} == {"all-reduce"}
    assert added.total() == 2 * 7
    layers, free, part = 2, 8, 24 // 2  # the longest part of a side
    assert max(sizes_of(" ".join(shape for _, shape in added))) <= layers * free * part


@pytest.mark.parametrize("form", ["update", pytest.param("coordinates", marks=pytest.mark.slow),
                                  pytest.param("factored", marks=pytest.mark.slow)])
def test_eight_devices_train_as_one(form):
    tokens = jax.random.randint(jax.random.key(2), (8, 9), 0, 16)
    tuning, sgd = Osft(form, 0.4), optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(0.1))

    def found(mesh):
        lm = LM(CONFIG, mesh=mesh)
        params = lm.init(jax.random.key(0))
        if mesh is not None:
            params = jax.device_put(params, shardings(lm.axes(), params, mesh))
        trained, frozen = tuning.start(lm, params, jax.random.key(1))
        state = TrainState(trained, tuning.wrap(sgd).init(trained), jnp.zeros((), jnp.int32))
        batch = shard_batch({"tokens": tokens}, mesh)
        step = jax.jit(lambda s: tuned_step(lm_objective(lm), tuning, sgd, s, frozen, batch)[0])
        for _ in range(3):
            state = step(state)
        return jax.jit(lambda tuned: (tuning.materialise(tuned, frozen),
                                      tuning.metrics(tuned, frozen)))(state.params)

    alone, together = found(None), found(make_mesh(data=2, fsdp=2, tensor=2))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), alone[0], together[0])
    assert together[1]["leak_left"] < 5e-7 and together[1]["leak_right"] < 5e-7


SPLITS = [({"fsdp": 4, "tensor": 2}, ("fsdp", "tensor")),
          ({"fsdp": 2, "tensor": 4}, ("tensor", "fsdp")),
          ({"data": 2, "fsdp": 2, "tensor": 2}, ("fsdp", "tensor")), ({"data": 8}, (None, None)),
          ({"data": 2, "tensor": 4}, (None, "tensor"))]


@pytest.mark.parametrize(("sizes", "axes"), SPLITS, ids=str)
def test_each_device_decomposes_its_own_matrices(sizes, axes):
    """Ten matrices over eight devices, however they lie on them."""
    mesh, spec = make_mesh(**sizes), PartitionSpec(*axes)
    keys = jax.random.split(jax.random.key(0), 10)
    where = NamedSharding(mesh, spec)
    matrices = [jax.device_put(jax.random.normal(key, (16, 8)), where) for key in keys]
    found = list(decompose(matrices, [3] * 10, mesh, spec=spec))
    for w, one in zip(matrices, found, strict=True):
        np.testing.assert_allclose((one.u * one.s) @ one.v.T, w, atol=1e-5)
        assert one.u.sharding.is_equivalent_to(NamedSharding(mesh, PartitionSpec(axes[0])), 2)
        assert one.v.sharding.is_equivalent_to(NamedSharding(mesh, PartitionSpec(axes[1])), 2)


def sizes_of(text):
    """Of every float array of a compiled program."""
    return [int(np.prod([int(d) for d in dims.split(",") if d], dtype=int))
            for dims in re.findall(r"f32\[([\d,]*)\]", text)]


def all_on_each(matrices, mesh):
    """The negative control: the same, left to the compiler."""
    where = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
    apart = jax.shard_map(svd, mesh=mesh, in_specs=where.spec, out_specs=where.spec)
    return jax.jit(lambda w: apart(jax.lax.with_sharding_constraint(
        jnp.stack(w), where))).lower(matrices).compile().as_text()


@pytest.fixture
def uncached():
    """Programs compiled here are not written down: one that is read back warns of nothing."""
    name = "jax_persistent_cache_min_compile_time_secs"
    before = getattr(jax.config, name)
    jax.config.update(name, 1e9)
    yield
    jax.config.update(name, before)


def test_a_device_holds_one_matrix_at_a_time(capfd, uncached):
    """The compiler does not replicate the stack to split it again, of which it would warn."""
    mesh, spec = make_mesh(data=2, fsdp=2, tensor=2), PartitionSpec("fsdp", "tensor")
    n, m = 18, 10
    w = jax.ShapeDtypeStruct((n, m), jnp.float32, sharding=NamedSharding(mesh, spec))
    text = shared(None, mesh, spec).lower([w] * 8).compile().as_text()
    quiet = capfd.readouterr().err
    control = all_on_each([w] * 8, mesh)
    warned = capfd.readouterr().err
    back = 8 * n * m // 2  # U whole, of all eight, over the two parts of the rows
    assert max(sizes_of(text)) <= back < 8 * n * m <= max(sizes_of(control))
    decomposed = [line for line in text.splitlines() if "gesdd" in line]
    assert decomposed and all(max(sizes_of(line)) <= n * m for line in decomposed)
    assert "rematerialization" in warned and "rematerialization" not in quiet
    assert not re.search(r"\b(infeed|outfeed|send|recv)\(", text)


@pytest.mark.parametrize("form", FORMS)
def test_a_start_fetches_no_weight_to_the_host(form, monkeypatch):
    lm = LM(CONFIG, mesh=make_mesh(data=2, fsdp=2, tensor=2))
    params = jax.device_put(lm.init(jax.random.key(0)),
                            shardings(lm.axes(), lm.shapes(), lm.mesh))
    kind, fetched = type(params["embed"]["table"]), []
    read = kind._value
    monkeypatch.setattr(kind, "_value", property(
        lambda self: (fetched.append(self.shape), read.fget(self))[1]))
    Osft(form, 0.4).start(lm, params, jax.random.key(1))
    assert fetched and not [shape for shape in fetched if len(shape) > 1]
    fetched.clear()
    list(params["layers_0"]["mlp"]["up"]["kernel"])  # what would fetch one
    assert set(fetched) == {(16, 24)}


def test_subspace_iteration_finds_the_leading_part(monkeypatch):
    key = jax.random.key(1)
    whole = svd(jax.random.normal(key, (96, 64)))
    falling = whole._replace(s=0.8 ** jnp.arange(64))
    w = (falling.u * falling.s) @ falling.v.T
    found, residual = leading(w, 8, key)
    np.testing.assert_allclose(found.s, falling.s[:8], rtol=1e-4)
    projector = lambda u: u @ u.T
    np.testing.assert_allclose(projector(found.u), projector(falling.u[:, :8]), atol=1e-3)
    assert residual < 1e-4
    monkeypatch.setattr(subspace, "LARGE", 64)
    part, = decompose([w], [8])
    assert part.u.shape == (96, 8) and LARGE > 64
    mesh, spec = make_mesh(data=2, fsdp=2, tensor=2), PartitionSpec("fsdp", "tensor")
    on_each, = decompose([jax.device_put(w, NamedSharding(mesh, spec))], [8], mesh, spec=spec)
    np.testing.assert_allclose(projector(on_each.u), projector(part.u), atol=1e-4)


def test_a_flat_spectrum_is_decomposed_whole(monkeypatch):
    """Iteration does not converge where all values are nearly one; the residual says so."""
    key = jax.random.key(1)
    whole = svd(jax.random.normal(key, (96, 64)))
    w = (whole.u * (1 + 0.01 * jnp.linspace(1, 0, 64))) @ whole.v.T
    assert leading(w, 8, key)[1] > subspace.RESIDUAL
    monkeypatch.setattr(subspace, "LARGE", 64)
    part, = decompose([w], [8])
    assert part.u.shape == (96, 64)
