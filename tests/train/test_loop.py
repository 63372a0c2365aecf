"""A run: what it computes, where it goes on, how it stops, and what it refuses."""

import json
import shutil
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxlm.core.errors import CheckpointError, ConfigError, DeviceError, NumericsError
from jaxlm.core.tree import flatten, unflatten
from jaxlm.hf.bundle import load
from jaxlm.train import Ewc, Full, Lora, MeshSizes, Osft, fit, loop, run, runs
from jaxlm.train.checkpoint import Checkpoints
from jaxlm.train.log import read_log
from jaxlm.train.optimizers import make_optimizer
from jaxlm.train.setup import placer
from jaxlm.train.step import TrainState, init_state, lm_objective, train_step, tuned_step
from tests.tiny import model
from tests.train.small import settings, sums, write


def flat(tree):
    return np.concatenate([np.asarray(x, np.float64).ravel() for x in jax.tree.leaves(tree)])


def losses(fitted):
    return [row["loss"] for row in fitted.history if "loss" in row]


def test_a_run_learns_and_leaves_the_bundle_alone(bundle, tmp_path):
    before = jax.tree.map(np.array, bundle.params)
    held = str(sums(tmp_path / "eval.jsonl", 30, seed=1))
    fitted = fit(bundle, settings(tmp_path, steps=40, data={"eval": (held,)}, evaluate_every=20))
    assert fitted.step == 40 and not fitted.stopped
    assert np.mean(losses(fitted)[-5:]) < 0.5 * np.mean(losses(fitted)[:5])
    chex.assert_trees_all_equal(before, bundle.params)
    rows = [row for row in fitted.history if "eval/loss" in row]
    assert [row["step"] for row in rows] == [20, 40]
    assert fitted.evaluation["loss"] < rows[0]["eval/loss"]
    assert read_log(tmp_path / "out" / "log.jsonl") == fitted.history


@pytest.mark.parametrize("changes", [
    pytest.param({}, marks=pytest.mark.slow), {"tuning": Lora(rank=2), "accumulate": 2},
    {"optimizer": {"kind": "muon", "schedule": "cosine", "warmup": 3}, "stack": True},
    pytest.param({"tuning": Osft(form="coordinates")}, marks=pytest.mark.slow),
], ids=["full", "lora", "muon", "osft"])
def test_five_steps_and_five_are_ten(bundle, tmp_path, changes, monkeypatch):
    """To the bit: parameters, adapters, moments, schedule, data."""
    straight = fit(bundle, settings(tmp_path, out=str(tmp_path / "straight"), **changes))
    with monkeypatch.context() as patch:
        patch.setattr(loop, "asked_to_stop", stop_after(5))
        first = fit(bundle, settings(tmp_path, **changes))
        assert first.stopped and first.step == 5
    second = fit(bundle, settings(tmp_path, **changes))
    assert second.step == 10 and not second.stopped
    chex.assert_trees_all_equal(straight.tuned, second.tuned)
    chex.assert_trees_all_equal(straight.bundle.params, second.bundle.params)
    assert losses(straight) == losses(second)
    assert np.abs(flat(first.bundle.params) - flat(second.bundle.params)).max() > 0


def stop_after(last):
    """`loop.asked_to_stop`, as if a SIGTERM came during a step."""
    @contextmanager
    def asked():
        yield lambda step: step >= last

    return asked


def test_what_a_tuning_measures_is_logged_without_held_out_data(bundle, tmp_path):
    ones = jax.tree.map(jnp.ones_like, bundle.params)
    config = settings(tmp_path, steps=4, evaluate_every=2, tuning=Ewc())
    fitted = fit(bundle, config, batches=[], previous=(None, {"fisher": ones}))
    rows = [row for row in fitted.history if "loss" not in row]
    assert [set(row) for row in rows] == [{"step", "eval/ewc_distance"}] * 2
    assert [row["step"] for row in rows] == [2, 4]
    wanted = config.tuning.metrics(*fitted.tuned)["ewc_distance"]
    np.testing.assert_allclose(fitted.evaluation["ewc_distance"], wanted, rtol=1e-5)
    assert rows[0]["eval/ewc_distance"] > 0 and wanted > 0


