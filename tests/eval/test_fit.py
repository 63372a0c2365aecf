"""Fitting a job to a chip: the mesh, the errors, and real compiles for chips that are not here."""

import importlib.util

import pytest

from jaxlm.cache.parse import parse_cache
from jaxlm.core.aot import collective_bytes
from jaxlm.core.errors import ConfigError, DeviceError
from jaxlm.core.targets import CARDS, describe, target
from jaxlm.eval.fit import fit, mesh_sizes
from jaxlm.models.config import ModelConfig
from jaxlm.models.presets import preset

SMALL = ModelConfig(vocab_size=512, dim=256, num_layers=2, num_heads=8, num_kv_heads=4,
                    head_dim=64, ffn_dim=512)
needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="no libtpu: make test-all installs it"
)


@pytest.mark.parametrize(("devices", "kv_heads", "job", "given", "expected"), [
    (1, 8, "decode", {}, (1, 1, 1)),
    (8, 8, "decode", {}, (1, 1, 8)),
    (64, 8, "prefill", {}, (8, 1, 8)),
    (8, 8, "train", {}, (1, 8, 1)),
    (8, 2, "decode", {"data": 2}, (2, 2, 2)),
    (8, 8, "train", {"tensor": 4}, (1, 2, 4)),
])
def test_mesh_sizes(devices, kv_heads, job, given, expected):
    assert tuple(mesh_sizes(devices, kv_heads, job, **given).values()) == expected


@pytest.mark.parametrize("name", ["v9", "v5e:axb", "h100:x", "h100:0", "cpu"])
def test_an_unknown_target_is_named(name):
    with pytest.raises(DeviceError, match=name):
        target(name)


def test_unknown_jobs_and_sizes():
    with pytest.raises(ConfigError, match="'sing'"):
        fit(SMALL, "sing", "v5e:1x1")
    with pytest.raises(ConfigError, match="batch is 0"):
        fit(SMALL, "decode", "v5e:1x1", batch=0)


def test_cards_are_described_with_their_memory():
    for card in CARDS.values():
        assert f"device_memory_size: {card.memory_bytes}" in describe(card)


def test_collectives_are_counted_by_what_they_produce():
    hlo = """
      a = bf16[8,128]{1,0} all-gather(b), dimensions={0}
      c = (f32[4]{0}, f32[4]{0}) all-reduce-start(d), to_apply=add
      e = f32[4]{0} add(f, g)
    """
    assert collective_bytes(hlo) == 8 * 128 * 2 + 2 * 4 * 4


@needs_libtpu
@pytest.mark.slow
@pytest.mark.parametrize("job", ["decode", "prefill", "train"])
def test_a_small_job_fits_a_tpu(job):
    found = fit(SMALL, job, "v5e:2x2", batch=4, context=256)
    assert found.fits and found.program.flops > 0
    assert found.program.arguments >= found.param_bytes // 4


@needs_libtpu
@pytest.mark.slow
def test_8b_in_bf16_does_not_fit_16_gb():
    found = fit(preset("llama-3.1-8b"), "decode", "v5e:1x1", batch=1, context=4096)
    assert not found.fits
    assert found.program.total > 0.95 * found.target.bytes_per_device


@needs_libtpu
@pytest.mark.slow
def test_a_decode_loop_copies_no_cache():
    config = preset("llama-3.1-8b").replace(num_layers=2, vocab_size=1024)
    found = fit(config, "decode", "v5e:1x1", batch=8, context=4096)
    assert found.program.temporaries < found.cache_bytes / 4


@needs_libtpu
@pytest.mark.slow
@pytest.mark.parametrize("shape", ["1x1", "2x4"])
def test_a_quantised_cache_is_read_and_written_by_kernels(shape):
    config = preset("llama-3.1-8b").replace(num_layers=2, vocab_size=1024, dim=256, ffn_dim=512)
    found = fit(config, "decode", f"v5e:{shape}", batch=8, context=16384,
                cache=parse_cache("squat2"))
    assert found.program.kernels == 2 * config.num_layers  # one attends, one flushes
    assert found.program.temporaries < found.cache_bytes / found.mesh["tensor"] / 2
