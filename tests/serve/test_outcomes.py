"""Each request is counted once, as it ended; administrators alone change what is served; files are read unlocked."""

import concurrent.futures
import contextlib
import os
import threading
import time
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from torch import Tensor

from graftline.errors import ExportError, ServingError
from graftline.export.onnx_session import Runner
from graftline.registry.file_store import FileStore
from graftline.serve import answers, served_base
from graftline.serve import served_base as base_module
from graftline.serve.app import AccessRules, Server
from graftline.serve.catalog import Catalog
from graftline.serve.scheduler import Limits, Scheduler
from graftline.serve.served_base import AdapterCache, AdapterFile, Base, Runtime
from graftline.serve.server import check_administrators
from tests.serve.conftest import ADMIN_TOKEN, TOKEN, loaded, make_adapter, run
from tests.serve.following import make_follower, make_release, promote

AUTH = {"authorization": f"Bearer {TOKEN}"}
ADMIN = {"authorization": f"Bearer {ADMIN_TOKEN}"}
PLAIN = {"model": "tiny", "prompt": [5, 6], "max_tokens": 2, "temperature": 0}
CHAT = {"model": "tiny", "messages": [{"role": "user", "content": "a"}], "max_tokens": 2, "temperature": 0}
ROUTES = {"/v1/chat/completions": CHAT, "/v1/completions": PLAIN}


def counted(url: str) -> dict[str, float]:
    """Requests so far by ``route outcome``."""
    found = {}
    for line in httpx.get(f"{url}/metrics").text.splitlines():
        if line.startswith("graftline_requests_total{"):
            labels, value = line.split("{")[1].split("} ")
            outcome, route = (part.split("=")[1].strip('"') for part in labels.split(","))
            found[f"{route} {outcome}"] = float(value)
    return found


def wait_for(url: str, expected: dict[str, float]) -> None:
    """A client has its answer before the server has counted it."""
    deadline = time.monotonic() + 10
    while counted(url) != expected:
        assert time.monotonic() < deadline, counted(url)
        time.sleep(0.02)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("route", ROUTES)
