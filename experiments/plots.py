"""The plots beside the results, drawn from the JSON alone: python experiments/report.py."""

import io
from collections.abc import Callable
from typing import Any

from experiments.continual_plots import osft_continual
from jaxlm.eval.plots import LIGHT, Draw, grouped_bars, line, plot

Named = dict[str, tuple[str, Draw, tuple[float, float]]]  # suffix -> title, drawing, inches
WIDE = (6.4, 3.6)
PALETTE = (*LIGHT["series"], "#c92a2a", "#868e96", "#364fc7", "#d6336c")


def draw(result: dict[str, Any]) -> dict[str, bytes]:
    """Suffix -> PNG of a result's plots; none for a script that has none.

    Raises: KeyError when the metrics are not as the script writes them.
    """
    made = PLOTS.get(result["name"], lambda metrics: {})(result["metrics"])
    return {suffix: smaller(plot(drawing, title, size).light)
            for suffix, (title, drawing, size) in made.items()}


def smaller(png: bytes) -> bytes:
    """The same picture in 48 colours, a third of the bytes."""
    from PIL import Image  # comes with matplotlib

    out = io.BytesIO()
    Image.open(io.BytesIO(png)).convert("RGB").quantize(200).save(out, "PNG", optimize=True)
    return out.getvalue()


def beside(labels: list[str], values: list[float], xlabel: str, spans: Any = None,
           mark: float | None = None) -> Draw:
    """Horizontal bars with their values; `spans`: (lowest, highest) each; `mark`: a line."""

    def drawing(axes, colours):
        at = list(range(len(labels)))[::-1]
        axes.barh(at, values, 0.7, color=colours["series"][0])
        ends = values
        if spans:
            ends = [max(value, high) for value, (_, high) in zip(values, spans, strict=True)]
            off = [[max(v - low, 0) for v, (low, _) in zip(values, spans, strict=True)],
                   [max(high - v, 0) for v, (_, high) in zip(values, spans, strict=True)]]
            axes.errorbar(values, at, xerr=off, fmt="none", ecolor=colours["soft"], capsize=2)
        for y, end, value in zip(at, ends, values, strict=True):
            axes.annotate(f"{value:.3g}", (end, y), (4, 0), textcoords="offset points",
                          va="center", fontsize=8, color=colours["ink"])
        if mark is not None:
            axes.axvline(mark, color=colours["series"][1], linewidth=1)
        axes.set_yticks(at, labels)
        axes.set_xlim(0, 1.12 * max([*ends, mark or 0]))
        axes.set_xlabel(xlabel)
        axes.grid(False, axis="y")
        axes.grid(True, axis="x", color=colours["grid"], linewidth=0.8)

    return drawing


def lines(series: dict[str, tuple[list, list]], xlabel: str, ylabel: str, log: str = "",
          marker: str = "o") -> Draw:
    """Lines with a legend; `log`: the axes that are logarithmic, as "xy"."""

    def drawing(axes, colours):
        for i, (name, (x, y)) in enumerate(series.items()):
            axes.plot(x, y, label=name, color=PALETTE[i % len(PALETTE)], marker=marker,
                      markersize=3.5, linewidth=1.4, linestyle="-" if i < len(PALETTE) else "--")
        if "x" in log:
            axes.set_xscale("log", base=2)
            ticks = sorted({x for xs, _ in series.values() for x in xs})
            axes.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
            axes.minorticks_off()
        if "y" in log:
            axes.set_yscale("log", subs=(2, 5))
            values = [value for _, ys in series.values() for value in ys]
            axes.yaxis.set_major_formatter("{x:g}")  # between decades too, where there are few
            axes.yaxis.set_minor_formatter("{x:g}" if max(values) < 100 * min(values) else "")
            axes.tick_params(axis="y", which="minor", labelcolor=colours["soft"], length=0,
                             labelsize=axes.yaxis.get_ticklabels()[0].get_size())
        else:
            axes.set_ylim(0)
        axes.set_xlabel(xlabel)
        axes.set_ylabel(ylabel)
        if len(series) > 1:
            axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))

    return drawing


