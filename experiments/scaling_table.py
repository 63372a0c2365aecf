"""Budgets that match, for inference_scaling.py, and the tables of docs/search.md.

Only from `accuracy`, method|reward -> budget -> cell, so that a committed result gives them too. A
cell has `value`, and newer ones `each`: by seed, which problems were answered right (`packed`).
"""

from typing import Any

import numpy as np

Accuracy = dict[str, dict[str, Any]]
FILTER = "particle-filter"
RIVALS = ("best-of-n", "dvts")


def reach(budgets: list[int], values: Any, wanted: float) -> tuple[float, bool]:
    """The budget that reaches an accuracy, between budgets by their logarithms; the largest, and
    true, where none does. No less than the smallest.

    >>> reach([4, 16], [0.5, 0.75], 0.5), reach([4, 16], [0.5, 0.75], 0.8)
    ((4.0, False), (16.0, True))
    """
    near = wanted - 1e-9  # shares over seeds may be the same but for their rounding
    x, y = np.log2(budgets), np.maximum.accumulate(values)
    if y[-1] < near:
        return float(budgets[-1]), True
    i = int(np.argmax(y >= near))
    if i == 0:
        return float(budgets[0]), False
    share = min((wanted - y[i - 1]) / (y[i] - y[i - 1]), 1.0)
    return float(2 ** (x[i - 1] + share * (x[i] - x[i - 1]))), False


def ratios(accuracy: Accuracy, again: np.ndarray | None = None) -> dict[str, Any]:
    """Rival -> reward -> budget of the filter -> how many times that budget the rival needs to be
    right as often.

    `at_least`: its largest budget does not reach it. again: (n, problems), problems drawn anew;
    with it, and where the cells have `right`, `low` and `high` are the ends of 95 % of the ratios,
    each with an `at_least` of its own.
    """
    found: dict[str, Any] = {}
    for other in RIVALS:
        by_reward = found.setdefault(other, {})
        for line, mine in accuracy.items():
            method, _, reward = line.partition("|")
            theirs = accuracy.get(f"{other}|{reward}")
            if method == FILTER and theirs:
                by_reward[reward] = {
                    budget: ratio(cell, int(budget), theirs, again)
                    for budget, cell in sorted(mine.items(), key=lambda item: int(item[0]))
                    if int(budget) > 1}
    return found


def ratio(
    cell: dict[str, Any], budget: int, theirs: dict[str, Any], again: np.ndarray | None
) -> dict[str, Any]:
    """One of `ratios`: of the filter's cell at a budget, and another method's cells."""
    budgets = sorted(map(int, theirs))
    others = [theirs[str(number)] for number in budgets]
    need, at_least = reach(budgets, [other["value"] for other in others], cell["value"])
    found = {"ratio": need / budget, "at_least": at_least}
    if again is None or not all("each" in one for one in (cell, *others)):
        return found
    count = again.shape[1]
    mine_N = often(cell, count)[again].mean(1)
    theirs_NB = np.stack([often(other, count)[again].mean(1) for other in others], 1)
    drawn = sorted((beyond, most / budget) for most, beyond in (
        reach(budgets, values, wanted) for values, wanted in zip(theirs_NB, mine_N, strict=True)))
    cut = int(0.025 * len(drawn))  # those that never reach it lie above all others
    ends = {"low": drawn[cut], "high": drawn[-1 - cut]}
    return found | {name: {"ratio": value, "at_least": beyond}
                    for name, (beyond, value) in ends.items()}


def often(cell: dict[str, Any], count: int) -> np.ndarray:
    """How often each problem was right, over seeds.

    >>> often({"each": {"0": {"right": "40"}, "1": {"right": "c0"}}}, 2).tolist()
    [0.5, 1.0]
    """
    return np.mean([unpacked(one["right"], count) for one in cell["each"].values()], 0)


def packed(right: Any) -> str:
    """Truth values as hexadecimal digits, eight values in two of them, filled up with zeros.

    >>> packed([False, True])
    '40'
    """
    return np.packbits(np.asarray(right, bool)).tobytes().hex()


def unpacked(text: str, count: int) -> np.ndarray:
    """The first `count` values of `packed`.

    >>> unpacked("40", 2).tolist()
    [False, True]
    """
    return np.unpackbits(np.frombuffer(bytes.fromhex(text), np.uint8), count=count).astype(bool)


def accuracy_table(reward: str) -> Any:
    """A table of every method's accuracy at every budget, by one reward."""
    def table(metrics: dict[str, Any]) -> list[list[str]]:
        lines = {line.partition("|")[0]: by for line, by in metrics["accuracy"].items()
                 if line.partition("|")[2] == reward}
        budgets = sorted({int(budget) for by in lines.values() for budget in by})
        cells = [["method", *map(str, budgets)], ["---"] * (1 + len(budgets))]
        for method, by in lines.items():
            cells.append([method, *(
                "{value:.1%} ({low:.1%} to {high:.1%})".format(**by[str(budget)])
                if str(budget) in by else "" for budget in budgets)])
        return cells

    return table


def ratio_table(metrics: dict[str, Any]) -> list[list[str]]:
    """A line a reward and rival: the ratios at the filter's budgets."""
    found = metrics.get("budget_ratios") or ratios(metrics["accuracy"])  # the older results'
    budgets = sorted({int(n) for by in found.values() for one in by.values() for n in one})
    cells = [["reward", "against", *map(str, budgets)], ["---"] * (2 + len(budgets))]
    for other in RIVALS:
        for reward, by in found[other].items():
            cells.append([reward, other, *(said(by[str(n)]) if str(n) in by else ""
                                           for n in budgets)])
    return cells


def said(one: dict[str, Any]) -> str:
    """A ratio in words, with its band where there is one.

    >>> said({"ratio": 2.0, "at_least": True, "low": {"ratio": 1.5, "at_least": False},
    ...       "high": {"ratio": 2.0, "at_least": True}})
    'at least 2.0 (1.5 to at least 2.0)'
    """
    word = lambda end: f"{'at least ' if end['at_least'] else ''}{end['ratio']:.1f}"
    return word(one) + (f" ({word(one['low'])} to {word(one['high'])})" if "low" in one else "")


def larger_table(metrics: dict[str, Any]) -> list[list[str]]:
    """A line a method and reward: the answers with which it is right as often as the larger one."""
    sibling, needed = metrics["larger"], metrics["budget_to_match_larger"]
    whats = {"greedy": "greedily", "one_sample": "in one sample"}
    cells = [["method", "reward", *(f"as the larger one {words}, {sibling[what]:.1%}"
                                    for what, words in whats.items())], ["---"] * 4]
    for line in needed["greedy"]:
        method, _, reward = line.partition("|")
        cells.append([method, reward, *(
            f"{'more than ' if one['at_least'] else ''}{one['budget']:.1f}".removesuffix(".0")
            for one in (needed[what][line] for what in whats))])
    return cells


TABLES = {"checker": accuracy_table("checker"), "noisy": accuracy_table("checker, noise 0.1"),
          "ratios": ratio_table, "larger": larger_table}
