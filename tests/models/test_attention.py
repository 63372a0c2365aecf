"""Masks as rules, attention and its log-sum-exp, against numpy written from the definitions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.core.errors import ConfigError, ShapeError
from jaxlm.models.attention import NEG, Mask, attend, attention, merge, visible

B, T, S, N, K, H = 2, 5, 7, 4, 2, 8


def matrix(mask, query_pos, key_pos, valid=None, q_segment=None, k_segment=None, prefix=None):
    """The rule, cell by cell."""
    seen = np.zeros((B, query_pos.shape[1], key_pos.shape[1]), bool)
    for b, t, s in np.ndindex(*seen.shape):
        q, k = int(query_pos[b, t]), int(key_pos[b, s])
        rule = not (mask.causal and k > q) and not (mask.window and abs(q - k) >= mask.window)
        if prefix is not None and k < prefix[b]:
            rule = True
        if q_segment is not None and q_segment[b, t] != k_segment[b, s]:
            rule = False
        seen[b, t, s] = rule and (valid is None or bool(valid[b, s]))
    return seen


def softmax_attention(q, k, v, seen, scale, softcap=None, bias=0.0):
    """Float64, one query at a time."""
    out, lse = np.zeros((B, T, N, H)), np.full((B, T, N), NEG)
    bias = np.broadcast_to(bias, (B, N, T, S))
    for b, t, n in np.ndindex(B, T, N):
        if not seen[b, t].any():
            continue
        score = scale * q[b, t, n].astype(float) @ k[b, n // (N // K)].astype(float)
        score = softcap * np.tanh(score / softcap) if softcap else score
        weight = np.exp(score + bias[b, n, t]) * seen[b, t]
        out[b, t, n] = weight @ v[b, n // (N // K)] / weight.sum()
        lse[b, t, n] = np.log(weight.sum())
    return out, lse


@pytest.fixture
def qkv():
    rng = np.random.default_rng(0)
    draw = lambda *shape: rng.standard_normal(shape).astype(np.float32)
    return draw(B, T, N, H), draw(B, K, H, S), draw(B, K, S, H)


@pytest.mark.parametrize("mask", [Mask(), Mask(causal=False), Mask(window=2),
                                  Mask(causal=False, window=3)], ids=str)
@pytest.mark.parametrize("extra", ["", "valid", "segments", "prefix", "all"])
def test_rule_equals_the_matrix(mask, extra):
    query_pos, key_pos = np.array([[2, 3, 4, 5, 6], [0, 1, 2, 0, 1]]), np.tile(np.arange(S), (B, 1))
    arguments = {}
    if extra in ("valid", "all"):
        arguments["valid"] = np.array([[1, 1, 1, 1, 1, 0, 0], [1, 1, 0, 1, 1, 1, 1]], bool)
    if extra in ("segments", "all"):
        arguments["q_segment"] = np.array([[0, 0, 1, 1, 1], [0, 0, 0, 1, 1]])
        arguments["k_segment"] = np.array([[0, 0, 0, 1, 1, 1, 2], [0, 0, 1, 1, 1, 1, 1]])
    if extra in ("prefix", "all"):
        arguments["prefix"] = np.array([4, 0])
    ours = {"valid": "key_valid_BS", "q_segment": "query_segment_BT", "k_segment": "key_segment_BS",
            "prefix": "prefix_B"}
    found = visible(mask, jnp.asarray(query_pos), jnp.asarray(key_pos),
                    **{ours[name]: jnp.asarray(value) for name, value in arguments.items()})
    np.testing.assert_array_equal(found, matrix(mask, query_pos, key_pos, **arguments))


@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize("bias", [False, True])
def test_attend_equals_numpy(qkv, softcap, bias):
    rng = np.random.default_rng(1)
    seen = rng.random((B, T, S)) < 0.6
    seen[0, 1] = False  # a query that sees nothing
    bias_BNTS = rng.standard_normal((1, N, 1, S)).astype(np.float32) if bias else None
    out, lse = attend(*qkv, jnp.asarray(seen), scale=0.3, softcap=softcap, bias_BNTS=bias_BNTS)
    expected_out, expected_lse = softmax_attention(
        *qkv, seen, 0.3, softcap, 0.0 if bias_BNTS is None else bias_BNTS
    )
    np.testing.assert_allclose(out, expected_out, atol=1e-5)
    np.testing.assert_allclose(lse, expected_lse, atol=1e-5)
    assert (np.asarray(out)[0, 1] == 0).all() and (np.asarray(lse)[0, 1] == NEG).all()


def test_attention_over_segments_merges_exactly(qkv):
    q, k, v = qkv
    seen = np.random.default_rng(2).random((B, T, S)) < 0.5
    seen[0, 2, :3], seen[0, 3], seen[1, 0, 3:] = False, False, False  # one, both, the other empty
    whole = attend(q, k, v, jnp.asarray(seen), scale=0.3)
    parts = [attend(q, k[..., cut], v[:, :, cut], jnp.asarray(seen[:, :, cut]), scale=0.3)
             for cut in (slice(0, 3), slice(3, 4), slice(4, None))]
    for found, expected in zip(merge(parts), whole, strict=True):
        np.testing.assert_allclose(found, expected, atol=1e-5)
    assert (np.asarray(merge(parts)[0])[0, 3] == 0).all()


def test_query_chunks_change_nothing(qkv):
    rng = np.random.default_rng(3)
    query_pos = jnp.array([[2, 3, 4, 5, 6], [0, 1, 2, 0, 1]])
    key_pos = jnp.tile(jnp.arange(S), (B, 1))
    segments = jnp.array([[0, 0, 1, 1, 1], [0, 0, 0, 1, 1]])
    rules = {
        "bias_BNTS": jnp.asarray(rng.standard_normal((1, N, T, S)), jnp.float32), "scale": 0.3,
        "query_segment_BT": segments, "key_segment_BS": jnp.tile(jnp.arange(S) // 4, (B, 1)),
        "key_valid_BS": key_pos < 6,
    }
    whole, parts = (attention(*qkv, Mask(window=3), query_pos, key_pos, chunk=chunk, **rules)
                    for chunk in (T, 2))
    for one, other in zip(whole, parts, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-6)


@pytest.mark.parametrize("time", [64, 101, 256])
@pytest.mark.parametrize("window", [None, 5, 70])
def test_keys_that_no_query_sees_need_not_be_read(time, window):
    """Aligned tokens attend in pieces; the values equal those of the whole square."""
    rng = np.random.default_rng(time)
    q, k, v = (jnp.asarray(rng.standard_normal(shape), jnp.float32)
               for shape in ((B, time, N, H), (B, K, H, time), (B, K, time, H)))
    pos = jnp.tile(jnp.arange(time), (B, 1))
    rules = {"scale": 0.3, "key_valid_BS": pos < jnp.array([[time], [time - 9]]),
             "query_segment_BT": pos // 50, "key_segment_BS": pos // 50}
    whole, parts, chunks = (
        attention(q, k, v, Mask(window=window), pos, pos, aligned=aligned, chunk=chunk, **rules)
        for aligned, chunk in ((False, 512), (True, 512), (True, 16)))
    for one, other, third in zip(whole, parts, chunks, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-6)
        np.testing.assert_allclose(one, third, atol=1e-6)


def test_gradient_is_finite_where_a_query_sees_nothing(qkv):
    q, k, v = map(jnp.asarray, qkv)
    seen = jnp.ones((B, T, S), bool).at[0, 1].set(False).at[1].set(False)

    def total(q, k, v):
        out, lse = attend(q, k, v, seen, scale=0.3)
        return out.sum() + jnp.where(lse > NEG, lse, 0).sum()

    gradients = jax.grad(total, (0, 1, 2))(q, k, v)
    assert all(bool(jnp.isfinite(g).all()) for g in gradients)
    assert (gradients[0][1] == 0).all() and (gradients[2][1] == 0).all()
    assert bool((gradients[0][0, 0] != 0).any())


def test_bad_masks_are_refused():
    pos = jnp.zeros((1, 2), jnp.int32)
    with pytest.raises(ConfigError, match="window is 0; expected None or at least 1"):
        Mask(window=0)
    with pytest.raises(ShapeError, match="only one"):
        visible(Mask(), pos, pos, query_segment_BT=pos)
