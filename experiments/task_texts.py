"""Real texts with labels, split once and for all: what a model may learn from, and what judges it.

Classification tasks of a folder `cl` in the data sets, as O-LoRA's benchmark has them. Two of them
have one file alone; that is split here, by a permutation that no seed changes, so that a model
pre-trained on the training texts has seen no test text whatever the experiment's seed is.
"""

import json
import lzma
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

ASKED = {"topic": "What is it about?", "sentiment": "How does the writer feel?"}
VALIDATION = 0.1  # of the training records, to choose settings by


@dataclass(frozen=True)
class Source:
    """Where a task's records are.

    Args:
      folder: under `cl`.
      asks: a key of ASKED.
      test: its own test file; else `held_out` records of the one file that there is, `only`.
    """

    folder: str
    asks: str
    only: str = ""
    held_out: int = 0


SOURCES = {
    "ag": Source("TC/agnews", "topic"),
    "amazon": Source("SC/amazon", "sentiment"),
    "dbpedia": Source("TC/dbpedia", "topic", "test", 2000),
    "sst2": Source("SC/SST-2", "sentiment"),
    "yelp": Source("SC/yelp", "sentiment", "train", 1000),
}


@dataclass(frozen=True)
class Split:
    """Disjoint records `{"sentence": ..., "label": ...}` of one task."""

    train: list[dict[str, str]]
    validation: list[dict[str, str]]
    test: list[dict[str, str]]


def read(path: Path) -> Any:
    """JSON, or a list of JSON lines, or text; `.xz` or plain."""
    opened = lzma.open(path, "rt", encoding="utf-8") if path.suffix == ".xz" else open(
        path, encoding="utf-8")
    with opened as file:
        text = file.read()
    kind = path.name.removesuffix(".xz").rpartition(".")[2]
    if kind == "jsonl":
        return [json.loads(line) for line in text.splitlines() if line.strip()]
    return json.loads(text) if kind == "json" else text


def split(data: Path, name: str) -> Split:
    """The three parts of a task, the same in every run; no text is in two of them."""
    source = SOURCES[name]
    file = lambda part: read(data / "cl" / source.folder / f"{part}.json.xz")
    if source.only:
        records = shuffled(unique(file(source.only)))
        train, test = records[source.held_out:], records[:source.held_out]
    else:
        test = shuffled(unique(file("test")))
        held = {record["sentence"] for record in test}
        train = shuffled([r for r in unique(file("train")) if r["sentence"] not in held])
    count = round(VALIDATION * len(train))
    return Split(train[count:], train[:count], test)


def unique(records: list[dict[str, str]]) -> list[dict[str, str]]:
    """The first record of each text."""
    return list({record["sentence"]: record for record in reversed(records)}.values())[::-1]


def shuffled(records: list[Any], seed: int = 0) -> list[Any]:
    """The records in an order that depends on their number and the seed alone."""
    order = np.random.default_rng([seed, len(records)]).permutation(len(records))
    return [records[i] for i in order]


def instructions(data: Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Chats of an instruction and its answer, for training and held out (a fifth)."""
    found = [chat(f"{one['instruction']}\n{one['input']}".strip(), one["output"])
             for one in read(data / "instruct" / "instruction-data.json")]
    found += [chat(f"{one['instruction']}\n{instance['input']}".strip(), instance["output"])
              for one in read(data / "instruct" / "seed_tasks.jsonl")
              for instance in one["instances"]]
    found = shuffled([one for one in found if one["messages"][1]["content"].strip()])
    count = len(found) // 5
    return found[count:], found[:count]


def chat(user: str, assistant: str) -> dict[str, Any]:
    """A line of training data with one turn each."""
    return {"messages": [{"role": "user", "content": user},
                         {"role": "assistant", "content": assistant}]}


def paragraphs(data: Path, part: str, least: int = 200) -> list[str]:
    """Paragraphs of WikiText-2's `valid` or `test` part with at least so many characters."""
    lines = read(data / "text" / f"wikitext2_{part}.txt.xz").splitlines()
    return [line.strip() for line in lines if len(line) >= least]


def stories(data: Path) -> list[str]:
    """The few stories of a sample of TinyStories."""
    text = read(data / "text" / "tinystories_cs336_sample.txt")
    return [story.strip() for story in text.split("<|endoftext|>") if story.strip()]