def test_a_step_is_a_bare_optax_step(bundle):
    """Nothing of ours between the gradient and the update, up to rounding."""
    lm, params = model()
    batch = {"tokens": jax.random.randint(jax.random.key(0), (4, 9), 0, 258)}
    chain = optax.adamw(1e-2)
    plain, wanted = jax.jit(lambda s: train_step(lm_objective(lm), chain, s, batch, None))(
        init_state(params, chain))
    state = TrainState(params, chain.init(params), jnp.zeros((), jnp.int32))
    ours, got = jax.jit(lambda s: tuned_step(lm_objective(lm), Full(), chain, s, {}, batch))(state)
    np.testing.assert_allclose(flat(ours.params), flat(plain.params), atol=1e-6)
    np.testing.assert_allclose(got["grad_norm"], wanted["grad_norm"], rtol=1e-6)


@pytest.mark.parametrize("kind", ["adamw", "lion", "sgd", "muon"])
def test_optimisers_are_those_of_optax(kind):
    """With clipping, decay and a schedule, against optax's own aliases."""
    from optax.contrib import muon

    from jaxlm.train import Optimizer

    settings = Optimizer(kind=kind, rate=0.1, schedule="linear", weight_decay=0.3, clip=0.5)
    rate = lambda count: 0.1 * (1 - count / 4)
    theirs = optax.chain(optax.clip_by_global_norm(0.5), {
        "adamw": lambda: optax.adamw(rate, b1=0.9, b2=0.95, weight_decay=0.3),
        "lion": lambda: optax.lion(rate, b1=0.9, b2=0.95, weight_decay=0.3),
        "sgd": lambda: optax.chain(optax.trace(0.9), optax.add_decayed_weights(0.3),
                                   optax.scale_by_learning_rate(rate)),
        "muon": lambda: muon(rate, beta=0.9, weight_decay=0.3),
    }[kind]())
    ours = make_optimizer(settings, 4)
    params = {"mlp": {"up": {"kernel": jax.random.normal(jax.random.key(0), (4, 3))}}}
    grads = jax.tree.map(lambda x: 10 * jnp.cos(x), params)
    mine = yours = params
    mine_state, yours_state = ours.init(params), theirs.init(params)
    for _ in range(3):
        u, mine_state = ours.update(grads, mine_state, mine)
        v, yours_state = theirs.update(grads, yours_state, yours)
        mine, yours = optax.apply_updates(mine, u), optax.apply_updates(yours, v)
    np.testing.assert_allclose(flat(mine), flat(yours), atol=1e-6)


def test_norms_are_not_decayed():
    from jaxlm.train import Optimizer

    chain = make_optimizer(Optimizer(rate=1.0, weight_decay=0.5), 1)
    params = {"a": {"scale": jnp.ones((2, 3))}, "b": {"kernel": jnp.ones((2, 3))}}
    updates, _ = chain.update(jax.tree.map(jnp.zeros_like, params), chain.init(params), params)
    assert (updates["a"]["scale"] == 0).all() and (updates["b"]["kernel"] == -0.5).all()


@pytest.mark.parametrize("parts", [2, 4])
def test_accumulated_parts_are_one_batch(parts):
    """Parts of unequal weight, and a part without any."""
    lm, params = model()
    tokens = jax.random.randint(jax.random.key(0), (8, 9), 0, 258)
    weights = jax.random.uniform(jax.random.key(1), (8, 8)) * jnp.arange(8)[:, None]
    weights = weights.at[::parts].set(0)
    batch, sgd = {"tokens": tokens, "weights": weights}, optax.sgd(1.0)
    state = TrainState(params, sgd.init(params), jnp.zeros((), jnp.int32))
    one, whole = tuned_step(lm_objective(lm), Full(), sgd, state, {}, batch)
    many, summed = tuned_step(lm_objective(lm), Full(), sgd, state, {}, batch, parts=parts)
    np.testing.assert_allclose(flat(one.params), flat(many.params), atol=1e-6)
    for name in whole:
        np.testing.assert_allclose(whole[name], summed[name], rtol=1e-5, err_msg=name)