def bench_decode(metrics: dict[str, Any]) -> Named:
    """How many times faster than transformers, with the range of the pairs."""
    rows = {}
    for title, name in (("batch 1", "decode_b1_ratio"), ("batch 32", "decode_b32_ratio"),
                        ("prefill", "prefill_ratio")):
        rows |= {f"{title}, {model}": found for model, found in metrics[name].items()}
    rows["batch 1, a 135M shape, compiled"] = metrics["decode_135m_ratio"]
    values = [row["ratio"] for row in rows.values()]
    spans = [(row["ratio_min"], row["ratio_max"]) for row in rows.values()]
    return {"ratios": ("Time of transformers over that of jaxlm, CPU", beside(
        list(rows), values, "ratio (above 1: jaxlm is faster); whiskers: all pairs", spans, 1.0),
        (6.4, 3.8))}


def eval_tiny(metrics: dict[str, Any]) -> Named:
    """Accuracy by level and by length, with standard errors."""
    levels = metrics["arithmetic"]
    samples = next(iter(levels.values()))["samples"]
    names = {"greedy": "greedy", "one sample": "t0.8", "any of 4": "t0.8_any4",
             f"any of {samples}": f"t0.8_any{samples}"}
    series = [(name, [by[key]["value"] for by in levels.values()],
               [by[key]["error"] for by in levels.values()]) for name, key in names.items()]
    recall = {int(length): found for length, found in metrics["recall"].items()}
    return {"arithmetic": ("Share of test sums right (samples at temperature 0.8)",
                           grouped_bars(list(levels), series, "share right"), WIDE),
            "recall": ("Recall against the length of the context",
                       line(list(recall), [r["value"] for r in recall.values()],
                            [r["error"] for r in recall.values()], "tokens of context",
                            "share right", 1.08), WIDE)}


def train_tiny(metrics: dict[str, Any]) -> Named:
    """Loss, and the share of checkable tokens guessed right."""
    history = metrics["history"]
    steps = [row["step"] for row in history]
    column = lambda name: (steps, [row[name] for row in history])
    return {"loss": ("Training loss", lines({"loss": column("loss")}, "step",
                                            "nats a token, weighted", "y", ""), WIDE),
            "accuracy": ("Tokens guessed right in training", lines(
                {"steps of sums": column("steps"), "values of keys": column("values")}, "step",
                "share right", marker=""), WIDE)}


def quant_ablation(metrics: dict[str, Any]) -> Named:
    """Error over KIVI's of each setting; of keys coded later, by when."""
    table = metrics["ratio_over_kivi"]
    cases = lambda row: [value for name, value in row.items() if name not in ("geomean", "max")]
    spans = [(min(cases(row)), max(cases(row))) for row in table.values()]
    found: Named = {"ratio": ("Logit error over plain KIVI's, held-out queries", beside(
        list(table), [row["geomean"] for row in table.values()],
        "geometric mean over inputs (below 1: better); whiskers: all inputs", spans, 1.0),
        (7.2, 1.2 + 0.24 * len(table)))}
    if later := metrics.get("later_ratio_over_kivi"):
        found["later"] = ("Error over the first kind's, of keys coded while generating", lines(
            {name: (list(range(len(y))), y) for name, y in later.items()},
            "span of 256 tokens after the prompt", "ratio", marker="."), (7.6, 3.8))
    return found


def kv_speed(metrics: dict[str, Any]) -> Named:
    """Milliseconds a token against the tokens in the cache."""
    series: dict[str, tuple[list, list]] = {}
    for row in metrics["rows"]:
        x, y = series.setdefault(row["kind"], ([], []))
        x.append(row["cached"])
        y.append(row["ms"])
    return {"ms": (f"A decode step of {metrics['batch']} rows", lines(
        series, "tokens in the cache", "milliseconds", "xy"), (7.2, 3.8))}


def kv_capacity(metrics: dict[str, Any]) -> Named:
    """The largest batch that fits each chip, by cache kind, a plot for each context."""
    found: Named = {}
    for context in sorted({row["context"] for row in metrics["rows"]}):
        cells = [row for row in metrics["rows"] if row["context"] == context and row.get("batch")]
        groups = list(dict.fromkeys(f"{row['target']}, {row['model']}" for row in cells))
        kinds = list(dict.fromkeys(row["kind"] for row in cells))
        at = {(f"{row['target']}, {row['model']}", row["kind"]): row["batch"] for row in cells}
        found[f"batch-{context}"] = (f"Largest batch that fits, context of {context:,} tokens",
                                     _bars(groups, kinds, at), (7.2, 1.2 + 0.42 * len(groups)))
    return found


