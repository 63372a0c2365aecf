"""Quantised kinds through ragged pieces, flushes at any time, and queries that change."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.cache import Dense, Kivi, RotatedKivi, Squat, TurboQuant
from jaxlm.cache.squat import turn_ahead
from jaxlm.core.errors import NumericsError
from jaxlm.decode.generate import generate
from jaxlm.models.config import Rope
from pallas_kernels.quant_decode_attention.reference import dequantise
from tests.cache.contract import Contract
from tests.cache.test_quantised import (
    FLUSH,
    KIVI8,
    SLOTS,
    SMALL,
    SPEC,
    SQUAT2,
    SQUAT4,
    STEP,
    B,
    H,
    K,
    N,
    Rows,
    gap,
    text,
)

STILL = replace(SPEC, rope=Rope(theta=1e12, factor=1e6, kind="linear"))  # no rotation


@pytest.mark.slow
class TestKiviBeforeRopeContract(Contract):
    kind = Kivi(8, 8, **SMALL, rope="before")
    exact, tolerance = False, 0.02


@pytest.mark.slow
class TestSquatAfterRopeContract(Contract):
    kind = Squat(8, 8, **SMALL, block=4, half_life=32)
    exact, tolerance = False, 0.02


@pytest.mark.parametrize("kind", [KIVI8, SQUAT4])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_any_order_of_steps_and_pieces_loses_no_token(kind, seed):
    """Flushed late as `flush_every` allows, whatever was extended meanwhile: tails never overflow.

    A lost or doubled token would move the outputs by far more than 4- or 8-bit codes do.
    """
    draw = np.random.default_rng(seed)
    exact, rough = Rows(Dense(), lengths=[20, 9, 1]), Rows(kind, lengths=[20, 9, 1])
    for _ in range(3):
        exact.step(4)
        found = rough.step(4, every=kind.flush_every)
        assert gap(found, jnp.stack(exact.outs[-4:])) < 0.12
        counts = draw.integers(0, 9, B)
        wanted, found = (rows.extend(8, counts.tolist()) for rows in (exact, rough))
        live = np.arange(8) < counts[:, None]
        assert not live.any() or gap(found[live], wanted[live]) < 0.12
        waiting = np.asarray(rough.at - rough.state["packed_B"])
        assert (waiting <= kind.keep + kind.group).all() and (waiting >= 0).all()
        assert (rough.state["packed_B"] % kind.group == 0).all()


def test_a_prompt_in_pieces_packs_as_many_tokens_and_keeps_the_same_tail():
    """SQuat's codes differ (a piece's queries teach only what comes after them); nothing else."""
    qkv = text()
    whole, pieces = (Rows(SQUAT2, qkv=qkv, lengths=n) for n in ([50, 50, 50], [20, 33, 1]))
    pieces.extend(49, [30, 17, 49])
    assert whole.state["packed_B"].tolist() == pieces.state["packed_B"].tolist()
    for name in ("k", "v"):
        np.testing.assert_allclose(whole.state[name], pieces.state[name], atol=1e-6)
    exact = Rows(Dense(), qkv=qkv, lengths=[50, 50, 50]).step(2)
    errors = [gap(rows.step(2), exact) for rows in (whole, pieces)]
    assert max(errors) < 1.6 * min(errors) < 0.6, errors


@pytest.mark.parametrize("kind", [Kivi(4, 4, **SMALL, scales="int8"),
                                  Squat(4, 4, **SMALL, block=8, scales="int8")])
@pytest.mark.parametrize("way", ["pieces", "steps", "fork"])
def test_minima_of_8_bits_have_an_origin_however_a_text_begins(kind, way):
    """Keys far from zero: without an origin their scales must reach to it, and codes are lost."""
    q, k, v = text()
    k = k.at[..., -1].add(40.0)  # a channel of the lowest frequency: rotary positions leave it be
    rows = Rows(kind, qkv=(q, k, v), lengths=[50, 50, 50])
    prompt = rows.state
    rows.state, rows.at = kind.init(SPEC, B, SLOTS, jnp.float32), jnp.zeros(B, jnp.int32)
    if way == "fork":
        rows.state = kind.inherit(rows.state, prompt, 1, kind)
        np.testing.assert_array_equal(rows.state["packed"].k_center, prompt["packed"].k_center)
    if way == "pieces":
        rows.extend(40, [40, 40, 40])
    else:
        rows.step(40)
    assert rows.state["packed_B"].tolist() == [32] * B
    key = kind.place(SPEC, k, jnp.broadcast_to(jnp.arange(SLOTS), k.shape[:2])).swapaxes(1, 2)
    found, wanted = (jnp.abs(dequantise(state["packed"], kind.format)[0][:, :, :32]
                             - key[:, :, :32])[..., -1].mean() for state in (rows.state, prompt))
    assert found < 5 * wanted, (found, wanted)  # without an origin it is about 20 times


def in_subspace(seed, size, time=96, batch=B):
    """Queries in `size` of the H dimensions."""
    basis = jax.random.normal(jax.random.key(seed), (size, H))
    return jax.random.normal(jax.random.key(seed + 1), (batch, time, N, size)) @ basis


def test_half_life_learns_the_queries_of_a_long_generation():
    """Queries change subspace after the prompt: keys coded later must serve the new ones."""
    _, k, v = text(seed=5)
    q = jnp.concatenate([in_subspace(1, 3)[:, :50], in_subspace(7, 3)[:, 50:]], 1)
    later = q[:, 60:].reshape(B, -1, K, N // K, H).swapaxes(1, 2)
    errors = {}
    for half_life in (None, 8):
        kind = Squat(2, 8, **SMALL, block=4, half_life=half_life, guard=False)
        rows = Rows(kind, STILL, (q, k, v), [50, 50, 50])
        rows.step(40, every=4)
        miss = dequantise(rows.state["packed"], kind.format)[0][:, :, 64:80] - k[:, 64:80].swapaxes(
            1, 2)
        errors[half_life] = float(jnp.linalg.norm(jnp.einsum("bktgh,bksh->bktgs", later, miss)))
    assert errors[8] < 0.7 * errors[None], errors


def test_a_row_on_hold_learns_nothing_from_standing_still():
    """A held row's steps repeat one position with queries that are not its own."""
    kind = SQUAT4
    moving, held = Rows(kind), Rows(kind)
    flush = lambda rows: FLUSH(kind, SPEC, rows.state, jnp.asarray(True), rows.at)
    for number in range(12):
        if number % 3 == 1:
            junk = (100.0 * x[:, :1] for x in text(seed=9))
            *_, held.state = STEP(kind, SPEC, held.state, *junk, held.at, held.at)
            moving.state, held.state = flush(moving), flush(held)
        held.step(1, every=2)
        moving.step(1, every=2)
    moving.state, held.state = flush(moving), flush(held)
    for name in ("sketch", "packed", "packed_B", "learned_B"):
        for one, other in zip(jax.tree.leaves(moving.state[name]),
                              jax.tree.leaves(held.state[name]), strict=True):
            np.testing.assert_array_equal(one, other)
    assert bool((held.state["sketch"].rows != Rows(kind).state["sketch"].rows).any())