def test_a_run_compiles_once_and_a_sweep_of_rates_too(bundle, tmp_path):
    traces = []

    class Counting(Full):
        def settle(self, trained, frozen):
            traces.append(1)
            return trained

    for rate in (1e-3, 1e-2):
        fit(bundle, settings(tmp_path, steps=4, optimizer={"rate": rate}, tuning=Counting(),
                             out=f"{tmp_path}/{rate}"))
    assert len(traces) == 1


@pytest.mark.parametrize("axes", [
    pytest.param({"data": 8}, marks=pytest.mark.slow),
    pytest.param({"fsdp": 8}, marks=pytest.mark.slow), {"data": 2, "fsdp": 2, "tensor": 2},
], ids=str)
def test_eight_devices_train_as_one_and_take_its_checkpoint_up(tiny_folder, tmp_path, axes):
    config = settings(tmp_path, steps=4, model=str(tiny_folder), optimizer={"kind": "sgd"})
    alone = run(config.replace(out=f"{tmp_path}/one"))
    several = config.replace(mesh=MeshSizes(**axes), out=f"{tmp_path}/many")
    together = run(several)
    np.testing.assert_allclose(losses(alone), losses(together), rtol=1e-4)
    np.testing.assert_allclose(
        flat(alone.bundle.params), flat(together.bundle.params), atol=2e-5)
    longer = run(several.replace(out=f"{tmp_path}/one", steps=6))
    assert longer.step == 6 and losses(longer)[:4] == losses(alone)


@pytest.mark.parametrize(("changes", "kind", "said"), [
    ({"mesh": MeshSizes(data=8), "batch": 12}, DeviceError, "12 rows .* do not divide over 8"),
    ({"mesh": MeshSizes(data=8), "accumulate": 2}, DeviceError, "4 rows .* multiple of 16"),
    ({"mesh": MeshSizes(data=3)}, DeviceError, "needs 3 devices, got 8"),
    ({"data": {"window": 129}}, ConfigError, "reads at most 128"),
    ({"data": {"train": ()}}, ConfigError, "data.train names no file"),
    ({"steps": None}, ConfigError, "neither steps nor epochs"),
    ({"data": {"mask_thoughts": 0.2, "mask_token": "<none>"}}, ConfigError, "data.mask_token"),
    ({"tuning": Lora(rank=99)}, ConfigError, "tuning.rank is 99"),
    ({"tuning": Osft(unfreeze_ratio=0.0, others="freeze")}, ConfigError, "nothing to train.*osft"),
    ({"tuning": Lora(targets=())}, ConfigError, "nothing to train; name targets"),
])
def test_what_cannot_run_is_said_before_any_step(bundle, tmp_path, changes, kind, said):
    with pytest.raises(kind, match=said):
        fit(bundle, settings(tmp_path, **changes))
    assert not [p for p in (tmp_path / "out").rglob("*") if p.is_file()]


def test_a_loss_that_is_no_number_stops_the_run(bundle, tmp_path):
    """The checkpoint before it stays, and the message has step and lines."""
    config = settings(tmp_path, steps=30, checkpoint_every=1,
                      optimizer={"kind": "sgd", "rate": 1e30, "clip": 0.0, "warmup": 3000})
    with pytest.raises(NumericsError, match=r"step (\d+): .*train.jsonl:\d+.*step \d+ in") as said:
        fit(bundle, config)
    kept = max(int(p.name) for p in (tmp_path / "out" / "checkpoints").iterdir())
    assert f"the last good checkpoint is that of step {kept}" in str(said.value)
    rows = read_log(tmp_path / "out" / "log.jsonl")
    assert rows and all(np.isfinite(row["loss"]) for row in rows)


@pytest.fixture(scope="module")
def finished(bundle, tmp_path_factory):
    """A run of three steps with a checkpoint at each."""
    folder = tmp_path_factory.mktemp("finished")
    fit(bundle, settings(folder, steps=3, checkpoint_every=1, tuning=Lora(rank=2)))
    return folder