def _bars(groups: list[str], kinds: list[str], at: dict[tuple[str, str], int]) -> Draw:
    """Horizontal bars in groups, on a logarithmic axis; a cell that is missing has none."""

    def drawing(axes, colours):
        height = 0.85 / max(len(kinds), 1)
        for i, kind in enumerate(kinds):
            pairs = [(-y - (i - (len(kinds) - 1) / 2) * height, at[group, kind])
                     for y, group in enumerate(groups) if (group, kind) in at]
            axes.barh([y for y, _ in pairs], [value for _, value in pairs], height * 0.92,
                      label=kind, color=PALETTE[i % len(PALETTE)])
        axes.set_yticks([-y for y in range(len(groups))], groups)
        axes.set_xscale("log")
        axes.set_xlim(1)  # all bars from one row on
        axes.xaxis.set_major_formatter("{x:,.0f}")
        axes.minorticks_off()
        axes.set_xlabel("rows")
        axes.grid(False, axis="y")
        axes.grid(True, axis="x", color=colours["grid"], linewidth=0.8)
        axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))

    return drawing


def kv_quality(metrics: dict[str, Any]) -> Named:
    """Divergence against bytes a token, and what answers lose."""
    found: Named = {}
    if rows := metrics.get("rows"):
        for text in dict.fromkeys(row["text"] for row in rows):
            series: dict[str, tuple[list, list]] = {}
            for row in (row for row in rows if row["text"] == text and row["seed"] == 0):
                method = row["kind"].rstrip("248") if ":" not in row["kind"] else row["kind"]
                x, y = series.setdefault(method, ([], []))
                x.append(row["bytes_per_token"])
                y.append(row["divergence"])
            found[f"divergence-{text.replace(', ', '-')}"] = (
                f"Divergence from full precision, {text}",
                lines(series, "bytes of cache a token", "nats a token", "y"), (7.6, 3.8))
    if answers := metrics.get("answers"):
        rows = [row for row in answers if row["kind"] != "dense"]
        found["drops"] = ("Points of accuracy lost against full precision", dots(
            [f"{row['task']}, {row['kind']}" for row in rows], [row["points"] for row in rows],
            [(row["low"], row["high"]) for row in rows], "points, 95% interval"),
            (6.8, 1.2 + 0.24 * len(rows)))
    return found


def dots(labels: list[str], values: list[float], spans: list[tuple[float, float]],
         xlabel: str) -> Draw:
    """Values with intervals, either side of zero."""

    def drawing(axes, colours):
        at = list(range(len(labels)))[::-1]
        off = [[max(v - low, 0) for v, (low, _) in zip(values, spans, strict=True)],
               [max(high - v, 0) for v, (_, high) in zip(values, spans, strict=True)]]
        axes.errorbar(values, at, xerr=off, fmt="o", markersize=4, capsize=2,
                      color=colours["series"][0], ecolor=colours["soft"])
        axes.axvline(0, color=colours["series"][1], linewidth=1)
        axes.set_yticks(at, labels)
        axes.set_xlabel(xlabel)
        axes.grid(False, axis="y")
        axes.grid(True, axis="x", color=colours["grid"], linewidth=0.8)

    return drawing


