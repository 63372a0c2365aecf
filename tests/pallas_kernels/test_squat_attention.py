"""End to end against the reference attention module, with its cache policy ("compat"): by a
plain re-implementation over these kernels, and by the cache kinds with `compat=reference`.

The policy, as the reference has it: prefill attends in full precision; then all whole windows of
keys are quantised and all but the last `window` values. Each decode step attends to quantised and
full-precision parts, then quantises the key buffer when it is full, and the oldest value.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.cache.parse import parse_cache
from jaxlm.models.config import AttentionSpec, Rope
from pallas_kernels import quant, squat
from pallas_kernels.quant import QuantFormat, unpack_words

COMPAT = QuantFormat(scales="float32", shrinks=(1.0,))
WINDOW, BLOCK, RANK, HEAD = 32, 32, 20, 64


def rotate(x, positions):
    """Half-split rotary embedding, base 10000: x [..., T, H]."""
    inverse = 10000.0 ** (-np.arange(0, HEAD, 2) / HEAD)
    angle = positions[:, None] * inverse
    cos, sin = (np.concatenate([f(angle)] * 2, -1).astype(np.float32) for f in (np.cos, np.sin))
    half = np.concatenate([-x[..., HEAD // 2:], x[..., :HEAD // 2]], -1)
    return x * cos + half * sin


def attend(q, k, v, mask):
    logits = np.einsum("bkgth,bksh->bkgts", q, k) / np.sqrt(HEAD)
    logits = np.where(mask, logits, -1e30)
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    return np.einsum("bkgts,bksh->bkgth", weights / weights.sum(-1, keepdims=True), v)


def run(z, case, lam, before_rope, quantised=True):
    x = z[f"{case}/x"]
    batch, total, _ = x.shape
    prompt = z[f"{case}/out_prefill"].shape[1]
    split = lambda y: np.swapaxes(y.reshape(batch, total, -1, HEAD), 1, 2)
    q, k, v = (split(x @ z[f"{case}/w{name}"].T) for name in "qkv")
    at = np.arange(total)
    q = rotate(q, at)
    keys = k if before_rope else rotate(k, at)
    read = (lambda y: rotate(y, at[: y.shape[2]])) if before_rope else (lambda y: y)
    kv = k.shape[1]
    grouped = q.reshape(batch, kv, -1, total, HEAD)
    gram = squat.query_gram(jnp.swapaxes(jnp.asarray(q[:, :, :prompt]), 1, 2), kv)
    comp = squat.compensation(gram, BLOCK, lam, "reference", rank=RANK, energy_order=False)

    causal = np.tril(np.ones((prompt, prompt), bool))
    outs = [attend(grouped[..., :prompt, :], read(keys[:, :, :prompt]), v[:, :, :prompt], causal)]
    k_cache, v_cache, packed, codes = keys.copy(), v.copy(), 0, []

    def flush(until):
        nonlocal packed
        if quantised and until > packed:
            part = jnp.asarray(keys[:, :, packed:until])
            grid = squat.quantise_keys_squat(part, comp, COMPAT, BLOCK, guard=False)
            k_cache[:, :, packed:until] = grid.value
            codes.append(np.asarray(grid.codes))
            packed = until

    all_values = np.asarray(quant.quantise_values(jnp.asarray(v), COMPAT).value)
    flush(prompt // WINDOW * WINDOW)
    for now in range(prompt + 1, total + 1):
        kept = max(now - 1 - WINDOW, 0)  # values older than the window, before this step's flush
        if quantised:
            v_cache[:, :, :kept] = all_values[:, :, :kept]
        outs.append(attend(grouped[..., now - 1:now, :], read(k_cache[:, :, :now]),
                           v_cache[:, :, :now], np.ones((1, now), bool)))
        if now - packed == WINDOW:
            flush(now)
    out = np.concatenate(outs, 3).reshape(batch, -1, total, HEAD)
    return np.swapaxes(out, 1, 2).reshape(batch, total, -1), codes


@pytest.mark.parametrize("case, lam, before_rope", [
    ("e_post", 0.001, False), ("e_post_kivi", 0.0, False), ("e_short_pre", 0.001, True)])
def test_end_to_end(squat_attention, case, lam, before_rope):
    z = squat_attention
    out, codes = run(z, case, lam, before_rope)
    want = np.concatenate([z[f"{case}/out_prefill"], z[f"{case}/out_decode"]], 1)
    relative = np.linalg.norm(out - want) / np.linalg.norm(want)
    assert relative < 1e-4
    words = z[f"{case}/final_k_code"].view(np.uint32)
    final = (words[..., None] >> np.arange(0, 32, 2, dtype=np.uint32)) & np.uint32(3)
    final = np.swapaxes(final.reshape(*words.shape[:-1], -1), -1, -2)
    assert (np.concatenate(codes, 2) != final).mean() <= 0.01
    exact, _ = run(z, case, lam, before_rope, quantised=False)
    assert np.linalg.norm(exact - z[f"{case}/out_exact"]) / np.linalg.norm(exact) < 1e-5
    # power: the unquantised answer is far outside the tolerance
    assert np.linalg.norm(exact - want) / np.linalg.norm(want) > 1e-2


def by_kind(z, case, kind):
    """Outputs and final state of a cache kind that prefills, then steps and flushes."""
    x = z[f"{case}/x"]
    batch, total, _ = x.shape
    prompt = z[f"{case}/out_prefill"].shape[1]
    q, k, v = (jnp.asarray(x @ z[f"{case}/w{name}"].T).reshape(batch, total, -1, HEAD)
               for name in "qkv")
    spec = AttentionSpec(q.shape[2], k.shape[2], HEAD, HEAD**-0.5, Rope())
    at = jnp.broadcast_to(jnp.arange(total), (batch, total))
    state = kind.init(spec, batch, total, jnp.float32)
    first, _, state = jax.jit(kind.prefill, static_argnums=0)(
        spec, state, q[:, :prompt], k[:, :prompt], v[:, :prompt], at[:, :prompt],
        jnp.full(batch, prompt))

    @jax.jit
    def one(state, now):
        take = lambda y: jax.lax.dynamic_slice_in_dim(y, now, 1, 1)
        at_B = jnp.full(batch, now)
        out, _, state = kind.step(spec, state, take(q), take(k), take(v), at_B, at_B)
        return kind.flush(spec, state, (now + 1) % kind.flush_every == 0, at_B + 1), out

    state, rest = jax.lax.scan(one, state, jnp.arange(prompt, total))
    out = jnp.concatenate([first, jnp.swapaxes(rest[:, :, 0], 0, 1)], 1)
    return np.asarray(out).reshape(batch, total, -1), state


@pytest.mark.parametrize("case, name", [
    ("e_post", "squat2:compat=reference,block=32"),
    ("e_post_kivi", "squat2:compat=reference,block=32,lam=0"),
    ("e_post_kivi", "kivi2:compat=reference"),
    ("e_short_pre", "squat2:compat=reference,block=32,rope=before")])
def test_the_kinds_with_compat_reproduce_the_reference(squat_attention, case, name):
    z, kind = squat_attention, parse_cache(name)
    out, state = by_kind(z, case, kind)
    want = np.concatenate([z[f"{case}/out_prefill"], z[f"{case}/out_decode"]], 1)
    relative = lambda got: np.linalg.norm(got - want) / np.linalg.norm(want)
    assert relative(out) < 1e-4
    unpack = lambda words: (words.view(np.uint32)[..., None]
                            >> np.arange(0, 32, 2, dtype=np.uint32)) & np.uint32(3)
    keys = unpack(z[f"{case}/final_k_code"]).reshape(*out.shape[:1], 2, HEAD, -1).swapaxes(2, 3)
    values = unpack(z[f"{case}/final_v_code"]).reshape(*out.shape[:1], 2, -1, HEAD)
    assert state["coded_B"].tolist() == [keys.shape[2]] * len(out)
    assert state["packed_B"].tolist() == [values.shape[2]] * len(out)
    packed, group = state["packed"], kind.group
    got = np.asarray(unpack_words(packed.k_words, 2, group))[:, :, :keys.shape[2]]
    assert (got != keys).mean() <= 0.01
    got = np.asarray(unpack_words(packed.v_words, 2, group))[:, :, :values.shape[2]]
    np.testing.assert_array_equal(got, values)


@pytest.mark.parametrize("case", ["e_post"])
def test_without_compat_the_same_settings_are_another_policy(squat_attention, case):
    """Power: a sketch of the prompt's queries and flushes by the group are seen in the outputs."""
    kind = parse_cache("squat2:block=32,lam=0.001,lam_mode=reference,rank=20,energy_order=False,"
                       "guard=False,ahead=0,scales=float32,shrinks=1.0")
    out, _ = by_kind(squat_attention, case, kind)
    want = squat_attention[f"{case}/out_decode"]
    off = out[:, -want.shape[1]:] - want
    assert np.linalg.norm(off) / np.linalg.norm(want) > 1e-2
