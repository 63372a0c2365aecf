"""Parts of stored tensors: what a device reads is its part of the whole, and no more."""

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

import jaxlm.hf.weights
from jaxlm.core.errors import CheckpointError
from jaxlm.core.mesh import make_mesh
from jaxlm.core.tree import flatten
from jaxlm.hf.bundle import load
from jaxlm.hf.weights import open_file, read_slice, to_ours, to_theirs
from tests.tiny import weights

# name -> our shape; a projection is stored (out, in), a bias flat
SHAPES = {
    "layers.0.self_attn.q_proj.weight": (6, 4, 2), "layers.0.self_attn.o_proj.weight": (4, 2, 6),
    "layers.0.mlp.down_proj.weight": (8, 6), "layers.0.self_attn.q_proj.bias": (4, 2),
    "embed_tokens.weight": (10, 6), "norm.weight": (6,),
}


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    """A file of these tensors, and each of them in our layout."""
    path = tmp_path_factory.mktemp("slices") / "x.safetensors"
    ours = {name: np.arange(np.prod(shape), dtype=np.float32).reshape(shape)
            for name, shape in SHAPES.items()}
    save_file({name: to_theirs(array, name) for name, array in ours.items()}, path)
    return path, ours


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_a_part_is_that_part_of_the_whole(stored, data):
    path, ours = stored
    name = data.draw(st.sampled_from(sorted(SHAPES)))
    index = []
    for size in SHAPES[name]:
        start = data.draw(st.integers(0, size - 1))
        stop = data.draw(st.integers(start + 1, size))
        index.append(data.draw(st.sampled_from([slice(start, stop), slice(None)])))
    with open_file(path) as file:
        part = read_slice(file, name, path, SHAPES[name], tuple(index))
        whole = read_slice(file, name, path, SHAPES[name])
    np.testing.assert_array_equal(whole, ours[name])
    np.testing.assert_array_equal(part, ours[name][tuple(index)])


def test_nan_in_a_part_is_an_error_there(tmp_path):
    path, name = tmp_path / "x.safetensors", "layers.0.mlp.down_proj.weight"
    array = np.zeros((8, 6), np.float32)
    array[7, 0] = np.nan
    save_file({name: to_theirs(array, name)}, path)
    with open_file(path) as file:
        read_slice(file, name, path, (8, 6), (slice(0, 7), slice(None)))
        with pytest.raises(CheckpointError, match="down_proj.weight' holds NaN"):
            read_slice(file, name, path, (8, 6), (slice(4, 8), slice(None)))


def test_a_mesh_reads_each_slice_once(tiny_folder, monkeypatch):
    """Each device's part of each tensor is read, whole tensors are not, and no part twice."""
    asked: dict[str, list[tuple]] = {}

    def recorded(file, name, path, shape, index=None):
        asked.setdefault(name, []).append((index, shape))
        return read_slice(file, name, path, shape, index)

    monkeypatch.setattr(jaxlm.hf.weights, "read_slice", recorded)
    bundle = load(tiny_folder, mesh=make_mesh(data=2, fsdp=2, tensor=2))
    for name in ("model.layers.0.self_attn.q_proj.weight", "model.layers.1.mlp.down_proj.weight"):
        sizes = [ours_size(index, shape) for index, shape in asked[name]]
        assert len(sizes) == 4 and sum(sizes) == weights()[name].size
    for path, leaf in flatten(bundle.params).items():
        if path.endswith("k/kernel"):
            name = f"model.layers.{path[7]}.self_attn.k_proj.weight"
            np.testing.assert_array_equal(
                jax.device_get(leaf), to_ours(weights()[name], name, leaf.shape)
            )


def ours_size(index, shape):
    """How many numbers a part holds."""
    return int(np.prod([len(range(*one.indices(size)))
                        for one, size in zip(index, shape, strict=True)]))
