"""The head of Qwen's published reward models: labels behind a hidden layer, and its files."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import jaxlm
from jaxlm.core.errors import CheckpointError, ConfigError
from jaxlm.hf.bundle import Bundle, load, save
from jaxlm.hf.config import to_hf
from jaxlm.models.config import ModelConfig
from jaxlm.models.lm import LM
from jaxlm.rewards import process_reward, qwen_layout, score_answers
from tests.rewards.twins import VOCAB, Growing, random_step, softmax, words

SIZES = dict(vocab_size=VOCAB, dim=16, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=4,
             ffn_dim=24, max_len=512, family="qwen2", qkv_bias=True)


@pytest.fixture(scope="module", params=[2, 1], ids=["process", "outcome"])
def folder(request, tmp_path_factory):
    """A random twin, every bias of its head away from 0."""
    home, labels = tmp_path_factory.mktemp("deep"), request.param
    lm = LM(ModelConfig(**SIZES), labels=labels, per_token=labels == 2, deep_head=True)
    params = lm.init(jax.random.key(0))
    for number, part in enumerate(("inner", "outer")):
        bias = params["score"][part]["bias"]
        params["score"][part]["bias"] = jax.random.normal(jax.random.key(number), bias.shape)
    bare = Bundle(lm, params, words(home / "words"), (257,), {"bos_token_id": 256})
    return save(bare, home / "model")


def test_the_files_are_qwen_s(folder):
    raw, tensors = json.loads((folder / "config.json").read_text()), load_file(
        folder / "model.safetensors")
    labels = load(folder).lm.labels
    kind = {2: "Qwen2ForProcessRewardModel", 1: "Qwen2ForRewardModel"}[labels]
    assert raw["architectures"] == [kind]
    shapes = {name: x.shape for name, x in tensors.items() if name.startswith("score.")}
    assert shapes == {"score.0.weight": (16, 16), "score.0.bias": (16,),
                      "score.2.weight": (labels, 16), "score.2.bias": (labels,)}


def test_the_head_is_two_layers_and_a_relu(folder):
    bundle, tensors = load(folder), load_file(folder / "model.safetensors")
    assert bundle.lm.deep_head and bundle.lm.per_token == (bundle.lm.labels == 2)
    tokens = jax.random.randint(jax.random.key(1), (3, 9), 0, VOCAB)
    final = np.asarray(bundle.lm.apply(bundle.params, tokens, logits_at=None).final)
    inner = np.maximum(final @ tensors["score.0.weight"].T + tensors["score.0.bias"], 0)
    want = inner @ tensors["score.2.weight"].T + tensors["score.2.bias"]
    assert 0.1 < (inner > 0).mean() < 0.9  # the ReLU cuts something
    found = bundle.lm.classify(bundle.params, tokens)
    np.testing.assert_allclose(found, want if bundle.lm.per_token else want[:, -1], atol=1e-5)


def test_a_vocabulary_head_in_the_file_is_passed_over(folder, tmp_path):
    """The published weights carry one that their model does not use."""
    tensors = load_file(folder / "model.safetensors")
    copy = save(load(folder), tmp_path / "copy")
    extra = np.ones((VOCAB, 16), np.float32)
    save_file(tensors | {"lm_head.weight": extra}, copy / "model.safetensors", {"format": "pt"})
    assert "head" not in load(copy).params
    del tensors["score.2.bias"]
    save_file(tensors, copy / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"score\.2\.bias"):
        load(copy)


def test_other_families_have_none():
    with pytest.raises(ConfigError, match="Qwen 2's reward models"):
        to_hf(ModelConfig(**SIZES | {"family": "llama", "qkv_bias": False}), 2, True, True)
    with pytest.raises(ConfigError, match="deep_head is for a model with labels"):
        LM(ModelConfig(**SIZES), deep_head=True)


def test_it_serves_as_a_reward(folder):
    bundle = load(folder)
    if bundle.lm.labels == 1:
        assert np.isfinite(score_answers(bundle, ["p"], ["a"])).all()
        return
    reward = process_reward(bundle, bundle)
    assert reward.on_device and reward.layout == qwen_layout(bundle.tokenizer)


@pytest.mark.torch
def test_step_scores_are_those_of_torch(folder):
    """transformers' Qwen2Model under the published head, over the whole formatted text at once."""
    import torch
    from transformers import Qwen2Config, Qwen2Model

    bundle = load(folder)
    if bundle.lm.labels == 1:
        pytest.skip("one of the two is enough")
    tensors = {k: torch.tensor(v) for k, v in load_file(folder / "model.safetensors").items()}
    model = Qwen2Model(Qwen2Config(**json.loads((folder / "config.json").read_text()))).eval()
    model.load_state_dict({k[6:]: v for k, v in tensors.items() if k.startswith("model.")})
    head = torch.nn.Sequential(torch.nn.Linear(16, 16), torch.nn.ReLU(), torch.nn.Linear(16, 2))
    head.load_state_dict({k[6:]: v for k, v in tensors.items() if k.startswith("score.")})

    growing, rng = Growing(bundle.tokenizer, ["Add 1 and 2"], 1), np.random.default_rng(0)
    reward = process_reward(bundle, bundle, aggregate="min")
    carry = reward.init(growing.given(), 1, 96)
    text = ("<|im_start|>system\nPlease reason step by step, and put your final answer within "
            "\\boxed{}.<|im_end|>\n<|im_start|>user\nAdd 1 and 2<|im_end|>\n"
            "<|im_start|>assistant\n")
    for size in (5, 21, 2):
        growing.steps[0].append(random_step(rng, size))
        text += bundle.tokenizer.decode(growing.steps[0][-1]).strip() + "<extra_0>"
        found, carry = reward.score(carry, growing.rows())
        ids = bundle.tokenizer.encode(text, special=False)
        with torch.no_grad():
            logits = head(model(torch.tensor([ids])).last_hidden_state)[0].numpy()
        steps = softmax(logits[np.array(ids) == bundle.tokenizer.encode("<extra_0>", False)[0]])
        np.testing.assert_allclose(found, steps[:, 1].min(), atol=1e-4)
    assert isinstance(bundle, jaxlm.Bundle) and jnp.isfinite(found).all()
