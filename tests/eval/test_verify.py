"""Verification and conversion: a right checkpoint passes, a wrong one is found."""

import builtins
import json
import sys
from argparse import Namespace
from functools import partial
from importlib.util import find_spec

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import jaxlm
from experiments import twins, verify_hub
from jaxlm.cli import main
from jaxlm.cli.convert import run
from jaxlm.core.errors import CheckpointError, ConfigError, ShapeError
from jaxlm.eval.verify import (
    BOUNDS,
    Bounds,
    _forward,
    _logits,
    compare,
    judge,
    stored_dtype,
    verify,
)
from jaxlm.hf.convert import convert
from tests.tiny import CONFIG

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


def test_our_side_multiplies_in_float32_on_any_chip():
    """A TPU's default is one bfloat16 pass, and a GPU's may be TF32."""
    lm = jaxlm.LM(CONFIG)
    at = jnp.arange(8)[None]
    traced = str(jax.make_jaxpr(partial(_forward, lm))(lm.shapes(jnp.float32), at, at))
    assert traced.count("dot_general[") > 7
    assert traced.count("dot_general[") == traced.count(
        "precision=(Precision.HIGHEST, Precision.HIGHEST)")


def test_a_tolerance_of_logits_leaves_the_other_bounds(twin, monkeypatch):
    """Against our own logits, put out by a little noise."""
    folder = twin("llama")
    own = jaxlm.load(folder)

    class Noisy:
        window = None

        def __init__(self, _):
            self.ids = own.tokenizer.encode

        def logits(self, ids, first):
            exact = _logits(own.lm, own.params, ids, first)
            return exact + 0.02 * np.random.default_rng(0).normal(size=exact.shape)

    monkeypatch.setattr("jaxlm.eval.verify._Reference", Noisy)
    logit, kl = verify(folder, TEXTS).faults[:2]
    assert "max |logit" in logit and "KL is" in kl
    assert verify(folder, TEXTS, tolerance=1.0).faults[0] == kl


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
    with pytest.raises(ConfigError, match="pip install torch"):
        verify(twin("llama"), TEXTS)


def converted(capsys, source, folder):
    """What `jaxlm convert --verify` says where it refuses; nothing was written."""
    assert main(["convert", str(source), str(folder), "--verify"]) == 2
    out, err = capsys.readouterr()
    assert out == "" and not folder.exists()
    return err


def test_the_command_asks_for_torch_before_it_converts(twin, tmp_path, capsys, monkeypatch):
    def without_torch(name, *rest):
        if name == "torch":
            raise ModuleNotFoundError("No module named 'torch'")
        return given(name, *rest)

    given = builtins.__import__  # not `sys.modules["torch"] = None`: tyro imports what is there
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    monkeypatch.setattr(builtins, "__import__", without_torch)
    assert "pip install torch" in converted(capsys, twin("llama"), tmp_path / "out")


