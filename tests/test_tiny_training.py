"""The training of small models: its loss, its optimiser, resuming, the folder it writes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxlm
from experiments import tiny_training
from experiments.tiny_data import Mix, batch
from experiments.tiny_tokenizer import BOS, PAD
from experiments.tiny_training import Recipe, fit, loss_fn, model_config, short_run
from jaxlm.models.lm import LM

LITTLE = LM(model_config(dim=32, layers=2, ffn=48))
MIX = Mix((2, 96), recall=0.5, lengths=(32, 64))


@pytest.fixture(scope="module")
def params():
    return LITTLE.init(jax.random.key(1))


def test_loss_is_the_weighted_cross_entropy_of_each_document_alone(params):
    data = batch(MIX, 0, 0)
    total = weight = 0.0
    for ids, targets, weights in zip(*(data[k] for k in data), strict=True):
        starts = [*np.flatnonzero(ids == BOS), len(ids)]
        for start, end in zip(starts, starts[1:], strict=False):
            part = slice(start, end)
            logits = np.asarray(LITTLE.apply(params, ids[None, part]).logits[0], np.float64)
            log_z = np.log(np.exp(logits).sum(-1))
            chosen = logits[np.arange(end - start), targets[part]]
            total += (weights[part] * (log_z - chosen)).sum()
            weight += weights[part].sum()
    loss, metrics = loss_fn(LITTLE, params, data)
    np.testing.assert_allclose(loss, total / weight, rtol=1e-5)
    assert 0 <= metrics["steps"] <= 1 and 0 <= metrics["values"] <= 1


def test_padding_is_never_trained_on():
    data = batch(Mix((4, 96), recall=1.0, lengths=(48, 64)), 0, 0)
    assert (data["targets"] == PAD).any() and not data["weights"][data["targets"] == PAD].any()


def test_the_rate_follows_its_points(params):
    def moves(rate):
        tx = tiny_training.optimiser(Recipe(lambda step: MIX, rate=rate))
        state, grads = tx.init(params), jax.tree.map(jnp.ones_like, params)
        for _ in range(5):
            updates, state = tx.update(grads, state, jax.tree.map(jnp.zeros_like, params))
            yield [float(jnp.abs(updates["final_norm"]["scale"]).max()),
                   float(jnp.abs(updates["layers_0"]["mlp"]["up"]["kernel"]).max())]

    level, drawn = moves(((0, 1.0), (9, 1.0))), moves(((0, 0.0), (2, 1.0), (4, 0.0)))
    shares = np.array(list(drawn)) / np.array(list(level))
    np.testing.assert_allclose(shares, np.outer([0, 0.5, 1, 0.5, 0], [1, 1]), atol=1e-5)


def test_a_run_goes_on_and_no_other_takes_its_place(tmp_path, params):
    recipe = lambda **change: Recipe(**{"mix": lambda step: MIX, "rate": short_run(2), **change})
    made, _ = fit(LITTLE, recipe(), tmp_path, params=params)
    again, _ = fit(LITTLE, recipe(), tmp_path, params=params)
    assert all(jax.tree.leaves(jax.tree.map(lambda x, y: bool((x == y).all()), made, again)))
    other = Mix((2, 96), recall=0.25, lengths=(32, 64))
    for changed, start in ((recipe(seed=1), params), (recipe(mix=lambda step: other), params),
                           (recipe(lr=0.1), params), (recipe(), None)):
        with pytest.raises(ValueError, match="was made with"):
            fit(LITTLE, changed, tmp_path, params=start)


def test_every_matrix_moves_by_an_orthogonal_step(params):
    tx = tiny_training.optimiser(Recipe(lambda step: MIX, rate=((0, 1.0), (9, 1.0)), lr=1.0))
    grads = jax.tree.map(
        lambda x: jnp.asarray(np.random.default_rng(0).normal(size=x.shape), x.dtype), params)
    updates, _ = tx.update(grads, tx.init(params), jax.tree.map(jnp.zeros_like, params))
    layer = updates["layers_0"]
    for name, shape in (("q", (32, -1)), ("v", (32, -1)), ("o", (-1, 32))):
        values = np.linalg.svd(layer["attn"][name]["kernel"].reshape(shape), compute_uv=False)
        assert values.max() / values.min() < 3  # of a random matrix's gradient it is above 4
    with_noise = np.linalg.svd(grads["layers_0"]["mlp"]["gate"]["kernel"], compute_uv=False)
    assert with_noise.max() / with_noise.min() > 4


@pytest.mark.slow
def test_a_stopped_run_goes_on_to_the_same_end(tmp_path):
    recipe = Recipe(lambda step: MIX, short_run(6))
    straight, summary = fit(LITTLE, recipe, tmp_path / "a", log_every=1)

    class Killed(Exception):
        pass

    def kill(_):
        raise Killed

    with pytest.raises(Killed):
        fit(LITTLE, recipe, tmp_path / "b", marks={4: kill}, log_every=1, save_every_s=0.0)
    resumed, again = fit(LITTLE, recipe, tmp_path / "b", log_every=1)
    assert jax.tree.all(jax.tree.map(lambda x, y: bool((x == y).all()), straight, resumed))
    assert again["tokens"] == summary["tokens"] == 6 * 2 * 96
    assert [row["loss"] for row in again["history"]] == [row["loss"] for row in summary["history"]]
    assert [row["step"] for row in again["history"]] == [1, 2, 3, 4, 5, 6]


def test_the_written_folder_holds_the_model(params, tmp_path):
    tiny_training.write_folder(LITTLE, params, tmp_path / "model")
    bundle = jaxlm.load(tmp_path / "model")
    assert bundle.lm == LITTLE and bundle.stop_ids == (2,)
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16).astype(jnp.float32), params)
    ids = jnp.asarray([bundle.tokenizer.encode("Q:1+2=\n")])
    np.testing.assert_array_equal(
        bundle.lm.apply(bundle.params, ids).logits, LITTLE.apply(half, ids).logits)
