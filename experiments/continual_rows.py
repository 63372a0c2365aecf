"""The rows of the continual-learning table: each a way of tuning, with rates to try."""

from dataclasses import dataclass, replace

from jaxlm.train import Ewc, Full, Lora, OLora, Osft
from jaxlm.train.config import AnyTuning

FULL = (1e-4, 3e-4, 1e-3)
PART = (1e-3, 3e-3, 1e-2)  # adapters and projected updates move less at the same rate


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Args:
      rates: what is tried for it, as many for each row.
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


def osft(**how: object) -> Osft:
    """OSFT with all that is not protected frozen."""
    return Osft(others="freeze", **how)  # type: ignore[arg-type]


ROWS = {
    "full": Row(Full(), FULL),
    "full, matrices alone": Row(osft(unfreeze_ratio=1.0), FULL),
    "lora": Row(Lora(), PART),
    "olora": Row(OLora(), PART),
    "ewc": Row(Ewc(), FULL),
    "replay": Row(Full(), FULL, replay=True),
    "osft uniform": Row(osft(), PART),
    "osft importance": Row(osft(ranks="importance"), PART, calibrated=True),
    "osft scheduled": Row(osft(ranks="scheduled"), PART),
    "osft coordinates": Row(osft(form="coordinates"), PART),
    "osft factored": Row(osft(form="factored"), PART),
    "alone": Row(Full(), FULL, kind="alone"),
    "joint": Row(Full(), FULL, kind="joint"),
}
