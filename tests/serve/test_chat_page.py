"""The chat page in a real browser: conversations with models side by side, streamed, no error on the console."""

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
from graftline.serve import guidance
from graftline.serve.app import AccessRules, Server
from graftline.serve.catalog import Catalog
from graftline.serve.scheduler import Scheduler
from graftline.serve.served_base import Base, Runtime
from tests.data import chat_templates
from tests.serve.conftest import run
from tests.serve.following import make_follower, make_release, promote
from tests.serve.test_tools import Says
from tests.tiny import make_tiny_llama

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
    server = Server(catalog, Scheduler(), None, AccessRules())
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


def texts(browser: Browser, selector: str) -> list[str]:
    found: list[str] = browser.evaluate(f"[...document.querySelectorAll('{selector}')].map(e => e.textContent)")
    return found


def press(browser: Browser, key: str, **more: object) -> None:
    for kind in ("keyDown", "keyUp"):
        browser.call("Input.dispatchKeyEvent", type=kind, key=key, code=key, **more)


def type_and_ask(browser: Browser, text: str, num_turns: int) -> None:
    """By keyboard alone."""
    browser.evaluate("document.getElementById('prompt').focus()")
    browser.call("Input.insertText", text=text)
    press(browser, "Enter", text="\r", windowsVirtualKeyCode=13)
    browser.wait_for(
        f"(f => f.length === {num_turns} && f.every(e => e.textContent.includes('ended by')))"
        "([...document.querySelectorAll('.facts')])"
    )


@pytest.fixture
def one_column(page: str, browser: Browser) -> Browser:
    browser.call("Page.navigate", url=page)
    browser.wait_for("document.querySelectorAll('section').length === 3")
    browser.evaluate("[...document.querySelectorAll('section')].slice(1).forEach(section => section.remove())")
    browser.evaluate("document.getElementById('max_tokens').value = 8")
    return browser


def test_a_conversation_is_sent_with_its_history_and_the_system_prompt(one_column: Browser) -> None:
    browser = one_column
    browser.evaluate("document.getElementById('system').value = 'Be brief'")
    type_and_ask(browser, "a plant", 1)
    type_and_ask(browser, "an animal", 2)
    assert texts(browser, ".question") == ["a plant", "an animal"]
    browser.evaluate("[...document.querySelectorAll('.sent')].forEach(details => { details.open = true; })")
    browser.wait_for("[...document.querySelectorAll('.sent pre')].every(pre => pre.textContent)")
    first, second = texts(browser, ".sent pre")
    answer = texts(browser, ".answer")[0]
    assert (
        first == "<|im_start|>system\nBe brief<|im_end|>\n<|im_start|>user\na plant<|im_end|>\n<|im_start|>assistant\n"
    )
    assert second.startswith(f"{first}{answer}<|im_end|>\n<|im_start|>user\nan animal<|im_end|>")
    assert all("of 512 tokens" in text for text in texts(browser, ".sent summary"))
    assert "first after" in texts(browser, ".facts")[0]
    browser.evaluate("document.getElementById('new').click()")
    assert texts(browser, ".question") == []
    type_and_ask(browser, "a plant", 1)
    assert texts(browser, ".answer") == [answer]
    assert browser.errors == []


def test_shift_and_enter_begin_a_line_and_escape_stops(one_column: Browser, page: str) -> None:
    browser = one_column
    browser.evaluate("document.getElementById('prompt').focus()")
    browser.call("Input.insertText", text="one")
    press(browser, "Enter", text="\r", windowsVirtualKeyCode=13, modifiers=8)
    browser.call("Input.insertText", text="two")
    assert browser.evaluate("document.getElementById('prompt').value") == "one\ntwo"
    assert texts(browser, ".question") == []
    # An answer that never comes, so that there is something to stop.
    browser.evaluate(
        "window.fetch = (url, options) => new Promise((_, reject) => options.signal.addEventListener('abort', "
        "() => reject(new DOMException('stopped', 'AbortError'))))"
    )
    press(browser, "Enter", text="\r", windowsVirtualKeyCode=13)
    browser.wait_for("!document.getElementById('stop').disabled")
    press(browser, "Escape", windowsVirtualKeyCode=27)
    browser.wait_for("document.getElementById('stop').disabled")
    assert texts(browser, ".facts") == ["stopped"]


