"""The table of `experiments/inference_scaling.py`: budgets that match, and errors that are told."""

import argparse

import pytest

from experiments import inference_scaling as scaling
from jaxlm.core.errors import ConfigError

CELLS = {"1": 0.5, "4": 0.6, "16": 0.6, "64": 0.8}
ACCURACY = {name: {n: {"value": value + more} for n, value in CELLS.items()}
            for name, more in (("particle-filter|checker", 0.0), ("dvts|checker", -0.1))}


@pytest.mark.parametrize(("wanted", "budget", "at_least"), [
    (0.4, 1, False), (0.5, 1, False), (0.55, 2, False), (0.6, 4, False), (0.7, 32, False),
    (0.8, 64, False), (0.9, 64, True)])
def test_a_budget_lies_between_those_that_were_measured(wanted, budget, at_least):
    by_budget = {name: {"value": value} for name, value in CELLS.items()}
    found = scaling.budget_for(by_budget, wanted)
    assert found == (pytest.approx(budget), at_least)


def test_every_method_is_matched_with_the_larger_sibling():
    found = scaling.matching(ACCURACY, {"greedy": 0.7, "one_sample": 0.55, "seconds": 3.0})
    assert set(found) == {"greedy", "one_sample"}
    assert found["greedy"]["particle-filter|checker"]["budget"] == pytest.approx(32)
    assert found["greedy"]["dvts|checker"] == {"budget": pytest.approx(64), "at_least": False}
    assert found["one_sample"]["particle-filter|checker"]["budget"] == pytest.approx(2)
    assert scaling.matching(ACCURACY, {}) == {}


def test_the_ratio_is_that_of_two_budgets():
    found = scaling.ratio(ACCURACY, "checker", "dvts")
    assert found == {"ratio": pytest.approx(32 / 16), "at_least": False, "filter_budget": 16}


def test_only_budgets_that_cannot_be_shared_are_left_out(monkeypatch):
    args = argparse.Namespace(smoke=False, quick=False, budgets=[4, 8], rows=16)
    done = []
    keep = lambda name, compute: done.append(name) or (
        {"cells": {}} if name.startswith("rollouts") else compute())
    cell = lambda request, name, budget, *rest: {"right": [True], "tokens": 1.0, "seconds": 0.0}
    monkeypatch.setattr(scaling, "searched", cell)
    scaling.add_cells({}, keep, None, "checker", [], 0, args)
    asked = {tuple(name.split(", ")[:2]) for name in done[1:]}
    assert ("particle-gibbs", "4") in asked and ("parallel-tempering", "8") in asked
    assert ("parallel-tempering", "4") not in asked and ("dvts", "4") in asked

    def broken(*_):
        raise ConfigError("something else is wrong")

    monkeypatch.setattr(scaling, "searched", broken)
    with pytest.raises(ConfigError, match="something else"):
        scaling.add_cells({}, keep, None, "checker", [], 0, args)
