"""Whole jobs: their ends, their limit, and what a job may do."""

import asyncio
import threading
import time

import pytest

from jaxlm.serve import jobs
from jaxlm.serve.engine import Engine
from jaxlm.serve.jobs import Jobs, Refused

CLOSED = Refused("the server is shutting down; the answer is not complete", 503)


def test_a_job_that_ends_with_the_server_has_the_server_s_reason(monkeypatch):
    """However slowly the reason is told: what the job itself says of its end comes second."""
    post = jobs.post

    def slow(*given):
        if threading.current_thread() is not work._thread:
            time.sleep(0.2)
        post(*given)

    monkeypatch.setattr(jobs, "post", slow)
    work, begun = Jobs(), threading.Event()

    def job(left):
        begun.set()
        while not left():
            time.sleep(0.001)
        raise ValueError("nobody waits")

    async def ask():
        work.start()
        future = work.call(job)
        await asyncio.to_thread(begun.wait, 10)
        await asyncio.to_thread(work.end, CLOSED)
        with pytest.raises(Refused, match="not complete"):
            await future
        with pytest.raises(Refused) as found:  # nobody would ever run it
            work.call(job)
        assert found.value.status == 503

    asyncio.run(ask())


@pytest.mark.parametrize("ending", [SystemExit(3), StopIteration(), KeyboardInterrupt()])
def test_a_job_cannot_end_its_thread(ending):
    work = Jobs()

    def job(left):
        raise ending

    async def ask():
        work.start()
        with pytest.raises(RuntimeError, match=type(ending).__name__):
            await asyncio.wait_for(work.call(job), 10)
        assert await asyncio.wait_for(work.call(lambda left: 5), 10) == 5
        work.end(CLOSED)

    asyncio.run(ask())


def test_the_queue_of_jobs_has_a_limit_and_forgets_who_left():
    work, may, begun = Jobs(limit=2), threading.Event(), threading.Event()

    async def ask():
        work.start()
        first = work.call(lambda left: (begun.set(), may.wait(10)))
        await asyncio.to_thread(begun.wait, 10)
        waiting = [work.call(lambda left, i=i: i) for i in range(2)]
        with pytest.raises(Refused) as found:
            work.call(lambda left: 0)
        assert found.value.status == 429
        waiting[0].cancel()
        last = work.call(lambda left: 7)
        assert len(work) == 3
        may.set()
        assert [await first, await waiting[1], await last] == [(None, True), 1, 7]
        work.end(CLOSED)

    asyncio.run(ask())


class Idle:
    """A batcher with nothing to do."""

    rows, busy = 1, False


class Gap:
    """A lock whose holder lets another thread do something just before it gets it."""

    def __init__(self, lock, before):
        self.lock, self.before = lock, before

    def __enter__(self):
        before, self.before = self.before, lambda: None
        before()
        return self.lock.__enter__()

    def __exit__(self, *error):
        return self.lock.__exit__(*error)

    def notify(self):
        self.lock.notify()


@pytest.mark.parametrize("end", [Engine.end, lambda engine: engine.drain(0.0)])
def test_what_comes_in_the_moment_of_an_end_is_refused(end):
    """Between a look at the engine and the queue the thread may fail, or leave."""
    async def ask():
        engine = Engine(Idle())  # its thread has left, so nobody would answer
        engine._wake = Gap(engine._wake, lambda: end(engine))
        with pytest.raises(Refused) as found:
            engine.submit([object()])
        assert found.value.status == 503 and not engine.pending

        other = Engine(Idle())
        other._jobs._wake = Gap(other._jobs._wake, lambda: end(other))
        with pytest.raises(Refused) as found:
            other.call(lambda left: 0)
        assert found.value.status == 503 and not other.searching

    asyncio.run(ask())
