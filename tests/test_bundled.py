"""The bundled model: complete, small, and as good as its card says."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxlm
from jaxlm.eval import arithmetic, recall
from jaxlm.eval.skills import share
from jaxlm.hf.bundle import BUNDLED

FOLDER = BUNDLED["tiny"]
RESULT = "experiments/results/eval_tiny/cpu.json"


@pytest.fixture(scope="module")
def tiny() -> jaxlm.Bundle:
    return jaxlm.load("tiny")


def test_the_folder_is_complete_and_small():
    names = {path.name for path in FOLDER.iterdir()}
    assert {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json",
            "tokenizer_config.json", "README.md"} <= names
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) <= 10e6


def test_its_shape_suits_the_methods(tiny):
    config = tiny.lm.config
    assert config.num_layers >= 8 and config.head_dim == 64
    assert config.num_heads // config.num_kv_heads >= 2
    assert jaxlm.load("tiny", dtype=jnp.bfloat16).params["embed"]["table"].dtype == jnp.bfloat16


def published(root) -> dict:
    return json.loads((root / RESULT).read_text())["metrics"]


def within(right: list[bool], figure: dict) -> bool:
    """Whether a fresh sample agrees with a published share, to 4 standard errors of both."""
    spread = share(sum(right), len(right)).error ** 2 + figure["error"] ** 2
    return abs(np.mean(right) - figure["value"]) < 4 * np.sqrt(spread)


@pytest.mark.parametrize("level", arithmetic.LEVELS)
def test_arithmetic_is_as_published(tiny, level, request):
    rng = np.random.default_rng(11)
    problems = [arithmetic.sample(rng, level, "test") for _ in range(40)]
    made = jaxlm.generate(tiny, [p.prompt for p in problems], max_new_tokens=112,
                          sampler=jaxlm.Temperature(0.8), key=jax.random.key(5))
    right = [arithmetic.check_steps(p, g.text).correct
             for p, g in zip(problems, made, strict=True)]
    figure = published(request.config.rootpath)["arithmetic"][level]["t0.8"]
    assert within(right, figure)
    assert not within([False] * 40, figure)  # a model that knows nothing would fail


def test_recall_is_as_published(tiny, request):
    rng = np.random.default_rng(12)
    documents = [recall.sample(rng, 256, 1, "test") for _ in range(24)]
    made = jaxlm.generate(tiny, [d.prompt(0) for d in documents], max_new_tokens=3)
    right = [recall.check_answer(d, 0, g.text) for d, g in zip(documents, made, strict=True)]
    figure = published(request.config.rootpath)["recall"]["256"]
    assert within(right, figure)
    assert not within([False] * 24, figure)


def test_hard_problems_leave_room_for_search(request):
    hard = published(request.config.rootpath)["arithmetic"]["hard"]["t0.8"]
    assert 0.3 <= hard["value"] <= 0.7


@pytest.mark.torch
def test_transformers_loads_it_and_writes_the_same(tiny):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(FOLDER, dtype="float32")
    tokenizer = AutoTokenizer.from_pretrained(FOLDER)
    prompt = "Q:37+25-16=\n"
    inputs = tokenizer(prompt, return_tensors="pt")
    assert inputs["input_ids"][0].tolist() == tiny.tokenizer.encode(prompt)
    theirs = model.generate(**inputs, max_new_tokens=40, do_sample=False)[0]
    ours = jaxlm.generate(tiny, prompt, max_new_tokens=40)
    drawn = theirs[inputs["input_ids"].shape[1]:].tolist()
    assert drawn == list(ours.tokens)
