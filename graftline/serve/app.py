"""The HTTP routes: OpenAI's, vLLM's for adapters, and those for operators."""

import logging
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastapi import FastAPI, HTTPException, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException as StarletteHTTPException
from starlette.types import Receive, Scope, Send

from graftline.errors import GraftlineError, ServingError
from graftline.serve import answers
from graftline.serve.answers import AnswerForm, ChatForm, CompletionForm, GenerationFailedError, RunningRequest
from graftline.serve.body import FieldError
from graftline.serve.catalog import Catalog, ServedModel, UnknownModelError
from graftline.serve.follower import Follower
from graftline.serve.generation import BusyError
from graftline.serve.middleware import (
    NO_REASON,
    AccessMiddleware,
    Counted,
    Metrics,
    Outcome,
    TracingMiddleware,
    error_body,
    is_admin,
    outcome_of,
)
from graftline.serve.pooled import ClassifyRequest, EmbeddingRequest, Reader, classify, embed
from graftline.serve.protocol import (
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    Feedback,
    LoadAdapter,
    TokenizeRequest,
    UnloadAdapter,
    explain,
)
from graftline.serve.request_log import RequestLog
from graftline.serve.rollouts import Observed
from graftline.serve.scheduler import Scheduler
from graftline.serve.versions import Versions, encode

logger = logging.getLogger(__name__)

_FAILED = "the server failed; its log says why"
_PAGE = Path(__file__).with_name("chat.html")


@dataclass(frozen=True, kw_only=True)
class AccessRules:
    """Who may do what."""

    tokens: tuple[str, ...] = ()
    """Bearer tokens of clients; none: the server is open to everybody."""
    admin_tokens: tuple[str, ...] = ()
    """Bearer tokens of administrators, who may load and unload adapters and are told why a release is not served."""
    max_body_bytes: int = 2 << 20
    """Larger bodies are refused."""
    adapter_folder: Path | None = None
    """Adapters below this folder can be loaded by request; None: none can."""


@dataclass
class Server:
    """Everything behind the routes."""

    catalog: Catalog
    scheduler: Scheduler
    follower: Follower | None = None
    access: AccessRules = field(default_factory=AccessRules)
    request_log: RequestLog = field(default_factory=lambda: RequestLog(()))
    draining: bool = False

    def __post_init__(self) -> None:
        self.metrics = Metrics(self.catalog, self.scheduler, self.follower)
        self.metrics.registry.register(self.request_log)
        observed = self.follower.observed if self.follower else Observed()
        self.versions = Versions(self.catalog, self.scheduler, self.metrics, observed)

    def start(self) -> None:
        """Start generating and following channels."""
        self.scheduler.start()
        if self.follower:
            self.follower.start()
        self.request_log.start()

    def stop(self) -> None:
        """Refuse new requests, finish the others, stop following."""
        self.draining = True
        if self.follower:
            self.follower.stop()
        self.scheduler.drain()
        self.request_log.stop()

    def readiness(self, *, with_reasons: bool = True) -> tuple[bool, dict[str, Any]]:
        """Whether the server can take traffic, and what it serves.

        ``with_reasons`` says what is wrong, which may name paths and addresses; otherwise only that something is.
        """
        channels = self.follower.status() if self.follower else {}
        ready = self.scheduler.is_alive and not self.draining and all(c["version"] for c in channels.values())
        if not with_reasons:
            channels = {name: state | {"error": state["error"] and NO_REASON} for name, state in channels.items()}
        return ready, {
            "ready": ready,
            "draining": self.draining,
            "models": [model.name for model in self.catalog.models()],
            "channels": channels,
            "unsigned": self.follower is not None and self.follower.is_unsigned,
            "alarms": [f"{name}: {state['error']}" for name, state in channels.items() if state["error"]],
        }


