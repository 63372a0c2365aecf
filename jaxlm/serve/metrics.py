"""What `/metrics` shows, in Prometheus' text format."""

import time
from collections.abc import Iterator
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

from jaxlm.serve.engine import Engine

SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)


class Metrics:
    """Counters of one server; a registry of its own, so that several may live in a process."""

    def __init__(self, engine: Engine):
        self.registry = CollectorRegistry()
        make = lambda kind, name, text, labels=(), **more: kind(
            f"jaxlm_{name}", text, labels, registry=self.registry, **more)
        self.requests = make(Counter, "requests", "answered requests", ("path", "status"))
        self.prompt_tokens = make(Counter, "prompt_tokens", "tokens of prompts asked for")
        self.drawn_tokens = make(Counter, "generated_tokens", "tokens drawn, as usage counts them")
        self.seconds = make(Histogram, "request_seconds", "from request to last byte", ("path",),
                            buckets=SECONDS)
        self.first = make(Histogram, "first_token_seconds", "from request to the first token",
                          buckets=SECONDS)
        self.registry.register(_Live(engine))  # type: ignore[arg-type]

    def tokens(self, usage: dict) -> None:
        """Count what an answer used."""
        self.prompt_tokens.inc(usage["prompt_tokens"])
        self.drawn_tokens.inc(usage["completion_tokens"])

    def text(self) -> bytes:
        """All of it."""
        return generate_latest(self.registry)


class Counted:
    """Middleware that counts each request and its time, up to the last byte of a stream."""

    def __init__(self, app: Any, metrics: Metrics):
        self.app, self.metrics = app, metrics

    async def __call__(self, scope: dict, receive: Any, send: Any) -> None:
        """Pass a request on; one that raises, or whose client has left, is counted too."""
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        began, status = time.perf_counter(), 500

        async def noted(message: dict) -> None:
            nonlocal status
            status = message.get("status", status)
            await send(message)

        try:
            await self.app(scope, receive, noted)
        finally:
            path = getattr(scope.get("route"), "path", "other")
            self.metrics.requests.labels(path, status).inc()
            self.metrics.seconds.labels(path).observe(time.perf_counter() - began)


class _Live:
    """What the engine knows at the moment of asking."""

    def __init__(self, engine: Engine):
        self.engine = engine

    def collect(self) -> Iterator[CounterMetricFamily | GaugeMetricFamily]:
        """Gauges and counters."""
        batcher = self.engine.batcher
        reader = batcher.reader
        gauges = {
            "rows": ("rows of the batch", batcher.rows),
            "rows_live": ("rows that grow", len(batcher.live)),
            "answers_pending": ("answers that are not over", self.engine.pending),
            "searches_pending": ("searches that are not over", self.engine.searching),
            "prompt_cache_bytes": ("bytes of kept prompts", reader.kept.bytes),
            "prompt_cache_prompts": ("kept prompts", len(reader.kept)),
        }
        counters = {
            "prompt_tokens_read": ("tokens of prompts that the model read", reader.tokens_read),
            "prompt_tokens_reused": ("tokens of prompts that were kept", reader.tokens_reused),
        }
        for name, (text, value) in gauges.items():
            yield GaugeMetricFamily(f"jaxlm_{name}", text, value)
        for name, (text, value) in counters.items():
            yield CounterMetricFamily(f"jaxlm_{name}", text, value)
