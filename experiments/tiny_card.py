"""The bundled model's card, written from the results of its training and of its evaluation."""

import textwrap
from typing import Any

from jaxlm.eval.recall import FRAME_TOKENS, PAIR_TOKENS, QUERY_TOKENS

CARD = """---
license: apache-2.0
library_name: jaxlm
tags: [arithmetic, recall, test-model]
---

# tiny: a small model whose answers a program can check

{parameters:,} parameters, Llama architecture: 8 layers, width 160, 4 query heads on 2 kv heads of
64, feed-forward 448, tied embeddings, one character one token ({vocab} ids), 2,048 positions, bf16.
It is made to try methods on, not to be useful: trained from scratch on text that the project
generates, for two skills.

**Arithmetic with worked steps**, one a line, every one checkable (`jaxlm.eval.arithmetic`):

```
Q:37+8*6-16=
8*6=48
37+48=85
85-16=69
A:69
```

**Recall**, two digits for a key of two letters among some 200 pairs at most (`jaxlm.eval.recall`):

```
R:kf49;qz13;ab77;
?qz13
```

Prompts end in the newline after `=`, or in the key. No spaces: text unlike the above is outside
what it knows. Characters other than printable ASCII and newline become `<unk>`.

## Accuracy on test problems

{problems} problems a level, {samples} samples of each at temperature 0.8, {documents} documents a
length; share right and standard error. A sound solution is right in its answer and in every step.

| level | what | greedy | greedy, sound | temperature 0.8 | any of 4 | any of {samples} |
|---|---|---|---|---|---|---|
{arithmetic}

| recall, tokens of context | pairs | greedy |
|---|---|---|
{recall}

## Training

{steps:,} steps, {tokens:.1f} million tokens: `python experiments/train_tiny.py`; measured by
`python experiments/eval_tiny.py` ({date}; results under `experiments/results/`). Training and
test problems are told apart by a checksum, so none is in both.

{history}
"""

HISTORY = """These weights come of a run that was stopped and resumed six times, while the
curriculum and the rate after steps 242, 658, 994, 1448 and 1535 were settled; they stand in the
script as they ran (the rate at step 1448 to three decimals). Run from scratch, in one go of
{minutes:.0f} minutes on {device} ({cores}), the script makes another model of the same kind, beside
the one here: hard sums {hard} at temperature 0.8 and {any4} for any of 4, recall {recall} over
1,024 tokens."""

LEVELS = {
    "easy": "2 or 3 numbers below 100, totals below 100",
    "medium": "3 or 4 terms, one a product of digits, totals below 100",
    "hard": "7 or 8 terms, two of them products up to 19*9; 8 or 9 steps, totals below 200",
}


def card(train: dict[str, Any], metrics: dict[str, Any], vocab: int, cores: str,
         date: str) -> str:
    """The text of README.md.

    Args:
      train: the JSON of train_tiny.py. metrics: those of eval_tiny.py, with `again`.
      vocab, cores, date: the number of ids, the processor, the day of the evaluation.
    """
    show = lambda r: f"{100 * r['value']:.1f} ± {100 * r['error']:.1f} %"
    run, hard = train["metrics"], metrics["arithmetic"]["hard"]
    columns = ("greedy", "greedy_sound", "t0.8", "t0.8_any4", f"t0.8_any{hard['samples']}")
    rows = [f"| {level} | {LEVELS[level]} | {' | '.join(show(by[c]) for c in columns)} |"
            for level, by in metrics["arithmetic"].items()]
    pairs = lambda length: (length - FRAME_TOKENS - QUERY_TOKENS) // PAIR_TOKENS
    recalled = [f"| {length} | {pairs(int(length))} | {show(r)} |"
                for length, r in metrics["recall"].items()]
    again = metrics["again"]["arithmetic"]["hard"]
    history = HISTORY.format(
        minutes=run["minutes"], device=train["device"], cores=cores, hard=show(again["t0.8"]),
        any4=show(again["t0.8_any4"]), recall=show(metrics["again"]["recall"]["1024"]))
    return CARD.format(
        history=textwrap.fill(" ".join(history.split()), 100),
        parameters=run["parameters"], vocab=vocab, steps=run["steps"], tokens=run["tokens"] / 1e6,
        date=date,
        problems=hard["problems"], samples=hard["samples"],
        documents=metrics["recall"]["64"]["documents"], arithmetic="\n".join(rows),
        recall="\n".join(recalled))
