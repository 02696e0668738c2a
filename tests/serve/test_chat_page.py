"""The chat page in a real browser: three models side by side, streamed, without an error on the console."""

import base64
import json
import shutil
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from websockets.sync.client import ClientConnection, connect

from graftline.registry.file_store import FileStore
from graftline.serve.app import Access, Server
from graftline.serve.base import Runtime
from graftline.serve.catalog import Catalog
from graftline.serve.scheduler import Scheduler
from tests.serve.conftest import run
from tests.serve.test_follower import make_follower, make_release, promote

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
pytestmark = [pytest.mark.slow, pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here")]


class Browser:
    """One page, driven over the DevTools protocol."""

    def __init__(self, socket: ClientConnection) -> None:
        self._socket, self._count = socket, 0
        self.errors: list[str] = []
        for domain in ("Runtime", "Page", "Log"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **parameters: object) -> dict[str, Any]:
        self._count += 1
        self._socket.send(json.dumps({"id": self._count, "method": method, "params": parameters}))
        while True:
            message = json.loads(self._socket.recv(timeout=30))
            if message.get("method") in ("Runtime.exceptionThrown", "Log.entryAdded"):
                self.errors.append(json.dumps(message["params"]))
            if message.get("id") == self._count:
                return message.get("result", {})

    def evaluate(self, expression: str) -> Any:
        result = self.call("Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True)
        return result["result"].get("value")

    def wait_for(self, expression: str) -> None:
        deadline = time.monotonic() + 30
        while not self.evaluate(expression):
            assert time.monotonic() < deadline, f"{expression} never became true; errors: {self.errors}"
            time.sleep(0.05)


@pytest.fixture
def browser(tmp_path: Path) -> Iterator[Browser]:
    command = [CHROMIUM, "--headless=new", "--no-sandbox", "--disable-gpu", "--remote-debugging-port=0"]
    process = subprocess.Popen(
        [*command, f"--user-data-dir={tmp_path / 'profile'}", "about:blank"], stderr=subprocess.DEVNULL
    )
    port_file = tmp_path / "profile" / "DevToolsActivePort"
    deadline = time.monotonic() + 30
    while not port_file.exists() or not port_file.read_text():
        assert time.monotonic() < deadline, "Chromium did not start"
        time.sleep(0.05)
    port = port_file.read_text().splitlines()[0]
    pages = json.load(urllib.request.urlopen(f"http://127.0.0.1:{port}/json"))
    target = next(page for page in pages if page["type"] == "page")
    with connect(target["webSocketDebuggerUrl"], max_size=None) as socket:
        yield Browser(socket)
    process.terminate()
    process.wait(10)


@pytest.fixture
def page(catalog: Catalog) -> Iterator[str]:
    server = Server(catalog, Scheduler(), None, Access())
    with run(server) as url:
        yield url


def ask(browser: Browser) -> list[str]:
    """Ask all chosen models the same question; their answers when all have ended."""
    browser.evaluate("document.getElementById('prompt').value = 'Definition: a tall plant'")
    browser.evaluate("document.getElementById('max_tokens').value = 12")
    browser.evaluate("document.getElementById('form').requestSubmit()")
    browser.wait_for("[...document.querySelectorAll('.facts')].every(f => f.textContent.includes('ended by'))")
    return browser.evaluate("[...document.querySelectorAll('.answer')].map(a => a.textContent)")


def test_the_same_question_goes_to_three_models_and_three_answers_come(
    page: str, browser: Browser, tmp_path: Path
) -> None:
    browser.call("Page.navigate", url=page)
    browser.wait_for("document.querySelectorAll('section').length === 3")
    chosen = browser.evaluate("[...document.querySelectorAll('section > select')].map(s => s.value)")
    assert chosen == ["tiny", "lora", "dora"]  # no channel here
    answers = ask(browser)
    assert len(set(answers)) == 3
    screenshot = browser.call("Page.captureScreenshot")["data"]
    (tmp_path / "page.png").write_bytes(base64.b64decode(screenshot))
    assert browser.errors == []


def test_base_candidate_and_production_are_side_by_side_at_first(
    tiny: Path, runtime: Runtime, adapters: dict[str, Path], browser: Browser, tmp_path: Path
) -> None:
    store = FileStore(tmp_path / "store")
    promote(store, *make_release(store, tiny, tmp_path, seed=1))
    follower = make_follower(store, tiny, runtime, tmp_path / "fetched")
    follower.catalog.load_adapter("candidate", adapters["dora"])  # type: ignore[attr-defined]
    with run(Server(follower.catalog, Scheduler(), follower)) as url:  # type: ignore[attr-defined]
        browser.call("Page.navigate", url=url)
        browser.wait_for("document.querySelectorAll('section').length === 3")
        chosen = browser.evaluate("[...document.querySelectorAll('section > select')].map(s => s.value)")
        assert chosen == ["tiny", "candidate", "demo@production"]
        answers = ask(browser)
    assert len(set(answers)) == 3
    assert browser.errors == []


def test_an_error_of_the_server_is_shown(page: str, browser: Browser) -> None:
    browser.call("Page.navigate", url=page)
    browser.wait_for("document.querySelectorAll('section').length === 3")
    browser.evaluate("document.getElementById('prompt').value = 'x'")
    browser.evaluate("document.getElementById('max_tokens').value = 4096")
    browser.evaluate("document.getElementById('form').requestSubmit()")
    browser.wait_for("document.querySelectorAll('.answer.error').length === 3")
    assert "positions" in browser.evaluate("document.querySelector('.answer.error').textContent")
