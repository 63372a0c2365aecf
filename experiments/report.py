"""Draw the plots beside experiments/results anew, and gather all into one self-contained page.

Command: python experiments/report.py --out report/experiments.html
"""

import argparse
import json
from pathlib import Path
from typing import Any

from experiments import plots
from jaxlm.eval import report as html

RESULTS = Path(__file__).resolve().parent / "results"


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


def redraw(results: list[tuple[Path, dict[str, Any]]]) -> list[Path]:
    """Write each result's plots beside it, as DEVICE-SUFFIX.png; those there were go."""
    written = []
    for path, result in results:
        files = {f"{path.stem}-{suffix}.png": png for suffix, png in plots.draw(result).items()}
        if not files:
            continue
        for old in path.parent.glob(f"{path.stem}-*.png"):
            if old.name not in files:
                old.unlink()
        html.write_files(path.parent, files)
        written += [path.parent / name for name in files]
    return written


def page(results: list[tuple[Path, dict[str, Any]]], title: str = "jaxlm: measurements") -> str:
    """The whole page."""
    sections = [section(path, result) for path, result in results]
    links = "".join(
        f'<a href="#{_anchor(r)}">{html.text(r["name"])} ({html.text(r["device"])})</a>'
        for _, r in results
    )
    body = "\n".join(sections) or "<p>No results yet.</p>"
    return html.page(title, f"<h1>{html.text(title)}</h1><nav>{links}</nav>\n{body}")


def section(path: Path, result: dict[str, Any]) -> str:
    """One result: how it was made, its numbers, its plots."""
    made = " · ".join([
        f"commit {result.get('commit')}" + (" and changes" if result.get("dirty") else ""),
        f"seed {result.get('seed')}", f"sources {result.get('sources', 'not recorded')[:12]}",
        *(f"{name} {value}" for name, value in result.get("versions", {}).items()),
    ])
    title = f"{result['name']}, {result['device']}"
    note = " (a smoke run: measures nothing)" if result.get("smoke") else ""
    return "\n".join([
        f'<h2 id="{_anchor(result)}">{html.text(title)}{note}</h2>',
        f"<p><code>{html.text(result['command'])}</code></p>",
        tables(result["metrics"]),
        *(image(plot) for plot in sorted(path.parent.glob(f"{path.stem}*.png"))
          if not plot.stem.endswith("-dark")),
        f'<p class="soft">{html.text(made)}</p>',
    ])


def tables(metrics: dict[str, Any]) -> str:
    """Plain numbers as one table; each list of records as its own."""
    flat, records = flatten(metrics)
    parts = [html.table(["metric", "value"], [list(row) for row in flat.items()])] if flat else []
    for name, rows in records.items():
        columns = list(dict.fromkeys(key for row in rows for key in row))
        cells = [[row.get(key, "") for key in columns] for row in rows]
        parts.append(f"<h3>{html.text(name)}</h3>{html.table(columns, cells)}")
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
    """A plot, inside the page, with the one beside it for dark screens."""
    dark = path.with_name(f"{path.stem}-dark.png")
    return html.picture(path.read_bytes(), path.stem, dark.read_bytes() if dark.exists() else None)


def _anchor(result: dict[str, Any]) -> str:
    return html.text(f"{result['name']}-{result['device']}")


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of results")
    parser.add_argument("--out", type=Path, default=Path("report/experiments.html"))
    args = parser.parse_args(argv)
    results = load(args.results)
    drawn = redraw(results)
    html.write_files(args.out.parent, {args.out.name: page(results)})
    print(f"{args.out}: {len(results)} results, {len(drawn)} plots drawn beside them")


if __name__ == "__main__":
    main()
