"""A router in front of vLLM, which holds the names that move: a name reused inside vLLM would serve stale caches.

``pipeline@channel`` is an alias of the immutable ``pipeline@VERSION``. `/v1/*` is passed on, with streams as they
arrive. A request goes to the least busy replica that has its model. A replica that has lost the model (it was
restarted) answers 404; it is left out until the follower has loaded the model again, and the request goes to another
one. A request is sent again only if not a single byte of an answer has arrived.
"""

import asyncio
import json
import logging
import posixpath
import threading
import time
from collections import Counter as Counts
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import httpx
from prometheus_client import CollectorRegistry, generate_latest
from pydantic import ValidationError
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from graftline.serve.middleware import NO_REASON, AccessMiddleware, RolloutMetrics, error_body, is_admin
from graftline.serve.protocol import Feedback, explain
from graftline.serve.rollouts import Answered, Observed, Split, Watch, key_of
from graftline.serve.tally import Tally

MAX_BODY_BYTES = 8 << 20
_TIMEOUT = httpx.Timeout(600.0, connect=5.0)
_HOP_BY_HOP = frozenset(
    [
        "host",
        "content-length",
        "connection",
        "keep-alive",
        "transfer-encoding",
        "te",
        "trailer",
        "upgrade",
        "accept-encoding",
    ]
)
_FOLLOWERS_ALONE = ("/v1/load_lora_adapter", "/v1/unload_lora_adapter")

logger = logging.getLogger(__name__)


@dataclass(eq=False)
class Replica:
    """One vLLM process."""

    url: str
    models: set[str] = field(default_factory=set)
    """Immutable names that it has loaded and that were tried on it."""
    reachable: bool = True
    running: Counts[str] = field(default_factory=Counts)
    """Requests under way, by model."""


class Fleet:
    """The replicas and the aliases; thread-safe. The follower changes them, the router reads them."""

    def __init__(self, urls: Sequence[str]) -> None:
        self.replicas = [Replica(url.rstrip("/")) for url in urls]
        self._aliases: dict[str, str] = {}
        self._managed: set[str] = set()
        self._lock = threading.Lock()

    def point(self, alias: str, model: str) -> None:
        """Send new requests for ``alias`` to ``model``; those under way finish where they are."""
        with self._lock:
            self._aliases[alias] = model

    def model_of(self, name: str) -> str:
        """The immutable name that an alias stands for; any other name stands for itself."""
        with self._lock:
            return self._aliases.get(name, name)

    def aliases(self) -> dict[str, str]:
        """All aliases."""
        with self._lock:
            return dict(self._aliases)

    def running(self, model: str) -> int:
        """Requests for a model that are under way on all replicas."""
        with self._lock:
            return sum(replica.running[model] for replica in self.replicas)

    def note(self, replica: Replica, *, reachable: bool, models: set[str]) -> None:
        """Note what a look at a replica found."""
        with self._lock:
            replica.reachable, replica.models = reachable, set(models)
            self._managed |= models

    def take(self, model: str, tried: Sequence[Replica]) -> Replica | None:
        """The least busy replica for a model, with one more request counted; None: no other has it."""
        with self._lock:
            has = [one for one in self.replicas if one.reachable and one not in tried]
            if model in self._managed:
                has = [one for one in has if model in one.models]
            chosen = min(has, key=lambda one: one.running.total(), default=None)
            if chosen is not None:
                chosen.running[model] += 1
            return chosen

    def give_back(self, replica: Replica, model: str, *, gone: bool = False) -> None:
        """Note that a request is over; ``gone``: the replica does not answer."""
        with self._lock:
            replica.running[model] -= 1
            replica.reachable = replica.reachable and not gone

    def lost(self, replica: Replica, model: str) -> bool:
        """Note that a replica says it does not have a model; returns whether it should have it."""
        with self._lock:
            replica.models.discard(model)
            return model in self._managed


@dataclass
class _Way:
    """Where a request goes, and who counts it."""

    model: str
    split: Split | None = None
    key: str = ""
    watch: Watch | None = None
    began: float = field(default_factory=time.monotonic)


