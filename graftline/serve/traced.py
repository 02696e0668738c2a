"""A span for each request, below the caller's where its headers name one (W3C Trace Context)."""

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from graftline import tracing


class Traced:
    """ASGI middleware; the span ends with the last byte of the answer. Attributes are OpenTelemetry's."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on inside its span."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        about = {"http.request.method": scope["method"], "url.path": scope["path"]}
        # A path that nobody serves is no name: names are few.
        with tracing.span(f"{scope['method']} request", carrier=dict(Headers(scope=scope)), **about) as late:

            async def note_status(message: Message) -> None:
                if message["type"] == "http.response.start":
                    late["http.response.status_code"] = message["status"]
                await send(message)

            await self._app(scope, receive, note_status)
