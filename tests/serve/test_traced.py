import asyncio
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from graftline.serve.middleware import TracingMiddleware

PARENT = "00-0123456789abcdef0123456789abcdef-0123456789abcdef-01"


def ask(path: str, headers: dict[str, str]) -> list[Any]:
    """The finished spans of one request to a small server."""
    exporter, provider = InMemorySpanExporter(), TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    app = FastAPI()
    app.add_middleware(TracingMiddleware)

    @app.get("/ready")
    async def ready() -> str:
        return "yes"

    async def request() -> None:
        transport = httpx.ASGITransport(app=app)
        async with httpx.AsyncClient(transport=transport, base_url="http://here") as client:
            await client.get(path, headers=headers)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trace, "get_tracer", provider.get_tracer)
        asyncio.run(request())
    return list(exporter.get_finished_spans())


def test_a_request_has_a_span_below_its_caller_s() -> None:
    (span,) = ask("/ready", {"traceparent": PARENT})
    assert (f"{span.context.trace_id:032x}", f"{span.parent.span_id:016x}") == tuple(PARENT.split("-")[1:3])
    assert dict(span.attributes) == {
        "http.request.method": "GET",
        "url.path": "/ready",
        "http.response.status_code": 200,
    }


def test_names_are_few_whatever_is_asked_for() -> None:
    (span,) = ask("/no/such/page", {})
    assert span.name == "GET request"
    assert span.attributes["http.response.status_code"] == 404
