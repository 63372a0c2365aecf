"""The ways to compile for a TPU or an NVIDIA card work here, and say no where the hardware does."""

import jax
import jax.numpy as jnp
import pytest

from tests.targets import compile_for, gpu, tpu

X = jax.ShapeDtypeStruct((256, 256), jnp.bfloat16)


def two_matmuls(x):
    return jax.nn.relu(x @ x) @ x


@pytest.mark.slow
@pytest.mark.parametrize("name", ["v5e:1x1", "v5p:2x2x1", "v6e:1x1", "v4:2x2x1"])
def test_tpu(name):
    compiled = compile_for(tpu(name), two_matmuls, X)
    assert compiled.cost_analysis()["flops"] >= 2 * 2 * 256**3
    assert compiled.memory_analysis().argument_size_in_bytes == 2 * 256**2


@pytest.mark.gpu_target
@pytest.mark.parametrize("card", ["a100", "h100", "h200", "t4"])
def test_gpu(card):
    compiled = compile_for(gpu(card), two_matmuls, X)
    assert compiled.memory_analysis().argument_size_in_bytes == 2 * 256**2


def triton_kernel(x):
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import triton

    def double(x_ref, out_ref):
        out_ref[...] = x_ref[...] * 2

    return pl.pallas_call(
        double,
        grid=(4,),
        in_specs=[pl.BlockSpec((64, 256), lambda i: (i, 0))],
        out_specs=pl.BlockSpec((64, 256), lambda i: (i, 0)),
        out_shape=jax.ShapeDtypeStruct(x.shape, x.dtype),
        compiler_params=triton.CompilerParams(num_warps=4),
    )(x)


@pytest.mark.gpu_target
@pytest.mark.parametrize("card", ["a100", "h100", "h200"])
def test_triton_kernel(card):
    compile_for(gpu(card), triton_kernel, X)


@pytest.mark.gpu_target
def test_t4_refuses_triton():
    with pytest.raises(Exception, match="Ampere"):
        compile_for(gpu("t4"), triton_kernel, X)
