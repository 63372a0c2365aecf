"""A reward by its name: each kind opens, and what stands for none is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxlm
from jaxlm.cli import solve
from jaxlm.core.errors import CheckpointError, ConfigError
from jaxlm.eval.named_reward import open_reward
from jaxlm.rewards.base import Prompts, Rows
from jaxlm.rewards.call import TextReward


@pytest.fixture(scope="module")
def tiny():
    return jaxlm.load("tiny")


def scores(reward, tiny, answers):
    """Of answers to 12+34."""
    prompt = "Q:12+34=\n"
    start = len(tiny.tokenizer.encode(prompt))
    ids = [tiny.tokenizer.encode(prompt + answer) for answer in answers]
    tokens = np.zeros((len(ids), 32), np.int32)
    for row, text in zip(tokens, ids, strict=True):
        row[:len(text)] = text
    lengths = jnp.array([len(text) for text in ids])
    carry = reward.init(Prompts(jnp.asarray(tokens[:1, :start]), jnp.array([start]), [prompt]),
                        len(ids), 24)
    rows = Rows(jnp.asarray(tokens), jnp.full(len(ids), start), lengths,
                jnp.zeros(len(ids), bool), texts=list(answers))
    return np.asarray(reward.score(carry, rows)[0])


def test_the_checker_and_its_noise(tiny):
    good, bad = scores(open_reward("arithmetic", tiny, jaxlm.load), tiny,
                       ["12+34=46\n", "12+34=47\n"])
    assert good > 0.9 and bad < 0.1
    good, bad = scores(open_reward("arithmetic:1", tiny, jaxlm.load), tiny,
                       ["12+34=46\n", "12+34=47\n"])
    assert good < 0.1 and bad > 0.9  # every verdict turned round


def test_a_function(tiny, tmp_path, monkeypatch):
    (tmp_path / "my_reward.py").write_text(
        "def short(prompts, answers):\n    return [1 / (1 + len(a)) for a in answers]\n")
    monkeypatch.chdir(tmp_path)
    reward = open_reward("my_reward:short", tiny, jaxlm.load)
    assert isinstance(reward, TextReward)
    np.testing.assert_allclose(scores(reward, tiny, ["1", "123"]), [0.5, 0.25], rtol=1e-6)


def test_a_process_reward_has_room_for_the_steps_of_the_run(tiny, monkeypatch):
    lm = jaxlm.LM(tiny.lm.config, labels=2, per_token=True)
    judge = tiny.replace(lm=lm, params=lm.init(jax.random.key(0)))
    assert open_reward("a-judge", tiny, lambda name: judge, steps=99).steps == 99
    read: list[dict] = []
    monkeypatch.setattr(solve, "load", lambda name, **as_is: read.append(as_is) or judge)
    as_is = {"check_tokenizer": False}
    assert solve.reward_of("a-judge", tiny, "math", "last", 98, as_is).steps == 98
    assert read == [as_is]  # and is read as the model is


@pytest.mark.parametrize("name, error, words", [
    ("arithmetic:2", ConfigError, "from 0 to 1"), ("arithmetic:x", ConfigError, "from 0 to 1"),
    ("no_such_module:f", ConfigError, "no_such_module"), ("math:nothing", ConfigError, "nothing"),
    ("./no/folder", CheckpointError, "no/folder"),
])
def test_what_stands_for_none(tiny, name, error, words):
    with pytest.raises(error, match=words):
        open_reward(name, tiny, jaxlm.load)
