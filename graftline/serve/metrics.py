"""Prometheus metrics of one server; each request is counted once, with how it ended."""

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from graftline.serve.catalog import Catalog
from graftline.serve.follower import Follower
from graftline.serve.scheduler import Scheduler

_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)

Ended = Literal["answered", "failed", "left", "refused"]
"""``left``: the client was gone before the answer's end. ``refused``: the request was the client's fault, or the server
was full. ``failed``: the server's fault."""

_COUNTED_PATHS = frozenset({"/v1/chat/completions", "/v1/completions"})
_OUTCOME_KEY = "graftline.outcome"


@dataclass
class Outcome:
    """How one request ended."""

    status: int | None = None
    """HTTP status, once it is sent."""
    ended: Ended | None = None
    """What the status does not say: of a stream it is sent before the first token."""

    @property
    def name(self) -> Ended:
        """The label."""
        if self.ended is not None:
            return self.ended
        if self.status is None:
            return "left"
        return "answered" if self.status < 400 else "refused" if self.status < 500 else "failed"


def outcome_of(scope: Scope) -> Outcome:
    """The outcome that is counted for a request."""
    outcome: Outcome = scope[_OUTCOME_KEY]
    return outcome


class Counted:
    """ASGI middleware: counts each request that generates, at its end, whatever the end."""

    def __init__(self, app: ASGIApp, *, metrics: "Metrics") -> None:
        self._app, self._metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on and count it."""
        if scope["type"] != "http" or scope["path"] not in _COUNTED_PATHS:
            await self._app(scope, receive, send)
            return
        outcome, started = Outcome(), time.monotonic()
        scope[_OUTCOME_KEY] = outcome

        async def note_status(message: Message) -> None:
            if message["type"] == "http.response.start":
                outcome.status = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, note_status)
        except Exception:
            outcome.ended = "failed"
            raise
        finally:
            self._metrics.requests.labels(scope["path"], outcome.name).inc()
            if outcome.name != "refused":
                self._metrics.request_seconds.labels(scope["path"]).observe(time.monotonic() - started)


class Metrics:
    """Counts what requests do; reads the scheduler and the caches when it is asked."""

    def __init__(self, catalog: Catalog, scheduler: Scheduler, follower: Follower | None = None) -> None:
        self.registry = CollectorRegistry()
        self.registry.register(_State(catalog, scheduler))
        if follower:
            self.registry.register(_Channels(follower))
        self.requests = Counter(
            "graftline_requests", "Requests by route and how they ended", ["route", "outcome"], registry=self.registry
        )
        self.request_seconds = Histogram(
            "graftline_request_seconds", "Time to the whole answer", ["route"], buckets=_SECONDS, registry=self.registry
        )
        self.first_token_seconds = Histogram(
            "graftline_first_token_seconds", "Time to the first token", buckets=_SECONDS, registry=self.registry
        )

    def text(self) -> bytes:
        """The exposition format."""
        return generate_latest(self.registry)


class _Channels(Collector):
    """What the follower says of each channel, for alarms."""

    def __init__(self, follower: Follower) -> None:
        self._follower = follower

    def collect(self) -> Iterator[Metric]:
        entry = GaugeMetricFamily("graftline_channel_entry", "Number of the entry that is served", labels=["channel"])
        error = GaugeMetricFamily("graftline_channel_error", "1 while it has an alarm in /ready", labels=["channel"])
        lost = GaugeMetricFamily(
            "graftline_channel_history_lost", "1 while its history is shorter or other than it was", labels=["channel"]
        )
        for name, state in self._follower.status().items():
            entry.add_metric([name], state["entry"] or 0)
            error.add_metric([name], float(state["error"] is not None))
            lost.add_metric([name], float(state["history_lost"]))
        yield from (entry, error, lost)


class _State(Collector):
    """Gauges and counters that live in the scheduler and the adapter caches."""

    def __init__(self, catalog: Catalog, scheduler: Scheduler) -> None:
        self._catalog, self._scheduler = catalog, scheduler

    def collect(self) -> Iterator[Metric]:
        counters, budget = self._scheduler.counters, self._scheduler.budget
        for name, what, value in (
            ("prompt_tokens", "Prompt tokens read", counters.prompt_tokens),
            ("completion_tokens", "Tokens generated", counters.completion_tokens),
            ("steps", "Decoding steps", counters.steps),
            ("refused", "Requests refused because too many wait", counters.refused),
        ):
            yield CounterMetricFamily(f"graftline_{name}", what, value)
        for name, what, value in (
            ("requests_waiting", "Requests without a place", self._scheduler.num_waiting),
            ("requests_running", "Requests being generated", self._scheduler.num_running),
            ("kv_bytes", "Bytes of key-value caches in use", budget.used_bytes),
            ("kv_max_bytes", "Bytes that they may take", budget.max_bytes),
            ("models", "Models that can be asked for", len(self._catalog.models())),
        ):
            yield GaugeMetricFamily(f"graftline_{name}", what, value)
        adapters = GaugeMetricFamily("graftline_adapter_bytes", "Memory of loaded adapters", labels=["base"])
        loads = CounterMetricFamily("graftline_adapter_loads", "Adapters read into memory", labels=["base"])
        for name, base in self._catalog.bases().items():
            adapters.add_metric([name], base.adapters.num_bytes)
            loads.add_metric([name], base.adapters.num_loads)
        yield adapters
        yield loads
