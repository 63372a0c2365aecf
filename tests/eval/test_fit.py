"""Fitting a job to a chip: the mesh, the errors, and real compiles for chips that are not here."""

import importlib.util

import jax
import jax.numpy as jnp
import pytest
import yaml

from jaxlm.cache.dense import Dense
from jaxlm.cache.parse import parse_cache
from jaxlm.cli.fit import one_line, train_settings
from jaxlm.core.aot import _text
from jaxlm.core.count import count
from jaxlm.core.errors import ConfigError, DeviceError
from jaxlm.core.hlo import collective_bytes
from jaxlm.core.mesh import make_mesh
from jaxlm.core.targets import CARDS, Target, describe, target
from jaxlm.eval.fit import (
    JOBS,
    TRAIN,
    _decode,
    _prefill,
    _train,
    _tuned,
    default_dtype,
    fit,
    mesh_sizes,
    tuned_program,
)
from jaxlm.hf.bundle import load
from jaxlm.models.config import ModelConfig
from jaxlm.models.lm import LM, count_params
from jaxlm.models.presets import preset
from jaxlm.train import Config, loop
from jaxlm.train.config import from_dict
from jaxlm.train.optimizers import make_optimizer
from jaxlm.train.osft import Osft
from jaxlm.train.setup import mesh_of, sources, start_params, training_lm
from jaxlm.train.step import TrainState
from jaxlm.train.subspace import blank
from jaxlm.train.tuning import Full
from tests.train.small import settings

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
    (16, 8, "osft", {}, (1, 4, 4)),
    (512, 8, "osft", {}, (1, 64, 8)),
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


def test_no_job_is_longer_than_what_the_model_reads():
    for job in JOBS:
        with pytest.raises(ConfigError, match="context is 2049; the model reads at most 2048"):
            fit(SMALL, job, "v5e:1x1", context=2049)


def test_what_a_job_makes_no_use_of_is_refused():
    for job in TRAIN:
        with pytest.raises(ConfigError, match=f"cache is Squat.*job '{job}' keeps none"):
            fit(SMALL, job, "v5e:1x1", cache=parse_cache("squat2"))
    for job in ("decode", "prefill", "train"):
        with pytest.raises(ConfigError, match=f"unfreeze_ratio.*job '{job}' makes no use"):
            fit(SMALL, job, "v5e:1x1", tuning=Osft())


@pytest.mark.parametrize(("family", "job", "chip", "expected"), [
    ("qwen2", "decode", "t4", "float16"), ("qwen2", "prefill", "T4:2", "float16"),
    ("gemma2", "decode", "t4", "float32"), ("gemma3_text", "prefill", "t4", "float32"),
    ("qwen2", "train", "t4", "float32"), ("qwen2", "osft", "t4", "float32"),
    ("gemma2", "decode", "v5e:1x1", "bfloat16"), ("qwen2", "train", "a100", "bfloat16"),
])
def test_a_t4_is_asked_for_no_bfloat16(family, job, chip, expected):
    assert default_dtype(SMALL.replace(family=family), job, chip) == expected


@pytest.mark.parametrize(("given", "expected"), [
    ({}, ("float16", 2048)), ({"dtype": jnp.bfloat16, "context": 64}, ("bfloat16", 64)),
    ({"dtype": "float32"}, ("float32", 2048)),
], ids=str)
def test_what_is_not_said_is_the_chip_s_and_the_model_s(given, expected, monkeypatch):
    """A job's own compilation is stood in for: what reaches it is what is said of it."""
    reached = []
    here = Target("t4", tuple(jax.devices()[:1]), 2**34)
    monkeypatch.setattr("jaxlm.eval.fit.target", lambda name: here)
    stand_in = lambda *args: reached.append(args) or (None, 1, 1)
    monkeypatch.setattr("jaxlm.eval.fit._decode", stand_in)
    found = fit(SMALL, "decode", "t4", **given)
    assert (found.dtype, found.context) == expected
    *_, context, _, dtype = reached[0]
    assert (dtype, context) == (jnp.dtype(expected[0]), expected[1])


