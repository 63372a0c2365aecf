"""Decode attention over packed codes: every implementation against an independent definition."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import quant
from pallas_kernels.lanes import side_by_side
from pallas_kernels.quant import QuantFormat
from pallas_kernels.quant_decode_attention import EMPTY_LSE, api, quant_decode_attention
from pallas_kernels.quant_decode_attention import gpu as gpu_kernel
from pallas_kernels.quant_decode_attention.specs import MODELS, SMALL
from tests.targets import compile_for, gpu, tpu

BACKENDS = ["reference", "xla", "tpu", "gpu"]
FIRST = SMALL[1]


@functools.cache
def inputs(spec, seed=0):
    rng = np.random.default_rng(seed)
    normal = lambda *shape: jnp.asarray(rng.standard_normal(shape), jnp.float32)
    lead = (spec.batch, spec.kv_heads)
    k, v = (normal(*lead, spec.capacity, spec.head_dim) + 0.5 for _ in range(2))
    center = quant.key_center(k, jnp.ones((spec.batch, spec.capacity), bool))
    center = center if spec.fmt.scales == "int8" else None
    keys, values = quant.quantise_keys(k, spec.fmt, center), quant.quantise_values(v, spec.fmt)
    packed = quant.pack(keys, values, spec.capacity, spec.fmt, center)
    q = normal(spec.batch, spec.heads, spec.head_dim)
    tails = [normal(*lead, spec.window, spec.head_dim) for _ in range(2)]
    return q, packed, tails, (keys.value, values.value)


def by_hand(spec, lengths, tail_lengths, start=None, softcap=None, rotate=None):
    """float64 softmax over exactly the tokens in use, row by row."""
    q, _, tails, values = inputs(spec)
    q = np.asarray(q, np.float64).reshape(spec.batch, spec.kv_heads, -1, spec.head_dim)
    out, lse = np.zeros(q.shape), np.full(q.shape[:3], EMPTY_LSE)
    for b in range(spec.batch):
        k, v = (np.concatenate([np.asarray(x[b, :, :lengths[b]], np.float64),
                                np.asarray(y[b, :, :tail_lengths[b]], np.float64)], 1)
                for x, y in zip(values, tails, strict=True))
        if rotate is not None:
            k = np.asarray(rotate(k[None], np.arange(k.shape[1])[None]))[0]
        low = 0 if start is None else start[b]
        k, v = k[:, low:], v[:, low:]
        if k.shape[1] == 0:
            continue
        logits = np.einsum("kgh,ksh->kgs", q[b], k) / np.sqrt(spec.head_dim)
        logits = logits if softcap is None else softcap * np.tanh(logits / softcap)
        top = logits.max(-1, keepdims=True)
        weights = np.exp(logits - top)
        total = weights.sum(-1, keepdims=True)
        out[b] = np.einsum("kgs,ksh->kgh", weights / total, v)
        lse[b] = (top + np.log(total))[..., 0]
    shape = (spec.batch, spec.heads)
    return out.reshape(*shape, spec.head_dim), lse.reshape(shape)


attend = jax.jit(quant_decode_attention, static_argnames=(
    "fmt", "softcap", "rotate", "implementation", "interpret"))


def call(spec, backend, lengths, tail_lengths, **kwargs):
    q, packed, tails, _ = inputs(spec)
    return attend(q, packed, jnp.asarray(lengths), spec.fmt, *tails, jnp.asarray(tail_lengths),
                  implementation=backend, interpret=True, **kwargs)


def check(got, want):
    np.testing.assert_allclose(got[0], want[0], atol=2e-4, rtol=2e-4)
    np.testing.assert_allclose(got[1], want[1], atol=2e-4, rtol=2e-5)


def odd_lengths(spec):
    """Group-aligned as caches keep them, and not: nothing may depend on it."""
    lengths = [spec.capacity - spec.fmt.group - 3, spec.fmt.group][:spec.batch]
    return lengths, [spec.window - 1, 7][:spec.batch]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("spec", SMALL, ids=lambda s: s.name)
def test_value_and_lse(spec, backend):
    lengths, tail_lengths = odd_lengths(spec)
    check(call(spec, backend, lengths, tail_lengths), by_hand(spec, lengths, tail_lengths))


@pytest.mark.parametrize("backend", BACKENDS)
def test_empty_rows_give_zeros_and_the_documented_lse(backend):
    out, lse = call(FIRST, backend, [0, 64], [0, 0])
    np.testing.assert_array_equal(out[0], 0)
    np.testing.assert_array_equal(lse[0], np.float32(EMPTY_LSE))
    check((out, lse), by_hand(FIRST, [0, 64], [0, 0]))
    check(call(FIRST, backend, [0, 1024], [3, 0]), by_hand(FIRST, [0, 1024], [3, 0]))


@pytest.mark.parametrize("backend", BACKENDS)
def test_sliding_window_start_and_softcap(backend):
    lengths, tail_lengths = [700, 96], [9, 64]
    for start in ([650, 97], [705, 160], [512, 0]):
        got = call(FIRST, backend, lengths, tail_lengths, start=jnp.asarray(start), softcap=2.0)
        check(got, by_hand(FIRST, lengths, tail_lengths, start, 2.0))
    assert not np.allclose(got[0], call(FIRST, backend, lengths, tail_lengths)[0], atol=1e-3)


@pytest.mark.parametrize("spec", [SMALL[9], FIRST], ids=lambda s: s.name)
def test_lengths_and_starts_within_a_step_of_a_card(spec):
    """Whole steps, the pieces before and after them, and rows that have only one of these."""
    q, packed, tails, _ = inputs(spec)
    run = jax.jit(lambda lengths, tail_lengths, start: quant_decode_attention(
        q, packed, lengths, spec.fmt, *tails, tail_lengths, start=start, implementation="gpu",
        interpret=True))
    group, tile = spec.fmt.group, spec.fmt.tile
    for length, start in ((5 * group + 7, 0), (5 * group + 7, 2 * group + 5),
                          (3 * group, 3 * group + 1), (spec.capacity - 1, group - 1),
                          (tile + 3 * group, tile // 2), (2 * tile, tile - 1)):
        rows = [[length, group + 1], [5, 0], [start, 0]]
        rows = [row[:spec.batch] for row in rows]
        check(run(*map(jnp.asarray, rows)), by_hand(spec, *rows))


def test_what_a_card_rounds(monkeypatch):
    """Cards multiply in bfloat16: near, and not what float32 gives."""
    rows = [900, 100], [3, 20]
    want = by_hand(FIRST, *rows)
    monkeypatch.setitem(api._TABLE, "gpu", functools.partial(
        gpu_kernel.attend, dtype=jnp.bfloat16))
    q, packed, tails, _ = inputs(FIRST)
    got = quant_decode_attention(q, packed, jnp.asarray(rows[0]), FIRST.fmt, *tails,
                                 jnp.asarray(rows[1]), implementation="gpu", interpret=True)
    for x, y in zip(got, want, strict=True):
        assert 1e-4 < np.abs(x - y).max() < 1e-2


@pytest.mark.parametrize("backend", BACKENDS)
def test_unused_slots_are_never_read(backend):
    """Rubbish words, NaN scales beyond the length and NaN tails change nothing."""
    q, packed, tails, _ = inputs(FIRST)
    lengths, tail_lengths = jnp.array([512, 0]), jnp.array([5, 2])
    run = lambda packed, tails: attend(
        q, packed, lengths, FIRST.fmt, *tails, tail_lengths, implementation=backend,
        interpret=True)
    want = run(packed, tails)
    spoiled = packed._replace(k_words=packed.k_words.at[:, :, 32:].set(-1),
                              v_words=packed.v_words.at[:, :, 32:].set(-1),
                              k_scale=packed.k_scale.at[:, :, 16:].set(jnp.nan),
                              k_min=packed.k_min.at[:, :, 16:].set(jnp.nan),
                              v_scale=packed.v_scale.at[..., 512:].set(jnp.nan),
                              v_min=packed.v_min.at[..., 512:].set(jnp.nan))
    tails = [x.at[:, :, 5:].set(jnp.nan) for x in tails]
    for got, expected in zip(run(spoiled, tails), want, strict=True):
        np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize("backend", ["xla", "tpu", "gpu"])
def test_a_row_does_not_see_its_neighbours(backend):
    q, packed, tails, _ = inputs(FIRST)
    lengths, tail_lengths = jnp.array([900, 100]), jnp.array([3, 20])
    both = attend(q, packed, lengths, FIRST.fmt, *tails, tail_lengths,
                  implementation=backend, interpret=True)
    one = jax.tree.map(lambda x: x[1:], packed)
    alone = attend(q[1:], one, lengths[1:], FIRST.fmt, *(x[1:] for x in tails),
                   tail_lengths[1:], implementation=backend, interpret=True)
    np.testing.assert_allclose(both[0][1:], alone[0], atol=1e-6)
    np.testing.assert_allclose(both[1][1:], alone[1], atol=1e-6)


def test_no_tail_and_merge_of_segments_by_lse():
    q, packed, tails, _ = inputs(FIRST)
    lengths, tail_lengths = jnp.array([640, 32]), jnp.array([10, 0])
    whole = call(FIRST, "xla", [640, 32], [10, 0])
    codes = quant_decode_attention(q, packed, lengths, FIRST.fmt, implementation="xla")
    tail = quant_decode_attention(q, packed, jnp.zeros(2, jnp.int32), FIRST.fmt, *tails,
                                  tail_lengths, implementation="xla")
    lse = jnp.logaddexp(codes[1], tail[1])
    out = sum(o * jnp.exp(l - lse)[..., None] for o, l in (codes, tail))
    np.testing.assert_allclose(out, whole[0], atol=1e-5)
    np.testing.assert_allclose(lse, whole[1], atol=1e-5)


@pytest.mark.parametrize("backend", ["reference", "xla"])
def test_keys_kept_before_rope(backend):
    def rotate(k, positions):
        angle = positions[:, None, :, None] * 10.0 ** (-jnp.arange(64) / 16)
        left, right = k[..., :64], k[..., 64:]
        cos, sin = jnp.cos(angle), jnp.sin(angle)
        return jnp.concatenate([left * cos - right * sin, right * cos + left * sin], -1)

    got = call(FIRST, backend, [800, 33], [11, 1], rotate=rotate)
    want = by_hand(FIRST, [800, 33], [11, 1], rotate=rotate)
    np.testing.assert_allclose(got[0], want[0], atol=2e-3)
    with pytest.raises(NotImplementedError, match="xla"):
        call(FIRST, "tpu", [800, 33], [11, 1], rotate=rotate)


def test_xla_never_holds_the_dequantised_cache():
    spec = dataclasses.replace(FIRST, capacity=8192, batch=1)
    q, packed, rows, k_tail, v_tail, tail_rows = spec.shapes()
    run = jax.jit(functools.partial(quant_decode_attention, implementation="xla"),
                  static_argnames="fmt")
    memory = run.lower(q, packed, rows, spec.fmt, k_tail, v_tail, tail_rows).compile()
    temporary = memory.memory_analysis().temp_size_in_bytes
    dense = 2 * 4 * spec.kv_heads * spec.capacity * spec.head_dim
    assert temporary < dense / 4


def test_dispatch_falls_through_and_is_strict_when_named():
    lengths, tails = [64, 64], [1, 1]
    rotate = lambda k, positions: k
    got = call(FIRST, ("tpu", "xla"), lengths, tails, rotate=rotate)
    check(got, by_hand(FIRST, lengths, tails))
    with pytest.raises(NotImplementedError, match="tpu: keys before RoPE"):
        call(FIRST, "tpu", lengths, tails, rotate=rotate)
    with pytest.raises(ValueError, match="cuda"):
        call(FIRST, "cuda", lengths, tails)


def test_bad_shapes_are_refused():
    q, packed, tails, _ = inputs(FIRST)
    lengths = jnp.array([64, 64])
    for bad in (
        lambda: quant_decode_attention(q[:, :3], packed, lengths, FIRST.fmt),
        lambda: quant_decode_attention(q, packed, lengths, QuantFormat(4, 2)),
        lambda: quant_decode_attention(q, packed, lengths, QuantFormat(group=64)),
        lambda: quant_decode_attention(q, packed, lengths[:1], FIRST.fmt),
        lambda: quant_decode_attention(q, packed, lengths, FIRST.fmt, tails[0]),
        lambda: quant_decode_attention(q, packed, lengths, FIRST.fmt, tails[0][:, :, :, :64],
                                       tails[1], lengths),
        lambda: quant_decode_attention(q, packed._replace(k_center=jnp.zeros((2, 2, 128))),
                                       lengths, FIRST.fmt),
    ):
        with pytest.raises(ValueError, match="got|together"):
            bad()


CHIPS = ["v5e:1x1", "v5p:2x2x1", "v6e:1x1"]


@pytest.mark.slow
@pytest.mark.parametrize("chip", CHIPS)
@pytest.mark.parametrize("spec", MODELS, ids=lambda s: s.name)
def test_compiles_for_tpu(chip, spec):
    """By the real Mosaic compiler; no temporary is as large as the dequantised cache."""
    topology = tpu(chip)
    run = lambda q, packed, *rows: quant_decode_attention(
        q, packed, rows[0], spec.fmt, *rows[1:], implementation="tpu")
    many = side_by_side(spec.head_dim, spec.kv_heads)
    arguments = spec.shapes(many)
    compiled = compile_for(topology, run, *arguments)
    memory = compiled.memory_analysis()
    logical = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(arguments))
    # as many bytes as the arrays have, but for 5% where narrow tails are padded
    assert logical <= memory.argument_size_in_bytes < 1.05 * logical
    words = re.escape(f"s32[{','.join(map(str, arguments[1].k_words.shape))}]")
    assert not re.findall(words + r"\S* copy\(", compiled.as_text())
    dense = 2 * 2 * spec.batch * spec.kv_heads * spec.capacity * spec.head_dim
    assert memory.temp_size_in_bytes < dense / 4


@pytest.mark.gpu_target
@pytest.mark.parametrize("card", ["a100", "h100"])
@pytest.mark.parametrize("spec", MODELS, ids=lambda s: s.name)
def test_compiles_for_gpu(card, spec):
    run = lambda q, packed, *rows: quant_decode_attention(
        q, packed, rows[0], spec.fmt, *rows[1:], implementation="gpu")
    compiled = compile_for(gpu(card), run, *spec.shapes())
    assert compiled.memory_analysis().argument_size_in_bytes > 0
