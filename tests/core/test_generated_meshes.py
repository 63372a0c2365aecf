"""Generated meshes and shardings: an error that names the axis, or what an independent rule says.

1,000 cases: 400 meshes, 300 trees of arrays, 100 tables of rules, 100 batches, 100 targets.
"""

import math
import re
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding

from experiments import twins
from jaxlm.core.errors import DeviceError
from jaxlm.core.mesh import RULES, make_mesh, partition, shard_batch, shardings
from jaxlm.core.targets import CARDS, TPU_BYTES, target
from tests.source_tree import documented_cases

NAMES = ("data", "fsdp", "tensor")
SIZES = st.one_of(st.sampled_from([1, 1, 1, 2, 2, 4, 8]), st.integers(-2, 9))
JUNK = st.one_of(SIZES, SIZES, SIZES.map(np.int64), st.booleans(), st.floats(), st.none(),
                 st.text(max_size=2), st.integers(), st.lists(st.just(1), max_size=2))
MESHES = [dict(zip(NAMES, sizes, strict=True)) for sizes in (
    (1, 1, 1), (2, 1, 1), (1, 1, 2), (2, 2, 1), (2, 1, 4), (1, 2, 4), (4, 1, 2), (2, 2, 2),
    (8, 1, 1), (1, 8, 1), (1, 1, 8))]


def is_size(value):
    return isinstance(value, int | np.integer) and type(value) is not bool and value >= 1


def mesh_of(sizes):
    return make_mesh(**sizes, devices=jax.devices()[: math.prod(sizes.values())])


@settings(max_examples=400, deadline=None)
@given(st.fixed_dictionaries({}, optional=dict.fromkeys(NAMES, JUNK)), st.integers(0, 8))
def test_meshes(sizes, count):
    whole = {name: sizes.get(name, 1) for name in NAMES}
    devices = jax.devices()[:count]
    bad = [name for name, size in whole.items() if not is_size(size)]
    if not bad and math.prod(map(int, whole.values())) == count:
        mesh = make_mesh(**sizes, devices=devices)
        assert dict(mesh.shape) == whole and list(mesh.devices.flat) == devices
        return
    with pytest.raises(DeviceError) as error:
        make_mesh(**sizes, devices=devices)
    words = ([repr(bad[0]), repr(whole[bad[0]]), "at least 1"] if bad else
             [f"{name!r}: {int(size)}" for name, size in whole.items()] + [f"got {count}"])
    assert all(word in str(error.value) for word in words), str(error.value)


def ways(mesh, axis):
    """Over how many devices the rules spread an axis."""
    names = RULES.get(axis) or ()
    return math.prod(mesh.shape[name] for name in ([names] if isinstance(names, str) else names))


AXES = [("vocab", "embed"), ("embed", "heads", "head_dim"), ("embed", "kv_heads", "head_dim"),
        ("heads", "head_dim", "embed"), ("embed", "mlp"), ("mlp", "embed"), ("norm",),
        ("kv_heads", "head_dim"), ("batch",)]
