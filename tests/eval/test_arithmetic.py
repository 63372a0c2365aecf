"""The arithmetic task: generator, split and verifier."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxlm.eval.arithmetic import LEVELS, Level, Problem, check_steps, sample, split_of

PROBLEM = Problem(("+", "+", "-"), ((37,), (58, 4), (16,)))


def draw(level, split="train", seed=0, count=200):
    rng = np.random.default_rng(seed)
    return [sample(rng, level, split) for _ in range(count)]


def test_the_format_is_the_documented_one():
    assert PROBLEM.prompt == "Q:37+58*4-16=\n"
    assert PROBLEM.solution == "58*4=232\n37+232=269\n269-16=253\nA:253\n"


def test_two_products_in_front_keep_their_own_results():
    problem = Problem(("+", "-"), ((9, 8), (7, 6)))
    assert problem.solution == "9*8=72\n7*6=42\n72-42=30\nA:30\n"


@pytest.mark.parametrize("level", LEVELS)
def test_solutions_agree_with_python_and_pass_the_verifier(level):
    bounds = LEVELS[level]
    for problem in draw(level):
        value = sum((1 if s == "+" else -1) * int(np.prod(t))
                    for s, t in zip(problem.signs, problem.terms, strict=True))
        assert problem.answer == value
        assert bounds.terms[0] <= len(problem.terms) <= bounds.terms[1]
        assert bounds.products[0] <= sum(len(t) == 2 for t in problem.terms) <= bounds.products[1]
        assert all(0 <= int(step[3]) <= bounds.max_total for step in problem.steps)
        verdict = check_steps(problem, problem.solution)
        assert verdict.sound and verdict.correct and all(verdict.steps)


@pytest.mark.parametrize("level", LEVELS)
def test_same_seed_same_problems_and_splits_never_meet(level):
    assert draw(level, seed=3) == draw(level, seed=3)
    assert draw(level, seed=3) != draw(level, seed=4)
    assert {split_of(p.expression) for p in draw(level, "test")} == {"test"}
    assert {split_of(p.expression) for p in draw(level, "train")} == {"train"}


@pytest.mark.parametrize("level", LEVELS)
def test_any_one_changed_digit_is_caught(level):
    rng = np.random.default_rng(1)
    for problem in draw(level, count=60):
        text = problem.solution
        places = [i for i, c in enumerate(text) if c.isdigit()]
        place = places[int(rng.integers(len(places)))]
        other = str((int(text[place]) + int(rng.integers(1, 10))) % 10)
        assert not check_steps(problem, text[:place] + other + text[place + 1:]).sound


def test_a_slip_is_one_invalid_step_and_what_follows_from_it_is_valid():
    verdict = check_steps(PROBLEM, "58*4=232\n37+232=268\n268-16=252\nA:252\n")
    assert verdict.steps == (True, False, True)
    assert verdict.answered and not verdict.correct and not verdict.sound


@pytest.mark.parametrize("text, steps", [
    ("58*4=232\n37+232=269\n269-16=253\n2+2=4\nA:253\n", (True, True, True, False)),
    ("37+58=95\n58*4=232\n232+95=327\nA:253\n", (False, False, False)),
    ("58*4=232\nA:253\n", (True,)),
    ("A:253\n", ()),
    ("\n58*4=232\nA:253\n", (False, False)),
    ("58*4=0232\nA:253", (False,)),
    ("58*4=232 \nA:253", (False,)),
    ("58*4=" + "9" * 5000 + "\nA:253", (False,)),
])
def test_a_right_answer_without_its_steps_is_not_sound(text, steps):
    verdict = check_steps(PROBLEM, text)
    assert verdict.steps == steps and verdict.correct and not verdict.sound


@pytest.mark.parametrize("text, steps", [("", ()), ("58*4=23", ()), ("58*4=232\n37+2", (True,))])
def test_unfinished_text_is_judged_by_its_whole_lines(text, steps):
    verdict = check_steps(PROBLEM, text)
    assert verdict.steps == steps and not verdict.answered and not verdict.correct


@settings(max_examples=300, deadline=None)
@given(st.text(alphabet="0123456789+-*=A:\n x²", max_size=60))
def test_arbitrary_text_never_breaks_the_verifier_nor_passes_it(text):
    verdict = check_steps(PROBLEM, text)
    assert not verdict.sound or text.startswith(PROBLEM.solution.rstrip("\n"))


def test_sibling_levels_keep_to_their_signs():
    level = Level(terms=(3, 5), signs="-", number=(1, 30))
    assert all(set(p.signs[1:]) == {"-"} for p in draw(level))


@pytest.mark.parametrize("bad", [
    dict(terms=(3, 2)), dict(terms=(0, 2)), dict(terms=(2, 3), products=(3, 3), max_total=999),
    dict(terms=(2, 2), signs="/"), dict(terms=(2, 2), signs=""),
    dict(terms=(2, 2), number=(50, 99), max_total=40),
])
def test_a_level_that_cannot_be_drawn_is_refused(bad):
    with pytest.raises(ValueError, match="Level"):
        Level(**bad)


def test_unknown_names_are_refused():
    rng = np.random.default_rng(0)
    with pytest.raises(ValueError, match="unknown level 'trivial'"):
        sample(rng, "trivial")
    with pytest.raises(ValueError, match="split must be"):
        sample(rng, "easy", "validation")
