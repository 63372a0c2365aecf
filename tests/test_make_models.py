"""The models made on demand: what is finished is checked again, and each is scored."""

import argparse
import dataclasses
import json

import chex
import jax
import jax.numpy as jnp
import pytest

from experiments import _harness, make_models
from experiments.make_models import Part, made


@pytest.fixture
def store(tmp_path):
    return lambda name="small": _harness.Resumable(tmp_path / f"{name}.json", {})


def part(tmp_path, digest, calls, name="small"):
    folders = tuple(tmp_path / name / f"step_{n}" for n in (1, 2))

    def make():
        calls.append(digest)
        for folder in folders:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "config.json").write_text(digest)
        return {"made": digest}

    return Part(name, digest, folders, make)


def test_a_part_is_made_anew_where_it_changed_or_a_folder_is_gone(tmp_path, store):
    calls = []
    one, two = part(tmp_path, "one", calls), part(tmp_path, "two", calls)
    other = part(tmp_path, "other", calls, "smaller")
    for _ in range(2):
        assert made(store(), one) == {"made": "one"} and made(store("smaller"), other)
    assert calls == ["one", "other"]
    (one.folders[0] / "config.json").unlink()
    made(store(), one)
    assert calls[2:] == ["one"] and not one.lost
    made(store(), two)  # overwrites the folders of the first recipe ...
    assert made(store(), one) == {"made": "one"} and calls[3:] == ["two", "one"]  # ... so again
    assert (one.folders[0] / "config.json").read_text() == "one"
    made(store("smaller"), other)
    assert len(calls) == 5


def test_a_part_that_failed_is_not_finished(tmp_path, store):
    calls = []
    whole = part(tmp_path, "one", calls)
    made(store(), whole)

    def fails():
        raise RuntimeError("stopped")

    with pytest.raises(RuntimeError):
        made(store(), Part("small", "two", whole.folders, fails))
    made(store(), whole)  # the other recipe may have begun to overwrite its folders
    assert calls == ["one", "one"]


def arguments(tmp_path, **changes):
    return argparse.Namespace(**{"seed": 0, "smoke": False, "folder": tmp_path, "base": "tiny",
                                 "only": None, "pace": False, **changes})


def test_what_a_part_depends_on(tmp_path, monkeypatch):
    digest = lambda **changes: make_models.size("small", arguments(tmp_path, **changes)).digest
    first = digest()
    assert digest() == first != digest(seed=1)
    monkeypatch.setattr(make_models, "SMALL", dict(dim=96, layers=9, ffn=256))
    assert digest() != first
    monkeypatch.undo()
    monkeypatch.setattr(make_models, "CHECKPOINTS", 8)
    assert digest() != first


def test_the_larger_size_begins_as_the_same_function(tmp_path):
    base = make_models.load("tiny", dtype=jnp.float32)
    lm, params = make_models.grown(base)
    assert lm.config.num_layers == 2 * base.lm.config.num_layers
    tokens = jnp.arange(24).reshape(2, 12) % base.lm.config.vocab_size
    chex.assert_trees_all_close(lm.apply(params, tokens).logits,
                                base.lm.apply(base.params, tokens).logits, atol=1e-4)
    grads = jax.grad(lambda p: jnp.sum(lm.apply(p, tokens).logits ** 2))(params)
    assert all(jnp.any(grads[f"layers_{i}"]["mlp"]["down"]["kernel"]) for i in range(16))
    biased = {**base.params, "layers_0": {"attn": {"q": {"bias": jnp.ones(2)}}}}
    with pytest.raises(ValueError, match=r"layers_0/attn/q/bias.*no biases"):
        make_models.grown(dataclasses.replace(base, params=biased))


def test_a_size_whose_checkpoint_is_gone_is_trained_anew(tmp_path, monkeypatch):
    """Going on from the last checkpoint would not write the ones before it."""
    runs = []

    def fit(lm, recipe, work, params, marks):
        begun = (work / "begun").exists()
        work.mkdir(parents=True, exist_ok=True)
        (work / "begun").touch()
        runs.append(begun)
        for step in [] if begun else marks:
            folder = tmp_path / "small" / f"step_{step}"
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "config.json").touch()
        return {}, {"steps": recipe.steps}

    for name, value in (("fit", fit), ("load", lambda *_, **__: None),
                        ("loss_of", lambda *_: 0.5), ("skills", lambda *_: {})):
        monkeypatch.setattr(make_models, name, value)
    size = make_models.size("small", arguments(tmp_path, smoke=True))
    assert set(size.make()["held_out_loss"].values()) == {0.5} and runs == [False]
    (size.folders[2] / "config.json").unlink()
    size.make()
    assert runs == [False, True, False] and not size.lost


def test_a_sibling_that_is_no_better_is_named(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(make_models, "size", lambda name, args: Part(name, "0", (), lambda: {}))
    monkeypatch.setattr(make_models, "sibling", lambda name, args: Part(
        name, "0", (), lambda: {"better": name != "times"}))
    found = make_models.measure(arguments(tmp_path))
    assert found["not_better"] == ["times"] and "times" in capsys.readouterr().err
    assert json.loads((tmp_path / ".work" / "minus.json").read_text())["parts"]["minus 0"]["better"]
    half, most = {"value": 0.5, "error": 0.0}, {"value": 0.75, "error": 0.0}
    better = lambda loss, before, after: make_models.better(
        {"loss_before": 1.0, "loss_after": loss, "accuracy_before": before,
         "accuracy_after": after})
    assert better(0.9, half, most) and better(0.9, half, half)
    assert not better(1.1, half, most) and not better(0.9, most, half)
    assert better(0.9, {"value": 0.75, "error": 0.3}, half)


def test_a_smoke_run_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(make_models.tempfile, "tempdir", str(tmp_path))
    seen = []
    monkeypatch.setattr(make_models, "make_all", lambda args: seen.append(
        (args.folder.exists(), make_models.load(args.base).lm.config.num_layers)) or {})
    make_models.measure(arguments("", smoke=True))
    assert seen == [(True, 2)] and not list(tmp_path.iterdir())