@pytest.mark.parametrize("axis", ["data", "fsdp", "tensor"])
@pytest.mark.parametrize("size", [0, -1, 2.0])
def test_a_mesh_axis_is_a_count(axis, size):
    with pytest.raises(ConfigError, match=f"mesh axis '{axis}' is {size}; expected a whole number"):
        mesh_sizes(4, 4, "decode", **{axis: size})


@pytest.mark.parametrize("given", [{"data": 3}, {"fsdp": 8}, {"tensor": 3}], ids=str)
@pytest.mark.parametrize("job", ["decode", "train", "osft"])
def test_axes_that_do_not_make_up_the_devices_are_named(job, given):
    sizes = mesh_sizes(4, 4, job, **given)
    with pytest.raises(DeviceError, match=f"'{next(iter(given))}': {next(iter(given.values()))}"):
        make_mesh(**sizes, devices=jax.devices()[:4])


@needs_libtpu
@pytest.mark.slow
def test_a_chip_of_two_devices_has_half_its_memory_in_each():
    chips = target("tpu7x:2x2x1")
    assert len(chips.devices) * chips.bytes_per_device == 4 * 192 * 2**30


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


@pytest.mark.parametrize(("line", "expected"), [
    ("a = (f32[2]{0}, f32[8]{0}) all-gather-start(b)", 32),
    ("a = ((f32[2], bf16[4]), (f32[8]{0}, bf16[16])) all-gather-start(b, c)", 64),
    ("a = (f32[8]{0}, f32[8]{0}, u32[], u32[]) collective-permute-start(b)", 32),
    ("a = f32[8]{0} all-gather-done(b)", 0),
    ("a = f32[8] all-gather(b), channel_id=3\nc = f32[8] all-gather(d), channel_id=3", 32),
    ("a = f32[8] all-gather(b), channel_id=3\nc = f32[8] all-gather(d), channel_id=4", 64),
    ("a = (f32[1], f32[1], f32[1], f32[1], f32[1], /*index=5*/f32[1]) all-reduce(b)", 24),
])
def test_of_an_asynchronous_collective_only_the_result_counts(line, expected):
    assert collective_bytes(line) == expected


LOOP = """
%sum (p: f32[8]) -> f32[8] {
  %r = f32[8]{0} all-reduce(%p), to_apply=%add
}

%body (t: (s32[], f32[8])) -> (s32[], f32[8]) {
  %f = f32[8]{0} fusion(%t), kind=kCustom, calls=%sum
}

%cond (t: (s32[], f32[8])) -> pred[] {
  %n = s32[]{:T(128)} constant(7)
  ROOT %lt = pred[] compare(%i, %n), direction=LT
}

ENTRY %main (x: f32[8]) -> f32[8] {
  %w = (s32[], f32[8]) while(%x), condition=%cond, body=%body SAYS
}
"""


@pytest.mark.parametrize(("hlo", "trips"), [
    (LOOP, 7),
    (LOOP.replace("SAYS", ', backend_config={"known_trip_count":{"n":"5"}}'), 5),
    (LOOP.replace("ROOT %lt", "%lt").replace("}\n\nENTRY", "  ROOT %a = and(%lt, %b)\n}\n\nENTRY"),
     1),
])
def test_a_collective_in_a_loop_counts_by_its_trips(hlo, trips):
    assert collective_bytes(hlo) == 32 * trips


def test_of_branches_the_one_made_for_the_platform_counts():
    def either(x):
        return jax.lax.platform_dependent(x, cpu=lambda x: x @ x @ x, default=lambda x: x @ x)

    traced = jax.make_jaxpr(either)(jnp.ones((4, 4)))
    assert (count(traced, "cpu").flops, count(traced, "tpu").flops) == (256, 128)
    data = jax.make_jaxpr(lambda flag, x: jax.lax.cond(flag, lambda x: x @ x, lambda x: x, x))
    assert count(data(True, jnp.ones((4, 4))), "cpu").flops == 128


