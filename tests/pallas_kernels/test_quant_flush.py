"""The flush: every implementation against unpack, insert, pack again."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.core.aot import _text
from pallas_kernels import quant, squat
from pallas_kernels.lanes import side_by_side
from pallas_kernels.quant import QuantFormat, init_packed, unpack_words
from pallas_kernels.quant_flush import quant_flush
from tests.targets import compile_for, gpu, tpu

FORMATS = [QuantFormat(), QuantFormat(8, 2, scales="int8", shrinks=(1.0, 0.8)),
           QuantFormat(4, 4, 64, "float32", (1.0,))]
flush = jax.jit(quant_flush, static_argnames=("fmt", "block", "guard", "implementation",
                                              "interpret"))


def make(fmt, head_dim=64, seed=0, kv_heads=2):
    """A half-full state of random codes, new tokens, and a compensation."""
    rng = np.random.default_rng(seed)
    normal = lambda *shape: jnp.asarray(rng.standard_normal(shape), jnp.float32)
    batch, size = 3, 2 * fmt.tile
    x, y = normal(2, batch, kv_heads, size, head_dim)
    center = jnp.full((batch, kv_heads, head_dim), 0.1) if fmt.scales == "int8" else None
    packed = quant.pack(quant.quantise_keys(x, fmt, center), quant.quantise_values(y, fmt), size,
                        fmt, center)
    k, v = normal(2, batch, kv_heads, fmt.group, head_dim) * 2
    queries = normal(batch, 40, 2 * kv_heads, head_dim) * jnp.linspace(0.5, 2, head_dim)
    gram = squat.query_gram(queries, kv_heads)
    lengths = jnp.array([0, fmt.group, size - fmt.group])
    return packed, k, v, lengths, jnp.array([True, True, True]), squat.compensation(gram, 16)


def differing(got, want, fmt):
    """Share of codes that differ, keys and values."""
    unpack = lambda p: np.concatenate([np.asarray(unpack_words(w, bits, fmt.group)).ravel()
                                       for w, bits in ((p.k_words, fmt.k_bits),
                                                       (p.v_words, fmt.v_bits))])
    return (unpack(got) != unpack(want)).mean()


@pytest.mark.parametrize("compensated", [False, True])
@pytest.mark.parametrize("fmt, head_dim", [*((fmt, 64) for fmt in FORMATS), (FORMATS[0], 128),
                                           (FORMATS[1], 96), (FORMATS[2], 256)],
                         ids=lambda f: getattr(f, "scales", f))
@pytest.mark.parametrize("backend", ["xla", "tpu"])
def test_against_the_definition(backend, fmt, head_dim, compensated):
    packed, k, v, lengths, ready, comp = make(fmt, head_dim)
    comp = comp if compensated else None
    want = flush(packed, k, v, lengths, ready, fmt, comp, implementation="reference")
    got = flush(packed, k, v, lengths, ready, fmt, comp, implementation=backend, interpret=True)
    assert differing(got, want, fmt) <= (0 if backend == "xla" else 1e-4)
    # the flush did write: nearly every code of the new tokens is another than before
    assert differing(want, packed, fmt) > 0.3 / (2 * fmt.tile // fmt.group)
    for name in ("k_scale", "k_min", "v_scale", "v_min"):
        a, b = (np.asarray(getattr(p, name), np.float32) for p in (got, want))
        wrong = np.abs(a - b) > 1e-2 * np.abs(b) + 1e-6
        assert wrong.mean() <= (0 if backend == "xla" else 1e-3), name


@pytest.mark.parametrize("backend", ["reference", "xla", "tpu"])
def test_rows_that_are_not_ready_stay_bit_for_bit(backend):
    fmt = QuantFormat()
    packed, k, v, lengths, _, comp = make(fmt)
    ready = jnp.array([False, True, False])
    got = flush(packed, k, v, lengths, ready, fmt, comp, implementation=backend, interpret=True)
    for before, after in zip(packed[:6], got[:6], strict=True):
        np.testing.assert_array_equal(before[::2], after[::2])
        assert not np.array_equal(before[1], after[1])


def test_flushes_in_turn_equal_one_packing():
    """Group after group through the flush gives the words that `pack` makes of all at once."""
    fmt = QuantFormat(2, 4)
    x, y = jnp.asarray(np.random.default_rng(5).standard_normal((2, 1, 2, 192, 64)), jnp.float32)
    state = init_packed(1, 2, 512, 64, fmt)
    ready = jnp.array([True])
    for start in range(0, 192, 64):  # two groups at once
        part = slice(start, start + 64)
        state = flush(state, x[:, :, part], y[:, :, part], jnp.array([start]), ready, fmt,
                      implementation="xla")
    want = quant.pack(quant.quantise_keys(x, fmt), quant.quantise_values(y, fmt), 512, fmt)
    for got, expected in zip(state[:6], want[:6], strict=True):
        np.testing.assert_array_equal(got, expected)


def test_bad_shapes_are_refused():
    fmt = QuantFormat()
    packed, k, v, lengths, ready, comp = make(fmt)
    for arguments in ((k[:, :, :5], v[:, :, :5], lengths, ready, fmt),
                      (k, v[:, :1], lengths, ready, fmt), (k, v, lengths[:1], ready, fmt),
                      (k, v, lengths, ready, fmt, comp._replace(matrix=comp.matrix[:1]))):
        with pytest.raises(ValueError, match="got"):
            quant_flush(packed, *arguments)


def shapes(fmt, head_dim, capacity=65536, batch=8, kv_heads=8):
    """Of a state that a TPU's vector memory cannot hold: a smaller one is carried there whole."""
    many = side_by_side(head_dim, kv_heads)  # as caches on a TPU keep them
    packed = jax.eval_shape(lambda: init_packed(batch, kv_heads, capacity, head_dim, fmt, many))
    new = jax.ShapeDtypeStruct((batch, kv_heads, fmt.group, head_dim), jnp.bfloat16)
    rows = jax.ShapeDtypeStruct((batch,), jnp.int32)
    gram = jax.ShapeDtypeStruct((batch, kv_heads, head_dim, head_dim), jnp.float32)
    comp = jax.eval_shape(lambda g: squat.compensation(g), gram)
    return packed, new, new, rows, jax.ShapeDtypeStruct((batch,), jnp.bool), comp


