"""Ending a search from outside, between two of its rounds.

A search runs in one thread and is wanted by another: a server's client that leaves, a signal.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from jaxlm.core.errors import JaxlmError

ROUNDS = 4  # on the device between two checks
_left: ContextVar[Callable[[], bool] | None] = ContextVar("jaxlm_left", default=None)


class Interrupted(JaxlmError):
    """A search that nobody waits for any more."""


@contextmanager
def unless(left: Callable[[], bool]) -> Iterator[None]:
    """Searches in this context end with `Interrupted` once `left()` is true.

    It is asked between two rounds, on the device every `ROUNDS`; any thread may make it true.
    """
    token = _left.set(left)
    try:
        yield
    finally:
        _left.reset(token)


def interruptible() -> bool:
    """Whether somebody may end the searches of this context."""
    return _left.get() is not None


def check() -> None:
    """Interrupted where the search is not wanted any more.

    >>> with unless(lambda: False):
    ...     check()
    """
    left = _left.get()
    if left is not None and left():
        raise Interrupted("the search was ended from outside; nobody waits for it")