DEEP = SMALL.replace(num_layers=6, tie_embeddings=True)  # each parameter is in one product


@pytest.mark.parametrize(("job", "lowest", "highest"), [
    (_train, 6, 9), (_prefill, 2 * 0.9, 3), (_decode, 2, 3),
])
def test_the_work_of_a_job_follows_from_its_parameters(job, lowest, highest):
    """2 FLOPs a parameter and token, 6 to train, 8 with blocks recomputed; attention on top."""
    program, _, _ = job(DEEP, make_mesh(devices=jax.devices()[:1]), 2, 64, Dense(), jnp.float32)
    tokens = 2 * (1 if job is _decode else 64)
    work = count_params(LM(DEEP)) * tokens
    assert lowest * work < program.flops < highest * work
    assert program.flops_source == "compiler" and program.bytes_accessed > 0


def flops_at_8b(tuning, rows):
    """Of a train step of Llama 3.1 8B over rows of 2,048 tokens, by the traced program."""
    lm = LM(preset("llama-3.1-8b"), remat=True, mesh=make_mesh(devices=jax.devices()[:1]))
    step, args, _ = tuned_program(tuning, lm, rows, 2048)
    return count(jax.jit(step).trace(*args).jaxpr, "tpu").flops


def test_what_osft_adds_to_an_8b_step():
    """Once a step, so little of 131,072 tokens, and eight times that of 16,384."""
    for rows, low, high in ((64, 1.005, 1.05), (8, 1.04, 1.15)):
        ratio = flops_at_8b(Osft(), rows) / flops_at_8b(Full(), rows)
        assert low < ratio < high


@pytest.mark.parametrize("form", ["update", pytest.param("coordinates", marks=pytest.mark.slow)])
def test_an_osft_job_compiles_what_the_trainer_runs(form):
    mesh = make_mesh(fsdp=4, tensor=2)
    program, held, _ = _tuned(Osft(form), SMALL, mesh, 8, 64, Dense(), jnp.float32)
    assert program.flops > 0 and program.collective_bytes > 0
    assert held / 8 < program.arguments < 3.5 * held / 8  # the moments, and what is on every device


def test_an_osft_job_reads_the_batch_that_the_trainer_makes(tmp_path):
    config = settings(tmp_path)
    made = sources(load("tiny"), config, None).train[0]
    lm = LM(SMALL, mesh=make_mesh(devices=jax.devices()[:1]))
    _, (_, _, batch), _ = tuned_program(Full(), lm, config.rows, config.data.window)
    of = lambda tree: {name: (x.shape, x.dtype) for name, x in tree.items()}
    assert of(batch) == of(made) and "segments" in batch


@pytest.mark.parametrize("form", ["update", pytest.param("coordinates", marks=pytest.mark.slow)])
def test_the_settings_that_are_printed_give_the_step_that_is_compiled(form):
    """The trainer's own step under them has as many FLOPs and bytes, in as many loops."""
    mesh = make_mesh(fsdp=4, tensor=2)
    step, args, _ = tuned_program(Osft(form, 0.25), LM(SMALL, remat=True, mesh=mesh), 8, 64)
    line = one_line(train_settings(Osft(form, 0.25), {"data": 1, "fsdp": 4, "tensor": 2}, 8, 64,
                                   "bfloat16"))
    config = from_dict(Config, yaml.safe_load(line))
    bundle = load("tiny").replace(lm=LM(SMALL), params=LM(SMALL).shapes(jnp.bfloat16))
    params = jax.eval_shape(lambda tree: start_params(bundle.replace(params=tree), config),
                            bundle.params)
    key = jax.eval_shape(lambda: jax.random.key(0))
    trained, frozen = jax.eval_shape(
        lambda tree, key: config.tuning.start(LM(SMALL), tree, key, decompose=blank), params, key)
    chain = config.tuning.wrap(make_optimizer(config.optimizer, 1))
    state = TrainState(trained, jax.eval_shape(chain.init, trained), args[0].step)
    assert rows_of(args[2]) == {(config.rows, config.data.window)}
    assert mesh_of(config).shape == mesh.shape
    own = loop._step(training_lm(bundle, config, mesh), config.tuning, config.optimizer,
                     config.accumulate, jnp.dtype(config.dtype))
    wanted = count(jax.make_jaxpr(step)(*args), "tpu")
    assert count(jax.make_jaxpr(own)(state, frozen, args[2], key), "tpu") == wanted