def copies(text, words):
    """Copies of an array of the codes' shape, plain or asynchronous, in a compiled program."""
    shape = re.escape(f"s32[{','.join(map(str, words.shape))}]")
    assert re.search(shape + r"\S* parameter\(", text)
    return re.findall(rf"{shape}\S* copy\(|{shape}[^=]* copy-start\(", text)


@pytest.mark.slow
@pytest.mark.parametrize("chip", ["v5e:1x1", "v5p:2x2x1", "v6e:1x1"])
@pytest.mark.parametrize("head_dim", [64, 96, 128, 256])
@pytest.mark.parametrize("fmt", [QuantFormat(), QuantFormat(2, 4), QuantFormat(8, 8),
                                 QuantFormat(group=64), QuantFormat(scales="int8")],
                         ids=lambda f: f"{f.k_bits}{f.v_bits}{f.group}{f.scales}")
@pytest.mark.parametrize("backend", ["tpu", "xla"])
def test_compiles_for_tpu_in_place(chip, head_dim, fmt, backend, tmp_path):
    if backend == "xla" and (head_dim != 128 or fmt != QuantFormat()):
        pytest.skip("one shape is enough for plain XLA")
    run = lambda packed, k, v, lengths, ready, comp: quant_flush(
        packed, k, v, lengths, ready, fmt, comp, guard=False, implementation=backend)
    arguments = shapes(fmt, head_dim)
    compiled = compile_for(tpu(chip), run, *arguments, donate=(0,), dump=tmp_path)
    held = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(arguments[0]))
    assert compiled.memory_analysis().alias_size_in_bytes >= held
    assert copies(_text(compiled, tmp_path), arguments[0].k_words) == []
    if backend == "xla":  # what is not donated must be copied, and the copy is seen
        kept = compile_for(tpu(chip), run, *arguments, dump=tmp_path / "kept")
        assert copies(_text(kept, tmp_path / "kept"), arguments[0].k_words)


@pytest.mark.gpu_target
@pytest.mark.parametrize("card", ["a100", "h100"])
def test_compiles_for_gpu_in_place(card):
    """There is no Triton flush: a card runs the plain XLA one, which must not copy the codes."""
    fmt = QuantFormat()
    run = lambda packed, k, v, lengths, ready, comp: quant_flush(
        packed, k, v, lengths, ready, fmt, comp, guard=False, implementation="xla")
    arguments = shapes(fmt, 128)
    memory = compile_for(gpu(card), run, *arguments, donate=(0,)).memory_analysis()
    held = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(arguments[0]))
    assert memory.alias_size_in_bytes >= held
    assert memory.temp_size_in_bytes < arguments[0].k_words.size * 4


def test_xla_flush_on_cpu_holds_no_second_copy_of_the_codes():
    fmt = QuantFormat()
    packed, *rest, comp = shapes(fmt, 64, 65536, 2, 2)
    run = jax.jit(functools.partial(quant_flush, implementation="xla"), static_argnames="fmt",
                  donate_argnums=0)
    memory = run.lower(packed, *rest, fmt, comp).compile().memory_analysis()
    assert memory.alias_size_in_bytes >= packed.k_words.size * 4 * 2
    assert memory.temp_size_in_bytes < packed.k_words.size * 4


def test_the_default_passes_over_kernels_that_the_operation_lacks(monkeypatch):
    """A card whose attention has a Triton kernel and whose flush has none."""
    monkeypatch.setattr("pallas_kernels.dispatch.preferred", lambda: ("gpu", "xla"))
    fmt = QuantFormat()
    arguments = make(fmt)
    got = quant_flush(*arguments[:5], fmt)
    want = quant_flush(*arguments[:5], fmt, implementation="xla")
    np.testing.assert_array_equal(got.k_words, want.k_words)
