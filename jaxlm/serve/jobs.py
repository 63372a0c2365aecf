"""Whole jobs, such as searches, one after another in a thread of their own, beside the batch."""

import asyncio
import threading
from collections import deque
from collections.abc import Callable
from typing import Any

from jaxlm.core.errors import JaxlmError

Whole = Callable[[Callable[[], bool]], Any]  # a job; it may ask whether anybody still waits


class Refused(JaxlmError):
    """A request that cannot be taken now; `status` is HTTP's."""

    def __init__(self, message: str, status: int):
        super().__init__(message)
        self.status = status


class Jobs:
    """A queue of jobs and the thread that runs them.

    The batch goes on meanwhile: a job that compiles, or runs long, holds up other jobs alone.

    Args: limit: jobs that may wait for their turn; more are refused.
    """

    def __init__(self, limit: int = 16) -> None:
        self.limit = limit
        self._wake = threading.Condition()
        self._waiting: deque[tuple[Whole, asyncio.Future]] = deque()
        self._running: tuple[Whole, asyncio.Future] | None = None
        self._closing, self._ended = False, False
        self._thread = threading.Thread(target=self._run, name="jaxlm-jobs", daemon=True)

    def __len__(self) -> int:
        """Jobs that are not over, the running one included; waiting ones that nobody wants are
        dropped."""
        with self._wake:
            self._waiting = deque(one for one in self._waiting if not one[1].cancelled())
            return len(self._waiting) + (self._running is not None)

    @property
    def alive(self) -> bool:
        """Whether the thread runs."""
        return self._thread.is_alive()

    def start(self) -> None:
        """Begin to work."""
        self._thread.start()

    def join(self, seconds: float) -> None:
        """Wait for the thread, up to so long."""
        if self.alive:
            self._thread.join(seconds)

    def call(self, job: Whole) -> asyncio.Future:
        """The job's result, or what it raised, in the event loop that calls this.

        job: is given a function that tells whether nobody waits any more: the future is cancelled,
        or `end` was called.
        Raises: Refused with 429 when too many wait, or 503 at the end.
        """
        future = asyncio.get_running_loop().create_future()
        with self._wake:
            if self._closing:
                raise Refused("the server is shutting down", 503)
            if len(self) > self.limit:
                raise Refused(f"{len(self)} searches run or wait and their queue is full; try "
                              "again later", 429)
            self._waiting.append((job, future))
            self._wake.notify()
        return future

    def drain(self) -> None:
        """Let the thread end after what is there; a signal handler may call this."""
        self._closing = True

    def end(self, reason: Exception) -> None:
        """Settle every job that is not over with a reason, and take no more, from any thread."""
        with self._wake:
            for _, future in [*([self._running] if self._running else []), *self._waiting]:
                post(future.get_loop(), settle, future, None, reason)
            self._waiting.clear()
            self._closing = self._ended = True  # only now: what a job that sees it posts is late
            self._wake.notify()

    def _run(self) -> None:
        while (first := self._first()) is not None:
            self._settle(*first)
            with self._wake:
                self._running = None

    def _settle(self, job: Whole, future: asyncio.Future) -> None:
        """Run a job, if its client still waits, and tell how it went."""
        if future.cancelled():
            return
        try:
            result = job(lambda: future.cancelled() or self._ended)
        except BaseException as error:  # a job's own: the batch is untouched, and the thread lives
            if not isinstance(error, Exception) or isinstance(error, StopIteration):
                error = RuntimeError(f"{type(error).__name__}: {error}")  # which a future can hold
            post(future.get_loop(), settle, future, None, error)
        else:
            post(future.get_loop(), settle, future, result, None)

    def _first(self) -> tuple[Whole, asyncio.Future] | None:
        """The next job, now running, once there is one; None when closed and nothing is left."""
        with self._wake:
            while not self._waiting:
                if self._closing:
                    return None
                self._wake.wait(timeout=0.5)  # a signal handler cannot notify
            self._running = self._waiting.popleft()
            return self._running


def post(loop: asyncio.AbstractEventLoop, call: Callable, *arguments: Any) -> None:
    """Call in an event loop, unless it is closed already."""
    try:
        loop.call_soon_threadsafe(call, *arguments)
    except RuntimeError:
        if not loop.is_closed():
            raise


def settle(future: asyncio.Future, result: Any, error: Exception | None) -> None:
    """Give a future its result or its error, unless it has one or was cancelled."""
    if not future.done():
        future.set_exception(error) if error is not None else future.set_result(result)
