"""OSFT over eight devices: the SVD by layers, the projection with two small all-reduces."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from jaxlm.core.hlo import COLLECTIVE, INDEX, collective_bytes
from jaxlm.core.mesh import make_mesh, shard_batch, shardings
from jaxlm.models.config import ModelConfig
from jaxlm.models.lm import LM
from jaxlm.train import subspace
from jaxlm.train.osft import Osft, project
from jaxlm.train.step import TrainState, lm_objective, tuned_step
from jaxlm.train.subspace import LARGE, decompose, leading, shared, svd

N, M, K = 64, 96, 16


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


def test_the_whole_step_gathers_nothing_for_its_bases():
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
        return tuning.materialise(state.params, frozen), tuning.metrics(state.params, frozen)

    alone, together = found(None), found(make_mesh(data=2, fsdp=2, tensor=2))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), alone[0], together[0])
    assert together[1]["leak_left"] < 5e-7 and together[1]["leak_right"] < 5e-7


def test_each_device_decomposes_its_own_matrices():
    """Ten matrices over eight devices; what a program moves is matrices between devices only."""
    mesh = make_mesh(fsdp=4, tensor=2)
    keys = jax.random.split(jax.random.key(0), 10)
    where = NamedSharding(mesh, PartitionSpec("fsdp", "tensor"))
    matrices = [jax.device_put(jax.random.normal(key, (16, 8)), where) for key in keys]
    found = list(decompose(matrices, [3] * 10, mesh))
    for w, one in zip(matrices, found, strict=True):
        np.testing.assert_allclose((one.u * one.s) @ one.v.T, w, atol=1e-5)
    run = shared(None, mesh)
    text = run.lower(matrices[:8]).compile().as_text()
    assert len(run(matrices[:8]).u.sharding.device_set) == 8
    assert run(matrices[:8]).u.sharding.shard_shape((8, 16, 8)) == (1, 16, 8)
    assert not re.search(r"\b(infeed|outfeed|send|recv)\(", text)
    decomposed = [line for line in text.splitlines() if "gesdd" in line]
    assert decomposed and all("f32[1," in line or "f32[8,16]" in line for line in decomposed)


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


def test_a_flat_spectrum_is_decomposed_whole(monkeypatch):
    """Iteration does not converge where all values are nearly one; the residual says so."""
    key = jax.random.key(1)
    whole = svd(jax.random.normal(key, (96, 64)))
    w = (whole.u * (1 + 0.01 * jnp.linspace(1, 0, 64))) @ whole.v.T
    assert leading(w, 8, key)[1] > subspace.RESIDUAL
    monkeypatch.setattr(subspace, "LARGE", 64)
    part, = decompose([w], [8])
    assert part.u.shape == (96, 64)