@pytest.mark.parametrize(("changes", "said"), [
    ({"optimizer": {"rate": 2e-2}}, "optimizer.rate was 0.01 and is 0.02"),
    ({"tuning": Full()}, "tuning.kind was 'lora' and is 'full'"),
    ({"batch": 4}, "batch was 8 and is 4"), ({"seed": 1}, "seed was 0 and is 1"),
    ({"data": {"window": 25}}, "data.window was 24 and is 25"),
    ({"steps": 2}, "beyond the 2 steps"),
])
def test_a_checkpoint_of_another_run_is_refused(bundle, finished, changes, said):
    with pytest.raises(CheckpointError, match=said):
        fit(bundle, settings(finished, **{"steps": 5, "tuning": Lora(rank=2), **changes}))


def test_a_checkpoint_of_other_data_or_another_model_is_refused(bundle, finished, tmp_path):
    config = settings(finished, steps=5, tuning=Lora(rank=2))
    other = replace(config.data, train=(str(sums(tmp_path / "b.jsonl", 64, seed=5)),))
    with pytest.raises(CheckpointError, match="made with other data"):
        fit(bundle, config.replace(data=other))
    lm, params = model(ffn_dim=32)
    with pytest.raises(CheckpointError, match="of another model"):
        fit(bundle.replace(lm=lm, params=params), config)


@pytest.mark.parametrize("tuning", [Full(), Lora(rank=2)], ids=["full", "lora"])
def test_other_weights_of_the_same_shape_are_refused(bundle, tmp_path, tuning):
    """Going on, and when all is done; the same weights in another dtype are the same."""
    config = settings(tmp_path, steps=2, tuning=tuning)
    low = jax.tree.map(lambda x: x.astype(jnp.bfloat16), bundle.params)
    one = bundle.replace(params=jax.tree.map(lambda x: x.astype(jnp.float32), low))
    fit(one, config)
    for steps in (2, 4):
        with pytest.raises(CheckpointError, match="began from other weights of the same shape"):
            fit(bundle, config.replace(steps=steps))
    assert fit(bundle.replace(params=low), config.replace(steps=4)).step == 4


def test_a_checkpoint_that_does_not_say_its_weights_still_loads(bundle, tmp_path, monkeypatch):
    config, describe = settings(tmp_path, steps=1), loop.describe
    with monkeypatch.context() as patch:
        patch.setattr(loop, "describe", lambda *args: {
            k: v for k, v in describe(*args).items() if k not in ("start", "epochs")})
        fit(bundle, config)
    assert fit(bundle, config.replace(steps=2)).step == 2


def test_more_epochs_are_refused_and_more_steps_are_not(bundle, tmp_path):
    """The last batch of an epoch is filled up with nothing, which is not so within a run of two."""
    config = settings(tmp_path, steps=None, epochs=1, batch=3, data={"pack": False})
    first = fit(bundle, config)
    assert first.step * 3 > first.counts["samples"] == 64
    for changes in ({"epochs": 2}, {"epochs": None, "steps": 30}):
        with pytest.raises(CheckpointError, match="epochs was 1 and is (2|None)"):
            fit(bundle, config.replace(**changes))
    by_steps = config.replace(epochs=None, steps=first.step, out=f"{tmp_path}/steps")
    fit(bundle, by_steps)
    longer = fit(bundle, by_steps.replace(steps=30))
    straight = fit(bundle, by_steps.replace(steps=30, out=f"{tmp_path}/straight"))
    assert losses(longer) == losses(straight) and len(losses(longer)) == 30


def test_an_old_checkpoint_is_moved_away_whole_before_it_is_deleted(bundle, tmp_path, monkeypatch):
    """So that a kill in the middle leaves no half of one by the name of a step."""
    config = settings(tmp_path, steps=4, checkpoint_every=1, keep=2)
    folder = Path(config.out) / "checkpoints"
    items = lambda path: sorted(item.name for item in path.iterdir())
    monkeypatch.setattr(Checkpoints, "_sweep", lambda self: None)
    fit(bundle, config)
    assert items(folder / "dropped") == ["1", "2"]
    assert items(folder / "dropped" / "2") == items(folder / "3")
    monkeypatch.undo()
    fit(bundle, config.replace(steps=5))
    assert items(folder) == ["4", "5", "dropped"] and not items(folder / "dropped")


