"""A process reward model inside a search: what it is told, how often it is computed and moved."""

import string

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.core.errors import ShapeError
from jaxlm.decode.samplers import Categorical
from jaxlm.rewards import PLAIN, process, process_reward, process_text
from jaxlm.search.base import Steps
from jaxlm.search.particles import filter_of, particle_filter
from jaxlm.search.run import make_task, put, start
from tests.rewards.twins import CHAT, PROBLEMS, Growing, twin

STEPS = Steps(tuple(string.ascii_lowercase), tokens=12, max_steps=3, max_new_tokens=36)
QUESTION = "Add 1 and 2"


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    return twin(folder / "policy", None, chat="<s>" + CHAT), twin(folder / "judge", 2)


def begun(policy, reward, questions):
    """What the reward has read of a chat before the first step, special tokens and all."""
    chat = policy.tokenizer.chat([{"role": "user", "content": f"{QUESTION}\nThink."}])
    task = make_task(policy, [policy.tokenizer.encode(chat, special=False)], reward,
                     filter_of("odds", 1.0, 0.5, "systematic"), particles=2, steps=STEPS,
                     sampler=Categorical(1.0), cache="dense", key=jax.random.key(0),
                     questions=questions)
    pop, carry = start(task, [0])
    state = (pop.carry if reward.on_device else carry).state
    return policy.tokenizer.decode(state.tokens_BS[0, : int(state.length_B[0])], special=True)


@pytest.mark.parametrize("on_device", [True, False])
def test_a_chat_layout_holds_the_question_and_no_chat_of_the_policy(models, on_device):
    policy, judge = models
    reward = process_reward(judge, policy, on_device=on_device)
    read = begun(policy, reward, [QUESTION])
    assert read == ("<|im_start|>system\nPlease reason step by step, and put your final answer "
                    f"within \\boxed{{}}.<|im_end|>\n<|im_start|>user\n{QUESTION}<|im_end|>\n"
                    "<|im_start|>assistant\n")
    assert "user\nuser" in begun(policy, reward, None)  # else it is told the prompt as it stands


@pytest.mark.parametrize("on_device", [True, False])
def test_without_a_form_it_reads_what_the_policy_does(models, on_device):
    policy, judge = models
    reward = process_reward(judge, policy, layout=PLAIN, on_device=on_device)
    read = begun(policy, reward, QUESTION)
    assert read == begun(policy, reward, None) and "Think." in read


def test_questions_are_one_a_prompt(models):
    reward = process_reward(models[1], models[0])
    for wrong in ((), (QUESTION,) * 2, [5]):
        with pytest.raises(ShapeError, match="one text for each of 1"):
            begun(models[0], reward, wrong)


def test_all_prompts_of_the_batch_are_read_together(models, monkeypatch):
    """Each call computes all rows: prompts that come one by one would take as many calls."""
    policy, judge = models
    reward = process_reward(judge, policy, layout=PLAIN, on_device=False)
    calls, extend = [], process_text.extend_jit
    monkeypatch.setattr(process_text, "extend_jit",
                        lambda *args: calls.append(None) or extend(*args))
    found = {}
    for quorum in (1, 3, None):
        calls.clear()
        results = particle_filter(policy, PROBLEMS, reward, particles=2, steps=STEPS,
                                  quorum=quorum, key=jax.random.key(1))
        found[quorum] = len(calls), [result.text for result in results]
    assert found[None] == found[3] and found[None][1] == found[1][1]
    assert found[None][0] <= STEPS.max_steps < found[1][0]


def test_nothing_moves_where_nobody_is_resampled(models, monkeypatch):
    policy, judge = models
    growing = Growing(judge.tokenizer, PROBLEMS[:1], 2)
    same, other = np.array([[0, 1]]), np.array([[1, 1]])
    moves, gather = [], process.gather
    monkeypatch.setattr(process, "gather", lambda state, ancestors, when=None: (
        moves.append(when) or gather(state, ancestors, when)))
    reward = process_reward(judge, policy, layout=PLAIN)
    carry = reward.init(growing.given(), 2, 32)
    for ancestors in (same, other):
        reward.gather(carry, jnp.asarray(ancestors))
    assert [when is None or bool(when) for when in moves] == [False, True]
    over_host = process_reward(judge, policy, layout=PLAIN, on_device=False)
    monkeypatch.setattr(process_text, "gather_jit", lambda state, *_: moves.append(None) or state)
    carry = over_host.init(growing.given(), 2, 32)
    for ancestors in (same, other):
        over_host.gather(carry, ancestors)
    assert len(moves) == 3


def test_a_part_that_is_too_large_for_its_place_is_named():
    with pytest.raises(ShapeError, match="longer than all before it"):
        put({"own": np.zeros((4, 8))}, {"own": np.zeros((2, 9))}, 1)
