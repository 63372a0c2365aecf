"""Classification as text to be continued: prompts that fit a short row, files that a run reads."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

import jaxlm
from experiments.task_texts import ASKED, SOURCES, instructions, paragraphs, shuffled, split
from experiments.text_model import write_lines
from jaxlm.hf.bundle import Bundle
from jaxlm.hf.tokenizer import Tokenizer
from jaxlm.train import Task

WINDOW = 64
# The published orders 4 and 5 of 15 tasks, with the five alone that are here; and order 1 of four,
# its Yahoo, which is not here, replaced by Yelp, and SST-2 at its end.
ORDERS = {
    "4 of five": ("yelp", "amazon", "sst2", "dbpedia", "ag"),
    "5 of five": ("sst2", "dbpedia", "ag", "yelp", "amazon"),
    "1 with yelp, sst2": ("dbpedia", "amazon", "yelp", "ag", "sst2"),
}
TUNING_ORDER = ("ag", "yelp", "dbpedia")  # how none of the scored ones begins


@dataclass(frozen=True)
class Sizes:
    """Samples: of a task to learn from and to be judged by, and of each held-out text."""

    train: int
    test: int
    other: int


@dataclass(frozen=True)
class Files:
    """What the courses of a seed read.

    Args:
      tasks: name -> its Task.
      others: name -> held-out texts of general ability.
      general: chats that the model learnt before any task, as `data.calibration` of the first.
      asked: held-out instructions, as the chat template opens the reply.
    """

    tasks: dict[str, Task]
    others: dict[str, tuple[str, ...]]
    general: str
    asked: tuple[str, ...]


@dataclass(frozen=True)
class Format:
    """Whether instructions still get a reply in their form: some words, a closing mark, an end.

    Replies are drawn greedily, up to `room` tokens; a label alone has no closing mark.
    """

    asked: tuple[str, ...]
    room: int = 48

    def __call__(self, bundle: Bundle) -> float:
        """The share of replies that are in form."""
        ids = [bundle.tokenizer.encode(text, False) for text in self.asked]
        replies = jaxlm.generate(bundle, ids, max_new_tokens=self.room)
        return float(np.mean([one.finish == "stop" and sentence(one.text) for one in replies]))


def sentence(text: str) -> bool:
    """Two words or more, and a closing mark.

    >>> sentence("It is hot."), sentence(" Good"), sentence("")
    (True, False, False)
    """
    return len(text.split()) > 1 and text.rstrip().endswith((".", "!", "?"))


def line(
    tokenizer: Tokenizer, name: str, record: dict[str, str], room: int
) -> dict[str, str]:
    """Prompt and completion of a record, `room` tokens of a row being left for the completion.

    The options are not listed: DBpedia's would fill half of the row.
    """
    head = f"Dataset: {name}. {ASKED[SOURCES[name].asks]}\n"
    return {"prompt": filled(tokenizer, head, record["sentence"].strip(), room),
            "completion": f" {record['label']}"}


def filled(tokenizer: Tokenizer, head: str, text: str, room: int) -> str:
    """A question, as much of the beginning of a text as a row has space for, the cue to answer.

    The cut must not depend on the text's own answer: where the prompt ends would tell which it is.
    """
    tail, encode = "\nAnswer:", tokenizer.backend_tokenizer.encode
    while (over := len(encode(head + text + tail).ids) - (WINDOW + 1 - room)) > 0:
        offsets = encode(text, add_special_tokens=False).offsets
        text = text[:offsets[max(len(offsets) - over, 0)][0]].rstrip()
    return head + text + tail


def longest(tokenizer: Tokenizer, records: list[dict[str, str]]) -> int:
    """Tokens of the longest answer, its end mark with it."""
    encode = tokenizer.backend_tokenizer.encode
    answers = {record["label"] for record in records}
    return 1 + max(len(encode(f" {one}", add_special_tokens=False).ids) for one in answers)


def prepare(
    folder: Path, data: Path, tokenizer: Tokenizer, sizes: Sizes, seed: int, judged: str = "test",
) -> Files:
    """Write the files of a seed: another seed has other samples of the same parts.

    Args: judged: the part that judges, "test", or "validation" to choose settings by.
    """
    tasks = {}
    for name in SOURCES:
        parts = split(data, name)
        room = longest(tokenizer, parts.train)
        chosen = {"train": shuffled(parts.train, seed + 1)[:sizes.train],
                  "eval": shuffled(getattr(parts, judged), seed + 1)[:sizes.test]}
        files = {part: write_lines([line(tokenizer, name, one, room) for one in records],
                                   folder / f"{name}_{part}.jsonl")
                 for part, records in chosen.items()}
        choices = tuple(sorted({f" {one['label']}" for one in parts.train}))
        tasks[name] = Task(name, (files["train"],), (files["eval"],), choices)
    known, held = instructions(data)
    texts: dict[str, list[dict[str, Any]]] = {
        "wikitext": [{"text": text} for text in shuffled(paragraphs(data, "test"))],
        "instructions": short(held)}
    others = {name: (write_lines(lines[:sizes.other], folder / f"{name}.jsonl"),)
              for name, lines in texts.items()}
    asked = tuple(tokenizer.render(one["messages"][:1], True) for one in short(held)[:sizes.other])
    return Files(tasks, others, write_lines(short(known)[:256], folder / "general.jsonl"), asked)


def short(chats: list[dict[str, Any]], most: int = 120) -> list[dict[str, Any]]:
    """Chats of at most so many characters: their answers lie within a row."""
    return [one for one in chats if sum(len(turn["content"]) for turn in one["messages"]) <= most]
