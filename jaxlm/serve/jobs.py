"""Whole jobs, such as searches, one after another in a thread of their own, beside the batch."""

import asyncio
import threading
from collections import deque
from collections.abc import Callable
from typing import Any

Whole = Callable[[Callable[[], bool]], Any]  # a job; it may ask whether anybody still waits


class Jobs:
    """A queue of jobs and the thread that runs them.

    The batch goes on meanwhile: a job that compiles, or runs long, holds up other jobs alone.
    """

    def __init__(self) -> None:
        self._wake = threading.Condition()
        self._waiting: deque[tuple[Whole, asyncio.Future]] = deque()  # the first is running
        self._closing, self._ended = False, False
        self._thread = threading.Thread(target=self._run, name="jaxlm-jobs", daemon=True)

    def __len__(self) -> int:
        """Jobs that are not over, the running one included."""
        return len(self._waiting)

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
        """
        future = asyncio.get_running_loop().create_future()
        with self._wake:
            self._waiting.append((job, future))
            self._wake.notify()
        return future

    def drain(self) -> None:
        """Let the thread end after what is there; a signal handler may call this."""
        self._closing = True

    def end(self, reason: Exception) -> None:
        """Settle every job that is not over with a reason, and take no more, from any thread."""
        with self._wake:
            waiting = list(self._waiting)
            self._waiting.clear()
            self._closing = self._ended = True
            self._wake.notify()
        for _, future in waiting:
            post(future.get_loop(), settle, future, None, reason)

    def _run(self) -> None:
        while (first := self._first()) is not None:
            try:
                self._settle(*first)
            finally:
                with self._wake:
                    if self._waiting:  # else it was refused meanwhile
                        self._waiting.popleft()

    def _settle(self, job: Whole, future: asyncio.Future) -> None:
        """Run a job, if its client still waits, and tell how it went."""
        if future.cancelled():
            return
        try:
            result = job(lambda: future.cancelled() or self._ended)
        except Exception as error:  # a job's own: the batch is untouched
            post(future.get_loop(), settle, future, None, error)
        else:
            post(future.get_loop(), settle, future, result, None)

    def _first(self) -> tuple[Whole, asyncio.Future] | None:
        """The next job, once there is one; None when closed and nothing is left."""
        with self._wake:
            while not self._waiting:
                if self._closing:
                    return None
                self._wake.wait(timeout=0.5)  # a signal handler cannot notify
            return self._waiting[0]


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