class Router:
    """Passes requests on.

    Args:
        fleet: replicas and aliases.
        observed: what is known of the keys of a rollout.
        status: by channel, what the follower knows, for `/ready`.
        is_unsigned: whether the follower checks nothing, for `/ready`.
    """

    def __init__(
        self,
        fleet: Fleet,
        observed: Observed,
        status: Callable[[], Mapping[str, Mapping[str, Any]]],
        *,
        is_unsigned: Callable[[], bool],
    ) -> None:
        self.fleet, self.observed, self.status, self.is_unsigned = fleet, observed, status, is_unsigned
        self.registry = CollectorRegistry()
        self._metrics = RolloutMetrics(self.registry)
        self.client: httpx.AsyncClient | None = None

    async def pass_on(self, request: Request) -> Response:
        """Any `/v1/*` request that is not answered here."""
        path = _path_at_replica(request)
        if path in _FOLLOWERS_ALONE:
            return _error(403, "adapters are loaded by the follower alone; promote a release", "permission_error")
        if not path.startswith("/v1/"):
            return _error(404, "only paths below /v1/ are passed on", "invalid_request_error")
        body = await request.body()
        asked = _json_object(body)
        name = asked.get("model")
        if not isinstance(name, str):
            return await self._send(request, body, _Way("")) or _busy("no replica answers now")
        before = None
        while (way := self._way(name, asked)).model != before:  # again where the alias has moved meanwhile
            changed = body if way.model == name else json.dumps(asked | {"model": way.model}).encode()
            if (answer := await self._send(request, changed, way)) is not None:
                return answer
            before = way.model
        if way.split is not None:
            way.watch = self.observed.begin(way.split, way.key, way.split.arm(way.key))
        self._end(way, Answered(failed=True), "failed")
        return _busy(f"no replica has {name} now")

    def _way(self, name: str, asked: Mapping[str, Any]) -> _Way:
        split = self.observed.split(name)
        if split is None:
            return _Way(self.fleet.model_of(name))
        key = key_of(asked, _opening(asked))
        return _Way(split.candidate if split.arm(key) == "candidate" else split.incumbent, split, key)

    async def _send(self, request: Request, body: bytes, way: _Way) -> "_Passing | None":
        """The answer of the first replica that has the model; None: none has it."""
        assert self.client is not None
        tried: list[Replica] = []
        headers = [(name, value) for name, value in request.headers.items() if name not in _HOP_BY_HOP]
        headers.append(("accept-encoding", "identity"))  # answers are read as they pass
        while (replica := self.fleet.take(way.model, tried)) is not None:
            tried.append(replica)
            url = httpx.URL(f"{replica.url}{request.url.path}", query=request.url.query.encode())
            sent = self.client.build_request(request.method, url, headers=headers, content=body)
            try:
                answer = await self.client.send(sent, stream=True)
            except httpx.TransportError as error:
                logger.warning("%s does not answer: %s", replica.url, str(error) or type(error).__name__)
                self.fleet.give_back(replica, way.model, gone=True)
                continue
            except BaseException:
                self.fleet.give_back(replica, way.model)
                raise
            if answer.status_code == 404 and way.model and self.fleet.lost(replica, way.model):
                await answer.aclose()
                self.fleet.give_back(replica, way.model)
                continue
            return self._passed(answer, replica, way)
        return None

    def _passed(self, answer: httpx.Response, replica: Replica, way: _Way) -> "_Passing":
        if way.split is not None:
            way.watch = self.observed.begin(way.split, way.key, way.split.arm(way.key))

        def named(answer: str) -> None:
            if way.split is not None and way.watch is not None:
                self.observed.can_be_rated(way.split, way.key, answer)

        def ended(tally: Tally, outcome: str) -> None:
            self.fleet.give_back(replica, way.model)
            self._count(way, tally, outcome)

        return _Passing(answer, named, ended)

    def _count(self, way: _Way, tally: Tally, outcome: str) -> None:
        if way.split is None:
            return
        seconds = time.monotonic() - way.began
        if outcome == "answered":
            answered = Answered(
                seconds=seconds,
                tokens=tally.tokens,
                refused=way.split.refuses(tally.beginning),
                ended=tally.finish_reason != "length",
            )
        else:
            answered = Answered(failed=outcome == "failed", seconds=seconds if outcome == "left" else None)
        self._end(way, answered, outcome)

    def _end(self, way: _Way, answered: Answered, outcome: str) -> None:
        if way.watch is not None:
            way.watch.end(answered)
        if way.split is not None:
            role = way.split.arm(way.key)
            self._metrics.count(way.split.channel, way.model, role, outcome, time.monotonic() - way.began)

    async def models(self, request: Request) -> Response:
        """The models that a replica lists, and the aliases."""
        answer = await self._send(request, b"", _Way(""))
        if answer is None:
            return _busy("no replica answers now")
        listed = _json_object(await answer.whole())
        if answer.status_code != 200:
            return JSONResponse(listed, answer.status_code)
        aliases = [{"id": name, "object": "model", "root": root} for name, root in self.fleet.aliases().items()]
        return JSONResponse(listed | {"data": [*listed.get("data", []), *aliases]})

    async def feedback(self, request: Request) -> Response:
        """A rating of an answer."""
        try:
            rated = Feedback.model_validate_json(await request.body())
        except ValidationError as error:
            return _error(400, explain(error.errors())[0], "invalid_request_error")
        return JSONResponse({"id": rated.id, "counted": self.observed.rate(rated.id, rated.rating)})

    async def rollouts(self, request: Request) -> Response:
        """The figures of keys, for the judge."""
        del request
        return JSONResponse(await run_in_threadpool(self.observed.report))

    async def ready(self, request: Request) -> Response:
        """Whether every channel is served by some replica; where replicas are and what is wrong, to administrators."""
        channels, told = self.status(), is_admin(request.scope)
        ready = bool(channels) and all(one["version"] for one in channels.values())
        if not told:
            channels = {name: {**one, "error": one["error"] and NO_REASON} for name, one in channels.items()}
        replicas = [
            {"url": one.url if told else None, "reachable": one.reachable, "models": sorted(one.models)}
            for one in self.fleet.replicas
        ]
        state = {"ready": ready, "channels": channels, "replicas": replicas, "unsigned": self.is_unsigned()}
        return JSONResponse(state, 200 if ready else 503)

    async def metrics(self, request: Request) -> Response:
        """Prometheus' exposition format."""
        del request
        return Response(generate_latest(self.registry), media_type="text/plain; version=0.0.4; charset=utf-8")


