"""A SIGTERM while a run works: it is noted, and the run leaves where nothing is lost."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import jax


class Stopped(Exception):
    """A SIGTERM came while no step was done: in reading, in finding bases, in the export."""


class Asked:
    """The handler: whether a SIGTERM has come."""

    came = False

    def __call__(self, number: int, frame: Any) -> None:
        self.came = True


@contextmanager
def listening() -> Iterator[Asked]:
    """From here on a SIGTERM is noted; within another such block the outer one's note counts.

    Only the main thread can do so, and a run of several processes leaves it to jax's own handler.
    """
    before = signal.getsignal(signal.SIGTERM)
    if isinstance(before, Asked):
        yield before
        return
    asked = Asked()
    main = threading.current_thread() is threading.main_thread()
    if not main or before is None or jax.process_count() > 1:
        yield asked
        return
    signal.signal(signal.SIGTERM, asked)
    try:
        yield asked
    finally:
        signal.signal(signal.SIGTERM, before)


def leave_if_asked() -> None:
    """Raises: Stopped where a SIGTERM has come in a `listening` block."""
    handler = signal.getsignal(signal.SIGTERM)
    if isinstance(handler, Asked) and handler.came:
        raise Stopped("a SIGTERM came; what was saved stays, and the same command goes on")
