"""The tables of docs/found.md on fine-tuning's settings, written from the results by
readme_tables.py."""

from typing import Any


def span(row: dict[str, float], form: str = "{:+.3f}") -> str:
    """An interval."""
    return f"{form.format(row['low'])} to {form.format(row['high'])}"


def effects(metrics: dict[str, Any]) -> list[list[str]]:
    """Every difference of two values, and whether its interval leaves zero out."""
    named = metrics["effects"] | {"stacked - phased": metrics["orders"]}
    head = ["first - second", "difference", "95% interval", "pairs", "better"]
    return [head, ["---"] * len(head)] + [
        [name, f"{row['mean']:+.3f}", span(row), str(row["pairs"]), better(name, row)]
        for name, row in named.items()]


def better(name: str, row: dict[str, float]) -> str:
    """Which of the two has the lower loss; "not told apart" where the interval holds zero.

    >>> better("batch 8 - 2", {"low": 0.1, "high": 0.3})
    '2'
    """
    if row["low"] <= 0 <= row["high"]:
        return "not told apart"
    first, second = name.split(" - ")
    return second if row["low"] > 0 else first.split(" ")[-1]


def best(metrics: dict[str, Any]) -> list[list[str]]:
    """The best run of each batch."""
    head = ["batch (rows)", "steps", "best rate", "schedule", "warm-up", "held-out loss"]
    return [head, ["---"] * len(head)] + [
        [batch, str(run["steps"]), f"{run['rate']:g}", run["schedule"], f"{run['warmup']:g}",
         f"{run['final']:.3f}"] for batch, run in metrics["best_by_batch"].items()]


def by_rate(metrics: dict[str, Any]) -> list[list[str]]:
    """Mean final losses: a line a batch or schedule, a column a rate."""
    table = metrics["mean_by_rate"]
    rates = list(next(iter(table.values())))
    head = ["mean held-out loss", *(f"rate {float(rate):g}" for rate in rates)]
    rows = sorted(table, key=lambda name: not name.startswith("batch"))
    return [head, ["---"] * len(head)] + [
        [name, *(f"{table[name][rate]:.3f}" for rate in rates)] for name in rows]


def signals(metrics: dict[str, Any]) -> list[list[str]]:
    """Rank correlations of the first steps' numbers with the final quality, by window."""
    head = ["first", "of", "all runs", "95% interval", "p", "within a batch", "within a rate"]
    cells = [head, ["---"] * len(head)]
    for found in metrics["windows"].values():
        window = found["window"]
        for key, words in (("early_loss", "loss"), ("early_gradnorm", "gradient norm"),
                           ("rank_runs", "`rank_runs`")):
            row, inside = found[f"{key}_spearman"], [
                found[f"{key}_spearman_within_{by}"]["rho"] for by in ("batch", "rate")]
            cells.append([steps(window), words, f"{row['rho']:+.2f}", span(row, "{:+.2f}"),
                          f"{row['p']:.4f}", *(f"{rho:+.2f}" for rho in inside)])
    return cells


def steps(window: float) -> str:
    """A window in words.

    >>> steps(8), steps(0.1)
    ('8 steps', '10% of the run')
    """
    return f"{window:.0%} of the run" if window < 1 else f"{window} steps"


def stopping(metrics: dict[str, Any]) -> list[list[str]]:
    """What stopping half of the runs saves and loses."""
    head = ["runs", "stopped after", "compute saved", "regret", "of a random half",
            "of the reverse"]
    cases = [("all", found) for found in metrics["windows"].values()] + [
        (f"batch {batch}", found) for batch, found in metrics["of_one_batch"].items()]
    third = metrics["by_third_quality"]
    last = ["all", "a third, by held-out loss", f"{third['compute_saved_fraction']:.0%}",
            f"{third['regret']:.3f}", f"{third['regret_at_random']:.3f}", ""]
    return [head, ["---"] * len(head)] + [
        [runs, steps(found["window"]), f"{found['compute_saved_fraction']:.0%}",
         f"{found['regret']:.3f}", f"{found['regret_at_random']:.3f}",
         f"{found['reversed']['regret']:.3f}"] for runs, found in cases] + [last]


def masked(metrics: dict[str, Any]) -> list[list[str]]:
    """Accuracy through the run by the share masked, and what masking gains at the end."""
    steps = metrics["runs"]["share 0.0"][0]["step"]
    head = ["masked", *(f"right after {step} steps" for step in steps), "points gained",
            "95% interval"]
    cells = [head, ["---"] * len(head)]
    for name, accuracy in metrics["accuracy"].items():
        gain = metrics["gain_points"].get(name)
        cells.append([name.removeprefix("share "), *(f"{value:.1%}" for value in accuracy),
                      *((f"{gain['mean']:+.1f}", span(gain, "{:+.1f}")) if gain else ("", ""))])
    return cells


TABLES = {"sft_recipe": {"effects": effects, "rates": by_rate, "best": best, "signals": signals,
                         "stopping": stopping},
          "masked_thought": {"masked thoughts": masked}}
