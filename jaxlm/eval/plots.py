"""Plots as PNG bytes, once for light and once for dark pages; matplotlib is imported only here."""

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

LIGHT = {"ink": "#1d2429", "soft": "#5b6770", "grid": "#d9dfe3", "paper": "#ffffff",
         "series": ("#0b7285", "#e8890c", "#7048a8", "#5c940d")}
DARK = {"ink": "#e4e9ec", "soft": "#9aa7b0", "grid": "#36424a", "paper": "#14191d",
        "series": ("#4dc4d6", "#ffb347", "#b79cf0", "#a9d15c")}
Draw = Callable[[Any, dict[str, Any]], None]  # (axes, colours)


@dataclass(frozen=True)
class Plot:
    """The same drawing twice."""

    light: bytes
    dark: bytes


def plot(draw: Draw, title: str, size: tuple[float, float] = (5.2, 3.2)) -> Plot:
    """Draw on both backgrounds."""
    return Plot(*(_render(draw, title, size, colours) for colours in (LIGHT, DARK)))


def _render(draw: Draw, title: str, size: tuple[float, float], colours: dict[str, Any]) -> bytes:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, dpi=150, facecolor=colours["paper"], layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot(facecolor=colours["paper"])
    axes.set_axisbelow(True)
    axes.grid(axis="y", color=colours["grid"], linewidth=0.8)
    draw(axes, colours)
    axes.set_title(title, color=colours["ink"], loc="left", fontsize=11)
    axes.tick_params(colors=colours["soft"], labelsize=9, length=0)
    for name, spine in axes.spines.items():
        spine.set_visible(name == "bottom")
        spine.set_color(colours["grid"])
    for label in (axes.xaxis.label, axes.yaxis.label):
        label.set_color(colours["soft"])
    if legend := axes.get_legend():
        legend.set_frame_on(False)
        for entry in legend.get_texts():
            entry.set_color(colours["ink"])
    out = io.BytesIO()
    figure.savefig(out, format="png", facecolor=colours["paper"])
    return out.getvalue()


def grouped_bars(
    groups: Sequence[str], series: Sequence[tuple[str, Sequence[float], Sequence[float]]],
    ylabel: str,
) -> Draw:
    """Bars side by side in groups. `series`: name, heights, standard errors."""

    def draw(axes, colours):
        width = 0.8 / len(series)
        for i, (name, heights, errors) in enumerate(series):
            at = [g + (i - (len(series) - 1) / 2) * width for g in range(len(groups))]
            axes.bar(at, heights, width * 0.92, label=name, color=colours["series"][i])
            axes.errorbar(at, heights, errors, fmt="none", ecolor=colours["soft"], capsize=2)
        axes.set_xticks(range(len(groups)), groups)
        axes.set_ylim(0, 1.08)
        axes.set_ylabel(ylabel)
        axes.legend(ncols=len(series), fontsize=8, columnspacing=1, loc="upper left",
                    bbox_to_anchor=(0, -0.1))

    return draw


def line(
    x: Sequence[float], y: Sequence[float], errors: Sequence[float] | None, xlabel: str,
    ylabel: str, top: float | None = None,
) -> Draw:
    """One line over a doubling axis; y starts at zero."""

    def draw(axes, colours):
        colour = colours["series"][0]
        axes.errorbar(x, y, errors, color=colour, ecolor=colours["soft"], marker="o", capsize=3)
        axes.set_xscale("log", base=2)
        axes.set_xticks(list(x), [str(value) for value in x])
        axes.minorticks_off()
        axes.set_ylim(0, top)
        axes.set_xlabel(xlabel)
        axes.set_ylabel(ylabel)

    return draw


def token_strip(tokens: Sequence[str], surprise: Sequence[float], answer_from: int) -> Draw:
    """One bar a token, `-log p` in nats; the answer has its own colour."""

    def draw(axes, colours):
        given, written = colours["soft"], colours["series"][1]
        paint = [given if i < answer_from else written for i in range(len(tokens))]
        axes.bar(range(len(tokens)), surprise, 0.85, color=paint)
        axes.set_xticks(range(len(tokens)), [token.replace("\n", "⏎") for token in tokens],
                        family="DejaVu Sans Mono")
        axes.set_xlim(-0.8, len(tokens) - 0.2)
        axes.set_ylabel("−log p (nats)")

    return draw
