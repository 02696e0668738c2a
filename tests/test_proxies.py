"""This machine is asked without a proxy; hosts that the user spares stay spared."""

import os
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from graftline import address
from graftline.doctor import machine

LOOPBACK = "localhost,127.0.0.1,::1"


class Answering(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(204)
        self.end_headers()

    def log_message(self, *_: object) -> None: ...


@pytest.fixture
def url() -> Iterator[str]:
    with HTTPServer(("127.0.0.1", 0), Answering) as listening:
        threading.Thread(target=listening.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{listening.server_port}/"
        listening.shutdown()


def without_proxies() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if not name.lower().endswith("_proxy")}


@pytest.mark.parametrize("variable", ["HTTP_PROXY", "http_proxy", "ALL_PROXY"])
@pytest.mark.parametrize(
    "start",
    [
        "from graftline.workflow.process import begin; begin()",
        "import os; from graftline.address import *; spare_loopback(os.environ)",
    ],
)
def test_what_our_processes_ask_on_this_machine_goes_through_no_proxy(url: str, variable: str, start: str) -> None:
    code = f"{start}; import httpx; print(httpx.get({url!r}).status_code)"
    dead = {variable: "http://127.0.0.1:9"}
    done = subprocess.run([sys.executable, "-c", code], env=without_proxies() | dead, capture_output=True, text=True)
    assert done.stdout == "204\n", done.stderr


def test_events_go_to_a_server_on_this_machine_without_the_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    environment = {"HTTPS_PROXY": "http://proxy:3128"}
    address.spare_loopback(environment)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert urllib.request.proxy_bypass("127.0.0.1:4200"), "what websockets asks"
    assert urllib.request.proxy_bypass("localhost:4200")
    assert not urllib.request.proxy_bypass("example.org:443")


@pytest.mark.parametrize(
    ("given", "spared"),
    [
        ({}, None),
        ({"HTTP_PROXY": ""}, None),
        ({"HTTP_PROXY": "http://p"}, LOOPBACK),
        ({"https_proxy": "http://p", "NO_PROXY": ".corp, 10.0.0.1"}, f".corp,10.0.0.1,{LOOPBACK}"),
        ({"https_proxy": "http://p", "no_proxy": "a", "NO_PROXY": "b"}, f"a,{LOOPBACK}"),
        ({"all_proxy": "http://p", "no_proxy": "127.0.0.1"}, "127.0.0.1,localhost,::1"),
        ({"all_proxy": "http://p", "no_proxy": "*"}, "*"),
    ],
)
def test_the_users_hosts_stay(given: dict[str, str], spared: str | None) -> None:
    environment = dict(given)
    address.spare_loopback(environment)
    address.spare_loopback(environment)
    assert environment.get("no_proxy") == spared
    assert spared in (None, "*") or environment["NO_PROXY"] == spared


def test_the_doctor_names_proxies_without_their_passwords(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.lower().endswith("_proxy")]:
        monkeypatch.delenv(name)
    assert list(machine.proxy()) == []
    monkeypatch.setenv("HTTPS_PROXY", "http://eve:secret@proxy:3128")
    (found,) = machine.proxy()
    assert found.advice.endswith(f"export NO_PROXY={LOOPBACK}")
    assert (found.status, found.found.partition(";")[0]) == ("note", "HTTPS_PROXY=http://***@proxy:3128")
