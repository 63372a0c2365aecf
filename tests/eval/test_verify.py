"""Verification and conversion: a right checkpoint passes, a wrong one is found."""

import json
import sys
from argparse import Namespace
from importlib.util import find_spec

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import jaxlm
from experiments import twins, verify_hub
from jaxlm.cli.convert import run
from jaxlm.core.errors import CheckpointError, ConfigError, ShapeError
from jaxlm.eval.verify import compare, verify
from jaxlm.hf.convert import convert

TEXTS = ["w5 w9 w3 w11 w40", " ".join(f"w{i}" for i in range(3, 30))]


@pytest.fixture
def twin(tmp_path):
    family = lambda name: name.removesuffix("_other")
    return lambda name: twins.write(twins.config_of(family(name)), tmp_path / name)


def test_figures_agree_with_their_definitions():
    rng = np.random.default_rng(0)
    theirs = rng.normal(size=(50, 7))
    ours = theirs + 0.3 * rng.normal(size=(50, 7))
    found = compare(ours, theirs, k=3)
    p, q = (np.exp(x) / np.exp(x).sum(-1, keepdims=True) for x in (theirs, ours))
    assert found.kl == pytest.approx((p * np.log(p / q)).sum(-1).mean())
    assert found.max_logit_error == np.abs(ours - theirs).max()
    top = lambda x: {tuple(sorted(row)) for row in [np.argpartition(-x, 3)[:3]]}
    overlap = [len(set(*top(a)) & set(*top(b))) / 3 for a, b in zip(ours, theirs, strict=True)]
    assert found.topk == pytest.approx(np.mean(overlap)) and 0.5 < found.topk < 1
    assert found.top1 == np.mean(ours.argmax(-1) == theirs.argmax(-1)) < 1
    assert compare(theirs, theirs, 3).kl == 0
    with pytest.raises(ShapeError):
        compare(ours[:3], theirs, 3)
    with pytest.raises(ShapeError):
        compare(ours * np.nan, theirs, 3)


@pytest.mark.parametrize("dtype", [None, "bfloat16", "float16"])
def test_convert_keeps_or_casts(dtype, twin, tmp_path):
    out = convert(twin("qwen2"), tmp_path / "out", dtype)
    old, new = (load_file(folder / "model.safetensors") for folder in (tmp_path / "qwen2", out))
    assert old.keys() == new.keys()
    kind = jnp.dtype(dtype or "float32")
    assert all(new[name].dtype == kind for name in new)
    assert all((old[name].astype(kind) == new[name]).all() for name in new)
    assert json.loads((out / "config.json").read_text())["dtype"] == kind.name


def test_convert_keeps_the_checkpoint_s_own_dtype(twin, tmp_path):
    half = convert(twin("llama"), tmp_path / "half", "bfloat16")
    again = load_file(convert(half, tmp_path / "again") / "model.safetensors")
    assert all(value.dtype == jnp.bfloat16 for value in again.values())


def test_convert_refuses(twin, tmp_path):
    folder = twin("llama")
    with pytest.raises(ConfigError, match="int8"):
        convert(folder, tmp_path / "out", "int8")
    with pytest.raises(CheckpointError, match="exists"):
        convert(folder, folder)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"][0] = 1e6
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match="float16"):
        convert(folder, tmp_path / "out", "float16")
    assert not (tmp_path / "out").exists()


def test_an_untied_head_in_a_tied_model_is_an_error(twin):
    folder = twin("qwen3")
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()
    save_file(tensors, folder / "model.safetensors")
    assert "head" not in jaxlm.load(folder).params
    tensors["lm_head.weight"][-1, -1] += 1
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match="tie_word_embeddings"):
        jaxlm.load(folder)


def test_labels_are_not_text(tmp_path):
    folder = twins.write(twins.config_of("llama", "SequenceClassification"), tmp_path / "rm")
    bundle = jaxlm.load(folder)
    with pytest.raises(ConfigError, match="labels"):
        jaxlm.generate(bundle, "w5")
    with pytest.raises(ConfigError, match="labels"):
        bundle.lm.logprobs(bundle.params, jnp.ones((1, 3), jnp.int32), jnp.ones((1, 3), jnp.int32))
    with pytest.raises(ConfigError, match="labels"):
        jaxlm.LM(bundle.lm.config).classify(bundle.params, jnp.ones((1, 3), jnp.int32))
    with pytest.raises(ConfigError, match="per_token"):
        jaxlm.LM(bundle.lm.config, per_token=True)


