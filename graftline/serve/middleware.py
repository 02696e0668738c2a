"""ASGI middlewares around the routes: access and body limits, a span for each request, and metrics."""

import functools
import hashlib
import hmac
import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from graftline import tracing
from graftline.serve.catalog import Catalog
from graftline.serve.follower import Follower
from graftline.serve.scheduler import Scheduler

OPEN_PATHS = frozenset({"/", "/health", "/ready", "/metrics"})
"""Paths that need no token: they change nothing and return no model's output."""
ADMIN_PATHS = frozenset({"/v1/load_lora_adapter", "/v1/unload_lora_adapter", "/v1/rollouts"})
"""Paths that need an administrator's token: they affect all clients, or report on all of them."""
NO_REASON = "the server's log says what is wrong, and so does this page to an administrator"
"""On `/ready`, to everybody else: reasons may name paths and addresses."""
_ADMIN_KEY = "graftline.is_admin"


def is_admin(scope: Scope) -> bool:
    """Whether a request came with an administrator's token."""
    return bool(scope.get(_ADMIN_KEY))


def error_body(message: str, *, kind: str, code: str | None = None, param: str | None = None) -> dict[str, object]:
    """An error in OpenAI's form."""
    # The message may quote a client's text, and a lone surrogate could not be sent.
    message = message.encode("utf-8", "backslashreplace").decode()
    param = param and param.encode("utf-8", "backslashreplace").decode()
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


class AccessMiddleware:
    """Bearer tokens, compared in constant time, and a limit on the body's size.

    Args:
        tokens: the clients'; none: everybody may ask.
        admin_tokens: the administrators', for `ADMIN_PATHS`.
        max_body_bytes: larger bodies are refused.
    """

    def __init__(
        self, app: ASGIApp, *, tokens: Sequence[str], admin_tokens: Sequence[str], max_body_bytes: int
    ) -> None:
        self._app, self._max_body_bytes = app, max_body_bytes
        # Digests have equal lengths, so a comparison does not reveal the length of a token either.
        self._tokens = [_hash(token.encode()) for token in tokens]
        self._admin_tokens = [_hash(token.encode()) for token in admin_tokens]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Refuse the request, or read its body and pass it on."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        given, path = headers.get(b"authorization", b""), scope["path"]
        is_client, scope[_ADMIN_KEY] = _is_one_of(self._tokens, given), _is_one_of(self._admin_tokens, given)
        if self._tokens and path not in OPEN_PATHS and not (is_client or scope[_ADMIN_KEY]):
            await _refuse(send, 401, "missing or wrong bearer token", "invalid_request_error", "invalid_api_key")
            return
        if path in ADMIN_PATHS and not scope[_ADMIN_KEY]:
            await _refuse(send, 403, "this needs an administrator's token", "permission_error", "not_an_administrator")
            return
        declared = headers.get(b"content-length", b"0")
        is_small = declared.isdigit() and int(declared) <= self._max_body_bytes
        body = await self._read(receive) if is_small else None
        if body is None:
            text = f"the body is larger than {self._max_body_bytes} bytes"
            await _refuse(send, 413, text, "invalid_request_error", "body_too_large")
            return
        await self._app(scope, _replay(body, receive), send)

    async def _read(self, receive: Receive) -> bytes | None:
        """The whole body; None if it is longer than allowed."""
        body = bytearray()
        while True:
            message = await receive()
            if message["type"] != "http.request":
                return bytes(body)
            body += message.get("body", b"")
            if len(body) > self._max_body_bytes:
                return None
            if not message.get("more_body"):
                return bytes(body)


def _is_one_of(tokens: Sequence[bytes], authorization: bytes) -> bool:
    scheme, _, token = authorization.partition(b" ")
    given = _hash(token.strip())
    # All are compared, so that the time does not tell which one matched.
    matches = [hmac.compare_digest(given, known) for known in tokens]
    return scheme.lower() == b"bearer" and any(matches)


def _hash(token: bytes) -> bytes:
    return hashlib.sha256(token).digest()


