"""The table of docs/found.md on forgetting, written from the result by readme_tables.py."""

from collections.abc import Iterator
from functools import partial
from math import fsum
from typing import Any

from experiments.continual_tasks import ORDERS

BEGIN, END = "<!-- {}: experiments/readme_tables.py -->", "<!-- end of {} -->"
WORDS = {
    "full": "full fine-tuning", "full, matrices alone": "full, embeddings and norms frozen",
    "full, matrices alone, 0.001": "control: the same at 0.001",
    "full, matrices alone, 0.003": "control: the same at 0.003",
    "lora": "LoRA, a new one a task, merged", "olora": "O-LoRA", "ewc": "EWC",
    "replay": "full, a tenth replayed", "osft uniform": "OSFT, uniform ranks",
    "osft uniform, rest trained": "OSFT, uniform, the rest trained",
    "osft importance": "OSFT, importance-driven ranks", "osft scheduled": "OSFT, scheduled ranks",
    "osft coordinates": "OSFT coordinates, uniform", "osft factored": "OSFT factored, uniform",
    "alone": "a model for each task", "joint": "all tasks mixed",
}


def filled(page: str, metrics: dict[str, Any], tables: dict[str, Any] | None = None) -> str:
    """The page with its tables between their markers. Raises: ValueError where a marker lacks."""
    for name, table in (tables or TABLES).items():
        begin, end = BEGIN.format(name), END.format(name)
        if page.count(begin) != 1 or page.count(end) != 1:
            raise ValueError(f"the page needs {begin!r} and {end!r} once each")
        before, rest = page.split(begin)
        text = "\n".join("| " + " | ".join(row) + " |" for row in table(metrics))
        page = f"{before}{begin}\n{text}\n{end}{rest.split(end)[1]}"
    return page


def span(one: dict[str, float], form: str = "{:.3f}") -> str:
    """A mean and its interval.

    >>> span({"mean": 0.5, "low": 0.4, "high": 0.6})
    '0.500 (0.400 to 0.600)'
    """
    mean, low, high = (form.format(one[name]) for name in ("mean", "low", "high"))
    return f"{mean} ({low} to {high})"


def table(metrics: dict[str, Any]) -> list[list[str]]:
    """A line a row, of whole answers: accuracy, forgetting, transfer, rate."""
    cells = [["row", "average accuracy", "forgetting", "learnt", "lost of it", "forward", "rate",
              "rates tried"], ["---"] * 8]
    for row, line in scored(metrics, ""):
        tried, rate = metrics["rates_tried"][row], metrics["rates"][row]
        line += [f"{metrics['forward'][row]:+.3f}" if row in metrics["forward"] else ""]
        edge = " (edge)" if rate in (min(tried), max(tried)) else ""
        cells.append([*line, f"{rate:g}{edge}", str(len(tried))])
    return cells


def scored(metrics: dict[str, Any], prefix: str) -> Iterator[tuple[str, list[str]]]:
    """Row, and its words with accuracy, forgetting, what was learnt and lost by one of the scores.
    """
    for row, words in WORDS.items():
        if row not in metrics["accuracy"]:
            continue
        line = [words, span(metrics[f"{prefix}accuracy_spread"][row])]
        if row in metrics["forgetting"]:
            line += [span(metrics[f"{prefix}forgetting_spread"][row]),
                     f"{metrics[f'{prefix}learnt'][row]:.3f}",
                     f"{metrics[f'{prefix}lost_share'][row]:.0%}"]
        else:
            line += [""] * 3
        yield row, line


def chosen(metrics: dict[str, Any]) -> list[list[str]]:
    """A line a row, of the likeliest among a task's own labels, and where its updates lie."""
    protected = metrics["general"]["subspaces/protected_share"]
    cells = [["row", "average accuracy", "forgetting", "learnt", "lost of it, above chance",
              "updates in the leading half"], ["---"] * 6]
    return cells + [[*line, f"{protected[row]:.0%}" if row in protected else ""]
                    for row, line in scored(metrics, "chosen_")]


def general(metrics: dict[str, Any]) -> list[list[str]]:
    """What else was lost: held-out text and instructions, before and after."""
    found = metrics["general"]
    columns = {"wikitext_perplexity": "{before:.0f} to {after:.0f}",
               "instructions_perplexity": "{before:.0f} to {after:.0f}",
               "instructions_token_accuracy": "{before:.1%} to {after:.1%}",
               "format": "{before:.0%} to {after:.0%}"}
    head = ["row", "Wikipedia perplexity", "perplexity of instructions' answers",
            "their tokens right", "replies in form"]
    return [head, ["---"] * len(head)] + [
        [words, *(form.format(**found[name][row]) for name, form in columns.items())]
        for row, words in WORDS.items() if row in found["format"]]


def compared(metrics: dict[str, Any], prefix: str = "") -> list[list[str]]:
    """Every row's difference from some others, paired over the courses, in points."""
    others = {"olora": "O-LoRA", "same_rate": "the control of the same rate", "replay": "replay"}
    names = ("accuracy", "forgetting")
    by = {(short, name): metrics.get(f"{prefix}{name}_minus_{short}", {})
          for short in others for name in names}
    head = [f"{name} minus that of {words}" for words in others.values() for name in names]
    return [["points", *head], ["---"] * 7] + [
        [words, *(span(rows[row], "{:+.1f}") if row in rows else "" for rows in by.values())]
        for row, words in WORDS.items() if row in metrics["forgetting"]]


def known(metrics: dict[str, Any]) -> list[list[str]]:
    """Of the two tasks that are learnt at all, where another follows: after it, and at the end."""
    head = ["row", *(f"{task}, {score}: {when}" for task in ("AG News", "DBpedia")
                     for score in ("answered", "chosen") for when in ("learnt", "end"))]
    lines = [head, ["---"] * len(head)]
    for row, words in WORDS.items():
        if row not in metrics["forgetting"]:
            continue
        starts = tuple(f"{row}, {order}, seed " for order in ORDERS)
        mine = [one for key, one in metrics["courses"].items() if key.startswith(starts)]
        line = [words]
        for task in ("ag", "dbpedia"):
            for score in ("accuracy", "chosen"):
                seen = [(one[score][at + 1][at], one[score][-1][at]) for one in mine
                        if (at := one["order"].index(task)) < len(one["order"]) - 1]
                line += [f"{fsum(x) / len(x):.2f}" for x in zip(*seen, strict=True)]
        lines.append(line)
    return lines


TABLES = {"five tasks in turn": table, "chosen among its own": chosen, "the two learnt": known,
          "other text": general, "in pairs": compared,
          "chosen, in pairs": partial(compared, prefix="chosen_")}


def shares(metrics: dict[str, Any]) -> list[list[str]]:
    """Of osft_share.py: a line for each share that may change."""
    names = ("first_learnt", "first_kept", "choice_learnt", "choice_kept", "second",
             "update_protected", "input_free")
    head = ["free u, rate", "DBpedia, answered: learnt", "after AG News", "chosen: learnt",
            "after AG News", "AG News, answered", "protected of DBpedia's change",
            "open of its inputs"]
    return [head, ["---"] * len(head)] + [
        [share, *(f"{one[name]:.3f}" for name in names)]
        for share, one in metrics["by_share_and_rate"].items()]
