"""An HTTP proxy in front of a real S3 server that does what networks and servers do on bad days.

Faults are drawn from a seeded generator, so that a run can be repeated from its printed seed; each is counted.
"""

import collections
import contextlib
import http.client
import random
import re
import threading
import time
from collections.abc import Iterator, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import urlsplit

FAULTS = (
    "500",  # an internal error; nothing was done
    "503",  # SlowDown; nothing was done
    "refused",  # the connection is closed before anything was done
    "lost answer",  # it was done, and the connection is closed before the answer
    "timeout",  # it was done, and the answer never comes
    "closed mid-body",  # the answer ends early, against its Content-Length
    "truncated",  # the answer is short, and its Content-Length says so
    "flipped answer bit",
    "flipped request bit",
    "late list",  # the newest key is not in the listing yet
)
TIMEOUT_SECONDS = 1.0


class Faults:
    """Draws at most one fault for a request. ``rate`` 0: none."""

    def __init__(self, *, seed: int = 0, rate: float = 0.0, kinds: Sequence[str] = FAULTS) -> None:
        self._random, self._lock = random.Random(seed), threading.Lock()
        self.rate, self.kinds = rate, kinds
        self.counts: collections.Counter[str] = collections.Counter()
        self.ignore_preconditions = False

    def draw(self, method: str, path: str, body: bytes) -> str | None:
        with self._lock:
            if self._random.random() >= self.rate:
                return None
            fitting = [kind for kind in self.kinds if _fits(kind, method, path, body)]
            if not fitting:
                return None
            kind = self._random.choice(fitting)
            self.counts[kind] += 1
            return kind

    def flip(self, data: bytes) -> bytes:
        if not data:
            return data
        with self._lock:
            position, bit = self._random.randrange(len(data)), self._random.randrange(8)
        changed = bytearray(data)
        changed[position] ^= 1 << bit
        return bytes(changed)


def _fits(kind: str, method: str, path: str, body: bytes) -> bool:
    is_list = method == "GET" and "list-type=2" in path
    if kind == "flipped request bit":
        return bool(body)
    if kind == "late list":
        return is_list
    if kind == "flipped answer bit":
        # A listing has no checksum: nobody can tell that a letter of a name has changed.
        return method == "GET" and not is_list
    return method == "GET" if kind in {"truncated", "closed mid-body"} else True


@contextlib.contextmanager
def fault_proxy(upstream: str, faults: Faults) -> Iterator[str]:
    """Run the proxy in front of ``upstream``; yields its address."""

    class Handler(_Handler):
        pass

    Handler.upstream, Handler.faults = urlsplit(upstream).netloc, faults
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    upstream: str
    faults: Faults

    def _handle(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        fault = self.faults.draw(self.command, self.path, body)
        if fault in {"500", "503"}:
            code = "InternalError" if fault == "500" else "SlowDown"
            self._answer(int(fault), {}, f"<Error><Code>{code}</Code><Message>injected</Message></Error>".encode())
            return
        if fault == "refused":
            self.close_connection = True
            return
        status, headers, answer = self._forward(self.faults.flip(body) if fault == "flipped request bit" else body)
        if fault == "timeout":
            time.sleep(TIMEOUT_SECONDS + 0.3)
        if fault in {"timeout", "lost answer"}:
            self.close_connection = True
            return
        if fault == "late list":
            answer = re.sub(rb"<Contents>(?:(?!<Contents>).)*</Contents>(?!.*<Contents>)", b"", answer, flags=re.DOTALL)
        elif fault == "flipped answer bit":
            answer = self.faults.flip(answer)
        elif fault == "truncated":
            answer = answer[: len(answer) // 2]
        self._answer(status, headers, answer, keep=len(answer) // 2 if fault == "closed mid-body" else None)

    do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = _handle  # noqa: N815 - the base class's names

    def _forward(self, body: bytes) -> tuple[int, dict[str, str], bytes]:
        headers = dict(self.headers.items())
        if self.faults.ignore_preconditions:
            headers = {
                name: value for name, value in headers.items() if name.lower() not in {"if-none-match", "if-match"}
            }
        upstream = http.client.HTTPConnection(self.upstream, timeout=60)
        try:
            upstream.request(self.command, self.path, body=body or None, headers=headers)
            response = upstream.getresponse()
            return response.status, dict(response.getheaders()), response.read()
        finally:
            upstream.close()

    def _answer(self, status: int, headers: dict[str, str], body: bytes, *, keep: int | None = None) -> None:
        """Answer; with ``keep`` the connection is closed after that many bytes of the body."""
        self.send_response(status)
        skipped = {"content-length", "transfer-encoding", "connection", "date", "server"}
        for name, value in headers.items():
            if name.lower() not in skipped or (name.lower() == "content-length" and self.command == "HEAD"):
                self.send_header(name, value)
        if self.command != "HEAD":
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body if keep is None else body[:keep])
        if keep is not None:
            self.wfile.flush()
            self.close_connection = True

    def log_message(self, *_: Any) -> None:
        pass