def test_labels_learn():
    """The head is part of the tree that gradients reach."""
    lm = twins.model_of(twins.config_of("llama", "TokenClassification"))
    params = lm.init(jax.random.key(0))
    loss = lambda params: lm.classify(params, jnp.ones((2, 3), jnp.int32)).sum()
    grads = jax.grad(loss)(params)
    assert (grads["score"]["bias"] == 6).all() and lm.axes()["score"]["bias"] == ("labels",)


def test_without_torch_the_error_says_what_to_install(twin, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(ConfigError, match=r"jaxlm\[torch\]"):
        verify(twin("llama"), TEXTS)


@pytest.mark.skipif(find_spec("torch") is None, reason="torch is not here")
def test_live(twin):
    """Where torch is, in the quick tests too: a right checkpoint passes, a wrong one is found."""
    folder, other = twin("gemma2"), twin("gemma2_other")
    found = verify(folder, TEXTS)
    assert found.max_logit_error < 1e-4 and found.top1 == found.topk == 1 and found.same_ids
    raw = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(raw | {"attn_logit_softcapping": None}))
    wrong = verify(other, TEXTS, reference=folder)
    assert wrong.max_logit_error > 1e-2 and wrong.kl > 1e-6


def test_many_checkpoints_are_resumed_and_failures_tried_again(tmp_path, monkeypatch):
    calls = []

    def compared(source, texts, revision):
        calls.append(source)
        return {"error": "gone"} if source == "b" and len(calls) < 3 else {"kl": 0.5}

    monkeypatch.setattr(verify_hub, "compare", compared)
    args = Namespace(smoke=False, out=tmp_path / "x.json", revision=None, checkpoints=["b"])
    with pytest.raises(SystemExit, match="no checkpoint could be compared"):
        verify_hub.measure(args)
    args.checkpoints = ["a", "b", "c"]
    monkeypatch.setattr(verify_hub, "print", stop_at("b"), raising=False)
    with pytest.raises(KeyboardInterrupt):
        verify_hub.measure(args)
    monkeypatch.setattr(verify_hub, "print", print, raising=False)
    found = verify_hub.measure(args)["checkpoints"]
    assert found == dict.fromkeys("abc", {"kl": 0.5}) and calls == ["b", "a", "b", "c"]
    assert not list(tmp_path.iterdir())


def stop_at(name):
    """A print that is interrupted at one checkpoint's figures."""
    def report(found, *_, **__):
        if found == name:
            raise KeyboardInterrupt
    return report


@pytest.mark.torch
@pytest.mark.parametrize("name", twins.CONFIGS)
def test_a_right_checkpoint_passes(name, twin):
    found = verify(twin(name), TEXTS)
    assert found.max_logit_error < 1e-4 and found.kl < 1e-8 and found.top1 == found.topk == 1
    # transformers 5 puts Qwen's own pre-tokenizer into any qwen2 folder, the twins' too: found out
    assert found.same_ids is not name.startswith("qwen2") and found.tokens == 32
    assert ("the same ids" in str(found)) is found.same_ids


@pytest.mark.torch
def test_the_command_finds_a_wrong_checkpoint(twin, tmp_path, capsys):
    folder = twin("gemma2")
    run(str(folder), str(tmp_path / "out"), verify=True, text=tuple(TEXTS))
    assert "max |logit difference|" in capsys.readouterr().out
    raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(raw | {"attn_logit_softcapping": None}))
    assert verify(tmp_path / "out", TEXTS, reference=folder).max_logit_error > 1e-2
    with pytest.raises(CheckpointError, match="logits differ"):
        run(str(folder), str(tmp_path / "half"), dtype="bfloat16", verify=True, tolerance=1e-4,
            text=tuple(TEXTS))
