"""Prometheus metrics of one server."""

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from graftline.serve.catalog import Catalog
from graftline.serve.follower import Follower
from graftline.serve.scheduler import Scheduler

_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)


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
        error = GaugeMetricFamily("graftline_channel_error", "1 while /ready gives an error for it", labels=["channel"])
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
