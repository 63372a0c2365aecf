"""The thread that runs the batch: requests in from any event loop, progress back to it."""

import asyncio
import threading
import time
from collections import deque
from collections.abc import Sequence
from typing import Any

from jaxlm.decode.batcher import Batcher, Progress, Request
from jaxlm.serve.jobs import Jobs, Refused, Whole, post


class Ticket:
    """The progress of one client's requests, awaited in its event loop.

    Leave the context to cancel what is not over: when a client goes, its rows are free again at
    the end of the chunk.
    """

    def __init__(self, requests: Sequence[Request]):
        self.requests = list(requests)
        self.loop = asyncio.get_running_loop()
        self.queue: asyncio.Queue[Progress | Refused] = asyncio.Queue()

    async def next(self) -> Progress:
        """The next progress of any of the requests.

        Raises: Refused when the engine will not finish them.
        """
        got = await self.queue.get()
        if isinstance(got, Refused):
            raise got
        return got

    def __enter__(self) -> "Ticket":
        return self

    def __exit__(self, *_: Any) -> None:
        for request in self.requests:
            request.cancelled = True


CLOSING = "the server is shutting down; the answer is not complete"


class Engine:
    """Runs a batcher in a thread of its own, and whole jobs in another.

    Args: waiting: answers that may wait for a row, and jobs: whole jobs that may wait for their
      turn; more are refused.
    """

    def __init__(self, batcher: Batcher, waiting: int = 256, jobs: int = 16):
        self.batcher, self.limit = batcher, waiting + batcher.rows
        self.failure: str | None = None
        self._wake = threading.Condition()
        self._new: deque[tuple[Ticket, Request]] = deque()
        self._jobs = Jobs(jobs)
        self._tickets: dict[int, Ticket] = {}  # by request
        self._closing, self._ended, self._deadline = False, False, float("inf")
        self._thread = threading.Thread(target=self._run, name="jaxlm-engine", daemon=True)

    @property
    def pending(self) -> int:
        """Answers that are not over, waiting ones included."""
        return len(self._new) + len(self._tickets)

    @property
    def searching(self) -> int:
        """Whole jobs that are not over and still wanted, waiting ones included."""
        return len(self._jobs)

    def start(self) -> None:
        """Begin to work."""
        self._thread.start()
        self._jobs.start()

    @property
    def alive(self) -> bool:
        """Whether a thread runs."""
        return self._thread.is_alive() or self._jobs.alive

    def drain(self, grace: float) -> None:
        """Take no more; after `grace` seconds, end what is left with a reason.

        The thread looks at the clock between chunks; what has to be on time calls `end` too.
        """
        self._deadline = min(self._deadline, time.monotonic() + grace)
        self._closing = True
        self._jobs.drain()

    def end(self) -> None:
        """End what is left with a reason, from any thread: a long job ends at the next moment that
        it asks."""
        self._refuse(Refused(CLOSING, 503))

    def close(self, grace: float = 0.0, wait: float = 5.0) -> None:
        """`drain`, `end` after the grace, and wait up to so many seconds more for the threads."""
        self.drain(grace)
        self._join(grace)
        self.end()
        self._join(wait)

    def _join(self, seconds: float) -> None:
        until = time.monotonic() + seconds
        if self._thread.is_alive():
            self._thread.join(seconds)
        self._jobs.join(max(until - time.monotonic(), 0.0))

    def submit(self, requests: Sequence[Request]) -> Ticket:
        """Let requests wait for rows; from inside an event loop.

        Raises: Refused with 429 when too many wait, or 503 when the engine is closing or broken.
        """
        ticket = Ticket(requests)
        with self._wake:  # so that the thread neither fails nor leaves between the two
            self.check(len(requests))
            self._new += [(ticket, request) for request in requests]
            self._wake.notify()
        return ticket

    def call(self, job: Whole) -> asyncio.Future:
        """Run a whole job beside the batch; its result, or what it raised. As `Jobs.call`.

        Raises: as `submit`.
        """
        self._check_open()
        return self._jobs.call(job)

    def check(self, count: int) -> None:
        """What `submit` raises for so many requests now; 400 for more than it ever takes."""
        self._check_open()
        if count > self.limit:
            raise Refused(f"{count} answers are asked for; expected at most {self.limit}, the rows "
                          "and the places in the queue", 400)
        if self.pending + count > self.limit:
            raise Refused(f"{self.pending} answers are being made and the queue is full; try "
                          "again later", 429)

    def _check_open(self) -> None:
        if self.failure is not None:
            raise Refused(f"the server has failed: {self.failure}", 503)
        if self._closing:
            raise Refused("the server is shutting down", 503)

    def _run(self) -> None:
        """Until closed: take what is new, advance one chunk, report."""
        while self._wait():
            try:
                self._report(self.batcher.step())
            except Exception as error:  # the pool's arrays may be donated already: no going on
                self.failure = f"{type(error).__name__}: {error}"
                self._refuse(Refused(f"the server has failed: {self.failure}", 500))
                return
            if time.monotonic() > self._deadline:
                self.end()
            if self._ended:
                return

    def _wait(self) -> bool:
        """Sleep until there is work, and take it; False when closed and nothing is left."""
        with self._wake:
            while not (self._new or self.batcher.busy):
                if self._closing:
                    return False
                self._wake.wait(timeout=0.5)  # a signal handler cannot notify
            while self._new:
                ticket, request = self._new.popleft()
                self._tickets[id(request)] = ticket
                self.batcher.add(request)
        return True

    def _report(self, progress: list[Progress]) -> None:
        """Send what is new to its event loops, and forget what is over or cancelled."""
        by_loop: dict[Any, list[tuple[asyncio.Queue, Progress]]] = {}
        for one in progress:
            ticket = self._tickets.get(id(one.request))
            if ticket is None:
                continue
            if one.text or one.finish or one.request.stream:
                by_loop.setdefault(ticket.loop, []).append((ticket.queue, one))
            if one.finish:
                self._tickets.pop(id(one.request), None)
        for loop, items in by_loop.items():
            post(loop, _deliver, items)
        for name, ticket in list(self._tickets.items()):
            if all(request.cancelled for request in ticket.requests):
                self._tickets.pop(name, None)

    def _refuse(self, reason: Refused) -> None:
        """End everything that is not over."""
        with self._wake:
            tickets = {id(t): t for t in [*self._tickets.values(), *(t for t, _ in self._new)]}
            self._new.clear()
            self._tickets.clear()
            self._closing = self._ended = True
            self._wake.notify()
        self._jobs.end(reason)
        for ticket in tickets.values():
            post(ticket.loop, ticket.queue.put_nowait, reason)


def _deliver(items: list[tuple[asyncio.Queue, Progress]]) -> None:
    for queue, progress in items:
        queue.put_nowait(progress)
