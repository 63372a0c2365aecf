"""Slips made on purpose: what is wrong is what was asked for, and the checker's labels say so."""

import numpy as np
import pytest

from experiments.prm_data import Rollout
from experiments.prm_slips import MOST, drawn, gaps, slip, slips_batch, worked
from experiments.tiny_tokenizer import encode
from jaxlm.eval import arithmetic
from jaxlm.eval.arithmetic_reward import problem_of


@pytest.fixture(scope="module")
def problems():
    rng = np.random.default_rng(0)
    return [arithmetic.sample(rng, "hard", "train") for _ in range(200)]


def test_exactly_the_lines_asked_for_are_wrong(problems):
    rng = np.random.default_rng(1)
    written = 0
    for problem in problems:
        wrong_S = rng.random(len(problem.plan)) < 0.3
        text = worked(rng, problem, wrong_S)
        if text is None:
            continue
        written += 1
        assert arithmetic.check_steps(problem, text).steps == tuple(~wrong_S)
        assert all(0 <= int(line.split("=")[1]) <= MOST for line in text.splitlines())
    assert written > 50


def test_without_a_wrong_line_it_is_the_solution(problems):
    rng = np.random.default_rng(1)
    for problem in problems[:20]:
        text = worked(rng, problem, np.zeros(len(problem.plan), bool))
        assert text + f"A:{problem.answer}\n" == problem.solution


def test_half_the_rows_have_one_first_error_at_a_random_line():
    rng = np.random.default_rng(2)
    rows = [drawn(rng, "hard", dense=False) for _ in range(400)]
    wrong = [row.labels[:-1].count(False) for row in rows]
    assert set(wrong) == {0, 1} and abs(np.mean(wrong) - 0.5) < 4 * 0.5 / 400**0.5 + 0.05
    places = {row.labels.index(False) for row in rows if False in row.labels}
    assert places >= set(range(8))
    assert all(arithmetic.split_of(row.prompt[2:-2]) == "train" for row in rows)


def test_the_answer_s_label_is_that_of_the_whole():
    rng = np.random.default_rng(3)
    for row in (drawn(rng, "hard", dense=False) for _ in range(50)):
        assert row.labels[-1] == all(row.labels[:-1])


def test_a_slip_is_another_number_and_a_gap_its_size():
    rng = np.random.default_rng(4)
    values = rng.integers(0, 200, 500)
    made = np.array([slip(rng, int(value)) for value in values])
    assert (made != values).all() and (made >= 0).all()
    assert 0.2 < (abs(made - values) == 10).mean() < 0.6
    problem = problem_of("Q:50-8*2=\n")
    np.testing.assert_allclose(
        gaps(problem, "8*2=19\n50-19=21\nA:21\n"), [np.log(4) / 2, -np.log(11) / 2], rtol=1e-6)


@pytest.mark.parametrize("dense", [True, False])
def test_batch_has_its_labels_at_the_newlines_that_end_lines(dense):
    batch = slips_batch(np.random.default_rng(5), 8, 128, dense)
    same = np.random.default_rng(5)
    for tokens, labels, off in zip(*(batch[k] for k in ("tokens", "labels", "gaps")), strict=True):
        row = drawn(same, "hard", dense)
        newline = np.flatnonzero(tokens == encode("\n")[0])[1:]
        assert (np.flatnonzero(labels >= 0) == newline).all()
        assert labels[newline].tolist() == row.labels[: len(newline)]
        steps = newline if dense else newline[:-1] if len(newline) == len(row.labels) else newline
        assert (off[steps] != 0).sum() == (labels[steps] == 0).sum() or has_copied(row)
        assert (off[labels < 0] == 0).all()


def has_copied(row: Rollout) -> bool:
    """Whether a line is wrong by its operands, so that its result may be right by chance."""
    plan = problem_of(row.prompt).plan
    lines = row.answer.splitlines()[: len(plan)]
    return any(not line.split("=")[0].endswith(str(right))
               for (_, _, right), line in zip(plan, lines, strict=True) if isinstance(right, str))
