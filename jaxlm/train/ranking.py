"""Which of several runs may end best, by their first steps: a hint, never a verdict."""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from jaxlm.core.errors import ConfigError, whole

WARNING = (
    "an order by early loss and gradient norm is a correlation, seen among rates and batch sizes "
    "on the same data; it is no threshold, says nothing of runs on other data, and stops none")
History = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Ranking:
    """`order`: names, the likeliest to end best first. `loss` and `grad_norm`: the early means."""

    order: tuple[Any, ...]
    loss: dict[Any, float]
    grad_norm: dict[Any, float]
    window: int
    warning: str = WARNING


def rank_runs(histories: Mapping[Any, History] | Sequence[History], window: int = 100) -> Ranking:
    """Order runs on the same data by their first steps: higher loss and lower gradient norm first.

    A run's place is the sum of its places in the two orders; the loss settles ties. 36 small runs
    over batches, rates and schedules did not confirm it (docs/found.md); the held-out loss a third
    of the way told more.

    Args:
      histories: a run's rows, as `Fitted.history` or the lines of `log.jsonl` have them: dicts
        with `loss` and `grad_norm`. Runs without names are numbered.
      window: steps that are looked at, at most those of the shortest run.
    Raises: ConfigError where a run has no step, or a number that is not finite.
    Source: 2412.13337, section 4.

    Example:
      >>> slow = [{"loss": 2.0, "grad_norm": 1.0}] * 3
      >>> fast = [{"loss": 1.0, "grad_norm": 4.0}] * 3
      >>> with warnings.catch_warnings(action="ignore"):
      ...     rank_runs({"fast": fast, "slow": slow}).order
      ('slow', 'fast')
    """
    if not isinstance(histories, Mapping):
        histories = dict(enumerate(histories))
    steps = {name: [row for row in rows if "loss" in row] for name, rows in histories.items()}
    window = min([whole("window", window), *map(len, steps.values())])
    if not steps or not window:
        raise ConfigError(f"got {len(steps)} runs, the shortest of {window} steps; expected runs "
                          "with a row a step, each with 'loss' and 'grad_norm'")
    early = {}
    for key in ("loss", "grad_norm"):
        early[key] = {name: float(np.mean([row[key] for row in rows[:window]]))
                      for name, rows in steps.items()}
        if wrong := [name for name, value in early[key].items() if not np.isfinite(value)]:
            raise ConfigError(f"run {wrong[0]!r} has a {key} that is not finite; leave it out")
    loss, norm = early["loss"], early["grad_norm"]
    by_loss = sorted(steps, key=lambda name: -loss[name])
    by_norm = sorted(steps, key=lambda name: norm[name])
    places = {name: by_loss.index(name) + by_norm.index(name) for name in steps}
    warnings.warn(WARNING, stacklevel=2)
    return Ranking(tuple(sorted(steps, key=lambda name: (places[name], -loss[name]))), loss, norm,
                   window)
