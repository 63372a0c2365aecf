"""The table of `experiments/inference_scaling.py`: budgets that match, and errors that are told."""

import argparse
import json

import jax.numpy as jnp
import numpy as np
import pytest

import jaxlm
from experiments import _harness, scaling_table
from experiments import inference_scaling as scaling
from jaxlm.core.errors import ConfigError
from jaxlm.eval.arithmetic_reward import arithmetic_reward
from jaxlm.search.methods import as_rollouts, draw

CELLS = {"1": 0.5, "4": 0.6, "16": 0.6, "64": 0.8}
ACCURACY = {name: {n: {"value": value + more} for n, value in CELLS.items()}
            for name, more in (("particle-filter|checker", 0.0), ("dvts|checker", -0.1))}


@pytest.mark.parametrize(("wanted", "budget", "at_least"), [
    (0.4, 1, False), (0.5, 1, False), (0.55, 2, False), (0.6, 4, False), (0.7, 32, False),
    (0.8, 64, False), (0.9, 64, True)])
def test_a_budget_lies_between_those_that_were_measured(wanted, budget, at_least):
    found = scaling_table.reach([int(name) for name in CELLS], list(CELLS.values()), wanted)
    assert found == (pytest.approx(budget), at_least)


def test_every_method_is_matched_with_the_larger_sibling():
    found = scaling.matching(ACCURACY, {"greedy": 0.7, "one_sample": 0.55, "seconds": 3.0})
    assert set(found) == {"greedy", "one_sample"}
    assert found["greedy"]["particle-filter|checker"]["budget"] == pytest.approx(32)
    assert found["greedy"]["dvts|checker"] == {"budget": pytest.approx(64), "at_least": False}
    assert found["one_sample"]["particle-filter|checker"]["budget"] == pytest.approx(2)
    assert scaling.matching(ACCURACY, {}) == {}
    sibling = {"greedy": 0.7, "one_sample": 0.95}
    table = scaling_table.larger_table(
        {"larger": sibling, "budget_to_match_larger": scaling.matching(ACCURACY, sibling)})
    assert table[0][2:] == ["as the larger one greedily, 70.0%",
                            "as the larger one in one sample, 95.0%"]
    assert ["particle-filter", "checker", "32", "more than 64"] in table


def test_ratios_are_those_of_two_budgets_at_every_one_of_the_filter_s():
    found = scaling_table.ratios(ACCURACY)
    assert found == {"best-of-n": {}, "dvts": {"checker": {
        "4": {"ratio": pytest.approx(32 / 4), "at_least": False},
        "16": {"ratio": pytest.approx(32 / 16), "at_least": False},
        "64": {"ratio": 1.0, "at_least": True}}}}
    assert scaling_table.ratio_table({"accuracy": ACCURACY}) == [
        ["reward", "against", "4", "16", "64"], ["---"] * 5,
        ["checker", "dvts", "8.0", "2.0", "at least 1.0"]]


def cells(problems, shares, seeds=2):
    """Cells whose answers are right at random, line -> budget -> seed -> cell."""
    rng = np.random.default_rng(0)
    return {line: {budget: {str(seed): {"right": (rng.random(problems) < share).tolist(),
                                        "tokens": 1.0 + seed} for seed in range(seeds)}
                   for budget, share in by.items()} for line, by in shares.items()}


