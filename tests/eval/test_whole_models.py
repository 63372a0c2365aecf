"""Whole models of published sizes, compiled for chips that are not here: TPUs with libtpu,
NVIDIA cards by `make test-gpu-targets`. A kernel is asked for by name, so that a silent way round
it fails.
"""

import importlib.util
import os
from pathlib import Path

import jax.numpy as jnp
import pytest

from experiments import fit_table
from jaxlm.cache.parse import parse_cache
from jaxlm.eval.fit import Fit, fit
from jaxlm.models.lm import LM, count_params
from jaxlm.models.presets import preset

GIB = 2**30
needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="no libtpu: make test-all installs it"
)
needs_cuda = pytest.mark.skipif(
    "JAX_SKIP_CUDA_CONSTRAINTS_CHECK" not in os.environ,
    reason="run by make test-gpu-targets, which sets what compiling without a GPU needs",
)


def check(found: Fit, model: str, bytes_each: int, fits: bool) -> None:
    """The compiler's figures are those of this model, and its verdict is the expected one."""
    assert found.fits is fits, (found.program, found.target.bytes_per_device)
    assert found.param_bytes == bytes_each * count_params(LM(preset(model)))
    devices = len(found.target.devices)
    assert found.program.arguments >= (found.param_bytes + found.cache_bytes) / devices * 0.95
    assert found.program.flops > 0 and found.program.bytes_accessed > 0


@needs_libtpu
@pytest.mark.slow
@pytest.mark.parametrize(("model", "chip", "cache", "fits"), [
    ("qwen2.5-1.5b", "v5e:1x1", "dense", True),
    ("qwen2.5-1.5b", "v5e:1x1", "squat2:implementation=tpu", True),
    ("qwen2.5-1.5b", "v5p:2x2x1", "squat2:implementation=tpu", True),
    ("qwen2.5-1.5b", "v6e:1x1", "kivi2:implementation=tpu", True),
    ("llama-3.1-8b", "v5e:2x2", "squat2:implementation=tpu", True),
    ("llama-3.1-8b", "v6e:1x1", "squat2:implementation=tpu", True),
    ("gemma-2-2b", "v6e:1x1", "dense", True),  # windows, caps, heads of 256 channels
])
def test_decode_for_a_tpu(model, chip, cache, fits):
    found = fit(preset(model), "decode", chip, batch=8, context=8192, cache=parse_cache(cache))
    check(found, model, 2, fits)
    here = found.cache_bytes / len(found.target.devices)
    assert found.program.temporaries < max(here, GIB / 2)  # no second copy of what is cached


@needs_libtpu
@pytest.mark.slow
@pytest.mark.parametrize(("chip", "job", "fits"), [
    ("v5e:1x1", "prefill", True), ("v5p:2x2x1", "prefill", True), ("v6e:1x1", "prefill", True),
    ("v5e:1x1", "train", False), ("v5e:2x2", "train", True), ("v5p:2x2x1", "train", True),
    ("v6e:2x2", "train", True),
])
def test_prefill_and_train_for_a_tpu(chip, job, fits):
    """AdamW of 1.5B parameters holds 18 GB: too much for one v5e, not for four."""
    found = fit(preset("qwen2.5-1.5b"), job, chip, batch=4, context=1024)
    check(found, "qwen2.5-1.5b", 4 if job == "train" else 2, fits)


@needs_libtpu
@pytest.mark.slow
@pytest.mark.parametrize(("job", "chip", "limit_s"), [
    ("decode", "v5e:2x4", 25), ("train", "v5p:2x2x2", 125),  # 5 s of each: the process's start
])
def test_the_compile_of_an_8b_takes_bounded_processor_time(job, chip, limit_s, capsys):
    """32 layers; 10 s and 60 s of wall time on two quiet cores are the aim."""
    found = fit_table.compile_cell(("llama-3.1-8b", job, "dense", chip), Path("unused"))
    wall, used = found["compile_seconds"], found["cpu_seconds"]  # of the whole process
    with capsys.disabled():
        print(f" {job}: {wall:.1f} s wall, {used:.1f} s processor, load {found['load']}")
    assert found["refused"] is None  # the compiler went all the way
    assert used < limit_s


@needs_cuda
@pytest.mark.gpu_target
@pytest.mark.parametrize(("card", "cache"), [
    ("h100", "dense"), ("h100", "squat2:implementation=gpu"), ("a100", "kivi2:implementation=gpu"),
    ("t4", "dense"), ("t4", "squat2"),  # a T4 has neither Triton nor bfloat16
])
def test_decode_for_a_card(card, cache):
    dtype = jnp.float16 if card == "t4" else jnp.bfloat16
    found = fit(preset("qwen2.5-1.5b"), "decode", card, batch=4, context=4096, dtype=dtype,
                cache=parse_cache(cache))
    check(found, "qwen2.5-1.5b", 2, True)
    assert found.program.temporaries < max(found.cache_bytes, GIB / 2)


@needs_cuda
@pytest.mark.gpu_target
@pytest.mark.parametrize(("card", "job", "fits"), [
    ("h100", "prefill", True), ("a100", "prefill", True), ("t4", "prefill", True),
    ("h100", "train", True), ("a100", "train", True), ("t4", "train", False),
])
def test_prefill_and_train_for_a_card(card, job, fits):
    dtype = jnp.float16 if card == "t4" else jnp.bfloat16
    found = fit(preset("qwen2.5-1.5b"), job, card, batch=4, context=1024, dtype=dtype)
    check(found, "qwen2.5-1.5b", 4 if job == "train" else 2, fits)
