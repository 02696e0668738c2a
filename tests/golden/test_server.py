"""What the server answers over HTTP: models, completions, chat, streams, errors."""

import contextlib
import json
import shutil
import threading
import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
import uvicorn

from tests.golden import product
from tests.golden.record import Bound, Golden
from tests.golden.world import make_base, make_project, write_pipeline
from tests.ports import free_port

BOUND = Bound(relative=1e-4, absolute=1e-4)
"""Of log-probabilities; text and tokens must be the same."""
TOKEN = "a-token"
CHAT = [{"role": "user", "content": "Definition: a tall plant\nCategory:"}]
GREEDY = {"temperature": 0, "max_tokens": 8}
CHAT_PATH, COMPLETION_PATH = "/v1/chat/completions", "/v1/completions"

REQUESTS: dict[str, tuple[str, str, Any]] = {
    "models": ("GET", "/v1/models", None),
    "one model": ("GET", "/v1/models/lora", None),
    "health": ("GET", "/health", None),
    "ready": ("GET", "/ready", None),
    "chat": ("POST", CHAT_PATH, {"model": "lora", "messages": CHAT, **GREEDY}),
    "chat of the base": ("POST", CHAT_PATH, {"model": "tiny", "messages": CHAT, **GREEDY}),
    "chat with parts": (
        "POST",
        CHAT_PATH,
        {"model": "lora", "messages": [{"role": "user", "content": [{"type": "text", "text": "a tall"}]}], **GREEDY},
    ),
    "chat with log-probabilities": (
        "POST",
        CHAT_PATH,
        {"model": "lora", "messages": CHAT, "logprobs": True, "top_logprobs": 2, **GREEDY, "max_tokens": 3},
    ),
    "chat as a stream": (
        "POST",
        CHAT_PATH,
        {"model": "lora", "messages": CHAT, "stream": True, "stream_options": {"include_usage": True}, **GREEDY},
    ),
    "completion": ("POST", COMPLETION_PATH, {"model": "tiny", "prompt": "a tall plant", **GREEDY}),
    "completion of tokens": ("POST", COMPLETION_PATH, {"model": "lora", "prompt": [10, 20, 30], **GREEDY}),
    "completion with log-probabilities": (
        "POST",
        COMPLETION_PATH,
        {"model": "tiny", "prompt": "a tall plant", "logprobs": 2, **GREEDY, "max_tokens": 3},
    ),
    "completion as a stream": (
        "POST",
        COMPLETION_PATH,
        {"model": "tiny", "prompt": "a tall plant", "stream": True, **GREEDY},
    ),
    "unknown model": ("POST", CHAT_PATH, {"model": "nobody", "messages": CHAT}),
    "no messages": ("POST", CHAT_PATH, {"model": "lora", "messages": []}),
    "unknown role": ("POST", CHAT_PATH, {"model": "lora", "messages": [{"role": "operator", "content": "a"}]}),
    "several answers": ("POST", CHAT_PATH, {"model": "lora", "messages": CHAT, "n": 2}),
    "too hot": ("POST", CHAT_PATH, {"model": "lora", "messages": CHAT, "temperature": 3}),
    "empty stop": ("POST", COMPLETION_PATH, {"model": "tiny", "prompt": "a", "stop": ""}),
    "token outside the vocabulary": ("POST", COMPLETION_PATH, {"model": "tiny", "prompt": [10, 99999]}),
    "prompt that is too long": ("POST", COMPLETION_PATH, {"model": "tiny", "prompt": [10] * 600}),
    "no prompt": ("POST", COMPLETION_PATH, {"model": "tiny"}),
    "body that is too large": ("POST", COMPLETION_PATH, {"model": "tiny", "prompt": "a" * 30_000}),
    "no such route": ("GET", "/v1/moderations", None),
    "wrong method": ("GET", CHAT_PATH, None),
    "load an adapter": ("POST", "/v1/load_lora_adapter", {"lora_name": "again", "lora_path": "lora"}),
    "models with one more": ("GET", "/v1/models", None),
    "load from elsewhere": ("POST", "/v1/load_lora_adapter", {"lora_name": "other", "lora_path": "../outside"}),
    "load what is not there": ("POST", "/v1/load_lora_adapter", {"lora_name": "other", "lora_path": "missing"}),
    "unload an adapter": ("POST", "/v1/unload_lora_adapter", {"lora_name": "again"}),
    "unload what is not there": ("POST", "/v1/unload_lora_adapter", {"lora_name": "again"}),
}


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A server of a tiny base and an adapter that was trained on it."""
    root = make_project(tmp_path_factory.mktemp("served"))
    shutil.rmtree(root / "base")
    make_base(root / "base", size=0.5, num_hidden_layers=1)
    # So far from the base that no processor's rounding chooses another token.
    write_pipeline(root, "lora", {"train.learning_rate": 0.03, "base.template": "tokenizer"})
    product.run_stages(root, "lora", ("resolve", "fetch", "init", "train"))
    (root / "loadable").mkdir()
    (root / "outside").mkdir()
    adapter = root / "runs" / "lora" / "train" / "adapter"
    shutil.copytree(adapter, root / "loadable" / "lora")
    app = product.application(
        root / "base", {"lora": adapter}, graphs=root / "graphs", loadable=root / "loadable", token=TOKEN
    )
    with served(app) as address:
        yield address


@contextlib.contextmanager
def served(app: Any) -> Iterator[str]:
    """The application on a free port, in a thread."""
    port = free_port()
    server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=port, log_level="error"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        assert thread.is_alive(), "the server did not start"
        time.sleep(0.01)
    yield f"http://127.0.0.1:{port}"
    server.should_exit = True
    thread.join(30)
    assert not thread.is_alive()


def test_the_server_answers_as_recorded(url: str, golden: Golden) -> None:
    with httpx.Client(base_url=url, timeout=60) as client:
        headers = {"authorization": f"Bearer {TOKEN}"}
        admin = {"authorization": f"Bearer {TOKEN}-admin"}
        found = {
            name: exchange(client, *request, admin if request[1].endswith("_lora_adapter") else headers)
            for name, request in REQUESTS.items()
        }
        found["no token"] = exchange(client, "GET", "/v1/models", None, {})
        found["wrong token"] = exchange(client, "GET", "/v1/models", None, {"authorization": "Bearer another"})
        broken = client.post(CHAT_PATH, content=b'{"model": ', headers=headers | {"content-type": "application/json"})
        found["broken JSON"] = answer_of(broken)
    golden.values("server/transcript.json", found, BOUND)


def exchange(client: httpx.Client, method: str, path: str, body: Any, headers: dict[str, str]) -> dict[str, Any]:
    """A request and its answer."""
    shown = json.dumps(body)
    asked = {"request": f"{method} {path}"} | ({} if body is None else {"body": f"{shown[:200]}"})
    return asked | answer_of(client.request(method, path, json=body, headers=headers))


def answer_of(response: httpx.Response) -> dict[str, Any]:
    """Status, the headers that are promised, and the body without what no two answers share."""
    kept = {
        name: response.headers[name] for name in ("content-type", "cache-control", "allow") if name in response.headers
    }
    if response.headers.get("content-type", "").startswith("text/event-stream"):
        events = [line.removeprefix("data: ") for line in response.text.splitlines() if line]
        content: Any = [event if event == "[DONE]" else without_volatile(json.loads(event)) for event in events]
    elif "json" in response.headers.get("content-type", ""):
        content = without_volatile(response.json())
    else:
        content = response.text
    return {"status": response.status_code, "headers": kept, "answer": content}


def without_volatile(value: Any) -> Any:
    """Ids that are drawn and times of creation are replaced; that they are there still counts."""
    if isinstance(value, list):
        return [without_volatile(v) for v in value]
    if not isinstance(value, dict):
        return value
    plain = {key: without_volatile(v) for key, v in value.items()}
    if isinstance(plain.get("created"), int):
        plain["created"] = "a time"
    if str(plain.get("id", "")).startswith(("chatcmpl-", "cmpl-")):
        plain["id"] = str(plain["id"]).partition("-")[0] + "-…"
    return plain