def test_a_ratio_s_band_is_of_problems_drawn_anew():
    """Where a rival reaches the filter in some draws and not in others, the upper end is a bound;
    where it clearly does, both ends are numbers. All can be made again of what is kept."""
    made = cells(400, {"particle-filter|checker": {"1": 0.3, "4": 0.6, "8": 0.9},
                       "dvts|checker": {"1": 0.3, "4": 0.5, "16": 0.7},
                       "best-of-n|checker": {"1": 0.3, "16": 0.55, "32": 0.6}})
    args = argparse.Namespace(seed=0, seeds=2)
    found = scaling.table(made, 400, args)
    told = found["budget_ratios"]
    four, eight = told["dvts"]["checker"]["4"], told["dvts"]["checker"]["8"]
    assert 1 < four["low"]["ratio"] < four["ratio"] < four["high"]["ratio"] <= 4
    assert not (four["low"]["at_least"] or four["high"]["at_least"])
    never = {"ratio": 2.0, "at_least": True}
    assert eight == {**never, "low": never, "high": never}
    unsure = told["best-of-n"]["checker"]["4"]
    assert not unsure["low"]["at_least"] and unsure["high"] == {"ratio": 8.0, "at_least": True}
    again = np.random.default_rng(0).integers(0, 400, (2000, 400))
    assert scaling_table.ratios(found["accuracy"], again) == told
    for line, by in made.items():
        for budget, seeds in by.items():
            cell = found["accuracy"][line][budget]
            assert scaling_table.often(cell, 400).mean() == pytest.approx(cell["value"])
            assert cell["tokens"] == 1.5 and cell["seeds"] == 2
            for seed, one in seeds.items():
                kept = scaling_table.unpacked(cell["each"][seed]["right"], 400)
                assert kept.tolist() == one["right"]


def test_an_earlier_result_s_cells_count_as_if_measured_again(tmp_path):
    """One seed of one method, then the rest: the table of all at once, and nothing done twice."""
    made = cells(50, {"particle-filter|checker": {"1": 0.3, "4": 0.6},
                      "dvts|checker": {"1": 0.5, "4": 0.5}}, 2)
    args = argparse.Namespace(seed=0, seeds=2, problems=50, smoke=False, earlier=None, judge="")
    assert scaling.gone_before(args) == ({}, {}, {})
    first = {"particle-filter|checker": {budget: {"0": seeds["0"]} for budget, seeds in
                                         made["particle-filter|checker"].items()}}
    args.earlier = tmp_path / "cpu.json"
    metrics = scaling.table(first, 50, args) | {
        "device_s": 5.0, "judge": "one", "larger": {"greedy": 0.9}}
    written = {"command": "c", "commit": "1", "sources": "2", "smoke": False, "metrics": metrics}
    args.earlier.write_text(json.dumps(_harness.plain(written)))
    found, sibling, about = scaling.gone_before(args)
    assert found == first and sibling == {"greedy": 0.9}
    assert about == {"earlier": {"command": "c", "commit": "1", "sources": "2", "device_s": 5.0}}
    for line, by in made.items():
        for budget, seeds in by.items():
            found.setdefault(line, {}).setdefault(budget, {}).update(
                {seed: cell for seed, cell in seeds.items()
                 if seed not in found.get(line, {}).get(budget, {})})
    assert scaling.table(found, 50, args) == scaling.table(made, 50, args)
    for change in ({"problems": 60}, {"judge": "two"}):
        with pytest.raises(SystemExit, match="expected"):
            scaling.gone_before(argparse.Namespace(**vars(args) | change))
    del metrics["accuracy"]["particle-filter|checker"]["4"]["each"]
    args.earlier.write_text(json.dumps(_harness.plain(written)))
    with pytest.raises(SystemExit, match="without `each`"):
        scaling.gone_before(args)


class Kept:
    """Stands for `Resumable`: notes what is computed, and keeps nothing."""

    def __init__(self, done):
        self.parts, self.done = {}, done

    def __call__(self, name, compute):
        self.done.append(name)
        return compute()


