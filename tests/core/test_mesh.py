"""Meshes that cannot be, sharding that does not divide, and the device report."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, PartitionSpec

import jaxlm
from jaxlm.core import device
from jaxlm.core.errors import ConfigError, DeviceError, whole
from jaxlm.core.mesh import make_mesh, partition, shard_batch, shardings
from tests.tiny import CONFIG, model


@pytest.fixture(scope="module")
def mesh():
    return make_mesh(data=2, tensor=4)


@pytest.mark.parametrize("sizes, words", [
    ({"data": 3}, ["'data': 3", "needs 3 devices", "got 8"]),
    ({"fsdp": 0, "data": 8}, ["'fsdp'", "size 0", "at least 1"]),
    ({"tensor": 2.0}, ["'tensor'", "size 2.0", "at least 1"]),
    ({"data": {"data": 2, "tensor": 4}}, ["'data'", "size {", "make_mesh(data=2, tensor=4)"]),
    ({"devices": []}, ["needs 1 devices", "got 0"]),
])
def test_impossible_meshes_name_the_axis_and_its_size(sizes, words):
    with pytest.raises(DeviceError) as error:
        make_mesh(**sizes)
    assert all(word in str(error.value) for word in words), str(error.value)


def test_what_does_not_divide_is_replicated_with_one_warning(mesh):
    lm, _ = model()  # 2 kv heads over 4 ways; 258 rows of vocabulary too
    with pytest.warns(UserWarning) as caught:
        placed = shardings(lm.axes(), lm.shapes(), mesh)
    messages = [str(w.message) for w in caught]
    assert len(messages) == len(set(messages)) == 2  # tables as one, kv kernels as one
    kv = [message for message in messages if "kv_heads" in message]
    assert len(kv) == 1 and all(
        word in kv[0] for word in ("layers_0/attn/k/kernel", "size 2", "4 devices", "tensor")
    )
    layer = placed["layers_1"]
    assert layer["attn"]["k"]["kernel"].spec == PartitionSpec(None, None, None)
    assert layer["attn"]["q"]["kernel"].spec == PartitionSpec(None, "tensor", None)
    assert layer["mlp"]["down"]["kernel"].spec == PartitionSpec("tensor", None)


def of_axis(name):
    """A mesh of all devices along one axis."""
    return Mesh(np.array(jax.devices()), (name,))


@pytest.mark.parametrize("given, words", [
    ({"mesh": "x"}, ["mesh is 'x'", "expected a jax.sharding.Mesh", "make_mesh(data=2, tensor=4)"]),
    ({"mesh": (2, 2)}, ["mesh is (2, 2)", "expected a jax.sharding.Mesh"]),
    ({"mesh": of_axis("x")}, ["mesh axis 'data'", "has ('x',)", "make_mesh(data=2, tensor=4)"]),
    ({"mesh": of_axis("tensor")}, ["dimension 'batch'", "mesh axis 'data'", "has ('tensor',)"]),
    ({"rules": {"heads": "nosuch"}}, ["dimension 'heads'", "mesh axis 'nosuch'", "'tensor')"]),
    ({"rules": {"mlp": ("tensor", "x")}}, ["dimension 'mlp'", "mesh axis 'x'"]),
    ({"rules": {"heads": 3}}, ["dimension 'heads'", "mesh axis 3"]),
    ({"rules": {"head": "tensor"}}, ["rules are {'head': 'tensor'}", "dimensions batch, vocab"]),
    ({"rules": "heads"}, ["rules are 'heads'", "{'heads': 'tensor'}"]),
    ({"rules": None}, ["rules are None"]),
], ids=str)
def test_load_refuses_a_mesh_that_does_not_fit_its_rules(mesh, given, words):
    with pytest.raises(DeviceError) as error:
        jaxlm.load("tiny", **{"mesh": mesh, **given})
    assert all(word in str(error.value) for word in words), str(error.value)


def test_rules_change_only_the_dimensions_that_they_name():
    lm, _ = model()
    placed = shardings(lm.axes(), lm.shapes(), make_mesh(fsdp=4, tensor=2), {"heads": None})
    layer = placed["layers_0"]
    assert layer["attn"]["q"]["kernel"].spec == PartitionSpec("fsdp", None, None)
    assert layer["attn"]["k"]["kernel"].spec == PartitionSpec("fsdp", "tensor", None)
    assert layer["mlp"]["down"]["kernel"].spec == PartitionSpec("tensor", "fsdp")


def test_a_batch_goes_over_data_and_fsdp():
    mesh = make_mesh(data=2, fsdp=2, tensor=2)
    assert partition(("batch", "x"), (8, 3), mesh) == PartitionSpec(("data", "fsdp"), None)
    rows = shard_batch({"a": jnp.zeros((4, 3)), "b": jnp.zeros(4)}, mesh)
    assert {x.sharding.shard_shape(x.shape) for x in rows.values()} == {(1, 3), (1,)}
    with pytest.warns(UserWarning, match="batch.*size 3") as caught:
        shard_batch((jnp.zeros((3, 2)), jnp.zeros(3)), mesh)
    assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert shard_batch(CONFIG, None) is CONFIG


@pytest.mark.parametrize("name", ["gpu", "tpu", "abacus"])
def test_an_absent_device_is_said_to_be_absent(name):
    if name in {d.platform for d in jax.devices()}:
        pytest.skip(f"this machine has a {name}")
    with pytest.raises(DeviceError) as error:
        device.require(name)
    assert all(word in str(error.value) for word in (f"asked for '{name}'", "'cpu'"))


def test_an_unused_accelerator_comes_with_advice(monkeypatch):
    monkeypatch.setattr(device, "visible_accelerators", lambda: ["NVIDIA GPU"])
    monkeypatch.setattr(jax, "default_backend", lambda: "cpu")
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    (advice,) = device.advice()
    assert "NVIDIA GPU is visible but jax uses the CPU" in advice
    assert "pip install 'jax[cuda12]'" in advice
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    assert "JAX_PLATFORMS=cpu is set" in device.advice()[0]


@pytest.mark.parametrize("error", [
    AssertionError(), RuntimeError("Unable to initialize backend 'cuda': no card\nat 0x7f"),
])
def test_a_jax_without_any_device_is_a_device_error(monkeypatch, error):
    """jax gives an empty AssertionError where the plugin is not installed."""

    def fail(*_):
        raise error

    for name in ("default_backend", "devices", "local_devices", "process_count"):
        monkeypatch.setattr(jax, name, fail)
    monkeypatch.setattr(device, "visible_accelerators", lambda: ["NVIDIA GPU"])
    for call in (device.backend, lambda: device.require("gpu"), device.require, make_mesh):
        with pytest.raises(DeviceError) as caught:
            call()
        message = str(caught.value)
        assert all(word in message for word in (
            "jax has no device", "JAX_PLATFORMS=", "NVIDIA GPU is visible", "pip install 'jax[",
            "set it to cpu", str(error).partition("\n")[0])), message
        assert "\n" not in message
    found = device.report()
    assert found["backend"] is None and found["devices"] == []
    assert found["advice"] == [message] and "jax" in found["versions"]


def test_report_names_versions_and_devices():
    report = device.report()
    assert report["versions"]["jax"] == jax.__version__
    assert report["versions"]["jaxlm"] == jaxlm.__version__
    assert len(report["devices"]) == jax.local_device_count()
    assert report["host_bytes"] is None or report["host_bytes"] > 2**28


@pytest.mark.parametrize("bad", [0, 11, True, 2.0, "3", None, float("nan")])
def test_whole_refuses_what_is_no_count(bad):
    with pytest.raises(ConfigError, match="n is .* expected a whole number from 1 to 10"):
        whole("n", bad, 1, 10)
