"""What a run tells: a line of JSON a step, TensorBoard where asked, a bar where someone looks."""

import json
import os
import pathlib
import sys
import tempfile
from typing import Any

from jaxlm.core.errors import ConfigError


class Log:
    """Rows of `log.jsonl`; a resumed run drops those beyond its checkpoint.

    Args:
      folder: where it goes; None keeps rows in memory alone.
      step: of the checkpoint that the run goes on from.
      bar: total steps, for a progress bar on a terminal.
    """

    def __init__(
        self, folder: pathlib.Path | None, step: int = 0, bar: int | None = None,
        tensorboard: bool = False,
    ):
        self.rows: list[dict[str, Any]] = []
        self.path = None if folder is None else folder / "log.jsonl"
        if self.path is not None:
            self.rows = [row for row in read_log(self.path) if row["step"] <= step]
            write_lines(self.path, self.rows)
        self.board = _board(folder, step) if tensorboard and folder is not None else None
        self.bar = _bar(step, bar)

    def __call__(self, step: int, **values: Any) -> None:
        """One row: a training step, or an evaluation (its keys begin with `eval/`)."""
        row = {"step": step, **values}
        self.rows.append(row)
        if self.path is not None:
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
        if self.board is not None:
            for name, value in values.items():
                self.board.add_scalar(name, value, step)
        shown = {name: values[name] for name in ("loss", "tokens_per_s", "mfu") if name in values}
        if self.bar is not None and shown:
            self.bar.set_postfix({k: f"{v:.3g}" for k, v in shown.items()}, refresh=False)
            self.bar.update(step - self.bar.n)

    def close(self) -> None:
        """End the bar and the files."""
        for thing in (self.bar, self.board):
            if thing is not None:
                thing.close()


def read_log(path: pathlib.Path) -> list[dict[str, Any]]:
    """The whole rows of a log; a last line that a kill cut short is left out."""
    rows = []
    if path.exists():
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError:
                break
    return rows


def write_lines(path: pathlib.Path, rows: list[dict[str, Any]]) -> None:
    """Rows as a whole file, in one move."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False, encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    os.replace(file.name, path)


def write_json(path: pathlib.Path, value: Any) -> None:
    """One value as a whole file, in one move."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False, encoding="utf-8") as file:
        json.dump(value, file, indent=1)
    os.replace(file.name, path)


def _board(folder: pathlib.Path, step: int) -> Any:
    try:
        from tensorboardX import SummaryWriter
    except ImportError as error:
        raise ConfigError("tensorboard: true needs tensorboardX: pip install tensorboardX, or "
                          "leave it false; log.jsonl has the same") from error
    return SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)


def _bar(step: int, total: int | None) -> Any:
    """A bar that begins at the resumed step; none where nobody looks."""
    if total is None or not watched():
        return None
    from tqdm.auto import tqdm

    return tqdm(total=total, initial=step, unit="step", desc="train")


def watched() -> bool:
    """Whether someone looks: a terminal, or a notebook."""
    return sys.stderr.isatty() or "ipykernel" in sys.modules
