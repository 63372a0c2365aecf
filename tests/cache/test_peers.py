"""Rotated KIVI and SQuat, TurboQuant: the contract of cache kinds, and independent definitions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.cache import Kivi, RotatedKivi, RotatedSquat, Squat, TurboQuant
from jaxlm.cache.parse import cache_name, parse_cache
from jaxlm.cache.rotated import hadamard
from jaxlm.cache.turboquant import levels, random_rotation
from jaxlm.core.errors import ConfigError
from jaxlm.core.tree import nbytes
from jaxlm.models.config import AttentionSpec, Rope
from jaxlm.models.layers import apply_rope
from pallas_kernels.quant import unpack_words
from pallas_kernels.quant_decode_attention.reference import dequantise
from tests.cache.contract import Contract
from tests.cache.test_quantised import SMALL, SPEC, Dense, Rows, gap, text


class TestRotatedKiviContract(Contract):
    kind = RotatedKivi(8, 8, **SMALL)
    exact, tolerance = False, 0.02


class TestRotatedSquatContract(Contract):
    kind = RotatedSquat(8, 8, block=4, **SMALL)
    exact, tolerance = False, 0.02


class TestTurboQuantContract(Contract):
    kind = TurboQuant(8, 8, **SMALL)
    exact, tolerance = False, 0.05


TURBO2 = TurboQuant(2, 2, **SMALL)


@pytest.mark.parametrize("kind, bounds", [  # measured at most 0.27, 0.445, 0.27, 0.34
    (RotatedKivi(2, 2, **SMALL), 0.36), (TURBO2, 0.45),
    (RotatedSquat(2, 2, block=4, half_life=32, **SMALL), 0.36),
    (TurboQuant(4, 2, **SMALL, scales="float32"), 0.44)])
def test_steps_and_pieces_follow_the_dense_cache(kind, bounds):
    """A codebook of 2 bits leaves 0.34 of a single value."""
    exact, rough = Rows(Dense()), Rows(kind)
    assert 0.005 < gap(rough.step(16), exact.step(16)) < bounds
    wanted, found = (rows.extend(12, [12, 5, 0]) for rows in (exact, rough))
    live = np.arange(12) < np.array([[12], [5], [0]])
    assert 0.005 < gap(found[live], wanted[live]) < bounds
    assert rough.state["packed_B"].tolist() == [72, 32, 8]
    assert gap(rough.step(1), exact.step(1)) < bounds


@pytest.mark.parametrize("size", [8, 64, 96, 80, 128])
def test_rotations_are_orthonormal(size):
    for matrix in (hadamard(size), random_rotation(size, 0)):
        np.testing.assert_allclose(matrix @ matrix.T, np.eye(size), atol=1e-5)
    assert len(np.unique(np.abs(hadamard(size)).round(5))) <= 2
    assert not np.allclose(random_rotation(size, 0), random_rotation(size, 1))


def coded_keys(kind, qkv):
    """What a prompt of 50 tokens leaves in row 0: keys as they were turned, and as coded."""
    rows = Rows(kind, qkv=qkv)
    pos = jnp.arange(50)[None]
    k = np.asarray(apply_rope(qkv[1][:1, :50], pos, SPEC.rope))[0].swapaxes(0, 1)
    return rows, k.astype(np.float64)


def test_rotated_kivi_is_min_max_of_the_turned_keys():
    kind = RotatedKivi(2, 2, **SMALL, scales="float32", shrinks=(1.0,))
    rows, k = coded_keys(kind, text())
    turned = (k @ hadamard(16).T.astype(np.float64))[:, :40].reshape(2, 5, 8, 16)
    low, high = turned.min(2, keepdims=True), turned.max(2, keepdims=True)
    step = (high - low) / 3
    wanted = np.round((turned - low) / step) * step + low
    found = np.asarray(dequantise(rows.state["packed"], kind.format)[0])[0, :, :40]
    close = np.isclose(found, wanted.reshape(2, 40, 16), atol=1e-4)
    assert close.mean() > 0.995  # a tie may round the other way


def test_rotated_squat_is_squat_of_turned_queries_keys_and_values():
    """What rotary positions make H q, H k of, and turned values, given to `Squat`."""
    how = dict(SMALL, block=4, ahead=0, scales="float32")
    qkv = text()
    pos = jnp.broadcast_to(jnp.arange(qkv[0].shape[1]), qkv[0].shape[:2])
    turn = lambda x: x @ hadamard(16).T
    before = lambda x: apply_rope(turn(apply_rope(x, pos, SPEC.rope)), -pos, SPEC.rope)
    ours = Rows(RotatedSquat(2, 2, **how), qkv=qkv)
    same = Rows(Squat(2, 2, **how), qkv=(before(qkv[0]), before(qkv[1]), turn(qkv[2])))
    plain = Rows(Squat(2, 2, **how), qkv=qkv)
    words = [np.asarray(unpack_words(rows.state["packed"].k_words, 2, 8))[:, :, :40]
             for rows in (ours, same, plain)]
    assert (words[0] == words[1]).mean() > 0.99 > (words[0] == words[2]).mean()
    np.testing.assert_allclose(turn(ours.step(1)), same.step(1), atol=0.05)


@pytest.mark.parametrize("ahead", [0, 7])
def test_the_gram_of_turned_queries_is_that_of_later_positions_turned(ahead):
    q = np.random.default_rng(0).standard_normal((12, 16))
    kind, h = RotatedSquat(2, 2, ahead=ahead), hadamard(16).astype(np.float64)
    gram = jnp.asarray((q @ h.T).T @ (q @ h.T), jnp.float32)[None, None]
    wanted = 0.0
    for step in range(ahead + 1):
        later = np.asarray(apply_rope(jnp.asarray(q, jnp.float32)[None, :, None],
                                      jnp.full((1, 12), step), SPEC.rope), np.float64)[0, :, 0]
        wanted = wanted + (later @ h.T).T @ (later @ h.T) / (ahead + 1)
    np.testing.assert_allclose(kind.seen_ahead(SPEC, gram)[0, 0], wanted, atol=1e-3)
    plain = Squat(2, 2, ahead=ahead).seen_ahead(SPEC, gram)[0, 0]
    assert (np.abs(plain - wanted).max() > 0.1) == (ahead > 0)  # power: H must be undone first


def test_turboquant_is_the_nearest_level_of_the_turned_direction():
    kind = TurboQuant(2, 4, **SMALL, scales="float32")
    qkv = text()
    rows, k = coded_keys(kind, qkv)
    packed = rows.state["packed"]
    v = np.asarray(qkv[2])[0, :50].swapaxes(0, 1).astype(np.float64)
    for x, words, norms, bits in ((k, packed.k_words, packed.k_norm, 2),
                                  (v, packed.v_words, packed.v_norm, 4)):
        turned = (x @ random_rotation(16, 0).T.astype(np.float64))[:, :40]
        norm = np.linalg.norm(turned, axis=-1)
        table = levels(16, bits).astype(np.float64)
        nearest = np.abs((turned / norm[..., None])[..., None] - table).argmin(-1)
        codes = np.asarray(unpack_words(words, bits, 8))[0, :, :40]
        assert (codes != nearest).mean() < 0.002
        np.testing.assert_allclose(np.asarray(norms)[0, :, :40], norm, rtol=1e-5)


@pytest.mark.parametrize("bits, error", [(1, 0.3634), (2, 0.1175), (4, 0.009497)])
def test_levels_have_the_least_error_known_of_a_normal_variable(bits, error):
    """Max (1960), table I, of a unit normal; coordinates of long unit vectors are nearly that."""
    table = levels(4096, bits) * 64
    x = np.random.default_rng(0).standard_normal(400_000)
    found = ((x - table[np.abs(x[:, None] - table).argmin(1)]) ** 2).mean()
    assert abs(found / error - 1) < 0.02
    uniform = np.linspace(-2, 2, 2**bits)  # power: another table is told apart
    assert ((x - uniform[np.abs(x[:, None] - uniform).argmin(1)]) ** 2).mean() > 1.05 * error


@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf])
@pytest.mark.parametrize("kind", [RotatedKivi(2, 2, **SMALL), TURBO2,
                                  RotatedSquat(2, 2, block=4, **SMALL)])
def test_a_nan_or_infinite_key_is_never_a_number(bad, kind):
    q, k, v = text()
    out = Rows(kind, qkv=(q, k.at[0, 3, 0, 0].set(bad), v)).step(2)
    assert bool(jnp.isnan(out[:, 0, :2]).all() & jnp.isfinite(out[:, 1:]).all())


def test_head_dims_that_are_no_power_of_two():
    spec = AttentionSpec(2, 1, 96, 0.1, Rope())
    key = jax.random.split(jax.random.key(0), 3)
    q, k, v = (jax.random.normal(x, (1, 40, n, 96)) for x, n in zip(key, (2, 1, 1), strict=True))
    pos, count = jnp.arange(40)[None], jnp.array([40])
    outs = []
    for kind in (Dense(), RotatedKivi(8, 8, **SMALL), TurboQuant(8, 8, **SMALL),
                 RotatedSquat(8, 8, **SMALL)):
        *_, state = kind.prefill(spec, kind.init(spec, 1, 64, jnp.float32), q, k, v, pos, count)
        outs.append(kind.attend(spec, state, q[:, -1:], pos[:, -1:], count, jnp.array([0]))[0])
    np.testing.assert_allclose(outs[1], outs[0], atol=0.02)
    np.testing.assert_allclose(outs[2], outs[0], atol=0.05)
    np.testing.assert_allclose(outs[3], outs[0], atol=0.02)


def test_bytes_of_the_states():
    """Rotated KIVI takes KIVI's bytes; TurboQuant codes and two norms a token and head."""
    spec = AttentionSpec(32, 8, 128, 1.0, Rope())
    size = lambda kind: nbytes(jax.eval_shape(lambda: kind.init(spec, 2, 4096, jnp.bfloat16)))
    assert size(RotatedKivi()) == size(Kivi()) and size(RotatedSquat()) == size(Squat())
    tail = 48 * 2 * 128 * 2
    assert size(TurboQuant(4, 2)) == 2 * 8 * (4096 * (6 * 128 / 8 + 4) + tail + 1) + 2 * 4


@pytest.mark.parametrize("name", ["rkivi2", "rsquat2v4:block=8,half_life=64",
                                  "rkivi4v2:group=64,window=64", "turboquant4v2",
                                  "turboquant2:scales=float16,seed=3"])
def test_names_round_trip(name):
    assert cache_name(parse_cache(name)) == name


@pytest.mark.parametrize("name", ["rkivi3", "rkivi2:rope=before", "rsquat2:rope=before",
                                  "rsquat2:lam=-1", "turboquant2:rope=before",
                                  "turboquant2:scales=int8", "turboquant2:shrinks=1.0",
                                  "turboquant2:implementation=tpu", "turboquant16",
                                  "turboquant2:seed=-1"])
def test_what_there_is_not_is_refused(name):
    with pytest.raises(ConfigError):
        parse_cache(name)

