"""A small run: a tiny model, sums as samples, settings that a test changes."""

import json
from pathlib import Path
from typing import Any

import numpy as np

from jaxlm.train import Config, Data, Optimizer


def sums(path: Path, count: int, seed: int = 0, sign: str = "+") -> Path:
    """A jsonl file of small sums, one a line."""
    rng = np.random.default_rng(seed)
    lines = []
    for a, b in rng.integers(0, 10, (count, 2)):
        answer = a + b if sign == "+" else a * b
        lines.append({"prompt": f"{a}{sign}{b}=", "completion": f"{answer}"})
    return write(path, lines)


def write(path: Path, lines: list[Any]) -> Path:
    """Values as jsonl; strings as they are."""
    text = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    path.write_text("\n".join(text) + "\n")
    return path


def settings(folder: Path, **changes: Any) -> Config:
    """Eight short rows a step, ten steps, in `folder/out`; `data` and `optimizer` are dicts."""
    if not (train := folder / "train.jsonl").exists():
        sums(train, 64)
    data = Data(**{"train": (str(train),), "window": 24, **changes.pop("data", {})})
    optimizer = Optimizer(**{"rate": 1e-2, **changes.pop("optimizer", {})})
    return Config(**{"out": str(folder / "out"), "batch": 8, "steps": 10, "export": "none",
                     "data": data, "optimizer": optimizer, **changes})