def test_what_is_there_is_not_measured_again(monkeypatch):
    args = argparse.Namespace(smoke=False, quick=True, budgets=[4, 8], rows=16, most=None,
                              ends=np.inf, late=0)
    there = cells(3, {"particle-filter|checker": {"4": 0.5}, "dvts|checker": {"4": 0.5}}, 1)
    done = []
    cell = {"right": [True] * 3, "tokens": 1.0, "seconds": 2.0}
    monkeypatch.setattr(scaling, "searched", lambda request, name, budget, *_: cell)
    keep = Kept(done)
    scaling.add_searched(there, keep, None, "checker", [], 0, args)
    assert done == [f"{name}, 8, checker, seed 0" for name in ("particle-filter", "dvts")]
    assert there["dvts|checker"]["8"]["0"] == {"right": [True] * 3, "tokens": 1.0}
    scaling.add_searched(there, keep, None, "checker", [], 0, args)
    assert len(done) == 2
    args.most = 4
    scaling.add_searched(there, keep, None, "checker", [], 1, args)
    assert [name.split(", ")[1] for name in done[2:]] == ["4", "4"]
    args.ends = 0.0  # is over
    scaling.add_searched(there, keep, None, "checker", [], 2, args)
    assert len(done) == 4 and args.late == 2 and "2" not in there["dvts|checker"]["4"]
    full = {line: {budget: {"0": cell} for budget in ("4", "8")}
            for line in (f"{name}|checker" for name in scaling.SELECTIONS)}
    scaling.add_selected(full, keep, None, {"checker": None}, [], 0, args)
    assert len(done) == 4
    monkeypatch.setattr(scaling, "selected", lambda *_: {"cells": {"rpc|checker|4": cell}})
    del full["rpc|checker"]["4"]["0"]
    scaling.add_selected(full, keep, None, {"checker": None}, [], 0, args)
    assert len(done) == 5 and full["rpc|checker"]["4"]["0"] == cell


def test_only_budgets_that_cannot_be_shared_are_left_out(monkeypatch):
    args = argparse.Namespace(smoke=False, quick=False, budgets=[4, 8], rows=16, most=None,
                              ends=np.inf, late=0)
    done = []
    keep = Kept(done)
    cell = lambda request, name, budget, *rest: {"right": [True], "tokens": 1.0, "seconds": 0.0}
    monkeypatch.setattr(scaling, "searched", cell)
    scaling.add_searched({}, keep, None, "checker", [], 0, args)
    asked = {tuple(name.split(", ")[:2]) for name in done}
    assert ("particle-gibbs", "4") in asked and ("parallel-tempering", "8") in asked
    assert ("parallel-tempering", "4") not in asked and ("dvts", "4") in asked

    def broken(*_):
        raise ConfigError("something else is wrong")

    monkeypatch.setattr(scaling, "searched", broken)
    with pytest.raises(ConfigError, match="something else"):
        scaling.add_searched({}, keep, None, "checker", [], 0, args)


@pytest.mark.slow
def test_rewards_that_read_texts_share_their_rollouts_and_score_as_in_a_search():
    """A draw scored by the exact checker, judged again by one that errs, is a draw by that one."""
    bundle, problems = jaxlm.load("tiny", dtype=jnp.float32), scaling.problems_of(
        argparse.Namespace(problems=3))
    rewards = {"checker": arithmetic_reward(), "noise": arithmetic_reward(0.3), "model": object()}
    assert scaling.together(rewards) == [["checker", "noise"], ["model"]]

    def drawn(reward):
        request = scaling.request_of(bundle, rewards[reward])
        return scaling.in_batches(problems, 0, 3, lambda prompts, keys: [
            as_rollouts(request, [one]) for one in draw(request, prompts, keys, 4)])

    for problem, exact, noisy in zip(problems, drawn("checker"), drawn("noise"), strict=True):
        again = scaling.scored(rewards["noise"], problem, exact)
        assert again.texts == noisy.texts
        np.testing.assert_allclose(again.rewards_P, noisy.rewards_P)
    args = argparse.Namespace(rows=16)
    found = scaling.selected(scaling.request_of(bundle, rewards["checker"]), {
        name: rewards[name] for name in ("checker", "noise")}, [1, 4], problems, 0, args)["cells"]
    assert {key.split("|")[0] for key in found if "noise" in key} == set(scaling.REWARDED)
    assert found["best-of-n|checker|4"]["tokens"] == found["best-of-n|noise|4"]["tokens"]
