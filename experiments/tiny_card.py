"""The bundled model's card, written from the results of its training and of its evaluation."""

from typing import Any

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
Q:37+58*4-16=
58*4=232
37+232=269
269-16=253
A:253
```

**Recall**, two digits for a key of two letters among up to 199 pairs (`jaxlm.eval.recall`):

```
R:kf49;qz13;ab77;
?qz13
```

Prompts end in the newline after `=`, or in the key. No spaces: text unlike the above is outside
what it knows. Characters other than printable ASCII and newline become `<unk>`.

## Accuracy on test problems

{problems} problems a level, {documents} documents a length, 4 queries each; mean and standard
error. `sound` means that the answer and every step are right.

| level | what | greedy | sound | temperature 0.8 | sound |
|---|---|---|---|---|---|
{arithmetic}

| recall, tokens of context | pairs | greedy |
|---|---|---|
{recall}

## Training

{steps:,} steps, {tokens:.1f} million tokens, {minutes:.0f} minutes on {device} ({cores}):
`python experiments/train_tiny.py`; measured by `python experiments/eval_tiny.py`
({date}; results under `experiments/results/`). Training and test problems are told apart by a
checksum, so none is in both.
"""

LEVELS = {
    "easy": "2 or 3 numbers below 100, totals below 100",
    "medium": "3 or 4 terms, one a product of digits, totals below 200",
    "hard": "5 to 8 terms, two of them products; 6 to 9 steps, totals below 300",
}


def card(train: dict[str, Any], evaluated: dict[str, Any], vocab: int, cores: str,
         date: str) -> str:
    """The text of README.md.

    Args:
      train, evaluated: the JSON of train_tiny.py and of eval_tiny.py.
      vocab, cores, date: the number of ids, the processor, the day of the evaluation.
    """
    run, metrics = train["metrics"], evaluated["metrics"]
    show = lambda r: f"{100 * r['accuracy']:.1f} ± {100 * r['standard_error']:.1f} %"
    rows = []
    for level, by in metrics["arithmetic"].items():
        cells = [cell for name in ("greedy", "t0.8")
                 for cell in (show(by[name]), f"{100 * by[name]['sound']:.1f} %")]
        rows.append(f"| {level} | {LEVELS[level]} | {' | '.join(cells)} |")
    recalled = [f"| {length} | {r['pairs']} | {show(r)} |"
                for length, r in metrics["recall"].items()]
    return CARD.format(
        parameters=run["parameters"], vocab=vocab, steps=run["steps"], tokens=run["tokens"] / 1e6,
        minutes=run["minutes"], device=train["device"], cores=cores, date=date,
        problems=metrics["arithmetic"]["hard"]["greedy"]["n"],
        documents=metrics["recall"]["64"]["n"], arithmetic="\n".join(rows),
        recall="\n".join(recalled))
