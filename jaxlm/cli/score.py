"""`jaxlm score`: how likely a model finds texts."""

import json
from typing import Annotated, Any, Literal

import tyro

from jaxlm.cli.options import Loading, Model, columns, open_model, read_text
from jaxlm.core.errors import ConfigError
from jaxlm.decode.score import Score, perplexity, score
from jaxlm.hf.bundle import Bundle

Files = Annotated[tuple[str, ...], tyro.conf.arg(metavar="FILE ...")]

def run(
    model: Model, files: Files = (), /, text: tuple[str, ...] = (),
    window: int | None = None, stride: int | None = None, batch: int = 8,
    per_token: bool = False, format: Literal["table", "tsv", "json"] = "table",
    loading: Loading = Loading(), revision: str | None = None,
) -> None:
    """Tokens, mean log-probability (natural logarithm) and perplexity of each text.

    Args:
      model: a model folder, a hub id such as org/name, or "tiny", the bundled model.
      files: one text each, UTF-8; - is stdin.
      text: texts given here instead of in files.
      window: tokens read at once; default the model's length.
      stride: tokens between the starts of windows; default half a window.
      batch: windows computed together.
      per_token: one line for every token instead of one for every text.
      format: a table for people, or tsv or json for programs.
      revision: of a hub id.
      loading: how a model is loaded.
    """
    names = [*files, *(f"text {i}" for i in range(len(text)))]
    if not names:
        raise ConfigError("got nothing to score; name files, or - for stdin, or pass --text")
    texts = [*map(read_text, files), *text]
    bundle = open_model(model, loading, revision)
    scores = score(bundle, texts, window=window, stride=stride, batch=batch)
    rows = by_token(bundle, names, scores) if per_token else by_text(names, scores)
    print(written(rows, format))


def by_text(names: list[str], scores: list[Score]) -> list[dict[str, Any]]:
    """A record a text, and one for all of them when there are several."""
    parts = [(name, [found]) for name, found in zip(names, scores, strict=True)]
    parts += [("all", scores)] if len(scores) > 1 else []
    rows = []
    for name, group in parts:
        count = sum(len(found.logprobs) for found in group)
        mean = sum(float(found.logprobs.sum(dtype="float64")) for found in group) / count
        rows.append({"text": name, "tokens": count, "mean_logprob": mean,
                     "perplexity": perplexity(group)})
    return rows


def by_token(bundle: Bundle, names: list[str], scores: list[Score]) -> list[dict[str, Any]]:
    """A record a scored token; the first token of a text has nothing before it, so no record."""
    return [
        {"text": name, "index": i, "id": token, "logprob": float(logprob),
         "token": json.dumps(bundle.tokenizer.decode([token], special=True))}
        for name, found in zip(names, scores, strict=True)
        for i, (token, logprob) in enumerate(zip(found.tokens[1:], found.logprobs, strict=True), 1)
    ]


def written(rows: list[dict[str, Any]], format: str) -> str:
    """Records in one of the three forms; in tsv floats keep all their digits."""
    if format == "json":
        return json.dumps(rows, indent=1)
    lines = [list(rows[0]), *(list(row.values()) for row in rows)]
    if format == "table":
        return columns(lines)
    return "\n".join("\t".join(map(str, line)) for line in lines)