def test_a_question_that_nobody_could_answer_can_be_changed_and_asked_again(one_column: Browser) -> None:
    browser = one_column
    browser.evaluate("document.getElementById('max_tokens').value = 4096")
    browser.evaluate("document.getElementById('prompt').value = 'a plant'")
    browser.evaluate("document.getElementById('form').requestSubmit()")
    browser.wait_for("document.getElementById('prompt').value === 'a plant'")
    browser.evaluate("document.getElementById('prompt').value = ''")
    browser.evaluate("document.getElementById('max_tokens').value = 8")
    browser.evaluate("[...document.querySelectorAll('.facts')].forEach(facts => facts.remove())")
    type_and_ask(browser, "a plant", 1)
    browser.evaluate("[...document.querySelectorAll('.sent')].at(-1).open = true")
    browser.wait_for("[...document.querySelectorAll('.sent pre')].at(-1).textContent")
    assert texts(browser, ".sent pre")[-1].count("a plant") == 1  # what failed is not a part of the conversation


def test_reasoning_is_shown_apart_from_the_answer_and_not_sent_again(
    runtime: Runtime, browser: Browser, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_tiny_llama(tmp_path / "base", num_hidden_layers=1)
    (folder / "chat_template.jinja").write_text(chat_templates.QWEN3, encoding="utf-8")
    base = Base(folder, runtime)
    tokens = base.tokenizer("<think>\nhm\n</think>\n\nA plant.", add_special_tokens=False).input_ids
    monkeypatch.setattr(guidance, "_constraint", lambda *given: Says([*tokens, base.tokenizer.eos_token_id]))
    catalog = Catalog()
    catalog.add_base("qwen", base)
    with run(Server(catalog, Scheduler(), None, AccessRules())) as url:
        browser.call("Page.navigate", url=url)
        browser.wait_for("document.querySelectorAll('section').length === 1")
        type_and_ask(browser, "what is it?", 1)
        assert (texts(browser, ".thoughts div"), texts(browser, ".answer")) == (["hm"], ["A plant."])
        assert browser.evaluate("document.querySelector('.thoughts').open") is False  # the answer has begun
        type_and_ask(browser, "really?", 2)
        browser.evaluate("[...document.querySelectorAll('.sent')].at(-1).open = true")
        browser.wait_for("[...document.querySelectorAll('.sent pre')].at(-1).textContent")
        assert "A plant.<|im_end|>" in texts(browser, ".sent pre")[-1]
        assert "hm" not in texts(browser, ".sent pre")[-1]
    assert browser.errors == []


@pytest.mark.parametrize("width", [320, 390, 1280])
def test_the_page_fits_the_screen(width: int, page: str, browser: Browser, tmp_path: Path) -> None:
    browser.call("Emulation.setDeviceMetricsOverride", width=width, height=700, deviceScaleFactor=1, mobile=width < 500)
    browser.call("Page.navigate", url=page)
    browser.wait_for("document.querySelectorAll('section').length === 3")
    browser.evaluate("document.querySelector('form details').open = true")
    ask(browser)
    screenshot = browser.call("Page.captureScreenshot", captureBeyondViewport=True)["data"]
    (tmp_path / f"page-{width}.png").write_bytes(base64.b64decode(screenshot))
    assert browser.evaluate("document.documentElement.scrollWidth") <= width
    assert browser.evaluate(
        "[...document.querySelectorAll('button')].every(b => b.getBoundingClientRect().right <= innerWidth)"
    )
