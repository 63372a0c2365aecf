"""The checks that a real accelerator runs, and on a CPU that their code works.

`JAX_PLATFORMS= python -m pytest -m gpu` on a machine with an NVIDIA card, `-m tpu` on a TPU.
"""

import argparse

import jax
import pytest

from experiments import device_checks
from pallas_kernels.dispatch import preferred
from pallas_kernels.quant_decode_attention.specs import MODELS, SMALL

DEVICES = [pytest.param("gpu", marks=pytest.mark.gpu), pytest.param("tpu", marks=pytest.mark.tpu)]
BIG = [spec for spec in MODELS if spec.name in device_checks.SPECS]
ARGS = argparse.Namespace(smoke=False, seed=0)


@pytest.fixture
def backend(request):
    """The named platform's Pallas backend, or a skip that says what is missing."""
    found = jax.default_backend()
    if found not in {"gpu": ("gpu", "cuda"), "tpu": ("tpu",)}[request.param]:
        pytest.skip(f"jax uses {found}: needs a {request.param}, and JAX_PLATFORMS= (set, empty)")
    return request.param


@pytest.mark.parametrize("backend", DEVICES, indirect=True)
def test_the_library_gives_what_a_cpu_gives(backend):
    found = device_checks.library(ARGS)
    assert found["answers_within"] and found["logits"]["within"], found


@pytest.mark.parametrize("backend", DEVICES, indirect=True)
@pytest.mark.parametrize("spec", BIG, ids=lambda spec: spec.name)
def test_decode_attention_against_xla(spec, backend):
    if preferred()[0] != backend:
        pytest.skip("this device has no Pallas kernel of decode attention")
    found = device_checks.attention_row(spec, backend)
    assert found["within"], found


@pytest.mark.parametrize("backend", DEVICES[1:], indirect=True)
@pytest.mark.parametrize("spec", BIG, ids=lambda spec: spec.name)
def test_flush_against_xla(spec, backend):
    found = device_checks.flush_row(spec, backend)
    assert found["within"] and found["written"], found


def test_the_comparisons_run_and_can_fail(monkeypatch):
    """In interpret mode, where both kernels are right; then against an attention that is wrong."""
    spec = SMALL[10]  # 8-bit scales: with a center
    found = device_checks.attention_row(spec, "gpu", interpret=True)
    assert found["within"] and 0 < found["error"] < 1e-3
    found = device_checks.flush_row(SMALL[9], "tpu", interpret=True)
    assert found["within"] and found["written"]
    right = device_checks.quant_decode_attention

    def wrong(q, packed, lengths, *args, implementation=None, **kwargs):
        late = lengths // 2 if implementation == "gpu" else lengths
        return right(q, packed, late, *args, implementation="xla", **kwargs)

    monkeypatch.setattr(device_checks, "quant_decode_attention", wrong)
    assert not device_checks.attention_row(spec, "gpu")["within"]


def test_specs_are_named_as_they_are():
    assert len(BIG) == len(device_checks.SPECS)


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="says what a CPU skips")
def test_a_cpu_says_what_it_skips():
    skipped = {"skipped": "no accelerator"}
    assert device_checks.attention_kernel(ARGS) == device_checks.flush_kernel(ARGS) == skipped
