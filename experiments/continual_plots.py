"""Plots of the continual-learning table: what is kept against what is learnt."""

from typing import Any

import numpy as np

from experiments.continual_table import WORDS
from experiments.continual_tasks import ORDERS
from jaxlm.eval.plots import LIGHT, Draw

SHOWN = ("full", "replay", "ewc", "olora", "osft importance")
COLOURS = (*LIGHT["series"], "#c92a2a", "#868e96", "#364fc7", "#f06595",
           "#000000", "#99711b", "#66d9e8", "#1b4332", "#e8590c", "#862e9c")
OURS, THEIRS = "ovPpXdH", "s^D<>*h84123"  # a marker a row: colours alone do not tell so many apart


def tradeoff(metrics: dict[str, Any], prefix: str = "") -> Draw:
    """Forgetting against average accuracy, a point a row with 95 % intervals both ways."""
    accuracy, forgetting = (metrics[f"{prefix}{name}_spread"]
                            for name in ("accuracy", "forgetting"))

    def drawing(axes, colours):
        marks = {True: iter(OURS), False: iter(THEIRS)}
        for i, row in enumerate(row for row in forgetting if row in WORDS):
            (x, y), ours = (accuracy[row], forgetting[row]), row.startswith("osft")
            off = [[[one["mean"] - one["low"]], [one["high"] - one["mean"]]] for one in (x, y)]
            axes.errorbar(x["mean"], y["mean"], xerr=off[0], yerr=off[1], label=WORDS[row],
                          capsize=2, fmt=next(marks[ours]), markersize=6, linewidth=0.8,
                          color=COLOURS[i % len(COLOURS)], alpha=1.0 if ours else 0.7)
        for row in accuracy:
            if row not in forgetting:
                axes.axvline(accuracy[row]["mean"], color=colours["soft"], linewidth=0.8,
                             linestyle="--" if row == "joint" else ":",
                             label=f"{WORDS[row]} (reference)")
        axes.set_xlabel("average accuracy after the last task")
        axes.set_ylabel("forgetting (lower is better)")
        axes.legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))

    return drawing


def through(metrics: dict[str, Any], score: str = "accuracy") -> Draw:
    """Accuracy on the task learnt first, second, ... after each; a block for each of some rows."""
    rows = [row for row in SHOWN if row in metrics["forgetting"]]

    def drawing(axes, colours):
        middles = []
        for block, row in enumerate(rows):
            mean = np.mean([one[score] for key, one in metrics["courses"].items()
                            if key.startswith(tuple(f"{row}, {order}, seed " for order in ORDERS))],
                           axis=0)
            steps, tasks = mean.shape
            start = block * (steps + 0.5)
            for j in range(tasks):
                axes.plot(start + np.arange(j + 1, steps), mean[j + 1:, j], marker="o",
                          markersize=3, linewidth=1.3, color=COLOURS[j],
                          label=f"task {j + 1} of {tasks}" if not block else None)
            middles.append(start + (steps - 1) / 2 + 0.5)
        axes.set_xticks(middles, rows)
        axes.set_ylim(0)
        axes.set_xlabel("each block: after 1 to 5 tasks; mean over orders and seeds")
        axes.set_ylabel("accuracy" if score == "accuracy" else "right among its own labels")
        axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))

    return drawing


def osft_continual(metrics: dict[str, Any]) -> dict[str, tuple[str, Draw, tuple[float, float]]]:
    """Suffix -> title, drawing, inches."""
    return {"tradeoff": ("Forgetting against accuracy, five tasks in turn", tradeoff(metrics),
                         (7.2, 4.0)),
            "through": ("Each task from when it was learnt", through(metrics), (8.0, 3.6)),
            "tradeoff-chosen": ("Forgetting against accuracy, among a task's own labels",
                                tradeoff(metrics, "chosen_"), (7.2, 4.0)),
            "through-chosen": ("Each task from when it was learnt, among its own labels",
                               through(metrics, "chosen"), (8.0, 3.6))}
