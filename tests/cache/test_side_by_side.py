"""Heads side by side in a kind's codes, as on a TPU: a caller cannot tell."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.cache import Kivi, Squat
from jaxlm.cache.turboquant import TurboQuant
from jaxlm.core.mesh import make_mesh
from jaxlm.decode.placement import state_shardings
from jaxlm.decode.samplers import Greedy
from jaxlm.decode.state import prefill
from jaxlm.models.config import AttentionSpec, Rope
from tests.cache.test_quantised import SMALL, Rows
from tests.decode.tiny import tiny_model


@dataclass(frozen=True)
class Paired(Squat):
    """As `Squat` keeps heads of half the lanes on a TPU, read by plain XLA."""

    def side_by_side(self, spec: AttentionSpec) -> int:
        return 2


def test_a_caller_cannot_tell():
    """Prompt, steps with flushes, a long ragged piece, one more step: the same outputs."""
    settings = dict(k_bits=2, v_bits=4, **SMALL, block=8, scales="int8")
    alone, paired = (Rows(kind(**settings)) for kind in (Squat, Paired))
    assert paired.state["packed"].k_words.shape[1] * 2 == alone.state["packed"].k_words.shape[1]
    runs = [(rows.out, rows.step(12), rows.extend(12, [12, 5, 0]), rows.step(1))
            for rows in (alone, paired)]
    assert alone.state["packed_B"].tolist() == paired.state["packed_B"].tolist()
    for one, two in zip(*runs, strict=True):
        np.testing.assert_allclose(two, one, atol=2e-5)


@pytest.mark.parametrize("kv_heads, devices, many", [(8, 1, 2), (8, 4, 2), (8, 8, 1), (3, 1, 1)])
def test_heads_of_one_device_lie_side_by_side(kv_heads, devices, many):
    """On a TPU, where the heads of a device allow it, and no kind of its own codes does it."""
    mesh = make_mesh(tensor=devices, devices=jax.devices()[:devices])
    spec = AttentionSpec(2 * kv_heads, kv_heads, 64, 0.125, Rope())
    of = lambda kind, **more: kind(implementation="tpu", mesh=mesh, **more).side_by_side(spec)
    assert of(Squat) == of(Kivi) == many
    assert of(Kivi, rope="before") == Squat(mesh=mesh).side_by_side(spec) == 1  # read by XLA
    assert TurboQuant(mesh=mesh).side_by_side(spec) == 1


def test_shared_rows_of_lanes_are_split_over_devices_too():
    lm, params = tiny_model(num_heads=16, num_kv_heads=8)
    kind, rows = Paired(**SMALL, block=4), jnp.array([5, 3])
    state = jax.eval_shape(lambda: prefill(
        lm, params, Greedy(), jnp.ones((2, 5), jnp.int32), rows, kind, 40,
        jax.random.split(jax.random.key(0), 2)))
    places = state_shardings(state, 8, make_mesh(tensor=4, data=2))
    for leaf, place in zip(jax.tree.leaves(state.caches), jax.tree.leaves(places.caches),
                           strict=True):
        assert leaf.ndim < 2 or leaf.shape[1] in (4, 8)
        assert place.spec[1:2] == (("tensor",) if leaf.ndim > 1 else ()), (leaf.shape, place)