def smc_exact(metrics: dict[str, Any]) -> Named:
    """By chain and scheme: the largest |z| of the evidence beside the bound; the distance of the
    laws over that of exact draws."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for name, row in metrics["rows"].items():
        groups.setdefault(name.split(",")[0], []).append(row)
    size, rows = (6.4, 1.2 + 0.2 * len(groups)), groups.values()
    ratios = [sum(r["tv"] / r["floor"] for r in group) / len(group) for group in rows]
    return {"z": ("Evidence over seeds: standard errors from the exact number", beside(
                list(groups), [max(abs(r["z"]) for r in group) for group in rows],
                "largest |z|; line: the bound", mark=metrics["evidence_z_bound"]), size),
            "law": ("Distance of the laws over that of as many exact draws", beside(
                list(groups), ratios, "ratio (1: cannot be told from exact draws)", mark=1.0),
                size)}


def inference_scaling(metrics: dict[str, Any]) -> Named:
    """Accuracy against the budget with its band, a plot for each reward."""
    found: Named = {}
    rewards = dict.fromkeys(name.split("|")[1] for name in metrics["accuracy"])
    for reward in rewards:
        mine = {name.split("|")[0]: by for name, by in metrics["accuracy"].items()
                if name.endswith(f"|{reward}")}
        suffix = reward.replace(", ", "-").replace(" ", "-")
        found[suffix] = (f"Hard sums: share right against answers a problem ({reward})",
                         banded(mine), (7.6, 4.0))
    return found


def banded(series: dict[str, dict[str, Any]]) -> Draw:
    """Lines over budgets, each in its band."""

    def drawing(axes, colours):
        for i, (name, by) in enumerate(series.items()):
            x = sorted(map(int, by))
            cells = [by[str(budget)] for budget in x]
            colour = PALETTE[i % len(PALETTE)]
            axes.plot(x, [c["value"] for c in cells], label=name, color=colour, marker="o",
                      markersize=3.5, linewidth=1.4, linestyle="-" if i < len(PALETTE) else "--")
            axes.fill_between(x, [c["low"] for c in cells], [c["high"] for c in cells],
                              color=colour, alpha=0.08, linewidth=0)
        ticks = sorted({int(budget) for by in series.values() for budget in by})
        axes.set_xscale("log", base=2)
        axes.set_xticks(ticks, [str(tick) for tick in ticks])
        axes.minorticks_off()
        axes.set_xlabel("answers a problem")
        axes.set_ylabel("share right")
        axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))

    return drawing


def bench_serve(metrics: dict[str, Any]) -> Named:
    """Speed and latency by the number of clients."""
    clients = [row["clients"] for row in metrics["load"]]
    column = lambda name: (clients, [row[name] for row in metrics["load"]])
    return {"speed": ("The server's speed by clients", lines(
                {"tokens": column("tokens_per_s")}, "clients", "tokens/s", log="x"), (5.4, 3.4)),
            "latency": ("The server's latency by clients", lines(
                {"median": column("latency_median_s"), "95 %": column("latency_95_s")},
                "clients", "seconds an answer", log="x"), (6.4, 3.4))}


def sft_recipe(metrics: dict[str, Any]) -> Named:
    """Final loss against the first steps' numbers, and the effects of settings."""
    runs, effects = metrics["runs"], metrics["effects"] | {
        "stacked - phased": metrics["orders"]}
    window = metrics["early_window"]
    by_batch = lambda key: {
        f"batch {batch}": ([r[key] for r in runs if r["batch"] == batch],
                           [r["final"] for r in runs if r["batch"] == batch])
        for batch in dict.fromkeys(run["batch"] for run in runs)}
    found: Named = {f"early-{name}": (
        f"A run's end against its first {window} steps", scatter(
            by_batch(key), f"mean {words} of the first {window} steps", "held-out loss"), WIDE)
        for name, key, words in (("loss", "early_loss", "training loss"),
                                 ("norm", "early_grad_norm", "gradient norm"))}
    return found | {"effects": ("Final held-out loss: the first less the second", dots(
        list(effects), [row["mean"] for row in effects.values()],
        [(row["low"], row["high"]) for row in effects.values()],
        "nats a token, 95% interval (below 0: the first is better)"),
        (6.8, 1.2 + 0.28 * len(effects)))}


def masked_thought(metrics: dict[str, Any]) -> Named:
    """Points gained by masking."""
    rows = metrics["gain_points"]
    return {"gain": ("Whole solutions right: with masking less without", dots(
        list(rows), [row["mean"] for row in rows.values()],
        [(row["low"], row["high"]) for row in rows.values()], "points, 95% interval"),
        (6.8, 1.2 + 0.28 * len(rows)))}


def scatter(series: dict[str, tuple[list, list]], xlabel: str, ylabel: str) -> Draw:
    """Points with a legend."""

    def drawing(axes, colours):
        for i, (name, (x, y)) in enumerate(series.items()):
            axes.plot(x, y, "o", label=name, color=PALETTE[i % len(PALETTE)], markersize=4.5)
        axes.set_xlabel(xlabel)
        axes.set_ylabel(ylabel)
        axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))

    return drawing


PLOTS: dict[str, Callable[[dict[str, Any]], Named]] = {
    "bench_decode": bench_decode, "eval_tiny": eval_tiny, "train_tiny": train_tiny,
    "quant_ablation": quant_ablation, "kv_speed": kv_speed, "kv_capacity": kv_capacity,
    "kv_quality": kv_quality, "smc_exact": smc_exact, "inference_scaling": inference_scaling,
    "bench_serve": bench_serve, "osft_continual": osft_continual,
    "sft_recipe": sft_recipe, "masked_thought": masked_thought,
}
