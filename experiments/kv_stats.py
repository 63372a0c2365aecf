"""Paired statistics of the cache experiments."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

ORIGINS = ("c", "real", "tiny")  # how the names of quant_ablation's cases begin
MARGIN = 0.1  # of the best rival's divergence: so much more is still as good
CAPACITY = {"bf16": "16-bit", "int8": "int8", "4-bit": "4-bit", "2-bit": "2-bit",
            "2-bit, 8-bit scales": "2-bit, 8-bit scales"}  # kv_capacity's kinds, as columns


def drop(exact: Sequence[Sequence[bool]], rough: Sequence[Sequence[bool]],
         resamplings: int = 2000) -> dict[str, Any]:
    """Points of accuracy lost, paired question by question.

    Args: exact, rough: right or wrong by document and question; documents are resampled whole.
    Returns: points; low and high, a 95% interval by bootstrap; lost and won questions; p of the
      two being equally likely, exact and two-sided (McNemar); questions in all.
    """
    a, b = (np.asarray(x, float).reshape(len(x), -1) for x in (exact, rough))
    by_document = 100 * (a - b).mean(1)
    drawn = np.random.default_rng(0).integers(0, len(a), (resamplings, len(a)))
    low, high = np.quantile(by_document[drawn].mean(1), [0.025, 0.975])
    lost, won = int(((a == 1) & (b == 0)).sum()), int(((a == 0) & (b == 1)).sum())
    return {"points": float(by_document.mean()), "low": float(low), "high": float(high),
            "lost": lost, "won": won, "p": mcnemar(lost, won), "problems": a.size}


def mcnemar(lost: int, won: int) -> float:
    """Two-sided exact p that of `lost + won` changes each direction was as likely.

    >>> mcnemar(3, 3), round(mcnemar(10, 0), 4)
    (1.0, 0.002)
    """
    total, most = lost + won, max(lost, won)
    tail = sum(math.comb(total, n) for n in range(most, total + 1))
    return min(1.0, 2 * tail / 2**total)


def best_share(
    rows: Sequence[dict[str, Any]], bits: Sequence[int], method: str = "squat"
) -> tuple[float, list]:
    """How often a method's divergence is the least of all kinds that take no more bytes, or tied.

    In every (text, seed), beside the best of the others at these bits: `squat` and `rsquat` are no
    rivals of each other. `against` says what tied is.
    """
    cells: dict[tuple, dict[str, dict[str, Any]]] = {}
    for row in rows:
        cells.setdefault((row["text"], row["seed"]), {})[row["kind"]] = row
    found = []
    for (text, seed), cell in cells.items():
        for width in bits:
            if (ours := cell.get(f"{method}{width}")) is None:
                continue
            rivals = [row for name, row in cell.items() if not name.startswith(("squat", "rsquat"))
                      and row["bytes_per_token"] <= ours["bytes_per_token"]]
            if rivals:
                found.append({"text": text, "seed": seed, "bits": width} | against(ours, rivals))
    return (sum(cell["won"] for cell in found) / len(found) if found else 0.0), found


def against(ours: dict[str, Any], rivals: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """One kind beside the best of its rivals, and whether it is better or as good.

    `outcome`, by the 95% interval of the paired difference over the rows of text: "less" or "more"
    where it holds no 0; "tied" where it ends below a tenth of the rival's divergence; else "open":
    the texts do not tell. Won are the first and the third.
    """
    mean = lambda row: float(np.mean(row["by_row"]))
    rival = min(rivals, key=mean)
    gap = np.asarray(ours["by_row"]) - np.asarray(rival["by_row"])
    noise = 1.96 * gap.std(ddof=1) / math.sqrt(len(gap)) if len(gap) > 1 else 0.0
    low, high = gap.mean() - noise, gap.mean() + noise
    outcome = ("less" if high < 0 else "more" if low > 0 else
               "tied" if high <= MARGIN * mean(rival) else "open")
    return {"best_rival": rival["kind"], "rivals": len(rivals),
            "over_best_rival": mean(ours) / mean(rival),
            "rival_bytes": rival["bytes_per_token"] / ours["bytes_per_token"],
            "outcome": outcome, "won": outcome in ("less", "tied")}


def reached(answers: Sequence[dict[str, Any]]) -> dict[str, float]:
    """The headline figures of a table of drops: squat2, and squat4 as `_4bit`."""
    return {f"{row['task'].split()[0]}_drop_points{tail}": row["points"]
            for row in answers for kind, tail in (("squat2", ""), ("squat4", "_4bit"))
            if row["kind"] == kind}


def ablation(metrics: dict[str, Any]) -> list[list[str]]:
    """The table of docs/kv_cache.md: logit error over plain KIVI's, by setting and by origin."""
    head = ["setting", "all, geometric mean", "worst", "the method's vectors",
            "its authors' tensors", "the bundled model"]
    cells = [head, ["---"] * len(head)]
    for setting, row in metrics["ratio_over_kivi"].items():
        means = [math.exp(np.mean([math.log(value) for name, value in row.items()
                                   if name.startswith(origin)])) for origin in ORIGINS]
        numbers = [f"{x:.2f}" for x in (row["geomean"], row["max"], *means)]
        cells.append([f"**{setting}**" if "default" in setting else setting, *numbers])
    return cells