def test_an_answer_is_counted_once_as_answered(route: str, stream: bool, url: str) -> None:
    assert httpx.post(f"{url}{route}", json=ROUTES[route] | {"stream": stream}, headers=AUTH).status_code == 200
    wait_for(url, {f"{route} answered": 1})


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("route", ROUTES)
def test_an_answer_that_fails_is_counted_as_failed(
    route: str, stream: bool, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(self: Runner, cache: Any, step: Any) -> Tensor:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(Runner, "step_on_device", broken)
    response = httpx.post(f"{url}{route}", json=ROUTES[route] | {"stream": stream}, headers=AUTH)
    assert response.status_code == (200 if stream else 500)
    assert "the server failed" in response.text
    assert "CUDA" not in response.text
    wait_for(url, {f"{route} failed": 1})


def test_a_fault_of_the_server_before_the_first_token_is_counted_as_failed_and_its_words_stay_in_the_log(
    url: str, server: Server, caplog: pytest.LogCaptureFixture
) -> None:
    adapter = server.catalog.resolve("lora").adapter
    assert adapter is not None
    moved = adapter.file.rename(adapter.file.with_suffix(".away"))
    try:
        response = httpx.post(f"{url}/v1/completions", json=PLAIN | {"model": "lora"}, headers=AUTH)
    finally:
        moved.rename(adapter.file)
    assert response.status_code == 500
    assert response.json()["error"]["type"] == "server_error"
    assert str(adapter.file.parent) not in response.text
    assert str(adapter.file) in caplog.text
    wait_for(url, {"/v1/completions failed": 1})
    again = httpx.post(f"{url}/v1/completions", json=PLAIN | {"model": "lora"}, headers=AUTH)
    assert again.status_code == 200


@pytest.mark.parametrize(
    ("body", "headers", "status"),
    [
        (PLAIN | {"model": "nobody"}, AUTH, 404),
        (PLAIN | {"unknown": 1}, AUTH, 400),
        (PLAIN | {"prompt": [5] * 600}, AUTH, 400),
        (PLAIN | {"prompt": "x" * 200_000}, AUTH, 413),
        (PLAIN, {}, 401),
    ],
)
def test_what_is_refused_is_counted_as_refused(
    body: dict[str, Any], headers: dict[str, str], status: int, url: str
) -> None:
    assert httpx.post(f"{url}/v1/completions", json=body, headers=headers).status_code == status
    wait_for(url, {"/v1/completions refused": 1})


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_is_counted_as_one_that_left(
    stream: bool, url: str, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    turn = server.scheduler._turn

    def slow_turn(*given: Any) -> None:
        time.sleep(0.005)
        turn(*given)

    monkeypatch.setattr(server.scheduler, "_turn", slow_turn)
    monkeypatch.setattr(answers, "_POLL_SECONDS", 0.01)
    body = PLAIN | {"max_tokens": 400, "stream": stream}
    with contextlib.suppress(httpx.ReadTimeout):
        if stream:
            with httpx.stream("POST", f"{url}/v1/completions", json=body, headers=AUTH) as response:
                next(response.iter_lines())
        else:
            httpx.post(f"{url}/v1/completions", json=body, headers=AUTH, timeout=0.1)
    wait_for(url, {"/v1/completions left": 1})


def test_an_answer_that_the_servers_end_cuts_off_is_a_failure_that_says_so(catalog: Catalog) -> None:
    server = Server(catalog, Scheduler(Limits(max_batch=1)))
    with run(server) as url, concurrent.futures.ThreadPoolExecutor(1) as pool:
        body = PLAIN | {"max_tokens": 500}
        server.scheduler._turn, turn = (lambda *given: (time.sleep(0.01), turn(*given))), server.scheduler._turn  # type: ignore[method-assign, assignment]
        running = pool.submit(httpx.post, f"{url}/v1/completions", json=body, timeout=60)
        while not server.scheduler.num_running:
            time.sleep(0.005)
        server.scheduler._giving_up = True
        response = running.result()
        assert response.status_code == 500
        assert "send the request again" in response.json()["error"]["message"]
        wait_for(url, {"/v1/completions failed": 1})


@pytest.mark.parametrize("path", ["/v1/load_lora_adapter", "/v1/unload_lora_adapter"])
def test_loading_needs_an_administrators_token(path: str, url: str, server: Server, tiny: Path) -> None:
    assert server.access.adapter_folder is not None
    make_adapter(tiny, server.access.adapter_folder / "new", seed=5)
    body = {"lora_name": "new", "lora_path": "new"} if "/load" in path else {"lora_name": "lora"}
    for headers, status in ((AUTH, 403), ({}, 401), ({"authorization": "Bearer x"}, 401)):
        response = httpx.post(f"{url}{path}", json=body, headers=headers)
        assert response.status_code == status
        assert response.json()["error"]["message"]
    assert {model.name for model in server.catalog.models()} == {"tiny", "lora", "dora", "vera", "houlsby"}


def test_an_administrators_token_asks_as_any_other(url: str) -> None:
    client = openai.OpenAI(base_url=f"{url}/v1", api_key=ADMIN_TOKEN, max_retries=0)
    assert client.completions.create(model="tiny", prompt=[5], max_tokens=1).usage.completion_tokens <= 1


@pytest.mark.parametrize("tokens", [(), (TOKEN,)])
def test_without_an_administrators_token_nobody_loads(
    tokens: tuple[str, ...], catalog: Catalog, tmp_path: Path
) -> None:
    with run(Server(catalog, Scheduler(), None, AccessRules(tokens=tokens, adapter_folder=tmp_path))) as url:
        for body in ({"lora_name": "x", "lora_path": "."}, {"lora_name": "lora"}):
            path = "/v1/load_lora_adapter" if "lora_path" in body else "/v1/unload_lora_adapter"
            assert httpx.post(f"{url}{path}", json=body, headers=AUTH).status_code == 403


def test_only_what_a_request_has_loaded_is_unloaded_by_one(tiny: Path, runtime: Runtime, tmp_path: Path) -> None:
    store = FileStore(tmp_path / "store")
    version, digest = make_release(store, tiny, tmp_path, seed=1)
    promote(store, version, digest)
    follower = make_follower(store, tiny, runtime, tmp_path / "fetched")
    catalog: Catalog = follower.catalog  # type: ignore[attr-defined]
    catalog.load_adapter("own", make_adapter(tiny, tmp_path / "own"))
    (tmp_path / "loadable").mkdir()
    make_adapter(tiny, tmp_path / "loadable" / "new", seed=5)
    access = AccessRules(admin_tokens=(ADMIN_TOKEN,), adapter_folder=tmp_path / "loadable")
    with run(Server(catalog, Scheduler(), follower, access)) as url:

        def unload(name: str) -> httpx.Response:
            return httpx.post(f"{url}/v1/unload_lora_adapter", json={"lora_name": name}, headers=ADMIN)

        for name in ("demo@production", f"demo@{version}", "own", "tiny"):
            response = unload(name)
            assert response.status_code == 400
            assert "not loaded by a request" in response.json()["error"]["message"]
        assert unload("nobody").status_code == 404
        body = {"lora_name": "new", "lora_path": "new"}
        assert httpx.post(f"{url}/v1/load_lora_adapter", json=body, headers=ADMIN).status_code == 200
        assert unload("new").status_code == 200
        assert httpx.post(f"{url}/v1/completions", json=PLAIN | {"model": "demo@production"}).status_code == 200


def test_of_two_who_load_one_name_at_once_one_is_refused(
    catalog: Catalog, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folders = [make_adapter(tiny, tmp_path / str(seed), seed=seed) for seed in (5, 6)]
    both, prepare = threading.Barrier(2), Base.prepare_adapter

    def together(self: Base, folder: Path) -> Any:
        both.wait(20)
        return prepare(self, folder)

    monkeypatch.setattr(Base, "prepare_adapter", together)
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        loads = [pool.submit(catalog.load_adapter, "one", folder) for folder in folders]
    failed = [load.exception() for load in loads if load.exception()]
    assert len(failed) == 1
    assert isinstance(failed[0], ServingError)


def test_one_adapter_that_is_loaded_twice_at_once_is_converted_once(
    tiny: Path, runtime: Runtime, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_adapter(tiny, tmp_path / "adapter", seed=77)
    bases = [Base(tiny, runtime) for _ in range(3)]  # as three servers that share a cache folder
    written: list[Path] = []
    write, convert = base_module.write_parameters, base_module.graph_parameters

    def slowly(*given: Any) -> Any:
        time.sleep(0.3)  # so that the others have looked for the file before it is there
        return convert(*given)

    monkeypatch.setattr(base_module, "graph_parameters", slowly)
    monkeypatch.setattr(base_module, "write_parameters", lambda given, file: (written.append(file), write(given, file)))
    with concurrent.futures.ThreadPoolExecutor(3) as pool:
        files = {file.digest for file, _ in pool.map(lambda base: base.prepare_adapter(folder), bases)}
    assert len(files) == len(written) == 1


@pytest.mark.parametrize(
    ("access", "reason"),
    [
        (AccessRules(tokens=("a",), admin_tokens=("a", "b")), "use different ones"),
        (AccessRules(tokens=("a",), adapter_folder=Path("adapters")), "set GRAFTLINE_SERVE_ADMIN_TOKENS"),
        (AccessRules(adapter_folder=Path("adapters")), "set GRAFTLINE_SERVE_ADMIN_TOKENS"),
    ],
)
def test_a_server_without_a_clear_administrator_does_not_start(access: AccessRules, reason: str) -> None:
    with pytest.raises(ServingError, match=reason):
        check_administrators(access)


class SlowFile:
    """Reading one adapter's file waits until it is told to go on."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, slow: AdapterFile) -> None:
        self.began, self.may_end = threading.Event(), threading.Event()
        read = served_base.read_parameters

        def waiting(file: Path) -> Any:
            if file == slow.file:
                self.began.set()
                assert self.may_end.wait(20)
            return read(file)

        monkeypatch.setattr(served_base, "read_parameters", waiting)


def test_one_adapter_that_is_slow_to_read_holds_up_nobody_else(
    catalog: Catalog, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = catalog.resolve("tiny").base.adapters
    slow, quick = (catalog.resolve(name).adapter for name in ("lora", "dora"))
    assert slow is not None
    file = SlowFile(monkeypatch, slow)

    def use(adapter: AdapterFile | None) -> object:
        with cache.use(adapter) as model:
            return model.runner

    with concurrent.futures.ThreadPoolExecutor(3) as pool:
        first = pool.submit(use, slow)
        assert file.began.wait(20)
        second = pool.submit(use, slow)  # the same one: it is read once
        assert pool.submit(use, quick).result(20)
        assert use(None)
        assert cache.num_bytes == sum(loaded(cache).values()) > 0
        file.may_end.set()
        assert first.result(20) is second.result(20)
    assert cache.num_loads == 2


def test_places_count_while_adapters_are_being_read(catalog: Catalog, monkeypatch: pytest.MonkeyPatch) -> None:
    names = ("lora", "dora", "vera", "houlsby")
    cache = AdapterCache(catalog.resolve("tiny").base.session, key="x", max_adapters=1)
    slow, other = (catalog.resolve(name).adapter for name in names[:2])
    assert slow is not None
    file = SlowFile(monkeypatch, slow)

    def use(adapter: AdapterFile | None) -> None:
        with cache.use(adapter):
            pass

    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        first = pool.submit(use, slow)
        assert file.began.wait(20)
        with pytest.raises(ServingError, match="all 1 places"):
            use(other)
        file.may_end.set()
        first.result(20)
    use(other)


def test_an_adapter_that_could_not_be_read_is_read_again(catalog: Catalog, tmp_path: Path) -> None:
    cache = AdapterCache(catalog.resolve("tiny").base.session, key="x", max_adapters=1)
    good = catalog.resolve("lora").adapter
    assert good is not None
    file = tmp_path / "adapter"
    adapter = AdapterFile(file, good.digest)
    for _ in range(2):
        with pytest.raises(ExportError), cache.use(adapter):
            pass
    assert loaded(cache) == {}
    os.link(good.file, file)
    with cache.use(adapter) as model:
        assert model.key == f"x+{good.digest}"
