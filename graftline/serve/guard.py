"""What stands before the routes: who may ask, and how much a request may hold."""

import hashlib
import hmac
import json
from collections.abc import Sequence

from starlette.types import ASGIApp, Message, Receive, Scope, Send

OPEN_PATHS = frozenset({"/", "/health", "/ready", "/metrics"})
"""Paths that need no token: they change nothing and answer nothing that a model wrote."""
ADMIN_PATHS = frozenset({"/v1/load_lora_adapter", "/v1/unload_lora_adapter"})
"""Paths that need an administrator's token: they change what everybody is answered by."""
_ADMIN_KEY = "graftline.is_admin"


def is_admin(scope: Scope) -> bool:
    """Whether a request came with an administrator's token."""
    return bool(scope.get(_ADMIN_KEY))


def error_body(message: str, *, kind: str, code: str | None = None, param: str | None = None) -> dict[str, object]:
    """An error in OpenAI's form."""
    # A client's own text may be in the message: half of a surrogate pair could not be sent.
    message = message.encode("utf-8", "backslashreplace").decode()
    param = param and param.encode("utf-8", "backslashreplace").decode()
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


class Guard:
    """ASGI middleware: bearer tokens, compared in constant time, and a limit on the body's bytes.

    Args:
        tokens: whose bearers may ask; none: everybody may.
        admin_tokens: whose bearers may also ask what `ADMIN_PATHS` names; none: nobody may.
        max_body_bytes: larger bodies are refused.
    """

    def __init__(
        self, app: ASGIApp, *, tokens: Sequence[str], admin_tokens: Sequence[str], max_body_bytes: int
    ) -> None:
        self._app, self._max_body_bytes = app, max_body_bytes
        # Digests have one length, so a comparison tells nothing about the length of a token either.
        self._tokens = [_hash(token.encode()) for token in tokens]
        self._admin_tokens = [_hash(token.encode()) for token in admin_tokens]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Refuse, or pass on with a counting ``receive``."""
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
        if not declared.isdigit() or int(declared) > self._max_body_bytes:
            await self._refuse_body(send)
            return
        body = await self._read(receive)
        if body is None:
            await self._refuse_body(send)
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

    async def _refuse_body(self, send: Send) -> None:
        text = f"the body is larger than {self._max_body_bytes} bytes"
        await _refuse(send, 413, text, "invalid_request_error", "body_too_large")


def _is_one_of(tokens: Sequence[bytes], authorization: bytes) -> bool:
    scheme, _, token = authorization.partition(b" ")
    given = _hash(token.strip())
    # Every token is compared, whatever the result so far.
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