def rows_of(batch):
    """Rows and inputs of a batch."""
    return {(x.shape[0], x.shape[1] - (name == "tokens")) for name, x in batch.items()}


def check_shared(devices):
    """A train step over fsdp takes a quarter of the work and room of one device's."""
    size = 64, 48  # rows, tokens
    one = _train(SMALL, make_mesh(devices=devices[:1]), *size, Dense(), jnp.float32)[0]
    four = _train(SMALL, make_mesh(fsdp=4, devices=devices[:4]), *size, Dense(), jnp.float32)[0]
    assert four.flops < 0.3 * one.flops
    assert four.temporaries < 0.45 * one.temporaries  # a gathered layer is in it too
    assert four.collective_bytes > 0


def test_a_train_step_over_fsdp_shares_the_rows():
    check_shared(jax.devices())


@needs_libtpu
@pytest.mark.slow
def test_a_train_step_over_fsdp_shares_the_rows_of_a_slice():
    check_shared(list(target("v5e:2x2").devices))


@needs_libtpu
@pytest.mark.slow
@pytest.mark.parametrize("job", ["decode", "prefill", "train", "osft"])
def test_a_small_job_fits_a_tpu(job):
    found = fit(SMALL, job, "v5e:2x2", batch=4, context=256)
    assert found.fits and found.program.flops > 0
    assert found.program.arguments >= found.param_bytes // 4


def unreadable(self):
    """What jaxlib says of an operation that it does not know."""
    raise jax.errors.JaxRuntimeError("INTERNAL")


def test_a_program_that_jax_cannot_print_is_read_from_the_dump(tmp_path):
    compiled = type("Compiled", (), {"as_text": unreadable})()
    assert _text(compiled, tmp_path) is None
    for name in ("before_optimizations", "after_codegen", "after_optimizations"):
        (tmp_path / f"module_1.jit_step.{name}.txt").write_text(name)
    assert _text(compiled, tmp_path) == "after_codegen"


@needs_libtpu
@pytest.mark.slow
def test_a_dump_has_the_collectives_that_jax_prints(monkeypatch):
    measure = lambda: fit(SMALL, "osft", "v5p:2x2x1", batch=4, context=256).program
    printed = measure()
    monkeypatch.setattr(jax.stages.Compiled, "as_text", unreadable)
    dumped = measure()
    assert dumped.collective_bytes == printed.collective_bytes > 0
    assert dumped.kernels == printed.kernels


@needs_libtpu
@pytest.mark.slow
def test_8b_in_bf16_does_not_fit_16_gb():
    found = fit(preset("llama-3.1-8b"), "decode", "v5e:1x1", batch=1, context=4096)
    assert not found.fits
    assert found.program.total > 0.95 * found.target.bytes_per_device
    assert found.program.temporaries > 0  # the compiler's message is understood


@needs_libtpu
@pytest.mark.slow
@pytest.mark.parametrize(("model", "chips", "rows"), [
    ("llama-3.1-8b", "v5e:4x4", 16), ("llama-3.1-70b", "v5p:4x4x4", 64)])
def test_osft_fits_slices(model, chips, rows):
    found = fit(preset(model), "osft", chips, batch=rows, context=2048)
    assert found.fits, found.program


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