class _Passing(StreamingResponse):
    """An answer passed on as it arrives. However it ends, even before its first byte, its connection is released.

    ``named`` is told the answer's id before the client can know it, so that no rating comes too early.
    """

    def __init__(
        self, answer: httpx.Response, named: Callable[[str], None], ended: Callable[[Tally, str], None]
    ) -> None:
        super().__init__(self._parts(), answer.status_code)
        kept = {name: value for name, value in answer.headers.items() if name not in _HOP_BY_HOP}
        if "content-length" in answer.headers:
            kept["content-length"] = answer.headers["content-length"]
        self.raw_headers = [(name.encode("latin-1"), value.encode("latin-1")) for name, value in kept.items()]
        is_stream = answer.headers.get("content-type", "").startswith("text/event-stream")
        self._answer, self._named, self._ended, self._is_stream = answer, named, ended, is_stream
        self._tally, self._outcome, self._is_named = Tally(is_stream=is_stream), "left", False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            await self._end()

    async def whole(self) -> bytes:
        """The body, for whoever reads it here."""
        try:
            return b"".join([part async for part in self._parts()])
        finally:
            await self._end()

    async def _parts(self) -> AsyncIterator[bytes]:
        held = b""  # a whole answer can be read only when its last part is here, so the client is one part behind
        try:
            async for part in self._answer.aiter_raw():
                self._tally.feed(part)
                if self._is_stream:
                    self._tell_id()
                    yield part
                else:
                    if held:
                        yield held
                    held = part
        except httpx.HTTPError:
            self._outcome = "failed"
            raise
        self._tally.end()
        self._tell_id()
        if held:
            yield held
        status = self._answer.status_code
        self._outcome = "answered" if status < 400 else "refused" if status < 500 else "failed"

    def _tell_id(self) -> None:
        if self._tally.id is not None and not self._is_named:
            self._is_named = True
            self._named(self._tally.id)

    async def _end(self) -> None:
        self._tally.end()
        self._ended(self._tally, "failed" if self._tally.failed and self._outcome == "answered" else self._outcome)
        await asyncio.shield(self._answer.aclose())


def create_app(
    router: Router, *, admin_tokens: Sequence[str] = (), on_start: Callable[[], None], on_stop: Callable[[], None]
) -> Starlette:
    """The ASGI application; its lifespan runs the follower."""

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        del app
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=200)
        async with httpx.AsyncClient(timeout=_TIMEOUT, limits=limits, trust_env=False) as client:
            router.client = client
            await run_in_threadpool(on_start)
            yield
            await run_in_threadpool(on_stop)

    app = Starlette(
        lifespan=lifespan,
        routes=[
            Route("/v1/models", router.models),
            Route("/v1/feedback", router.feedback, methods=["POST"]),
            Route("/v1/rollouts", router.rollouts),
            Route("/v1/{path:path}", router.pass_on, methods=["GET", "POST"]),
            Route("/health", lambda request: JSONResponse({"healthy": True})),
            Route("/ready", router.ready),
            Route("/metrics", router.metrics),
        ],
    )
    # vLLM checks the clients' tokens; only the route that reports on all keys is guarded here.
    app.add_middleware(AccessMiddleware, tokens=(), admin_tokens=admin_tokens, max_body_bytes=MAX_BODY_BYTES)
    return app


def _path_at_replica(request: Request) -> str:
    """The path that a replica sees: decoded once more, and without dot segments, which the HTTP client removes."""
    return posixpath.normpath(httpx.URL(f"http://replica{request.url.path}").path)


def _json_object(body: bytes) -> dict[str, Any]:
    """The body as an object; empty if it is not one, which vLLM then explains to the client."""
    try:
        value = json.loads(body) if body else {}
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def _opening(asked: Mapping[str, Any]) -> list[str]:
    """The conversation up to the user's first turn, or the text to continue."""
    messages = asked.get("messages")
    if not isinstance(messages, list):
        return [json.dumps(asked.get("prompt"))]
    users = (at for at, one in enumerate(messages) if isinstance(one, dict) and one.get("role") == "user")
    return [json.dumps(one) for one in messages[: next(users, len(messages)) + 1]]


def _busy(problem: str) -> Response:
    return _error(503, f"{problem}; try again", "server_error", {"retry-after": "1"})


def _error(status: int, message: str, kind: str, headers: Mapping[str, str] | None = None) -> Response:
    return JSONResponse(error_body(message, kind=kind), status, headers)
