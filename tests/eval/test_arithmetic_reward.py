"""The arithmetic checker as a reward: it reads prompts, and agrees with the task's own verdicts."""

import numpy as np
import pytest

from jaxlm.core.errors import ShapeError
from jaxlm.eval import arithmetic
from jaxlm.eval.arithmetic_reward import arithmetic_reward, problem_of, step_verdicts
from jaxlm.rewards import Prompts, Rows


def test_a_problem_is_read_back():
    rng = np.random.default_rng(0)
    for level in arithmetic.LEVELS:
        for _ in range(50):
            problem = arithmetic.sample(rng, level)
            assert problem_of(problem.prompt) == problem


@pytest.mark.parametrize("prompt", ["", "Q:=\n", "Q:1+=\n", "Q:1+2=", "Q:1+2=\nx", "Q:1*2*3=\n",
                                    "Q:__import__('os')=\n", "Q:-1+2=\n"])
def test_what_is_no_problem_is_refused(prompt):
    with pytest.raises(ShapeError, match="no arithmetic problem"):
        problem_of(prompt)


def test_the_reward_follows_an_answer_as_it_grows():
    problem = arithmetic.sample(np.random.default_rng(1), "hard")
    lines = problem.solution.splitlines(keepends=True)
    wrong = [*lines[:2], lines[2].replace("=", "=9"), *lines[3:]]
    reward = arithmetic_reward(margin=0.1)
    carry = reward.init(Prompts(None, None, [problem.prompt]), 2, 200)
    for count in range(1, len(lines) + 1):
        texts = ["".join(lines[:count]), "".join(wrong[:count])]
        scores, carry = reward.score(carry, Rows(None, None, None, None, texts))
        np.testing.assert_allclose(scores, [0.9, 0.9 if count < 3 else 0.1], rtol=1e-6)


def test_an_answer_line_needs_all_of_its_steps():
    problem = problem_of("Q:37+8*6-16=\n")
    assert all(step_verdicts(problem.prompt, problem.solution))
    skipped = "8*6=48\n37+48=85\nA:69\n"
    assert step_verdicts(problem.prompt, skipped) == (True, True, False)
