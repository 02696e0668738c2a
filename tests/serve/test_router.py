"""The router in front of vLLM by itself: what it refuses, and answers that are rated as soon as they are there."""

import asyncio
import json
from collections.abc import MutableMapping
from typing import Any
from urllib.parse import unquote

import httpx
import pytest
from starlette.requests import Request

from graftline.serve.rollouts import Observed, Split
from graftline.serve.router import Fleet, Router


@pytest.mark.parametrize(
    ("path", "status"),
    [
        ("/v1/load_lora_adapter", 403),
        ("/v1/load_lora_adapter/", 403),
        ("/v1/./load_lora_adapter", 403),
        ("/v1/x/../load_lora_adapter", 403),
        ("/v1/x/%2e%2e/unload_lora_adapter", 403),
        ("/v1/%6coad_lora_adapter", 403),
        ("/v1/%256coad_lora_adapter", 403),
        ("/v1/%252e%252e/v1/load_lora_adapter", 403),
        ("/v1/../sleep", 404),
        ("/v1/%2e%2e/reset_prefix_cache", 404),
        ("/v1/embeddings", 503),
        ("/v1/responses/a%20b", 503),
    ],
)
def test_a_path_that_is_written_otherwise_reaches_nothing_that_is_the_follower_s(path: str, status: int) -> None:
    scope = {
        "type": "http",
        "method": "POST",
        "scheme": "http",
        "server": ("router", 80),
        "path": unquote(path),
        "raw_path": path.encode(),
        "query_string": b"",
        "headers": [],
    }

    async def receive() -> dict[str, object]:
        return {"type": "http.request", "body": b"{}", "more_body": False}

    async def answered() -> int:
        router = Router(Fleet([]), Observed(), dict, is_unsigned=bool)
        async with httpx.AsyncClient() as router.client:
            return (await router.pass_on(Request(scope, receive))).status_code

    assert asyncio.run(answered()) == status


@pytest.mark.parametrize("is_stream", [False, True])
def test_an_answer_can_be_rated_as_soon_as_the_client_has_it_whole(is_stream: bool) -> None:
    # The client has everything when the last byte is sent, while the router has not yet seen the end.
    split = Split(channel="demo@production", salt="0" * 32, incumbent="demo@a", candidate="demo@b", share=0.5)
    observed, counted = Observed(), []
    observed.set(split.channel, split)
    sent = json.dumps({"id": "answer-1", "choices": [{"text": "yes", "finish_reason": "stop"}]}).encode()
    body = b"data: " + sent + b"\n\ndata: [DONE]\n\n" if is_stream else sent

    def replica(request: httpx.Request) -> httpx.Response:
        async def parts() -> Any:
            yield body[:20]
            yield body[20:]

        kind = "text/event-stream" if is_stream else "application/json"
        return httpx.Response(200, headers={"content-type": kind}, content=parts())

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": json.dumps({"model": split.channel}).encode(), "more_body": False}

    received = b""

    async def send(message: MutableMapping[str, Any]) -> None:
        nonlocal received
        received += message.get("body", b"")
        if len(received) == len(body) and not counted:
            counted.append(observed.rate("answer-1", "bad"))

    async def answered() -> None:
        router = Router(Fleet(["http://replica"]), observed, dict, is_unsigned=bool)
        headers: list[tuple[bytes, bytes]] = []
        scope = {"type": "http", "method": "POST", "scheme": "http", "server": ("router", 80), "headers": headers}
        scope |= {"path": "/v1/completions", "raw_path": b"/v1/completions", "query_string": b""}
        async with httpx.AsyncClient(transport=httpx.MockTransport(replica)) as router.client:
            answer = await router.pass_on(Request(scope, receive))
            await answer({"type": "http", "asgi": {"spec_version": "2.4"}}, receive, send)

    asyncio.run(answered())
    assert (received, counted) == (body, [True])