LEAF = st.sampled_from(AXES).flatmap(lambda axes: st.tuples(
    st.just(axes), st.tuples(*[st.integers(1, 12) for _ in axes])))


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(MESHES), st.lists(LEAF, min_size=1, max_size=8))
def test_shardings(sizes, leaves):
    """What divides is split, what does not is whole, and each such dimension is told once."""
    mesh = mesh_of(sizes)
    axes = {f"layer_{i}": {"w": names} for i, (names, _) in enumerate(leaves)}
    shapes = {f"layer_{i}": {"w": jax.ShapeDtypeStruct(shape, jnp.float32)}
              for i, (_, shape) in enumerate(leaves)}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        placed = shardings(axes, shapes, mesh)
    wanted = set()
    for index, (names, shape) in enumerate(leaves):
        local = placed[f"layer_{index}"]["w"].shard_shape(shape)
        for name, size, part in zip(names, shape, local, strict=True):
            spread = ways(mesh, name)
            assert part == (size if size % spread else size // spread)
            if size % spread:
                wanted.add(f"dimension {name!r} of size {size} does not divide over {spread} ")
    messages = [str(warning.message) for warning in caught]
    assert len(messages) == len(wanted)
    assert all(any(want in message for message in messages) for want in wanted)


@pytest.mark.parametrize("name", sorted(twins.CONFIGS))
def test_every_family_on_meshes_that_do_not_divide(name):
    lm = twins.model_of(twins.config_of(name))
    axes, tree = lm.axes(), lm.shapes()
    for sizes in MESHES:
        mesh = mesh_of(sizes)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            placed = shardings(axes, tree, mesh)
        for where, leaf in zip(jax.tree.leaves(placed), jax.tree.leaves(tree), strict=True):
            assert isinstance(where, NamedSharding) and where.shard_shape(leaf.shape)
        assert len({str(warning.message) for warning in caught}) == len(caught) <= 2


@settings(max_examples=100, deadline=None)
@given(st.sampled_from(MESHES), st.dictionaries(st.sampled_from("abcd"), st.sampled_from(
    [None, *NAMES, ("data", "fsdp"), ("fsdp", "tensor")]), min_size=1),
       st.lists(st.sampled_from("abcd"), min_size=1, max_size=4, unique=True))
def test_rules_that_collide(sizes, rules, axes):
    """Two dimensions cannot be split over one mesh axis: the error names all three."""
    mesh = mesh_of(sizes)
    names = {axis: [n for n in ([rule] if isinstance(rule, str) else rule or ())
                    if sizes[n] > 1] for axis in axes for rule in [rules.get(axis)]}
    owners = {n: [axis for axis in axes if n in names[axis]] for n in NAMES}
    clash = {n: found for n, found in owners.items() if len(found) > 1}
    shape = (8 * 8 * 8,) * len(axes)
    if not clash:
        spec = partition(tuple(axes), shape, mesh, rules)
        assert NamedSharding(mesh, spec).shard_shape(shape) == tuple(
            size // math.prod(sizes[n] for n in names[axis])
            for axis, size in zip(axes, shape, strict=True))
        return
    with pytest.raises(DeviceError) as error:
        partition(tuple(axes), shape, mesh, rules, "layer/w")
    assert "layer/w" in str(error.value) and any(
        repr(n) in str(error.value) and all(repr(a) in str(error.value) for a in found[:2])
        for n, found in clash.items()), str(error.value)


@settings(max_examples=100, deadline=None)
@given(st.sampled_from(MESHES), st.integers(1, 17), st.integers(1, 3))
def test_batches(sizes, rows, leaves):
    mesh = mesh_of(sizes)
    tree = [jnp.zeros((rows, *range(1, 1 + n))) for n in range(leaves)]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        placed = shard_batch(tree, mesh)
    spread = sizes["data"] * sizes["fsdp"]
    part = rows if rows % spread else rows // spread
    assert {x.sharding.shard_shape(x.shape)[0] for x in placed} == {part}
    assert len(caught) == bool(rows % spread)


KNOWN = st.sampled_from([*TPU_BYTES, *CARDS])


@settings(max_examples=100, deadline=None)
@given(st.one_of(st.text(max_size=8), st.tuples(KNOWN, st.sampled_from([
    ":", ":0", ":x", ":2x", ":-1", ":1.5", ":2x2x2x2", ":x2", "::", ": 1", ":a", "x",
])).map("".join)))
def test_targets_that_are_none(name):
    """Refused before any compiler is looked for; what may stand for a chip is left out."""
    kind, colon, shape = name.lower().partition(":")
    if kind in (*TPU_BYTES, *CARDS) and (not colon or re.fullmatch(r"(\d+(x\d+){0,2})?", shape)):
        return
    with pytest.raises(DeviceError) as error:
        target(name)
    assert repr(name) in str(error.value)


def test_the_count_is_true():
    assert documented_cases(globals()) == (1000, 1000)
