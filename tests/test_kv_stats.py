"""Paired statistics of the cache experiments, against cases worked by hand."""

import numpy as np
import pytest

from experiments.kv_quality import beside_earlier
from experiments.kv_stats import best_share, capacity, drop, mcnemar, reached, whole_memory


def test_a_drop_is_paired_and_its_interval_holds_it():
    exact, rough = [[True]] * 60 + [[False]] * 40, [[True]] * 50 + [[False]] * 48 + [[True]] * 2
    found = drop(exact, rough)
    assert (found["points"], found["lost"], found["won"], found["problems"]) == (8.0, 10, 2, 100)
    assert found["low"] < 8.0 < found["high"]
    assert found["p"] == mcnemar(10, 2) == pytest.approx(2 * (66 + 12 + 1) / 2**12)


def cell(kind, rows, size):
    return {"text": "a", "seed": 0, "kind": kind, "by_row": rows, "bytes_per_token": size}


def test_a_rival_of_more_bytes_is_none():
    rows = [cell("squat2", [2.0, 2.1], 100), cell("kivi4", [0.1, 0.1], 150)]
    assert best_share(rows, (2,)) == (0.0, [])
    share, (found,) = best_share([*rows, cell("kivi2", [4.0, 4.2], 99)], (2,))
    assert (share, found["best_rival"], found["rivals"]) == (1.0, "kivi2", 1)
    assert found["over_best_rival"] == pytest.approx(0.5)


@pytest.mark.parametrize(("mean", "spread", "outcome"), [
    (4.0, 0.1, "less"), (5.02, 0.1, "tied"), (5.02, 2.0, "open"), (6.0, 0.1, "more")])
def test_tied_is_what_is_surely_little_worse_and_not_what_is_noisy(mean, spread, outcome):
    noise = np.random.default_rng(0).normal(size=16)
    noise -= noise.mean()
    rival = cell("turboquant2", 5 + 0.1 * noise, 80)
    share, (found,) = best_share([cell("squat2", mean + spread * noise[::-1], 100), rival], (2,))
    assert (found["outcome"], share) == (outcome, float(outcome in ("less", "tied")))


def test_our_two_methods_are_no_rivals_of_each_other():
    rows = [cell("squat2", [2.0, 2.1], 100), cell("rsquat2", [1.0, 1.1], 100),
            cell("rkivi2", [1.5, 1.6], 100)]
    share, (found,) = best_share(rows, (2,))
    assert (share, found["best_rival"], found["rivals"]) == (0.0, "rkivi2", 1)
    share, (found,) = best_share(rows, (2,), "rsquat")
    assert (share, found["best_rival"], found["rivals"]) == (1.0, "rkivi2", 1)


def test_only_squat_makes_headlines():
    rows = [{"task": task, "kind": kind, "points": 1.0}
            for task in ("recall", "arithmetic") for kind in ("squat2", "squat4", "kivi2")]
    assert set(reached(rows)) == {f"{task}_drop_points{tail}" for task in ("recall", "arithmetic")
                                  for tail in ("", "_4bit")}


def test_a_line_of_capacity_says_what_was_only_predicted_and_what_is_missing():
    at = {"target": "t4", "model": "m", "context": 16384}
    rows = [at | {"kind": "2-bit", "batch": 30, "compiled": 0},
            at | {"kind": "bf16", "batch": 10, "compiled": 2},
            at | {"kind": "bf16", "batch": 0, "compiled": 0, "target": "v5e:1x1"},
            at | {"kind": "2-bit", "left_out": "no compiler", "target": "v5e:1x1"},
            at | {"kind": "2-bit", "left_out": "no compiler", "target": "h100"}]
    head, _, one, other = capacity({"rows": rows})
    assert head == ["chip", "model", "context", "16-bit", "2-bit", "2-bit over 16-bit"]
    assert one == ["t4", "m", "16,384", "10", "30*", "3.0"]
    assert other == ["v5e:1x1", "m", "16,384", "0", "", ""]


def test_memory_in_the_paper_s_setting():
    row = {"rows": 64, "bf16_bytes": 3 * 2**30, "2-bit_bytes": 2**30, "ratio": 3.0}
    assert whole_memory({"paper_setting": [row]})[2:] == [["64", "3.0 GiB", "1.0 GiB", "3.00"]]
    assert whole_memory({})[2:] == []


def test_what_is_not_measured_now_is_an_earlier_result_s_and_says_so():
    row = lambda task, kind, points: {"task": task, "kind": kind, "points": points}
    earlier = {"commit": "abc", "command": "python x.py", "metrics": {
        "best_share": 0.5, "rows": [1],
        "answers": [row("lookup", "kivi2", 1.0), row("recall", "kivi2", 2.0)]}}
    found = beside_earlier(earlier, {"answers": [row("lookup", "kivi2", 3.0)], "rows": [2]})
    assert found["answers"] == [row("lookup", "kivi2", 3.0), row("recall", "kivi2", 2.0)]
    assert (found["rows"], found["best_share"]) == ([2], 0.5)
    assert found["earlier"] == [{"commit": "abc", "command": "python x.py",
                                 "answers": ["recall kivi2"], "metrics": ["best_share"]}]
    again = beside_earlier({"commit": "def", "command": "y", "metrics": found}, {"rows": [3]})
    assert again["rows"] == [3] and len(again["answers"]) == 2
    assert [one["commit"] for one in again["earlier"]] == ["abc", "def"]
