"""Rewards that read texts on the host: callables that fail or hang, checkers, outcome models."""

import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxlm.core.errors import ConfigError, ShapeError
from jaxlm.hf.bundle import Bundle
from jaxlm.models.config import ModelConfig
from jaxlm.models.lm import LM
from jaxlm.rewards import (
    OutcomeReward,
    Prompts,
    RewardError,
    Rows,
    StepChecker,
    TextReward,
    score_answers,
)
from jaxlm.search.base import Steps
from jaxlm.search.particles import particle_filter
from tests.rewards.twins import VOCAB, words


def asked(*texts):
    return Prompts(None, None, texts)


def answered(*texts, ended=None):
    return Rows(None, None, None, np.array(ended or [False] * len(texts)), list(texts))


def length(prompts, answers):
    return [len(answer) / 10 for answer in answers]


def test_only_what_is_new_is_scored_and_alike_texts_once():
    calls = []

    def watched(prompts, answers):
        calls.append(list(zip(prompts, answers, strict=True)))
        return length(prompts, answers)

    reward = TextReward(watched, batch=2)
    carry = reward.init(asked("p", "q"), 2, 8)
    scores, carry = reward.score(carry, answered("", "a", "bb", "bb"))
    np.testing.assert_allclose(scores, [1, 0.1, 0.2, 0.2])
    carry = reward.gather(carry, np.array([[1, 1], [0, 1]]))
    scores, carry = reward.score(carry, answered("a", "aaa", "bb", "bb"))
    np.testing.assert_allclose(scores, [0.1, 0.3, 0.2, 0.2])
    assert calls == [[("p", "a"), ("q", "bb")], [("p", "aaa")]] and scores.dtype == np.float32


def test_an_answer_that_ends_empty_is_scored_and_only_then():
    calls = []

    def empty(prompts, answers):
        calls.append(list(answers))
        return [0.25] * len(answers)

    reward = TextReward(empty)
    carry = reward.init(asked("p"), 2, 8)
    scores, carry = reward.score(carry, answered("", ""))
    assert scores.tolist() == [1.0, 1.0] and calls == []  # before the first step
    for _ in range(2):
        scores, carry = reward.score(carry, answered("", "", ended=[True, False]))
    assert scores.tolist() == [0.25, 1.0] and calls == [[""]]


def test_batches_hold_what_they_may():
    sizes = []
    reward = TextReward(lambda p, a: (sizes.append(len(p)), length(p, a))[1], batch=3)
    carry = reward.init(asked("p"), 7, 8)
    reward.score(carry, answered(*["x" * n for n in range(1, 8)]))
    assert sizes == [3, 3, 1]


def test_a_call_is_repeated():
    tries = []

    def flaky(prompts, answers):
        tries.append(time.monotonic())
        if len(tries) < 3:
            raise OSError("busy")
        return length(prompts, answers)

    reward = TextReward(flaky, retries=2, wait_s=0.05)
    scores, _ = reward.score(reward.init(asked("p"), 1, 8), answered("a"))
    np.testing.assert_allclose(scores, 0.1)
    assert np.diff(tries)[0] >= 0.05 and np.diff(tries)[1] >= 0.1


def test_a_call_that_gives_no_number_is_repeated():
    given = [[None], ["0.5"], np.float32([0.5])]
    reward = TextReward(lambda p, a: given.pop(0), retries=2, wait_s=0)
    scores, _ = reward.score(reward.init(asked("p"), 1, 8), answered("a"))
    assert scores.tolist() == [0.5] and not given


def broken(prompts, answers):
    if "bad" in prompts:
        raise KeyError("nothing known")
    return length(prompts, answers)


def test_a_failure_names_its_prompts_and_keeps_the_others_scores():
    reward = TextReward(broken, retries=1, wait_s=0.0)
    carry = reward.init(asked("good", "bad", "fine"), 2, 8)
    with pytest.raises(RewardError, match=r"prompts \[1\].*KeyError.*nothing known") as found:
        reward.score(carry, answered("a", "aa", "b", "bb", "c", "cc"))
    error = found.value
    assert error.prompts == (1,) and len(error.reasons) == 1
    np.testing.assert_allclose(error.scores_B, [0.1, 0.2, np.nan, np.nan, 0.1, 0.2])
    scores, _ = TextReward(length).score(error.carry, answered("a", "aa", "b", "bb", "c", "cc"))
    np.testing.assert_allclose(scores, [0.1, 0.2] * 3)  # the failed rows count as not scored


