"""The server as the official openai client sees it, and what it does with bad requests."""

import concurrent.futures
import contextlib
import hmac
import json
import shutil
import time
import types
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from graftline.data.rows import Message
from graftline.serve.app import Server
from graftline.serve.catalog import Catalog
from graftline.serve.scheduler import Limits, Scheduler
from tests.serve.conftest import ADMIN_TOKEN, METHODS, TOKEN, greedy_tokens, library_model, make_adapter, run

AUTH = {"authorization": f"Bearer {TOKEN}"}
ADMIN = {"authorization": f"Bearer {ADMIN_TOKEN}"}
QUESTION = [{"role": "user", "content": "Definition: a tall plant\nCategory:"}]


@pytest.fixture
def client(url: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{url}/v1", api_key=TOKEN, max_retries=0)


def expected_text(catalog: Catalog, name: str, folder: Path | None, num_tokens: int) -> str:
    served = catalog.resolve(name)
    prompt = served.base.encode_chat([Message("user", QUESTION[0]["content"], supervised=False)], served.template)
    model = library_model(served.base.folder, folder)
    tokens = greedy_tokens(model, prompt, num_tokens, served.base.stop_tokens(served.template))
    return served.base.tokenizer.decode(tokens, skip_special_tokens=True)


@pytest.mark.parametrize("method", ["rslora", "pissa", "pfeiffer"])
def test_the_other_methods_are_served_on_the_same_graph(
    method: str, client: openai.OpenAI, catalog: Catalog, tiny: Path, tmp_path: Path
) -> None:
    folder = make_adapter(tiny, tmp_path / method, method=method)
    catalog.load_adapter(method, folder)
    answer = client.chat.completions.create(model=method, messages=QUESTION, temperature=0, max_tokens=20)
    assert answer.choices[0].message.content == expected_text(catalog, method, folder, 20)
    assert catalog.resolve(method).base.session is catalog.resolve("dora").base.session


@pytest.mark.parametrize("name", ["tiny", *METHODS])
def test_greedy_answers_equal_transformers_with_our_layers(
    name: str, client: openai.OpenAI, catalog: Catalog, adapters: dict[str, Path]
) -> None:
    answer = client.chat.completions.create(model=name, messages=QUESTION, temperature=0, max_tokens=20)
    assert answer.choices[0].message.content == expected_text(catalog, name, adapters.get(name), 20)
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    assert answer.model == name


def test_a_stream_gives_the_same_text_as_the_whole_answer(client: openai.OpenAI) -> None:
    settings = {"model": "lora", "messages": QUESTION, "temperature": 0, "max_tokens": 20}
    whole = client.chat.completions.create(**settings)
    chunks = list(client.chat.completions.create(**settings, stream=True, stream_options={"include_usage": True}))
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == whole.choices[0].message.content
    assert chunks[0].choices[0].delta.role == "assistant"
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == whole.choices[0].finish_reason
    assert chunks[-1].usage == whole.usage
    assert len(chunks) > 4


def test_plain_completions_take_text_and_tokens(client: openai.OpenAI, catalog: Catalog) -> None:
    tokens = catalog.resolve("tiny").base.encode_text("a tall plant")
    by_text = client.completions.create(model="tiny", prompt="a tall plant", temperature=0, max_tokens=8)
    by_tokens = client.completions.create(model="tiny", prompt=tokens, temperature=0, max_tokens=8)
    assert by_text.choices[0].text == by_tokens.choices[0].text
    streamed = client.completions.create(model="tiny", prompt=tokens, temperature=0, max_tokens=8, stream=True)
    assert "".join(chunk.choices[0].text for chunk in streamed) == by_text.choices[0].text


def test_logprobs_sum_to_one_and_hold_the_chosen_token(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model="tiny", messages=QUESTION, temperature=0, max_tokens=3, logprobs=True, top_logprobs=5
    )
    content = answer.choices[0].logprobs.content
    assert len(content) == answer.usage.completion_tokens
    for token in content:
        assert token.logprob == max(top.logprob for top in token.top_logprobs)
        assert len(token.top_logprobs) == 5
        assert token.logprob < 0


def test_a_seed_repeats_an_answer_and_another_changes_it(client: openai.OpenAI) -> None:
    def ask(seed: int) -> str:
        answer = client.chat.completions.create(
            model="tiny", messages=QUESTION, temperature=1.5, max_tokens=24, seed=seed
        )
        return answer.choices[0].message.content

    assert ask(1) == ask(1)
    assert len({ask(seed) for seed in range(2, 6)}) > 1


@pytest.mark.parametrize("cut", [{"extra_body": {"top_k": 1}}, {"top_p": 1e-6}], ids=["top_k", "top_p"])
def test_one_token_left_to_choose_from_is_the_greedy_one(cut: dict[str, object], client: openai.OpenAI) -> None:
    settings = {"model": "lora", "messages": QUESTION, "max_tokens": 16}
    greedy = client.chat.completions.create(**settings, temperature=0)
    assert client.chat.completions.create(**settings, temperature=2, **cut).choices == greedy.choices


def test_plain_completions_give_logprobs_in_their_own_form(client: openai.OpenAI) -> None:
    answer = client.completions.create(model="tiny", prompt="a tall plant", temperature=0, max_tokens=4, logprobs=2)
    logprobs = answer.choices[0].logprobs
    assert len(logprobs.tokens) == len(logprobs.token_logprobs) == len(logprobs.top_logprobs) == 4
    assert "".join(logprobs.tokens) == answer.choices[0].text
    assert logprobs.text_offset[0] == 0


def test_a_stop_string_ends_the_answer_before_it(client: openai.OpenAI) -> None:
    settings = {"model": "tiny", "messages": QUESTION, "temperature": 0, "max_tokens": 30}
    whole = client.chat.completions.create(**settings).choices[0].message.content
    stop = whole[5:8]
    answer = client.chat.completions.create(**settings, stop=stop)
    assert answer.choices[0].message.content == whole[: whole.index(stop)]
    assert answer.choices[0].finish_reason == "stop"


def test_models_lists_bases_and_adapters(client: openai.OpenAI) -> None:
    models = {model.id: model for model in client.models.list()}
    assert set(models) == {"tiny", *METHODS}
    assert client.models.retrieve("dora").id == "dora"
    assert models["dora"].parent == "tiny"


def test_requests_for_many_adapters_at_once_are_never_mixed(client: openai.OpenAI) -> None:
    names = ["tiny", *METHODS]

    def ask(name: str) -> str:
        while True:
            try:
                answer = client.chat.completions.create(model=name, messages=QUESTION, temperature=0, max_tokens=12)
            except openai.RateLimitError as error:
                time.sleep(float(error.response.headers["retry-after"]) * 0.05)
            else:
                return answer.choices[0].message.content

    alone = {name: ask(name) for name in names}
    assert len(set(alone.values())) == len(names)
    asked = names * 12
    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        assert list(pool.map(ask, asked)) == [alone[name] for name in asked]


def test_an_adapter_is_loaded_and_unloaded_as_vllm_does(
    url: str, client: openai.OpenAI, server: Server, tiny: Path
) -> None:
    make_adapter(tiny, server.access.adapter_folder / "new", seed=5)
    body = {"lora_name": "new", "lora_path": "new"}
    assert httpx.post(f"{url}/v1/load_lora_adapter", json=body, headers=ADMIN).status_code == 200
    assert client.chat.completions.create(model="new", messages=QUESTION, max_tokens=2).usage.completion_tokens <= 2
    again = httpx.post(f"{url}/v1/load_lora_adapter", json=body, headers=ADMIN)
    assert again.status_code == 400
    assert "already" in again.json()["error"]["message"]
    assert httpx.post(f"{url}/v1/unload_lora_adapter", json={"lora_name": "new"}, headers=ADMIN).status_code == 200
    with pytest.raises(openai.NotFoundError, match="no model 'new'"):
        client.chat.completions.create(model="new", messages=QUESTION)


@pytest.mark.parametrize(
    ("path", "status"),
    [("../../etc", 403), ("/etc", 403), ("missing", 404), ("a\u0000b", 400), ("x" * 900, 400), (".", 400)],
)
def test_no_path_from_a_request_leaves_the_adapter_folder(path: str, status: int, url: str) -> None:
    body = {"lora_name": "x", "lora_path": path}
    response = httpx.post(f"{url}/v1/load_lora_adapter", json=body, headers=ADMIN)
    assert response.status_code == status
    assert "error" in response.json()


def test_a_symlink_out_of_the_adapter_folder_is_refused(url: str, server: Server, adapters: dict[str, Path]) -> None:
    (server.access.adapter_folder / "link").symlink_to(adapters["lora"])
    body = {"lora_name": "x", "lora_path": "link"}
    assert httpx.post(f"{url}/v1/load_lora_adapter", json=body, headers=ADMIN).status_code == 403


def test_a_damaged_adapter_is_refused_and_the_server_goes_on(
    url: str, client: openai.OpenAI, server: Server, adapters: dict[str, Path]
) -> None:
    folder = shutil.copytree(adapters["lora"], server.access.adapter_folder / "broken")
    (folder / "adapter_model.safetensors").write_bytes(b"\xff" * 100)
    response = httpx.post(
        f"{url}/v1/load_lora_adapter", json={"lora_name": "broken", "lora_path": "broken"}, headers=ADMIN
    )
    assert response.status_code == 400
    client.chat.completions.create(model="lora", messages=QUESTION, max_tokens=1)


GOOD = {"model": "tiny", "messages": QUESTION}
BAD_BODIES = {
    "no messages": {"model": "tiny"},
    "empty messages": GOOD | {"messages": []},
    "unknown role": GOOD | {"messages": [{"role": "wizard", "content": "x"}]},
    "image content": GOOD | {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
    "negative max_tokens": GOOD | {"max_tokens": -1},
    "zero max_tokens": GOOD | {"max_tokens": 0},
    "huge max_tokens": GOOD | {"max_tokens": 10**9},
    "more tokens than positions": GOOD | {"max_tokens": 5000},
    "negative temperature": GOOD | {"temperature": -0.1},
    "text temperature": GOOD | {"temperature": "hot"},
    "long stop": GOOD | {"stop": "x" * 50_000},
    "empty stop": GOOD | {"stop": ""},
    "many stops": GOOD | {"stop": ["a"] * 9},
    "three answers": GOOD | {"n": 3},
    "tools": GOOD | {"tools": [{"type": "function"}]},
    "a penalty out of range": GOOD | {"presence_penalty": 2.5},
    "an unknown form": GOOD | {"response_format": {"type": "yaml"}},
    "a schema without its form": GOOD | {"response_format": {"type": "json_object", "json_schema": {"name": "a"}}},
    "a form without its schema": GOOD | {"response_format": {"type": "json_schema"}},
    "many logprobs": GOOD | {"logprobs": True, "top_logprobs": 21},
    "model is a number": GOOD | {"model": 7},
    "a list": [1, 2],
    "long model name": GOOD | {"model": "m" * 501},
}


@pytest.mark.parametrize("case", BAD_BODIES)
def test_a_bad_request_gets_an_error_in_openais_form(case: str, url: str) -> None:
    response = httpx.post(f"{url}/v1/chat/completions", json=BAD_BODIES[case], headers=AUTH)
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert error["type"] == "invalid_request_error"
    assert error["message"]
    assert "Traceback" not in response.text


@pytest.mark.parametrize(
    "content",
    [b'{"model": ', b"", b"\xff\xfe", b"[" * 50_000, b'{"model": "tiny", "messages": [], "temperature": NaN}'],
    ids=["cut off", "empty", "no UTF-8", "nested too deeply", "NaN"],
)
def test_a_body_that_is_no_json_is_refused(content: bytes, url: str) -> None:
    response = httpx.post(f"{url}/v1/chat/completions", content=content, headers=AUTH)
    assert response.status_code == 400
    assert response.json()["error"]["type"] == "invalid_request_error"


@pytest.mark.parametrize(("path", "status"), [("/v1/chat/completions", 405), ("/v1/nowhere", 404)])
def test_a_wrong_route_or_verb_gets_an_error_in_openais_form(path: str, status: int, url: str) -> None:
    response = httpx.get(f"{url}{path}", headers=AUTH)
    assert response.status_code == status
    assert response.json()["error"]["message"]


def test_a_token_outside_the_vocabulary_is_refused(url: str) -> None:
    for prompt in ([1, 512], [-1], []):
        response = httpx.post(f"{url}/v1/completions", json={"model": "tiny", "prompt": prompt}, headers=AUTH)
        assert response.status_code == 400


def test_an_unknown_model_gets_the_nearest_names(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="try lora"):
        client.chat.completions.create(model="lorra", messages=QUESTION)


@pytest.mark.parametrize("headers", [{}, {"authorization": "Bearer wrong"}, {"authorization": f"Basic {TOKEN}"}])
def test_without_the_token_nothing_is_answered(headers: dict[str, str], url: str) -> None:
    for path in ("/v1/models", "/v1/chat/completions", "/v1/load_lora_adapter", "/nowhere"):
        assert httpx.get(f"{url}{path}", headers=headers).status_code == 401
    assert httpx.get(f"{url}/health", headers=headers).status_code == 200


def test_a_token_is_compared_with_every_known_one_in_constant_time(
    url: str, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    compared: list[tuple[bytes, bytes]] = []

    def compare(given: bytes, known: bytes) -> bool:
        compared.append((given, known))
        return hmac.compare_digest(given, known)

    monkeypatch.setattr("graftline.serve.middleware.hmac", types.SimpleNamespace(compare_digest=compare))
    known = [*server.access.tokens, *server.access.admin_tokens]
    for token in (known[0], "x", "x" * 1000):  # the first one known, too short, too long
        httpx.get(f"{url}/v1/models", headers={"authorization": f"Bearer {token}"})
    assert len(compared) == 3 * len(known)
    assert {len(digest) for pair in compared for digest in pair} == {32}


def test_every_token_of_the_list_is_taken(url: str) -> None:
    assert httpx.get(f"{url}/v1/models", headers={"authorization": "bearer another-token"}).status_code == 200


def test_a_body_over_the_limit_is_refused_with_and_without_its_length(url: str) -> None:
    large = json.dumps(GOOD | {"messages": [{"role": "user", "content": "x" * 200_000}]}).encode()
    assert httpx.post(f"{url}/v1/chat/completions", content=large, headers=AUTH).status_code == 413

    def chunks():  # type: ignore[no-untyped-def]
        for start in range(0, len(large), 10_000):
            yield large[start : start + 10_000]

    assert httpx.post(f"{url}/v1/chat/completions", content=chunks(), headers=AUTH).status_code == 413


def test_metrics_count_what_happened(url: str, client: openai.OpenAI) -> None:
    client.chat.completions.create(model="lora", messages=QUESTION, max_tokens=3, temperature=0)
    text = httpx.get(f"{url}/metrics").text
    values = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    assert float(values["graftline_completion_tokens_total"]) >= 1
    assert float(values["graftline_prompt_tokens_total"]) > 5
    assert float(values['graftline_requests_total{outcome="answered",route="/v1/chat/completions"}']) == 1
    assert float(values['graftline_adapter_loads_total{base="tiny"}']) == 1
    assert float(values["graftline_kv_bytes"]) == 0


def test_ready_names_the_models(url: str) -> None:
    response = httpx.get(f"{url}/ready")
    assert response.status_code == 200
    assert response.json()["models"] == ["tiny", *METHODS]


def test_the_chat_page_is_served_without_a_token(url: str) -> None:
    response = httpx.get(url)
    assert response.status_code == 200
    assert "<title>graftline" in response.text
    assert "http://" not in response.text.replace("http://127", "")  # nothing is loaded from elsewhere


@pytest.fixture
def slowly(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """Five milliseconds a token: the tiny model would have answered before a client can leave."""
    turn = server.scheduler._turn

    def slow_turn(*given: Any) -> None:
        time.sleep(0.005)
        turn(*given)

    monkeypatch.setattr(server.scheduler, "_turn", slow_turn)


@pytest.mark.usefixtures("slowly")
def test_a_client_that_leaves_frees_its_place(url: str, server: Server) -> None:
    body = GOOD | {"stream": True, "max_tokens": 400, "temperature": 0}
    with httpx.stream("POST", f"{url}/v1/chat/completions", json=body, headers=AUTH) as response:
        next(response.iter_lines())
    deadline = time.monotonic() + 5
    while server.scheduler.num_running or server.scheduler.budget.used_bytes:
        assert time.monotonic() < deadline, "the request still runs"
        time.sleep(0.02)
    assert server.scheduler.counters.completion_tokens < 400


@pytest.mark.usefixtures("slowly")
def test_work_for_a_client_that_left_before_its_whole_answer_is_dropped(
    url: str, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("graftline.serve.answers._POLL_SECONDS", 0.01)
    body = GOOD | {"max_tokens": 400, "temperature": 0}
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{url}/v1/chat/completions", json=body, headers=AUTH, timeout=0.05)
    deadline = time.monotonic() + 10
    while server.scheduler.num_running or server.scheduler.budget.used_bytes:
        assert time.monotonic() < deadline, "the request still runs"
        time.sleep(0.02)
    assert server.scheduler.counters.completion_tokens < 400


def test_a_full_queue_answers_429_with_a_time_to_wait(catalog: Catalog) -> None:
    server = Server(catalog, Scheduler(Limits(max_batch=1, max_waiting=1)))
    with run(server) as url, concurrent.futures.ThreadPoolExecutor(12) as pool:
        body = GOOD | {"max_tokens": 300, "temperature": 0}
        responses = list(pool.map(lambda _: httpx.post(f"{url}/v1/chat/completions", json=body, timeout=60), range(12)))
    refused = [response for response in responses if response.status_code == 429]
    assert {response.status_code for response in responses} == {200, 429}
    assert all(1 <= int(response.headers["retry-after"]) <= 60 for response in refused)
    assert refused[0].json()["error"]["code"] == "busy"


def test_a_slow_reader_delays_nobody(url: str, client: openai.OpenAI, server: Server) -> None:
    body = GOOD | {"stream": True, "max_tokens": 400, "temperature": 0}
    with httpx.stream("POST", f"{url}/v1/chat/completions", json=body, headers=AUTH) as slow:
        lines = slow.iter_lines()
        next(lines)
        for _ in range(5):
            client.chat.completions.create(model="lora", messages=QUESTION, max_tokens=5)
        deadline = time.monotonic() + 20
        while server.scheduler.num_running:
            assert time.monotonic() < deadline, "generation waits for the reader"
            time.sleep(0.02)
        assert list(lines)[-2] == "data: [DONE]"


def test_stopping_the_server_finishes_what_runs(server: Server) -> None:
    with run(server) as url, concurrent.futures.ThreadPoolExecutor(1) as pool:
        body = GOOD | {"max_tokens": 300, "temperature": 0}
        running = pool.submit(httpx.post, f"{url}/v1/chat/completions", json=body, headers=AUTH, timeout=60)
        while not server.scheduler.num_running:
            time.sleep(0.005)
    assert running.result().status_code == 200
    assert running.result().json()["usage"]["completion_tokens"] == 300
    assert not server.scheduler.is_alive


def test_clients_that_leave_at_any_moment_leave_no_adapter_in_use(
    url: str, server: Server, client: openai.OpenAI
) -> None:
    body = GOOD | {"model": "lora", "stream": True, "max_tokens": 100, "temperature": 0}
    for wait_seconds in (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02):
        with contextlib.suppress(httpx.TimeoutException):
            httpx.post(f"{url}/v1/chat/completions", json=body, headers=AUTH, timeout=wait_seconds)
    cache = server.catalog.resolve("lora").base.adapters
    deadline = time.monotonic() + 10
    while any(entry.num_users for entry in cache._entries.values()):
        assert time.monotonic() < deadline, "an adapter is still held"
        time.sleep(0.02)
    client.chat.completions.create(model="lora", messages=QUESTION, max_tokens=1)