def create_app(server: Server) -> FastAPI:
    """The ASGI application; its lifespan starts and stops ``server``."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        del app
        server.start()
        yield
        await run_in_threadpool(server.stop)

    app = FastAPI(title="graftline", lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None)
    app.add_middleware(
        AccessMiddleware,
        tokens=server.access.tokens,
        admin_tokens=server.access.admin_tokens,
        max_body_bytes=server.access.max_body_bytes,
    )
    app.add_middleware(Counted, metrics=server.metrics)
    app.add_middleware(TracingMiddleware)
    _add_errors(app)
    _add_generation(app, server)
    _add_reading(app, server)
    _add_models(app, server)
    _add_operations(app, server)
    return app


def _add_generation(app: FastAPI, server: Server) -> None:
    @app.post("/v1/chat/completions")
    async def chat(body: ChatRequest, request: Request) -> Response:
        return await _answer(server, request, body, ChatForm(body.logprobs, body.include_reasoning))

    @app.post("/v1/completions")
    async def complete(body: CompletionRequest, request: Request) -> Response:
        return await _answer(server, request, body, CompletionForm(body.logprobs is not None))

    @app.post("/tokenize")
    async def tokenize(body: TokenizeRequest) -> dict[str, Any]:
        served = _tokenized_by(server.catalog, body.model)
        tokens = await run_in_threadpool(_tokens, served, body)
        names = [served.base.token_bytes.text(token) for token in tokens] if body.return_token_strs else None
        max_positions = served.base.session.layout.max_positions
        return {"count": len(tokens), "max_model_len": max_positions, "tokens": tokens, "token_strs": names}

    @app.post("/detokenize")
    async def detokenize(body: DetokenizeRequest) -> dict[str, str]:
        base = _tokenized_by(server.catalog, body.model).base
        tokens = base.check_tokens(body.tokens, name="tokens")
        return {"prompt": str(await run_in_threadpool(lambda: base.tokenizer.decode(tokens)))}


def _add_reading(app: FastAPI, server: Server) -> None:
    reader = Reader(max_waiting=server.scheduler.limits.max_waiting)

    def served_by(name: str) -> ServedModel:
        if server.draining:
            raise BusyError("the server is shutting down; send the request to another one", 5)
        return server.catalog.resolve(name)

    @app.post("/classify")  # vLLM's
    @app.post("/v1/classify")
    async def of_class(body: ClassifyRequest) -> dict[str, Any]:
        return await classify(reader, served_by(body.model), body)

    @app.post("/v1/embeddings")
    async def embeddings(body: EmbeddingRequest) -> dict[str, Any]:
        return await embed(reader, served_by(body.model), body)


def _tokenized_by(catalog: Catalog, name: str | None) -> ServedModel:
    first = next((model.name for model in catalog.models() if model.parent is None), "")
    return catalog.resolve(name or first)


def _tokens(served: ServedModel, body: TokenizeRequest) -> list[int]:
    if body.messages is not None:
        turns, tools = [message.turn for message in body.messages], [tool.shown for tool in body.tools]
        return served.base.encode_chat(turns, served.template, tools, body.chat_template_kwargs)
    assert body.prompt is not None
    return served.base.encode_text(body.prompt, with_leading=body.add_special_tokens is not False)


async def _answer(
    server: Server, request: Request, body: ChatRequest | CompletionRequest, form: AnswerForm
) -> Response:
    chosen = server.versions.choose(body)
    if chosen.served.labels:
        raise FieldError("model", f"{body.model[:100]!r} chooses a class and writes no text; ask /v1/classify")
    prompt = await run_in_threadpool(encode, body, chosen.served)
    stack, outcome = AsyncExitStack(), outcome_of(request.scope)
    try:
        exchange = await stack.enter_async_context(answers.run(body, prompt, chosen.served, server.scheduler))
    except ServingError:
        raise  # the client's fault, or the server is full: not this version's fault
    except Exception:
        chosen.begin()
        chosen.end(None)
        raise
    chosen.begin()
    chosen.can_be_rated(exchange.id)
    stack.callback(chosen.end, exchange)
    if note := server.request_log.begin(body, exchange):
        stack.callback(note.end, chosen.served, exchange)
    server.versions.mirror(body, chosen)
    if body.stream:
        events = answers.events(form, exchange, body, request.is_disconnected)
        outcome.ended = "left"  # until the last event is sent
        return _EventStream(_observed(server, exchange, events, outcome), held=stack)
    async with stack:
        try:
            return JSONResponse(await answers.whole_answer(form, exchange, request.is_disconnected))
        finally:
            outcome.ended = exchange.ended


class _EventStream(StreamingResponse):
    """Server-sent events. However they end, even before the first one, the request and its adapter are released."""

    def __init__(self, events: AsyncIterator[str], *, held: AsyncExitStack) -> None:
        super().__init__(events, media_type="text/event-stream", headers={"cache-control": "no-cache"})
        self._held = held

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with self._held:
            await super().__call__(scope, receive, send)


async def _observed(
    server: Server, exchange: RunningRequest, events: AsyncIterator[str], outcome: Outcome
) -> AsyncIterator[str]:
    """Pass events on, and record when the first token came and how the answer ended."""
    started, is_first = time.monotonic(), True
    try:
        async for event in events:
            if is_first and exchange.generation.tokens:
                server.metrics.first_token_seconds.observe(time.monotonic() - started)
                is_first = False
            yield event
        outcome.ended = exchange.ended
    except Exception:
        outcome.ended = "failed"
        raise
    finally:
        if exchange.ended == "failed":
            outcome.ended = "failed"


def _add_models(app: FastAPI, server: Server) -> None:
    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [_describe(model) for model in server.catalog.models()]}

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> dict[str, Any]:
        return _describe(server.catalog.resolve(name))

    @app.post("/v1/load_lora_adapter")
    async def load(body: LoadAdapter) -> PlainTextResponse:
        folder = _adapter_folder(server.access, body.lora_path)
        try:
            await run_in_threadpool(server.catalog.load_adapter, body.lora_name, folder, by_request=True)
        except GraftlineError as error:
            raise HTTPException(400, str(error)) from error
        return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' added successfully.")

    @app.post("/v1/unload_lora_adapter")
    async def unload(body: UnloadAdapter) -> PlainTextResponse:
        _adapter_folder(server.access, ".")
        server.catalog.unload_requested(body.lora_name)
        return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' removed successfully.")


def _describe(model: ServedModel) -> dict[str, Any]:
    return {
        "id": model.name,
        "object": "model",
        "created": model.created,
        "owned_by": "graftline",
        "root": model.release or model.name,
        "parent": model.parent,
    } | ({"labels": list(model.labels)} if model.labels else {})


def _adapter_folder(access: AccessRules, path: str) -> Path:
    """The folder that a load request names, if adapters may be loaded from there."""
    if access.adapter_folder is None:
        raise HTTPException(403, "loading adapters by request is off; start the server with an adapter folder")
    root = access.adapter_folder.resolve()
    try:
        folder = (root / path).resolve()
        is_folder = folder.is_dir()
    except (OSError, ValueError) as error:
        raise HTTPException(400, "lora_path is not a path") from error
    if not folder.is_relative_to(root):
        raise HTTPException(403, "lora_path must lie in the server's adapter folder")
    if not is_folder:
        raise HTTPException(404, "lora_path is no folder in the server's adapter folder")
    return folder


def _add_operations(app: FastAPI, server: Server) -> None:
    @app.post("/v1/feedback")
    async def feedback(body: Feedback) -> dict[str, Any]:
        is_judged = server.versions.observed.rate(body.id, body.rating)
        is_logged = server.request_log.rate(body.id, body.rating)
        return {"id": body.id, "counted": is_judged or is_logged}

    @app.get("/v1/rollouts")
    async def rollouts() -> JSONResponse:
        return JSONResponse(await run_in_threadpool(server.versions.observed.report))

    @app.get("/health")
    async def health() -> JSONResponse:
        alive = server.scheduler.is_alive
        return JSONResponse({"healthy": alive}, 200 if alive else 503)

    @app.get("/ready")
    async def ready(request: Request) -> JSONResponse:
        is_ready, state = server.readiness(with_reasons=is_admin(request.scope))
        return JSONResponse(state, 200 if is_ready else 503)

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(server.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    @app.get("/", response_class=HTMLResponse)
    async def page() -> str:
        return _PAGE.read_text(encoding="utf-8")


def _add_errors(app: FastAPI) -> None:
    async def known(request: Request, error: Exception) -> JSONResponse:
        if isinstance(error, BusyError):
            body = error_body(str(error), kind="rate_limit_error", code="busy")
            return JSONResponse(body, 429, {"retry-after": str(error.retry_after_seconds)})
        if isinstance(error, UnknownModelError):
            body = error_body(str(error), kind="invalid_request_error", code="model_not_found", param="model")
            return JSONResponse(body, 404)
        if isinstance(error, GenerationFailedError):
            return JSONResponse(error_body(str(error), kind="server_error"), 500)
        if isinstance(error, ServingError):
            param = error.param if isinstance(error, FieldError) else None
            return JSONResponse(error_body(str(error), kind="invalid_request_error", param=param), 400)
        # Not the client's fault, and the message may name paths.
        logger.error("%s failed: %s", request.url.path, error)
        return JSONResponse(error_body(_FAILED, kind="server_error"), 500)

    async def invalid(request: Request, error: Exception) -> JSONResponse:
        del request
        assert isinstance(error, RequestValidationError)
        message, param = explain(error.errors())
        return JSONResponse(error_body(message, kind="invalid_request_error", param=param), 400)

    async def http(request: Request, error: Exception) -> JSONResponse:
        del request
        assert isinstance(error, StarletteHTTPException)
        return JSONResponse(error_body(str(error.detail), kind="invalid_request_error"), error.status_code)

    async def unknown(request: Request, error: Exception) -> JSONResponse:
        # The traceback goes to the log, because starlette raises the error again.
        del request, error
        return JSONResponse(error_body(_FAILED, kind="server_error"), 500)

    app.add_exception_handler(GraftlineError, known)
    app.add_exception_handler(Exception, unknown)
    app.add_exception_handler(RequestValidationError, invalid)
    app.add_exception_handler(StarletteHTTPException, http)