def test_a_call_that_hangs_does_not_hang_the_search():
    let_go = threading.Event()

    def hanging(prompts, answers):
        if "slow" in prompts:
            let_go.wait(30)
        return length(prompts, answers)

    reward = TextReward(hanging, timeout_s=0.2, retries=1, wait_s=0.0)
    began = time.monotonic()
    with pytest.raises(RewardError, match="TimeoutError: no answer within 0.2 s") as found:
        reward.score(reward.init(asked("quick", "slow"), 1, 8), answered("a", "b"))
    let_go.set()
    assert time.monotonic() - began < 10 and found.value.prompts == (1,)
    np.testing.assert_allclose(found.value.scores_B, [0.1, np.nan])


@pytest.mark.parametrize("wrong", [
    lambda p, a: [0.5], lambda p, a: 0.5, lambda p, a: [[0.5], [0.5]], lambda p, a: ["x", "y"],
    lambda p, a: None, lambda p, a: [None, None], lambda p, a: [0.5, None],
    lambda p, a: ["0.5", "0.5"], lambda p, a: np.array(["0.5", "0.5"])])
def test_what_is_not_a_number_a_text_is_a_failure(wrong):
    reward = TextReward(wrong, retries=0)
    with pytest.raises(RewardError):
        reward.score(reward.init(asked("p"), 2, 8), answered("a", "b"))


def exits(prompts, answers):
    raise SystemExit("gone")


def test_an_exit_in_the_function_is_a_failure_at_once():
    reward = TextReward(exits, timeout_s=20, retries=0)
    began = time.monotonic()
    with pytest.raises(RewardError, match="SystemExit"):
        reward.score(reward.init(asked("p"), 1, 8), answered("a"))
    assert time.monotonic() - began < 10


@pytest.mark.filterwarnings("ignore:a reward gave")
@given(st.lists(st.floats(width=32), min_size=1, max_size=6))
@settings(max_examples=40, deadline=None)
def test_scores_are_from_0_to_1_or_nan(values):
    reward = TextReward(lambda p, a: values)
    rows = answered(*map(str, range(len(values))))
    scores, _ = reward.score(reward.init(asked("p"), len(values), 8), rows)
    good = np.array([0 <= v <= 1 for v in values])
    np.testing.assert_array_equal(np.isnan(scores[~good & (np.abs(values) > 1.1)]), True)
    np.testing.assert_allclose(scores[good], np.array(values)[good], rtol=1e-6)


def test_a_score_out_of_range_is_nan_with_a_warning():
    reward = TextReward(lambda p, a: [2.0, float("nan"), float("-inf"), 1.0])
    with pytest.warns(UserWarning, match="a reward gave 2.0; expected 0 to 1"):
        scores, _ = reward.score(reward.init(asked("p"), 4, 8), answered(*"abcd"))
    np.testing.assert_array_equal(scores, [np.nan, np.nan, np.nan, 1])


def test_settings_are_checked():
    with pytest.raises(ConfigError, match="callable"):
        TextReward(3)
    with pytest.raises(ConfigError, match="timeout_s"):
        TextReward(length, timeout_s=0)
    with pytest.raises(ConfigError, match="retries"):
        TextReward(length, retries=-1)
    with pytest.raises(ConfigError, match="margin"):
        StepChecker(lambda p, a: [], margin=0.5)
    with pytest.raises(ConfigError, match="noise"):
        StepChecker(lambda p, a: [], noise=1.5)
    with pytest.raises(ConfigError, match="rows.texts"):
        TextReward(length).score(TextReward(length).init(asked("p"), 1, 8), Rows(*[None] * 4))


# --- checkers


def verdicts(prompt, answer):
    return [line == "ok" for line in answer.split()]


def scored(reward, *answers):
    carry = reward.init(asked("p"), len(answers), 8)
    return reward.score(carry, answered(*answers))[0]


def test_a_checker_scores_by_all_steps():
    found = scored(StepChecker(verdicts, margin=0.25), "ok", "ok ok", "ok no", "no ok")
    np.testing.assert_allclose(found, [0.75, 0.75, 0.25, 0.25])


def test_noise_turns_so_many_verdicts_and_always_the_same():
    """A binomial count: within 4 standard errors of the rate, and of no other rate here."""
    answers = [f"ok {i}" for i in range(4000)]
    clean = StepChecker(lambda p, a: [True])
    for noise in (0.05, 0.3):
        noisy = StepChecker(lambda p, a: [True], noise=noise)
        turned = scored(noisy, *answers) != scored(clean, *answers)
        error = np.sqrt(noise * (1 - noise) / len(answers))
        assert abs(turned.mean() - noise) < 4 * error < abs(0.5 - noise)
        shuffled = np.random.default_rng(0).permutation(len(answers))
        again = scored(noisy, *[answers[i] for i in shuffled])
        np.testing.assert_array_equal(again != scored(clean, *answers), turned[shuffled])
        other = scored(StepChecker(lambda p, a: [True], noise=noise, key=1), *answers)
        both = (other != scored(clean, *answers)) & turned
        assert abs(both.mean() - noise**2) < 4 * np.sqrt(noise**2 / len(answers))  # independent


