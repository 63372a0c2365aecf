"""Plots are drawn from the results' JSON alone, and those committed belong to committed results."""

import json

import pytest

from experiments import _harness, plots, report

RESULTS = report.load(_harness.RESULTS)
KINDS = [f"{kind}{bits}" for bits in (2, 4, 8) for kind in ("squat", "kivi", "turboquant")]
MADE = {  # what scripts without a committed result write
    "inference_scaling": {"accuracy": {
        f"{method}|{reward}": {str(n): {"value": 0.5, "low": 0.4, "high": 0.6} for n in (1, 4, 16)}
        for method in ("dvts", "best-of-n") for reward in ("checker", "checker, noise 0.1")}},
    "kv_speed": {"batch": 8, "rows": [{"kind": kind, "cached": n, "ms": 1e-3 * n * (i + 1)}
                                      for i, kind in enumerate(KINDS) for n in (1024, 4096)]},
    "kv_capacity": {"rows": [
        {"target": t, "model": m, "context": c, "kind": k, "batch": b * 16384 // c}
        for t in ("v5e:1x1", "t4") for m in ("llama-3.1-8b", "llama-3.2-3b")
        for c in (4096, 16384) for k, b in (("bf16", 10), ("2-bit", 50))]},
    "kv_quality": {
        "rows": [{"text": "a text", "seed": 0, "kind": kind, "bytes_per_token": 100 * int(kind[-1]),
                  "divergence": 10.0 ** -int(kind[-1])} for kind in KINDS],
        "answers": [{"task": task, "kind": kind, "points": 1.5, "low": -0.5, "high": 3.0}
                    for task in ("recall", "lookup") for kind in ("dense", "squat2", "kivi2")]},
    "sft_recipe": {
        "early_window": 8, "runs": [{"batch": b, "early_loss": 4.0 - e, "early_grad_norm": 2.0 + e,
                                     "final": 3.5 + e} for b in (2, 8) for e in (0.1, 0.2)],
        "effects": {"batch 8 - 2": {"mean": 0.1, "low": 0.0, "high": 0.2}},
        "orders": {"mean": -0.1, "low": -0.2, "high": 0.1}},
    "masked_thought": {"gain_points": {"share 0.2": {"mean": 1, "low": -2, "high": 4}}},
}


@pytest.mark.parametrize(("path", "result"), RESULTS,
                         ids=[result["name"] for _, result in RESULTS])
def test_committed_plots_are_those_of_the_result(path, result):
    drawn = plots.draw(result)
    beside = {file.name for file in path.parent.glob(f"{path.stem}-*.png")}
    assert beside == {f"{path.stem}-{suffix}.png" for suffix in drawn}, \
        "run python experiments/report.py"
    assert all(png[:4] == b"\x89PNG" and len(png) < 60_000 for png in drawn.values())


@pytest.mark.parametrize("name", MADE)
def test_every_script_s_plots_can_be_drawn(name):
    drawn = plots.draw({"name": name, "metrics": MADE[name]})
    assert drawn and all(png[:4] == b"\x89PNG" for png in drawn.values())


def test_other_numbers_give_another_picture_and_missing_ones_an_error():
    one = {"name": "kv_speed", "metrics": MADE["kv_speed"]}
    other = json.loads(json.dumps(one))
    other["metrics"]["rows"][0]["ms"] *= 3
    assert plots.draw(one) == plots.draw(one) != plots.draw(other)
    del other["metrics"]["rows"][0]["ms"]
    with pytest.raises(KeyError, match="ms"):
        plots.draw(other)


def test_a_plot_of_a_metric_that_is_gone_is_removed(tmp_path):
    path = tmp_path / "kv_speed" / "cpu.json"
    path.parent.mkdir()
    (path.parent / "cpu-old.png").write_bytes(b"")
    (path.parent / "t4-ms.png").write_bytes(b"")
    written = report.redraw([(path, {"name": "kv_speed", "metrics": MADE["kv_speed"]})])
    assert [file.name for file in written] == ["cpu-ms.png"]
    assert {file.name for file in path.parent.iterdir()} == {"cpu-ms.png", "t4-ms.png"}
