"""Heads side by side: the same attention, codes and scales as each head alone."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.lanes import (
    apart,
    beside,
    matrices_beside,
    own_lanes,
    queries_beside,
    side_by_side,
)
from pallas_kernels.quant import QuantFormat
from pallas_kernels.quant_decode_attention import quant_decode_attention
from pallas_kernels.quant_decode_attention.specs import Spec
from tests.pallas_kernels.test_quant_decode_attention import attend, by_hand, check, inputs
from tests.pallas_kernels.test_quant_flush import differing, flush, make

B24, B42, B88 = (QuantFormat(*bits) for bits in ((2, 4), (4, 2), (8, 8)))
SPECS = (  # 1 to 8 queries a kv head, odd numbers among them; every width of code
    Spec("64", 2, 2, 2, 64, 512, 32, dtype="float32"),
    Spec("gqa3-64-k4v2", 1, 12, 4, 64, 512, 48, B42, "float32"),
    Spec("gqa8-64-int8", 2, 16, 2, 64, 512, 32, QuantFormat(scales="int8"), "float32"),
    Spec("gqa5-96-k2v4", 1, 20, 4, 96, 512, 32, B24, "float32"),
    Spec("96-group64", 1, 4, 4, 96, 1024, 64, QuantFormat(group=64), "float32"),
    Spec("gqa2-96-8bit", 1, 8, 4, 96, 256, 32, B88, "float32"),
    Spec("64-group128-4bit", 2, 2, 2, 64, 1024, 32, QuantFormat(4, 4, 128), "float32"),
)


def packed_beside(packed, many):
    """A state of heads alone as one of heads side by side."""
    stack = lambda x: x.reshape(x.shape[0], x.shape[1] // many, many * x.shape[2], x.shape[3])
    wide = {name: beside(getattr(packed, name), many)
            for name in ("k_words", "k_scale", "k_min", "v_words")}
    center = packed.k_center
    if center is not None:
        center = center.reshape(center.shape[0], center.shape[1] // many, -1)
    return packed._replace(**wide, v_scale=stack(packed.v_scale), v_min=stack(packed.v_min),
                           k_center=center)


QUICK = ((SPECS[0], "tpu"), (SPECS[3], "xla"), (SPECS[6], "gpu"))
slow = pytest.mark.slow  # the kernels' interpreter is slow to compile: a few cases are quick


@pytest.mark.parametrize("spec, backend", [
    *QUICK, *(pytest.param(spec, backend, marks=slow) for spec in SPECS
              for backend in ("tpu", "xla", "gpu") if (spec, backend) not in QUICK)],
    ids=lambda x: getattr(x, "name", x))
def test_attention_equals_that_of_heads_alone(spec, backend):
    """At odd lengths, padded rows and an empty one."""
    q, packed, tails, _ = inputs(spec)
    many = side_by_side(spec.head_dim, spec.kv_heads)
    assert many * spec.head_dim % 128 == 0
    lengths = [spec.capacity - spec.fmt.group - 3, 0][:spec.batch]
    tail_lengths = [spec.window - 1, 0][:spec.batch]
    got = attend(q, packed_beside(packed, many), jnp.asarray(lengths), spec.fmt, *tails,
                 jnp.asarray(tail_lengths), implementation=backend, interpret=True)
    check(got, by_hand(spec, lengths, tail_lengths))


@pytest.mark.parametrize("fmt, head_dim, many", [
    (QuantFormat(), 64, 2), (B24, 96, 4),
    pytest.param(QuantFormat(8, 2, scales="int8", shrinks=(1.0, 0.8)), 64, 2, marks=slow)],
    ids=["2-64", "k2v4-96", "int8-64"])
@pytest.mark.parametrize("backend, compensated", [
    ("xla", True), ("tpu", True), pytest.param("tpu", False, marks=slow),
    pytest.param("reference", True, marks=slow)])
def test_a_flush_writes_what_it_writes_to_heads_alone(backend, fmt, head_dim, many, compensated):
    packed, k, v, lengths, ready, comp = make(fmt, head_dim, kv_heads=many)
    ready = ready.at[1].set(False)
    comp = comp if compensated else None
    run = lambda packed, backend: flush(packed, k, v, lengths, ready, fmt, comp, guard=False,
                                        implementation=backend, interpret=True)
    want = packed_beside(run(packed, "reference"), many)
    got = run(packed_beside(packed, many), backend)
    assert differing(got, want, fmt) <= (1e-4 if backend == "tpu" else 0)
    for name in ("k_scale", "k_min", "v_scale", "v_min"):
        a, b = (np.asarray(getattr(x, name), np.float32) for x in (got, want))
        np.testing.assert_array_equal(a[1], b[1])  # a row that is not ready, bit for bit
        assert (np.abs(a - b) > 1e-2 * np.abs(b) + 1e-6).mean() <= 1e-3, name


def test_what_cannot_lie_side_by_side_is_refused():
    spec = SPECS[0]
    q, packed, tails, _ = inputs(spec)
    packed, rows = packed_beside(packed, 2), jnp.array([32, 32])
    with pytest.raises(NotImplementedError, match="RoPE"):
        quant_decode_attention(q, packed, rows, spec.fmt, rotate=lambda k, at: k)
    with pytest.raises(ValueError, match="side by side"):
        quant_decode_attention(q[:, :1], packed, rows, spec.fmt)
    packed, k, v, lengths, ready, comp = make(QuantFormat())
    with pytest.raises(NotImplementedError, match="guard"):
        flush(packed_beside(packed, 2), k, v, lengths, ready, QuantFormat(), comp, guard=True,
              implementation="tpu", interpret=True)


def test_the_parts_by_definition():
    x = jnp.asarray(np.random.default_rng(0).standard_normal((2, 6, 5, 4)))
    np.testing.assert_array_equal(apart(beside(x, 3), 3), x)
    np.testing.assert_array_equal(beside(x, 3)[1, 1, :, 4:8], x[1, 4])
    y = jnp.asarray(np.random.default_rng(1).standard_normal((2, 6, 7, 4)))
    scores = jnp.einsum("bkgh,bksh->bkgs", queries_beside(y, 3), beside(x, 3))
    np.testing.assert_allclose(scores.reshape(2, 6, 7, 5), jnp.einsum("bkgh,bksh->bkgs", y, x),
                               atol=1e-6)
    np.testing.assert_array_equal(own_lanes(queries_beside(y, 3), 3), y)
    square = jnp.asarray(np.random.default_rng(2).standard_normal((2, 6, 4, 4)))
    moved = beside(x, 3) @ matrices_beside(square, 3)
    np.testing.assert_allclose(apart(moved, 3), x @ square, atol=1e-6)


def test_side_by_side_takes_not_a_byte_more():
    spec = dataclasses.replace(SPECS[0], capacity=1024)
    q, packed, *_ = spec.shapes(2)
    assert packed.k_words.shape == (2, 1, 64, 128) and q.shape == (2, 2, 64)
    assert packed.v_scale.shape == (2, 1, 4, 1024)
    held = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(packed))
    assert held == sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(spec.shapes()[1]))