def test_a_damaged_checkpoint_is_refused_by_name_and_the_one_before_it_loads(
        bundle, finished, tmp_path):
    """Every file of it, cut in half and with one bit turned: an error, or nothing lost."""
    folder = tmp_path / "copy"
    shutil.copytree(finished / "out", folder)
    config = settings(finished, steps=3, tuning=Lora(rank=2), out=str(folder))
    chain = config.tuning.wrap(make_optimizer(config.optimizer, 3))

    def restored():
        saved = Checkpoints(folder)
        try:
            state, frozen, _ = saved.restore(3, chain, placer(config.tuning, None))
            return jax.tree.leaves((state, frozen))
        finally:
            saved.close()

    wanted = restored()
    refused, files = 0, [p for p in (*folder.glob("checkpoints/3/**/*"),
                                     *folder.glob("frozen/**/*")) if p.is_file()]
    for path in files:
        whole = path.read_bytes()
        middle = len(whole) // 2
        for bad in (whole[:middle], whole[:middle] + bytes([whole[middle] ^ 1])
                    + whole[middle + 1:]) if whole else ():
            path.write_bytes(bad)
            try:
                chex.assert_trees_all_equal(restored(), wanted)
            except CheckpointError as error:
                refused += 1
                assert str(folder) in str(error) and "damaged" in str(error), error
        path.write_bytes(whole)
    assert refused >= 6 and len(files) > 12
    (folder / "checkpoints" / "3" / "trained" / "_METADATA").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"delete .*/3 to go on from step 2"):
        fit(bundle, config)
    shutil.rmtree(folder / "checkpoints" / "3")
    fit(bundle, config)
    chex.assert_trees_all_equal(restored(), wanted)


def test_an_export_is_read_again(tiny_folder, tmp_path):
    fitted = run(settings(tmp_path, steps=2, model=str(tiny_folder), export="bfloat16",
                          tuning=Lora(rank=2)))
    again = load(tmp_path / "out" / "model", dtype="own")
    low = jax.tree.map(lambda x: x.astype(jnp.bfloat16), fitted.bundle.params)
    chex.assert_trees_all_equal(again.params, low)


def test_an_export_that_lost_one_far_row_is_refused(bundle, tmp_path, monkeypatch):
    """A row of the embedding that the compared logits do not read."""
    def save(found, folder, **how):
        params = flatten(found.params)
        params["embed/table"] = params["embed/table"].at[200].add(1e-3)
        return bundle_save(found.replace(params=unflatten(params)), folder, **how)

    bundle_save = runs.save
    runs.export(bundle, tmp_path / "whole")
    monkeypatch.setattr(runs, "save", save)
    with pytest.raises(CheckpointError, match="another 'embed/table' than was trained"):
        runs.export(bundle, tmp_path / "changed")


def test_masked_thoughts_train(bundle, tmp_path):
    config = settings(tmp_path, steps=2, data={"mask_thoughts": 0.5, "mask_token": "<s>"})
    plain = fit(bundle, settings(tmp_path, steps=2, out=f"{tmp_path}/plain"))
    assert losses(fit(bundle, config))[0] != losses(plain)[0]


def test_bfloat16_computes_and_float32_is_kept(bundle, tmp_path):
    fitted = fit(bundle, settings(tmp_path, steps=3, dtype="bfloat16", remat=True))
    assert {x.dtype for x in jax.tree.leaves(fitted.tuned)} == {jnp.dtype("float32")}
    plain = fit(bundle, settings(tmp_path, steps=3, out=f"{tmp_path}/plain"))
    gap = abs(losses(fitted)[0] - losses(plain)[0])
    assert 0 < gap < 0.02


def test_a_log_with_a_torn_last_line_goes_on(tmp_path):
    path = write(tmp_path / "log.jsonl", [{"step": 1, "loss": 1.0}, '{"step": 2, "lo'])
    assert read_log(path) == [{"step": 1, "loss": 1.0}]


def test_tensorboard_has_what_the_log_has(bundle, tmp_path):
    pytest.importorskip("tensorboardX")
    fit(bundle, settings(tmp_path, steps=2, tensorboard=True))
    (file,) = (tmp_path / "out" / "tensorboard").iterdir()
    assert b"grad_norm" in file.read_bytes()
    assert len(json.loads((tmp_path / "out" / "log.jsonl").read_text().splitlines()[0])) > 5
