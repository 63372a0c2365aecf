"""Reports: one HTML page that needs no other file, legible in light and in dark."""

import base64
import html
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

STYLE = """
:root{color-scheme:light dark;--ink:#1d2429;--soft:#5b6770;--paper:#fff;--card:#f5f7f8;
--line:#d9dfe3;--good:#0b7a53;--bad:#b3372b;--accent:#0b7285}
@media(prefers-color-scheme:dark){:root{--ink:#e4e9ec;--soft:#9aa7b0;--paper:#14191d;--card:#1d2429;
--line:#36424a;--good:#4cc38a;--bad:#ff8a7a;--accent:#4dc4d6}}
*{box-sizing:border-box}
body{font:16px/1.55 system-ui,sans-serif;color:var(--ink);background:var(--paper);
max-width:62rem;margin:2.5rem auto;padding:0 1.2rem}
h1{font-size:1.9rem;margin:0 0 .3rem}h2{font-size:1.25rem;margin:2.4rem 0 .6rem}
h3{font-size:1rem;margin:1rem 0 .4rem}.soft{color:var(--soft)}
a{color:var(--accent)}nav a{margin-right:1rem}
code,pre{font-family:ui-monospace,Menlo,Consolas,monospace;font-size:.9em}
code{background:var(--card);padding:.1rem .35rem;border-radius:4px}
.wide{overflow-x:auto}table{border-collapse:collapse;margin:.6rem 0}
th,td{padding:.35rem .9rem .35rem 0;text-align:left;border-bottom:1px solid var(--line)}
th{color:var(--soft);font-weight:600}
td.n{text-align:right;font-variant-numeric:tabular-nums}
.grid{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,26rem),1fr));gap:1.2rem}
.row{display:flex;flex-wrap:wrap;gap:0 3rem}
.cards{display:grid;grid-template-columns:repeat(auto-fit,minmax(15rem,1fr));gap:1rem}
.card{background:var(--card);border:1px solid var(--line);border-radius:8px;padding:.8rem 1rem}
.card pre{margin:.4rem 0 0;white-space:pre-wrap;overflow-wrap:anywhere}
.good{color:var(--good)}.bad{color:var(--bad)}
figure{margin:.8rem 0}figcaption{color:var(--soft);font-size:.9rem}img{max-width:100%;height:auto}
"""


def text(value: Any) -> str:
    """A value as HTML text.

    >>> text("a<b")
    'a&lt;b'
    """
    return html.escape(str(value))


def page(title: str, body: str) -> str:
    """A whole page."""
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{text(title)}</title><style>{STYLE}</style></head>"
        f"<body>\n{body}\n</body></html>\n"
    )


def table(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A table; numbers stand to the right."""
    head = "".join(f"<th>{text(column)}</th>" for column in columns)
    body = "\n".join(f"<tr>{''.join(map(_cell, row))}</tr>" for row in rows)
    return f'<div class="wide"><table><tr>{head}</tr>\n{body}</table></div>'


def _cell(value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return f"<td>{text(value)}</td>"
    shown = f"{value:,}" if isinstance(value, int) else f"{value:.4g}"
    return f'<td class="n">{shown}</td>'


def picture(light: bytes, alt: str, dark: bytes | None = None, caption: str = "") -> str:
    """A PNG inside the page, with another one for dark screens where there is one."""
    source = ""
    if dark is not None:
        source = f'<source media="(prefers-color-scheme:dark)" srcset="{data_uri(dark)}">'
    below = f"<figcaption>{text(caption)}</figcaption>" if caption else ""
    image = f'<img alt="{text(alt)}" src="{data_uri(light)}">'
    return f"<figure><picture>{source}{image}</picture>{below}</figure>"


def data_uri(png: bytes) -> str:
    """A PNG as an address."""
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"


def write_files(folder: Path, files: Mapping[str, bytes | str]) -> None:
    """Write files into a folder, each under a temporary name first: none is ever half there."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        temporary = folder / f".{name}.{os.getpid()}"
        try:
            temporary.write_bytes(content.encode() if isinstance(content, str) else content)
            os.replace(temporary, folder / name)
        finally:
            temporary.unlink(missing_ok=True)