def test_a_prompt_that_a_checker_cannot_read_fails_alone():
    def check(prompt, answer):
        return [int(prompt) > 0]

    reward = StepChecker(check)
    with pytest.raises(RewardError, match=r"prompts \[1\].*ValueError") as found:
        reward.score(reward.init(asked("1", "x"), 1, 8), answered("a", "b"))
    np.testing.assert_allclose(found.value.scores_B, [0.99, np.nan])


# --- outcome models


def judge(folder, labels, **changes):
    config = ModelConfig(vocab_size=VOCAB, dim=16, num_layers=1, num_heads=2, num_kv_heads=1,
                         head_dim=8, ffn_dim=16, **{"max_len": 64, **changes})
    lm = LM(config, labels=labels)
    return Bundle(lm, lm.init(jax.random.key(3)), words(folder))


@pytest.fixture(scope="module")
def judges(tmp_path_factory):
    folder = tmp_path_factory.mktemp("judges")
    return {labels: judge(folder, labels) for labels in (1, 2, 3, None)}


classify = jax.jit(lambda lm, params, tokens, lengths: lm.classify(params, tokens, lengths),
                   static_argnums=0)


@pytest.mark.parametrize("labels", [1, 2])
def test_answers_score_as_one_by_one(judges, labels):
    bundle = judges[labels]
    prompts, answers = ["p", "how", "a longer one:", "q", "r"], ["x", "yes", "no", "z" * 40, ""]
    want = []
    for prompt, answer in zip(prompts, answers, strict=True):
        ids = bundle.tokenizer.encode(prompt + answer)
        padded = jnp.asarray([ids + [0] * (64 - len(ids))])
        logits = np.asarray(classify(bundle.lm, bundle.params, padded, jnp.asarray([len(ids)])))[0]
        odds = logits[0] if labels == 1 else logits[1] - logits[0]
        want.append(1 / (1 + np.exp(-odds)))
    assert np.std(want) > 0.02
    np.testing.assert_allclose(score_answers(bundle, prompts, answers, batch=2), want, atol=1e-5)
    np.testing.assert_allclose(score_answers(bundle, prompts, answers, batch=8), want, atol=1e-5)
    shouted = score_answers(bundle, prompts, answers, form=lambda p, a: f"<s>{p}{a}")
    np.testing.assert_allclose(shouted, want, atol=1e-5)


def test_rows_are_judged_when_they_end(judges):
    reward = OutcomeReward(judges[1])
    carry = reward.init(asked("p"), 3, 8)
    scores, carry = reward.score(carry, answered("a", "b", "c", ended=[False, True, False]))
    final = score_answers(judges[1], ["p"] * 2, ["b", "cc"])
    np.testing.assert_allclose(scores, [0.5, final[0], 0.5], atol=1e-6)
    carry = reward.gather(carry, np.array([[0, 1, 1]]))
    scores, _ = reward.score(carry, answered("a", "b", "b", ended=[False, True, True]))
    np.testing.assert_allclose(scores, [0.5, final[0], final[0]], atol=1e-6)


def test_an_answer_that_ends_by_its_steps_is_judged_too(judges):
    steps = Steps("\n", tokens=2, max_steps=2, max_new_tokens=8)
    found = particle_filter(judges[None], "p", OutcomeReward(judges[1]), particles=4, steps=steps,
                            threshold=0.0, key=jax.random.key(0))
    texts = [answer.text for answer in found.answers]
    assert {answer.finish for answer in found.answers} == {"steps"}
    want = score_answers(judges[1], ["p"] * 4, texts)
    assert np.abs(want - 0.5).min() > 1e-3
    np.testing.assert_allclose([answer.step_scores for answer in found.answers],
                               np.stack([np.full(4, 0.5), want], 1), atol=1e-6)


def test_a_text_too_long_or_parameters_of_nan_give_nan(judges):
    with pytest.warns(UserWarning, match="made for 64"):
        found = score_answers(judges[1], ["p", "p"], ["a", "a" * 80])
    assert np.isfinite(found[0]) and np.isnan(found[1])
    nothing = jax.tree.map(lambda x: x * np.nan, judges[1].params)
    assert np.isnan(score_answers(judges[1].replace(params=nothing), ["p"], ["a"])).all()


def test_other_heads_are_refused(judges):
    for labels, said in ((3, "3 labels"), (None, "a vocabulary")):
        with pytest.raises(ConfigError, match=said):
            score_answers(judges[labels], ["p"], ["a"])
        with pytest.raises(ConfigError, match=said):
            OutcomeReward(judges[labels])
    with pytest.raises(ShapeError, match="1 prompts and 2 answers"):
        score_answers(judges[1], ["p"], ["a", "b"])
    with pytest.raises(ConfigError, match="Bundle"):
        score_answers("model", ["p"], ["a"])
