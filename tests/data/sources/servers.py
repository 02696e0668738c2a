"""A real HTTP server on a free port that answers as it is told: right, short, slow, with an error, or elsewhere."""

import contextlib
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

Answer = Callable[[BaseHTTPRequestHandler], None]


@dataclass
class FileServer:
    """``answers[path]`` is a list: each request takes the first one, the last one stays."""

    url: str
    answers: dict[str, list[Answer]] = field(default_factory=dict)
    requests: Counter[str] = field(default_factory=Counter)


@contextlib.contextmanager
def file_server() -> Iterator[FileServer]:
    """Serve on 127.0.0.1 until the block ends."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            path = self.path.partition("?")[0]
            state.requests[path] += 1
            answers = state.answers.get(path, [status(404)])
            answer = answers.pop(0) if len(answers) > 1 else answers[0]
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                answer(self)

        do_HEAD = do_GET  # noqa: N815 - the library's name

        def log_message(self, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    state = FileServer(f"http://127.0.0.1:{server.server_address[1]}")
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield state
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def whole(body: bytes, **headers: str) -> Answer:
    """All of it, with its length."""

    def answer(request: BaseHTTPRequestHandler) -> None:
        _head(request, 200, {"Content-Length": str(len(body)), **headers})
        if request.command == "GET":
            request.wfile.write(body)

    return answer


def etagged(body: bytes, etag: str, **headers: str) -> Answer:
    """All of it under an ETag; 304 to whoever has that ETag."""

    def answer(request: BaseHTTPRequestHandler) -> None:
        if request.headers.get("If-None-Match") == etag:
            return status(304, ETag=etag)(request)
        return whole(body, ETag=etag, **headers)(request)

    return answer


def without_length(body: bytes) -> Answer:
    """All of it, ended by the connection's end."""

    def answer(request: BaseHTTPRequestHandler) -> None:
        _head(request, 200, {"Connection": "close"})
        request.wfile.write(body)
        request.close_connection = True

    return answer


def truncated(body: bytes, num_bytes: int) -> Answer:
    """The length of all of it, the first ``num_bytes``, then the end of the connection."""

    def answer(request: BaseHTTPRequestHandler) -> None:
        _head(request, 200, {"Content-Length": str(len(body)), "Connection": "close"})
        request.wfile.write(body[:num_bytes])
        request.close_connection = True

    return answer


def slow(body: bytes, started: threading.Event, *, seconds: float) -> Answer:
    """Half of it, then a pause, then the rest; ``started`` is set when the first half is out."""

    def answer(request: BaseHTTPRequestHandler) -> None:
        _head(request, 200, {"Content-Length": str(len(body))})
        request.wfile.write(body[: len(body) // 2])
        request.wfile.flush()
        started.set()
        time.sleep(seconds)
        request.wfile.write(body[len(body) // 2 :])

    return answer


def status(code: int, **headers: str) -> Answer:
    """A status and no body."""

    def answer(request: BaseHTTPRequestHandler) -> None:
        _head(request, code, {"Content-Length": "0", **headers})

    return answer


def redirect(target: str) -> Answer:
    """Look elsewhere."""

    def answer(request: BaseHTTPRequestHandler) -> None:
        _head(request, 302, {"Content-Length": "0", "Location": target})

    return answer


def _head(request: BaseHTTPRequestHandler, code: int, headers: dict[str, str]) -> None:
    request.send_response(code)
    for name, value in headers.items():
        request.send_header(name, value)
    request.end_headers()