@pytest.mark.parametrize("kind", [Kivi(2, 2, **SMALL), Squat(2, 2, **SMALL, block=4),
                                  RotatedKivi(2, 2, **SMALL), TurboQuant(4, 4, **SMALL)])
def test_generate_names_the_layer_whose_keys_are_not_finite(bundle, kind):
    broken = jax.tree.map(lambda x: x, bundle.params)
    kernel = broken["layers_1"]["attn"]["k"]["kernel"]
    broken["layers_1"]["attn"]["k"]["kernel"] = kernel.at[0].set(jnp.nan)
    with pytest.raises(NumericsError, match="row 0.*first in the keys or values of layer 1"):
        generate(bundle.replace(params=broken), "x" * 30, max_new_tokens=2, cache=kind)


def test_turning_ahead_is_the_mean_over_turned_queries():
    """Against queries turned one shift at a time, in float64."""
    q = np.asarray(text()[0][:1, :20], np.float64)  # 1 T N H
    gram = np.einsum("tkgh,tkgi->khi", *[q[0].reshape(20, K, N // K, H)] * 2)
    frequency = 10000.0 ** (-np.arange(0, H, 2) / H)
    wanted = np.zeros_like(gram)
    for shift in range(101):
        cos, sin = np.cos(shift * frequency), np.sin(shift * frequency)
        left, right = q[..., : H // 2], q[..., H // 2:]
        turned = np.concatenate([left * cos - right * sin, right * cos + left * sin], -1)
        turned = turned[0].reshape(20, K, N // K, H)
        wanted += np.einsum("tkgh,tkgi->khi", turned, turned) / 101
    found = turn_ahead(jnp.asarray(gram[None], jnp.float32), SPEC.rope, 100)
    np.testing.assert_allclose(found[0], wanted, atol=1e-4 * np.abs(wanted).max())
    assert np.abs(wanted - gram).max() > 0.1 * np.abs(gram).max()  # turns do matter
