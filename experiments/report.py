"""Gather experiments/results and the plots beside them into one HTML page that needs no other file.

Command: python experiments/report.py --out report/experiments.html
"""

import argparse
import base64
import html
import json
import os
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parent / "results"
STYLE = """
body{font:15px/1.5 system-ui,sans-serif;max-width:64rem;margin:2rem auto;padding:0 1rem;color:#222}
table{border-collapse:collapse;margin:.6rem 0}
td,th{border:1px solid #ccc;padding:.2rem .6rem;text-align:left}
td.n{text-align:right;font-variant-numeric:tabular-nums}
code{background:#f3f3f3;padding:.1rem .3rem} img{max-width:100%} .m{color:#666}
nav a{margin-right:1rem}
"""


def load(folder: Path) -> list[tuple[Path, dict[str, Any]]]:
    """The results under a folder, in order; files that do not follow the contract are an error."""
    found = []
    for path in sorted(folder.rglob("*.json")):
        result = json.loads(path.read_text())
        missing = {"name", "command", "device", "metrics"} - set(result)
        if missing:
            raise ValueError(f"{path} is no result: it lacks {sorted(missing)}")
        found.append((path, result))
    return found


def page(results: list[tuple[Path, dict[str, Any]]], title: str = "jaxlm: measurements") -> str:
    """The whole page."""
    sections = [section(path, result) for path, result in results]
    links = "".join(
        f'<a href="#{_anchor(r)}">{_text(r["name"])} ({_text(r["device"])})</a>' for _, r in results
    )
    body = "\n".join(sections) or "<p>No results yet.</p>"
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{_text(title)}</title>'
        f"<style>{STYLE}</style><h1>{_text(title)}</h1><nav>{links}</nav>\n{body}</html>\n"
    )


def section(path: Path, result: dict[str, Any]) -> str:
    """One result: how it was made, its numbers, its plots."""
    made = " · ".join(f"{name} {value}" for name, value in result.get("versions", {}).items())
    note = " (a smoke run: measures nothing)" if result.get("smoke") else ""
    return "\n".join([
        f'<h2 id="{_anchor(result)}">{_text(result["name"])}, {_text(result["device"])}{note}</h2>',
        f"<p><code>{_text(result['command'])}</code></p>",
        tables(result["metrics"]),
        *(image(plot) for plot in sorted(path.parent.glob(f"{path.stem}*.png"))),
        f'<p class="m">commit {_text(result.get("commit"))} · seed {_text(result.get("seed"))}'
        f" · {_text(made)}</p>",
    ])


def tables(metrics: dict[str, Any]) -> str:
    """Plain numbers as one table; each list of records as its own."""
    flat, records = flatten(metrics)
    parts = [_table(["metric", "value"], [list(row) for row in flat.items()])] if flat else []
    for name, rows in records.items():
        columns = list(dict.fromkeys(key for row in rows for key in row))
        cells = [[row.get(key, "") for key in columns] for row in rows]
        parts.append(f"<h3>{_text(name)}</h3>{_table(columns, cells)}")
    return "\n".join(parts)


def flatten(metrics: dict[str, Any], prefix: str = "") -> tuple[dict[str, Any], dict[str, list]]:
    """Nested dicts as dotted names, and apart from them the lists of dicts.

    >>> flatten({"a": {"b": 1}, "rows": [{"x": 2}]})
    ({'a.b': 1}, {'rows': [{'x': 2}]})
    """
    flat: dict[str, Any] = {}
    records: dict[str, list] = {}
    for key, value in metrics.items():
        name = f"{prefix}{key}"
        if isinstance(value, dict):
            inner, more = flatten(value, f"{name}.")
            flat, records = flat | inner, records | more
        elif isinstance(value, list) and value and all(isinstance(row, dict) for row in value):
            records[name] = value
        else:
            flat[name] = value
    return flat, records


def image(path: Path) -> str:
    """A plot, inside the page."""
    data = base64.b64encode(path.read_bytes()).decode()
    return f'<p><img alt="{_text(path.stem)}" src="data:image/png;base64,{data}"></p>'


def _table(columns: list[str], rows: list[list[Any]]) -> str:
    head = "".join(f"<th>{_text(column)}</th>" for column in columns)
    body = "".join(f"<tr>{''.join(map(_cell, row))}</tr>" for row in rows)
    return f"<table><tr>{head}</tr>{body}</table>"


def _cell(value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return f"<td>{_text(value)}</td>"
    return f'<td class="n">{value:,}</td>' if isinstance(value, int) else (
        f'<td class="n">{value:.4g}</td>'
    )


def _text(value: Any) -> str:
    return html.escape(str(value))


def _anchor(result: dict[str, Any]) -> str:
    return _text(f"{result['name']}-{result['device']}")


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of results")
    parser.add_argument("--out", type=Path, default=Path("report/experiments.html"))
    args = parser.parse_args(argv)
    results = load(args.results)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    temporary = args.out.with_name(f".{args.out.name}")
    temporary.write_text(page(results))
    os.replace(temporary, args.out)
    print(f"{args.out}: {len(results)} results")


if __name__ == "__main__":
    main()
