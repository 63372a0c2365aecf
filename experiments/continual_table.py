"""The table of docs/found.md on forgetting, written from the result by readme_tables.py."""

from typing import Any

BEGIN, END = "<!-- {}: experiments/readme_tables.py -->", "<!-- end of {} -->"
WORDS = {
    "full": "full fine-tuning", "full, matrices alone": "full, embeddings and norms frozen",
    "lora": "LoRA, a new one a task, merged", "olora": "O-LoRA", "ewc": "EWC",
    "replay": "full, a tenth replayed", "osft uniform": "OSFT, uniform ranks",
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
    """A line a row: accuracy, forgetting, transfer, general ability, rate."""
    perplexity = metrics["general"]["wikitext_perplexity"]
    answers = metrics["general"]["instructions_token_accuracy"]
    cells = [["row", "average accuracy", "forgetting", "learnt", "lost of it", "forward",
              "Wikipedia perplexity", "instruction tokens right", "rate"], ["---"] * 9]
    for row, words in WORDS.items():
        if row not in metrics["accuracy"]:
            continue
        line = [words, span(metrics["accuracy_spread"][row])]
        if row in metrics["forgetting"]:
            line += [span(metrics["forgetting_spread"][row]), f"{metrics['learnt'][row]:.3f}",
                     f"{metrics['lost_share'][row]:.0%}", f"{metrics['forward'][row]:+.3f}",
                     "{before:.0f} to {after:.0f}".format(**perplexity[row]),
                     "{before:.1%} to {after:.1%}".format(**answers[row])]
        else:
            line += [""] * 6
        tried = metrics["rates_tried"][row]
        edge = metrics["rates"][row] in (min(tried), max(tried))
        cells.append([*line, f"{metrics['rates'][row]:g}{' (edge)' if edge else ''}"])
    return cells


def compared(metrics: dict[str, Any]) -> list[list[str]]:
    """Every row's difference from two others, paired over the courses, in points."""
    others = {"olora": "O-LoRA", "matrices": "full, embeddings and norms frozen"}
    by = {(short, name): metrics[f"{name}_minus_{short}"]
          for short in others for name in ("accuracy", "forgetting")}
    head = [f"{name} minus that of {words}" for words in others.values()
            for name in ("accuracy", "forgetting")]
    return [["points", *head], ["---"] * 5] + [
        [words, *(span(rows[row], "{:+.1f}") if row in rows else "" for rows in by.values())]
        for row, words in WORDS.items() if row in metrics["forgetting"]]


TABLES = {"five tasks in turn": table, "in pairs": compared}


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