def _replay(body: bytes, receive: Receive) -> Receive:
    messages: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def replayed() -> Message:
        return messages.pop() if messages else await receive()

    return replayed


async def _refuse(send: Send, status: int, message: str, kind: str, code: str) -> None:
    body = json.dumps(error_body(message, kind=kind, code=code)).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    if status == 401:
        headers.append((b"www-authenticate", b"Bearer"))
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def _noting_status(send: Send, note: Callable[[int], None]) -> Send:
    """``send``, and ``note`` called with the answer's HTTP status."""

    async def noting(message: Message) -> None:
        if message["type"] == "http.response.start":
            note(message["status"])
        await send(message)

    return noting


class TracingMiddleware:
    """A span for each request, below the caller's where its headers name one (W3C Trace Context).

    It ends with the last byte of the answer. Attributes are OpenTelemetry's.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on inside its span."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        about = {"http.request.method": scope["method"], "url.path": scope["path"]}
        # The path is not part of the name: names of spans should be few.
        with tracing.span(f"{scope['method']} request", carrier=dict(Headers(scope=scope)), **about) as late:
            note = functools.partial(late.__setitem__, "http.response.status_code")
            await self._app(scope, receive, _noting_status(send, note))


_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)

Ended = Literal["answered", "failed", "left", "refused"]
"""``left``: the client disconnected early. ``refused``: a bad request, or the server was full. ``failed``: the server's
fault."""

_COUNTED_PATHS = frozenset({"/v1/chat/completions", "/v1/completions", "/v1/classify", "/classify", "/v1/embeddings"})
_OUTCOME_KEY = "graftline.outcome"


@dataclass
class Outcome:
    """How one request ended."""

    status: int | None = None
    """HTTP status, once it is sent."""
    ended: Ended | None = None
    """Set where the status does not tell: a stream's is sent before the first token."""

    @property
    def name(self) -> Ended:
        """The metric's label."""
        if self.ended is not None:
            return self.ended
        if self.status is None:
            return "left"
        return "answered" if self.status < 400 else "refused" if self.status < 500 else "failed"


def outcome_of(scope: Scope) -> Outcome:
    """The outcome of a request that `Counted` counts."""
    outcome: Outcome = scope[_OUTCOME_KEY]
    return outcome


class Counted:
    """Counts each generating request once, at its end, with how it ended."""

    def __init__(self, app: ASGIApp, *, metrics: "Metrics") -> None:
        self._app, self._metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on and count it."""
        if scope["type"] != "http" or scope["path"] not in _COUNTED_PATHS:
            await self._app(scope, receive, send)
            return
        outcome, started = Outcome(), time.monotonic()
        scope[_OUTCOME_KEY] = outcome
        try:
            await self._app(scope, receive, _noting_status(send, functools.partial(setattr, outcome, "status")))
        except Exception:
            outcome.ended = "failed"
            raise
        finally:
            self._metrics.requests.labels(scope["path"], outcome.name).inc()
            if outcome.name != "refused":
                self._metrics.request_seconds.labels(scope["path"]).observe(time.monotonic() - started)


class Metrics:
    """Prometheus metrics of one server; the scheduler and the caches are read when metrics are asked for."""

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


class RolloutMetrics:
    """Requests to a name during its rollout, by version."""

    def __init__(self, registry: CollectorRegistry) -> None:
        labels = ["channel", "version", "role"]
        self._requests = Counter(
            "graftline_rollout_requests",
            "Requests to a name during its rollout, by version and how they ended",
            [*labels, "outcome"],
            registry=registry,
        )
        self._seconds = Histogram(
            "graftline_rollout_request_seconds",
            "Time to the whole answer during a rollout, by version",
            labels,
            buckets=_SECONDS,
            registry=registry,
        )

    def count(self, channel: str, version: str, role: str, outcome: str, seconds: float) -> None:
        """Count a request that ended; ``role``: incumbent, candidate or shadow."""
        self._requests.labels(channel, version, role, outcome).inc()
        self._seconds.labels(channel, version, role).observe(seconds)


class _Channels(Collector):
    """The follower's state of each channel, for alarms."""

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
    """The state of the scheduler and the adapter caches."""

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
