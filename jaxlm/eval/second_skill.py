"""A second skill is taught to a model: what is left of the first, by way of tuning."""

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from jaxlm.core.tree import size
from jaxlm.eval import arithmetic
from jaxlm.eval.skills import Share, share
from jaxlm.hf.bundle import Bundle
from jaxlm.train import Config, Data, Full, Optimizer, Osft, Tuning, fit
from jaxlm.train.data import open_examples
from jaxlm.train.evaluation import evaluate
from jaxlm.train.setup import plain, reader

LETTERS = "abcdefghijklmnopqrstuvwxyz"
LARGEST = 50_000_000  # parameters; a larger model would take more than a demo's time
WINDOW, ROWS, LESSONS = 96, 8, 3000  # a pass over these words takes about 60 steps
# Name, tuning, rate: OSFT's two projections leave a part of each update, so its rate is higher.
# Sums kept and words learnt in 40 steps, of 64: full at 1e-3 6 and 41 %, at 5e-4 19 and 31 %; OSFT
# at 3e-3 42 and 27 %.
WAYS: tuple[tuple[str, Tuning, float], ...] = (
    ("full fine-tuning", Full(), 5e-4),
    ("OSFT, half free", Osft(unfreeze_ratio=0.5, others="freeze"), 3e-3))


@dataclass(frozen=True)
class Taught:
    """Shares of whole answers right: the first skill before and after, the second before and
    after."""

    way: str
    first: tuple[Share, Share]
    second: tuple[Share, Share]


def reversals(count: int, seed: int) -> list[dict[str, str]]:
    """`R:abc=` is answered by `cba`: words of 2 to 4 letters.

    >>> reversals(1, 0)
    [{'prompt': 'R:nf=\\n', 'completion': 'fn\\n'}]
    """
    rng = np.random.default_rng([seed, 11])
    words = ["".join(rng.choice(list(LETTERS), rng.integers(2, 5))) for _ in range(count)]
    return [{"prompt": f"R:{word}=\n", "completion": f"{word[::-1]}\n"} for word in words]


def sums(count: int, seed: int) -> list[dict[str, str]]:
    """Held-out problems of the bundled model's first skill, with their worked solutions."""
    rng = np.random.default_rng([seed, 12])
    drawn = [arithmetic.sample(rng, "easy", "test") for _ in range(count)]
    return [{"prompt": p.prompt, "completion": p.solution} for p in drawn]


def teach(
    bundle: Bundle, folder: Path, steps: int, problems: int, seed: int = 0,
    tick: Callable[[], Any] = lambda: None,
) -> list[Taught]:
    """Teach words backwards in each of `WAYS`, and ask for sums again; [] for a large model.

    Args:
      folder: for samples and checkpoints. steps: of training.
      problems: held-out ones of each skill. tick: called after each way.
    """
    if size(bundle.params) > LARGEST:
        return []
    train = write(folder / "train.jsonl", reversals(LESSONS, seed))
    files = [write(folder / "first.jsonl", sums(problems, seed)),
             write(folder / "second.jsonl", reversals(problems, seed + 1))]
    config = Config(data=Data(train=(train,), window=WINDOW), batch=ROWS, steps=steps,
                    stack=True, export="none", seed=seed)
    before, found = [judge(bundle, config, file, problems) for file in files], []
    for number, (way, tuning, rate) in enumerate(WAYS):
        own = config.replace(out=str(folder / str(number)), tuning=tuning,
                             optimizer=Optimizer(rate=rate))
        taught = fit(bundle, own).bundle
        after = [judge(taught, config, file, problems) for file in files]
        found.append(Taught(way, (before[0], after[0]), (before[1], after[1])))
        tick()
    return found


def judge(bundle: Bundle, config: Config, file: str, problems: int) -> Share:
    """The share of a file's samples whose whole answer the model gives."""
    examples = open_examples([file], reader(bundle, config), config.data.window)
    found = evaluate(bundle.lm, bundle.params, plain(examples, config, None, packed=True))
    return share(round(found["accuracy"] * problems), problems)


def write(path: Path, records: Iterable[dict[str, str]]) -> str:
    """Records as jsonl; the file's name."""
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)