def later(metrics: dict[str, Any]) -> list[list[str]]:
    """The same of keys that were coded while generating, by when."""
    rows = metrics["later_ratio_over_kivi"]
    spans = len(next(iter(rows.values())))
    head = ["cache", *(f"tokens {256 * i} to {256 * (i + 1)}" for i in range(1, spans + 1))]
    return [head, ["---"] * len(head),
            *([f"`{name}`", *(f"{x:.2f}" for x in row)] for name, row in rows.items())]


def lost(metrics: dict[str, Any]) -> list[list[str]]:
    """What answers lose: a line a task and kind."""
    cells = [["answers of the bundled model", "cache", "right", "points lost, 95% interval",
              "coded"], ["---"] * 5]
    for row in metrics["answers"]:
        span = f"{row['points']:.1f} ({row['low']:.1f} to {row['high']:.1f})"
        coded = f"{100 * row['coded']:.0f}%" if row["coded"] else ""
        cells.append([row["task"], f"`{row['kind']}`", f"{100 * row['accuracy']:.1f}%",
                      "" if row["kind"] == "dense" else span, coded])
    return cells


def beside(metrics: dict[str, Any]) -> list[list[str]]:
    """SQuat, plain and rotated, and the best rival of no more bytes, by text and bits, by seed."""
    cells = [["text", "bits", "best rival", "`squat`: divergence over its", "`rsquat`: the same"],
             ["---"] * 5]
    groups: dict[tuple, dict[str, list]] = {}
    for name in ("best_cells", "best_cells_rotated"):
        for cell in metrics[name]:
            groups.setdefault((cell["text"], cell["bits"]), {}).setdefault(name, []).append(cell)
    said = lambda cells: ", ".join(f"{cell['over_best_rival']:.2f} {cell['outcome']}"
                                   for cell in cells)
    for (text, bits), found in groups.items():
        rivals = sorted({f"`{cell['best_rival']}`" for cells in found.values() for cell in cells})
        cells.append([text, str(bits), ", ".join(rivals), said(found.get("best_cells", [])),
                      said(found.get("best_cells_rotated", []))])
    return cells


def capacity(metrics: dict[str, Any]) -> list[list[str]]:
    """The largest batch that fits, a line a chip, model and context, a column a kind."""
    kinds = [kind for kind in CAPACITY if any(row["kind"] == kind for row in metrics["rows"])]
    cells = [["chip", "model", "context", *(CAPACITY[kind] for kind in kinds),
              *(f"{CAPACITY[kind]} over 16-bit" for kind in kinds[1:])]]
    cells.append(["---"] * len(cells[0]))
    groups: dict[tuple, dict[str, dict[str, Any]]] = {}
    for row in metrics["rows"]:
        groups.setdefault((row["target"], row["model"], row["context"]), {})[row["kind"]] = row
    for (target, model, context), found in groups.items():
        batches = {kind: row["batch"] for kind, row in found.items() if "batch" in row}
        if not batches:
            continue  # nothing of it was compiled
        written = {kind: f"{batch}{'' if found[kind]['compiled'] or not batch else '*'}"
                   for kind, batch in batches.items()}
        counts = [written.get(kind, "") for kind in kinds]
        full = batches.get("bf16", 0)
        times = [f"{batches[kind] / full:.1f}" if full and kind in batches else ""
                 for kind in kinds[1:]]
        cells.append([target, model, f"{context:,}", *counts, *times])
    return cells


def whole_memory(metrics: dict[str, Any]) -> list[list[str]]:
    """Memory in the setting of SQuat's paper, weights and all, by the rows of a batch."""
    gib = lambda value: f"{value / 2**30:.1f} GiB"
    return [["rows", "16-bit cache", "2-bit cache", "ratio"], ["---"] * 4,
            *([str(row["rows"]), gib(row["bf16_bytes"]), gib(row["2-bit_bytes"]),
               f"{row['ratio']:.2f}"] for row in metrics.get("paper_setting", ()))]