@pytest.mark.parametrize("head", ["SequenceClassification", "TokenClassification"])
def test_a_model_that_gives_labels_is_refused_before_it_is_converted(
    head, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr("jaxlm.eval.verify._theirs", lambda: None)
    folder = twins.write(twins.config_of("llama", head), tmp_path / "rm")
    assert "gives labels" in converted(capsys, folder, tmp_path / "out")
    text = twins.write(twins.config_of("llama"), tmp_path / "text")
    for source, reference in ((folder, None), (text, folder)):
        with pytest.raises(ConfigError, match=r"rm is a model that gives labels.*classify"):
            verify(source, TEXTS, reference=reference)


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

    def compared(source, texts, revision, tolerance):
        assert tolerance == 0.01
        calls.append(source)
        return {"error": "gone"} if source == "b" and len(calls) < 3 else {"kl": 0.5}

    monkeypatch.setattr(verify_hub, "compare", compared)
    args = Namespace(smoke=False, out=tmp_path / "x.json", revision=None, checkpoints=["b"],
                     tolerance=0.01)
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


def test_judgements_can_fail():
    rng = np.random.default_rng(1)
    theirs = rng.normal(size=(200, 9))
    shifted = lambda size: compare(theirs + size * rng.normal(size=theirs.shape), theirs, k=2)
    for bounds in BOUNDS.values():
        assert judge(shifted(1e-6), bounds).passed
        wrong = judge(shifted(0.3), bounds)
        assert not wrong.passed and all("expected" in fault for fault in wrong.faults)
    assert not judge(compare(theirs, theirs, 2, same_ids=False), Bounds()).passed
    assert BOUNDS["bfloat16"].kl > BOUNDS["float16"].kl and shifted(0.02).kl < 5e-3
    assert judge(shifted(0.02), BOUNDS["bfloat16"]).passed
    assert not judge(shifted(0.02), BOUNDS["float32"]).passed
    near = compare(np.array([[0.0, 1e-4]]), np.array([[1e-4, 0.0]]), k=1)  # the other is likelier
    assert near.top1 == 0 and "top-1" in judge(near, BOUNDS["float32"]).faults[0]
    found = {"a": vars(wrong), "b": vars(shifted(0)), "c": {"error": "gone"}}
    assert [line[:2] for line in verify_hub.failed(found)] == ["a:"]


def test_the_dtype_that_is_judged_is_the_file_s(twin, tmp_path):
    folder = twin("llama")
    assert stored_dtype(folder) == "float32"
    for dtype in ("bfloat16", "float16"):
        assert stored_dtype(convert(folder, tmp_path / dtype, dtype)) == dtype
    assert stored_dtype(tmp_path) == "float32"


@pytest.mark.skipif(find_spec("torch") is None, reason="torch is not here: jaxlm[torch]")
@pytest.mark.parametrize("dropped", ["in the folder", "in the reference"])
def test_a_window_that_was_dropped_is_found(dropped, tmp_path):
    """The texts alone are too short to show it; a text is made that is not."""
    raw = twins.config_of("mistral")
    wide = twins.write(raw | {"sliding_window": 40}, tmp_path / "wide")
    full = twins.write(raw | {"sliding_window": None}, tmp_path / "full")
    ours, theirs = (full, wide) if dropped == "in the folder" else (wide, full)
    right = verify(wide, TEXTS)
    assert right.passed and right.windows == (40,) and right.tokens == 32 + 64
    assert "window 40 exercised" in str(right)
    unseen = verify(ours, TEXTS, reference=theirs, longest=0)
    assert unseen.passed and unseen.unexercised == (40,)
    assert "window 40 NOT exercised" in str(unseen)
    found = verify(ours, TEXTS, reference=theirs)
    assert not found.passed and found.max_logit_error > 1e-2 and found.windows == (40,)


@pytest.mark.skipif(find_spec("torch") is None, reason="torch is not here: jaxlm[torch]")
def test_the_command_s_verdict_is_its_exit_code(twin, tmp_path, capsys, monkeypatch):
    folder = str(twin("gemma2"))
    go = lambda name, *more: main(["convert", folder, str(tmp_path / name), "--verify", "--text",
                                   *TEXTS, *more])
    assert go("half", "--dtype", "bfloat16") == 0 and "passed" in capsys.readouterr().out
    assert go("strict", "--dtype", "bfloat16", "--tolerance", "1e-4") == 1
    assert "max |logit difference| is" in capsys.readouterr().err
    real = convert

    def spoiled(source, where, *rest, **options):
        """A conversion that loses the cap on scores."""
        written = real(source, where, *rest, **options)
        raw = json.loads((written / "config.json").read_text()) | {"attn_logit_softcapping": None}
        (written / "config.json").write_text(json.dumps(raw))
        return written

    monkeypatch.setattr("jaxlm.cli.convert.convert", spoiled)
    assert go("spoiled", "--dtype", "bfloat16") == 1
    assert "KL is" in capsys.readouterr().err
    monkeypatch.setattr("jaxlm.cli.convert.convert", real)
    monkeypatch.setattr("jaxlm.eval.verify._Reference.ids", lambda self, text: [1])
    assert go("ids", "--tolerance", "10") == 1 and "other ids" in capsys.readouterr().err


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
    assert run(str(folder), str(tmp_path / "out"), verify=True, text=tuple(TEXTS)) == 0
    assert "max |logit difference|" in capsys.readouterr().out
    raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(raw | {"attn_logit_softcapping": None}))
    assert verify(tmp_path / "out", TEXTS, reference=folder).max_logit_error > 1e-2
