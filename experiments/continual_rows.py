"""The rows of the continual-learning table: each a way of tuning, with rates to try."""

from collections.abc import Iterable
from dataclasses import dataclass, replace

from jaxlm.train import Ewc, Full, Lora, OLora, Osft
from jaxlm.train.config import AnyTuning

GRID = (1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
FULL = GRID[2:5]
PART = GRID[4:7]  # adapters and projected updates move less at the same rate


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Args:
      rates: one that is not tuned; or what is tried for it first, as many for each row, next to
        each other on `GRID`; where the best is at an edge, those beyond come next.
      replay: a tenth of each pass is drawn from earlier tasks.
      kind: "course" (the tasks in turn), "alone" (a model for each task) or "joint" (all tasks
        mixed, one run).
      calibrated: the first task has earlier data too: chats from before all tasks.
    """

    tuning: AnyTuning
    rates: tuple[float, ...]
    replay: bool = False
    kind: str = "course"
    calibrated: bool = False

    def tunings(self, tasks: int) -> list[AnyTuning]:
        """One a task: a schedule has to know where it is; another's program serves all tasks."""
        if isinstance(self.tuning, Osft) and self.tuning.ranks == "scheduled":
            return [replace(self.tuning, task=i + 1, tasks=tasks) for i in range(tasks)]
        return [self.tuning] * tasks


    def beyond(self, best: float, tried: Iterable[float]) -> float | None:
        """The next rate to try where the best is at an edge of those tried; None where it is not.

        >>> Row(Full(), FULL).beyond(FULL[0], FULL), Row(Full(), FULL).beyond(FULL[1], FULL)
        (3e-05, None)
        """
        at, known = GRID.index(best), {GRID.index(rate) for rate in tried}
        return next((GRID[i] for i in (at - 1, at + 1) if i not in known and 0 <= i < len(GRID)),
                    None)


def osft(**how: object) -> Osft:
    """OSFT with all that is not protected frozen."""
    return Osft(**{"others": "freeze", **how})  # type: ignore[arg-type]


ROWS = {
    "full": Row(Full(), FULL),
    "full, matrices alone": Row(osft(unfreeze_ratio=1.0), FULL),
    **{f"full, matrices alone, {rate:g}": Row(osft(unfreeze_ratio=1.0), (rate,))
       for rate in PART[:2]},  # beside OSFT at the rate that it chose
    "lora": Row(Lora(), PART),
    "olora": Row(OLora(), PART),
    "ewc": Row(Ewc(), FULL),
    "replay": Row(Full(), FULL, replay=True),
    "osft uniform": Row(osft(), PART),
    "osft uniform, rest trained": Row(osft(others="train"), PART),
    "osft importance": Row(osft(ranks="importance"), PART, calibrated=True),
    "osft scheduled": Row(osft(ranks="scheduled"), PART),
    "osft coordinates": Row(osft(form="coordinates"), PART),
    "osft factored": Row(osft(form="factored"), PART),
    "alone": Row(Full(), FULL, kind="alone"),
    "joint": Row(Full(), FULL, kind="joint"),
}
