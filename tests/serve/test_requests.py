"""What a request may ask for: nulls, defaults, settings that are refused by name, prompts that are rendered once."""

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import torch
from openai.types import Completion
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from pydantic import BaseModel, ConfigDict, ValidationError
from transformers import AutoTokenizer

from graftline.data.rows import Message
from graftline.serve.app import Server
from graftline.serve.catalog import Catalog
from graftline.serve.protocol import ChatMessage, ChatRequest, CompletionRequest, Generate
from graftline.serve.scheduler import Limits, Scheduler
from graftline.serve.served_base import Base, Runtime
from graftline.serve.token_bytes import TokenBytes
from tests.serve.conftest import TOKEN, library_model, run
from tests.tiny import make_tiny_llama

AUTH = {"authorization": f"Bearer {TOKEN}"}
SAY = [{"role": "user", "content": "Definition: a tall plant\nCategory:"}]
CHAT = {"model": "tiny", "messages": SAY, "max_tokens": 3, "temperature": 0}
PLAIN = {"model": "tiny", "prompt": "a tall plant", "max_tokens": 3, "temperature": 0}
ROUTES = {"/v1/chat/completions": CHAT, "/v1/completions": PLAIN}


def post(url: str, route: str, body: object) -> httpx.Response:
    return httpx.post(f"{url}{route}", json=body, headers=AUTH, timeout=60)


@pytest.mark.parametrize(
    ("route", "field"),
    [
        *(("/v1/chat/completions", name) for name in ChatRequest.model_fields if name not in ("model", "messages")),
        *(("/v1/completions", name) for name in CompletionRequest.model_fields if name not in ("model", "prompt")),
        *((route, name) for route in ROUTES for name in ("n", "tools", "logit_bias", "guided_json", "user")),
    ],
)
def test_a_null_is_the_default(route: str, field: str, url: str) -> None:
    without = {name: value for name, value in ROUTES[route].items() if name != field}
    if field in ("temperature", "seed"):
        without["top_k"] = 1  # one token to choose from, whatever temperature and seed
    expected = post(url, route, without).json()
    found = post(url, route, without | {field: None})
    assert found.status_code == 200, found.text
    assert found.json()["choices"] == expected["choices"]


def test_nulls_inside_messages_and_options_are_defaults(url: str) -> None:
    answer = {"role": "assistant", "content": "tree", "refusal": None, "tool_calls": None, "function_call": None}
    asked = CHAT | {"messages": [*SAY, answer | {"name": None, "annotations": []}, SAY[0]]}
    assert post(url, "/v1/chat/completions", asked).status_code == 200
    streamed = post(url, "/v1/chat/completions", CHAT | {"stream": True, "stream_options": {"include_usage": None}})
    assert streamed.status_code == 200
    assert '"usage"' not in streamed.text


UNSUPPORTED: dict[str, Any] = {
    "guided_json": {},
    "guided_choice": ["yes", "no"],
    "min_tokens": 3,
    "ignore_eos": True,
    "max_token": 5,
    "logit_bias": {"5": 1},
    "echo": True,
    "suffix": "!",
    "best_of": 2,
    "n": 2,
    "tools": [{"type": "function", "function": {"name": "f"}}],
    "tool_choice": "required",
    "length_penalty": 0.5,
    "include_stop_str_in_output": True,
    "skip_special_tokens": False,
    "chat_template_kwargs": {"enable_thinking": False},
    "wholly_unknown": 1,
}


@pytest.mark.parametrize(
    ("name", "route"),
    [
        (name, route)
        for name in UNSUPPORTED
        for route in ROUTES
        if name not in ("tools", "tool_choice", "chat_template_kwargs") or route == "/v1/completions"
    ],
)
def test_a_setting_that_the_server_does_not_have_is_refused_by_name(name: str, route: str, url: str) -> None:
    response = post(url, route, ROUTES[route] | {name: UNSUPPORTED[name]})
    assert response.status_code == 400
    error = response.json()["error"]
    assert error["param"] == name
    assert error["message"].startswith(f"{name} ")
    assert error["type"] == "invalid_request_error"


def test_a_mistyped_field_gets_the_nearest_one(url: str) -> None:
    message = post(url, "/v1/completions", PLAIN | {"max_token": 5}).json()["error"]["message"]
    assert message == "max_token is not supported by this server; did you mean max_tokens?"


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"messages": [SAY[0] | {"weight": 1}]}, "messages.0.weight"),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": "a", "cache": 1}]}]}, None),
        ({"messages": [SAY[0] | {"tool_calls": [{"id": "1"}]}]}, "messages.0.tool_calls.0.function"),
        ({"messages": [{"role": "assistant", "content": None}]}, "messages.0.content"),
        ({"stream": True, "stream_options": {"include_everything": True}}, "stream_options.include_everything"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"max_completion_tokens": 5}, "max_tokens"),
        ({"stop_token_ids": [100_000]}, "stop_token_ids"),
        ({"stop_token_ids": ["5"]}, "stop_token_ids.0"),
        ({"temperature": "0.5"}, "temperature"),
        ({"max_tokens": 2.5}, "max_tokens"),
        ({"max_tokens": True}, "max_tokens"),
        ({"stream": "yes"}, "stream"),
        ({"n": True}, "n"),
        ({"min_p": 1.5}, "min_p"),
        ({"repetition_penalty": 0}, "repetition_penalty"),
        ({"frequency_penalty": -3}, "frequency_penalty"),
        ({"stop": 5}, "stop"),
        ({"stop": [""]}, "stop"),
        ({"model": "\ud800"}, "model"),
        ({"\ud800": 1}, None),
        ({"messages": [{"role": "user", "content": "\ud800"}]}, None),
    ],
)
def test_what_is_wrong_inside_a_field_is_named(change: dict[str, Any], param: str | None, url: str) -> None:
    content = json.dumps(CHAT | change).encode()
    headers = AUTH | {"content-type": "application/json"}
    response = httpx.post(f"{url}/v1/chat/completions", content=content, headers=headers)
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert error["message"]
    if param is not None:
        assert error["param"] == param


@pytest.mark.parametrize("prompt", [["a tall plant"], [[5, 6, 7]], [5, 6, 7]])
def test_one_prompt_may_come_in_a_list(prompt: object, url: str) -> None:
    assert post(url, "/v1/completions", PLAIN | {"prompt": prompt}).status_code == 200


@pytest.mark.parametrize("prompt", [["a", "b"], [[5], [6]], [5, "a"], [True], 5, {"a": 1}, [[["a"]]], "\ud800"])
def test_several_prompts_and_what_is_none_are_refused(prompt: object, url: str) -> None:
    headers = AUTH | {"content-type": "application/json"}
    content = json.dumps(PLAIN | {"prompt": prompt}).encode()
    response = httpx.post(f"{url}/v1/completions", content=content, headers=headers)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "prompt"


@pytest.mark.parametrize("count", [350, 505, 511])
@pytest.mark.parametrize("route", ROUTES)
def test_without_a_number_an_answer_gets_the_room_that_its_prompt_leaves(route: str, count: int, url: str) -> None:
    """The model has 512 positions."""
    if route == "/v1/completions":
        asked: dict[str, Any] = {"model": "tiny", "prompt": [5] * count}
    else:
        text, num_tokens = "", 0
        while num_tokens < count:
            text += " a"
            shown = post(url, "/tokenize", {"model": "tiny", "messages": [{"role": "user", "content": text}]})
            num_tokens = shown.json()["count"]
            text += " a" * max(0, (count - num_tokens) // 3)
        assert num_tokens == count
        asked = {"model": "tiny", "messages": [{"role": "user", "content": text}]}
    response = post(url, route, asked | {"temperature": 0})
    assert response.status_code == 200, response.text
    usage = response.json()["usage"]
    assert usage["prompt_tokens"] == count
    assert 1 <= usage["completion_tokens"] <= 512 - count
    if response.json()["choices"][0]["finish_reason"] == "length":
        assert usage["completion_tokens"] == min(512 - count, 16 if "prompt" in asked else 512)


def test_a_prompt_that_leaves_no_room_is_refused(url: str) -> None:
    response = post(url, "/v1/completions", {"model": "tiny", "prompt": [5] * 512})
    assert response.status_code == 400
    assert "512 prompt tokens leave no room" in response.json()["error"]["message"]


def test_the_default_length_fits_into_the_cache_and_leaves_room_for_others(tiny: Path, runtime: Runtime) -> None:
    layout = Base(tiny, runtime).session.layout

    def default(num_cached: int, num_prompt: int) -> int:
        limits = Limits(max_kv_bytes=num_cached * layout.kv_bytes_per_token, max_batch=4)
        return Scheduler(limits).default_tokens(layout, num_prompt)

    assert default(100_000, 100) == 412  # all positions
    assert default(1200, 20) == 280  # a share of 300 tokens
    assert default(1200, 200) == 256
    assert default(300, 100) == 156  # a sequence of 256 is the largest that fits
    assert default(300, 250) == 6


THINKS = (
    "{%- for m in messages %}{%- if m['role'] == 'user' %}{{- '<|im_start|>' + m['content'] }}{%- else %}"
    "{%- set c = m['content'] %}{%- if '</think>' in c %}{%- set c = c.split('</think>')[-1] %}{%- endif %}"
    "{{- '<|im_start|>' + c + eos_token }}{%- endif %}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|><think>\n' }}{%- endif %}"
)
SYSTEM_AT_THE_END = (
    "{%- if messages[0]['role'] == 'system' %}{%- set sys = messages[0]['content'] %}{%- set rest = messages[1:] %}"
    "{%- else %}{%- set rest = messages %}{%- endif %}{%- for m in rest %}{%- if m['role'] == 'user' %}"
    "{{- '[INST] ' + (sys + '\n\n' if loop.last and sys is defined else '') + m['content'] + '[/INST]' }}"
    "{%- else %}{{- ' ' + m['content'] + eos_token }}{%- endif %}{%- endfor %}"
)
NEVER_ENDS = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
SHOUTS = "{% for m in messages %}{{ (m['content'] | upper) + '<|im_end|>' }}{% endfor %}"
REFUSES = "{% if messages | length > 1 %}{{ raise_exception('one turn only') }}{% endif %}{{ messages[0]['content'] }}"
BREAKS = "{{ messages[0]['content'].nothing.more }}"


def with_template(folder: Path, template: str) -> Path:
    base = make_tiny_llama(folder, num_hidden_layers=1)
    (base / "chat_template.jinja").write_text(template, encoding="utf-8")
    return base


@pytest.mark.parametrize("template", [THINKS, SYSTEM_AT_THE_END, NEVER_ENDS, SHOUTS], ids=["think", "sys", "no", "up"])
def test_a_prompt_is_what_the_template_renders_whatever_training_would_say(
    template: str, runtime: Runtime, tmp_path: Path
) -> None:
    folder = with_template(tmp_path / "base", template)
    base = Base(folder, runtime)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    conversation = [("user", "Name a fruit"), ("assistant", "<think>hm</think>Fig"), ("user", "Another")]
    for turns in (conversation[:1], conversation, [("system", "Be short"), *conversation]):
        messages = [{"role": role, "content": content} for role, content in turns]
        rendered = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=True)
        assert (
            base.encode_chat([Message(role, text, supervised=False) for role, text in turns], "tokenizer")
            == rendered["input_ids"]
        )
    assert tokenizer.eos_token_id in base.stop_tokens("tokenizer")
    catalog = Catalog()
    catalog.add_base("b", base)
    with run(Server(catalog, Scheduler())) as url:
        for body in ({"messages": SAY}, {"prompt": "Name a fruit"}):
            route = "/v1/chat/completions" if "messages" in body else "/v1/completions"
            response = post(url, route, {"model": "b", "max_tokens": 2} | body)
            assert response.status_code == 200, response.text


@pytest.mark.parametrize(("template", "reason"), [(REFUSES, "one turn only"), (BREAKS, "has no attribute")])
def test_a_template_that_refuses_says_so_to_the_client(
    template: str, reason: str, runtime: Runtime, tmp_path: Path
) -> None:
    catalog = Catalog()
    catalog.add_base("b", Base(with_template(tmp_path / "base", template), runtime))
    with run(Server(catalog, Scheduler())) as url:
        two_turns = [*SAY, {"role": "assistant", "content": "x"}, *SAY]
        response = post(url, "/v1/chat/completions", {"model": "b", "messages": two_turns, "max_tokens": 2})
        assert response.status_code == 400
        message = response.json()["error"]["message"]
        assert "refuses a conversation of user, assistant, user" in message
        assert reason in message
        assert "line" not in message
        assert post(url, "/v1/completions", {"model": "b", "prompt": "a", "max_tokens": 2}).status_code == 200


def test_a_conversation_is_rendered_once(tiny: Path, runtime: Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    base = Base(tiny, runtime)
    base.stop_tokens("tokenizer")
    calls: list[int] = []
    render = base.tokenizer.apply_chat_template

    def counted(messages: list[Any], **settings: Any) -> Any:
        calls.append(len(messages))
        return render(messages, **settings)

    monkeypatch.setattr(base.tokenizer, "apply_chat_template", counted)
    turns = [("user", "a plant"), ("assistant", "tree")] * 50 + [("user", "x")]
    base.encode_chat([Message(role, text, supervised=False) for role, text in turns], "tokenizer")
    assert calls == [101]


@pytest.mark.parametrize("leading", [(), ("<|im_start|>",)])
def test_a_text_is_continued_behind_the_tokenizers_beginning_and_without_its_end(
    leading: tuple[str, ...], runtime: Runtime, tmp_path: Path
) -> None:
    folder = make_tiny_llama(tmp_path / "base", num_hidden_layers=1)
    file = folder / "tokenizer.json"
    value = json.loads(file.read_text(encoding="utf-8"))
    ids = {
        token: AutoTokenizer.from_pretrained(folder).convert_tokens_to_ids(token) for token in (*leading, "<|im_end|>")
    }
    special = {token: {"id": token, "ids": [number], "tokens": [token]} for token, number in ids.items()}
    value["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [
            *({"SpecialToken": {"id": token, "type_id": 0}} for token in leading),
            {"Sequence": {"id": "A", "type_id": 0}},
            {"SpecialToken": {"id": "<|im_end|>", "type_id": 0}},
        ],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": special,
    }
    file.write_text(json.dumps(value), encoding="utf-8")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    bare = tokenizer("a tall plant", add_special_tokens=False).input_ids
    assert tokenizer("a tall plant").input_ids[-1] == ids["<|im_end|>"]  # the tokenizer does add it
    base = Base(folder, runtime)
    assert base.encode_text("a tall plant") == [*(ids[token] for token in leading), *bare]
    catalog = Catalog()
    catalog.add_base("b", base)
    with run(Server(catalog, Scheduler())) as url:
        found = post(url, "/v1/completions", {"model": "b", "prompt": "a tall plant", "max_tokens": 1}).json()
        assert found["usage"]["prompt_tokens"] == len(leading) + len(bare)
        shown = post(url, "/tokenize", {"model": "b", "prompt": "a tall plant"}).json()
        assert shown["tokens"] == base.encode_text("a tall plant")
        shown = post(url, "/tokenize", {"model": "b", "prompt": "a tall plant", "add_special_tokens": False}).json()
        assert shown["tokens"] == bare


def test_tokenize_gives_the_ids_that_a_request_would_be_read_as(url: str, server: Server) -> None:
    base = server.catalog.resolve("tiny").base
    shown = post(url, "/tokenize", {"model": "tiny", "messages": SAY, "return_token_strs": True}).json()
    answered = post(url, "/v1/chat/completions", CHAT).json()
    assert shown["count"] == len(shown["tokens"]) == answered["usage"]["prompt_tokens"]
    assert shown["tokens"] == base.encode_chat([Message("user", SAY[0]["content"], supervised=False)], "tokenizer")
    assert shown["max_model_len"] == base.session.layout.max_positions
    assert "".join(shown["token_strs"]) == base.tokenizer.decode(shown["tokens"])
    assert post(url, "/tokenize", {"model": "tiny", "prompt": "a"}).json()["token_strs"] is None
    # vLLM's clients may leave the model out; there is one tokenizer for a base.
    assert post(url, "/tokenize", {"messages": SAY}).json()["tokens"] == shown["tokens"]
    assert post(url, "/detokenize", {"tokens": shown["tokens"]}).json() == {"prompt": "".join(shown["token_strs"])}


@pytest.mark.parametrize(
    ("body", "status"),
    [
        ({"model": "tiny"}, 400),
        ({"model": "tiny", "prompt": "a", "messages": SAY}, 400),
        ({"model": "tiny", "messages": SAY, "add_special_tokens": True}, 400),
        ({"model": "tiny", "prompt": "a", "unknown": 1}, 400),
        ({"model": "nobody", "prompt": "a"}, 404),
    ],
)
def test_tokenize_refuses_what_it_cannot_do(body: dict[str, Any], status: int, url: str) -> None:
    response = post(url, "/tokenize", body)
    assert response.status_code == status
    assert response.json()["error"]["message"]


def test_tokenize_needs_a_token_as_answers_do(url: str) -> None:
    assert httpx.post(f"{url}/tokenize", json={"model": "tiny", "prompt": "a"}).status_code == 401


def unknown_fields(value: Any, where: str = "") -> list[str]:
    """Fields that the client's types do not have."""
    if isinstance(value, list):
        return [name for one in value for name in unknown_fields(one, where)]
    if not isinstance(value, BaseModel):
        return []
    own = [f"{where}.{name}" for name in value.model_extra or {}]
    fields = type(value).model_fields
    return own + [found for name in fields for found in unknown_fields(getattr(value, name), f"{where}.{name}")]


@pytest.mark.parametrize("extra", [{}, {"logprobs": True, "top_logprobs": 2}])
def test_chat_answers_are_of_the_official_clients_types(extra: dict[str, Any], url: str) -> None:
    whole = ChatCompletion.model_validate(post(url, "/v1/chat/completions", CHAT | extra).json(), strict=False)
    assert unknown_fields(whole) == []
    streamed = post(
        url, "/v1/chat/completions", CHAT | extra | {"stream": True, "stream_options": {"include_usage": True}}
    )
    events = [json.loads(line.removeprefix("data: ")) for line in streamed.text.split("\n\n")[:-2]]
    chunks = [ChatCompletionChunk.model_validate(event) for event in events]
    assert [name for chunk in chunks for name in unknown_fields(chunk)] == []
    assert all(event["usage"] is None for event in events[:-1])
    assert chunks[-1].usage == whole.usage
    assert chunks[-1].choices == []


def test_plain_answers_are_of_the_official_clients_types(url: str) -> None:
    whole = Completion.model_validate(post(url, "/v1/completions", PLAIN | {"logprobs": 2}).json())
    assert unknown_fields(whole) == []
    asked = PLAIN | {"logprobs": 2, "stream": True, "stream_options": {"include_usage": True}}
    lines = post(url, "/v1/completions", asked).text.split("\n\n")[:-2]
    events = [json.loads(line.removeprefix("data: ")) for line in lines]
    assert all(event["usage"] is None for event in events[:-1])
    for event in events[:-2]:
        assert event["choices"][0]["finish_reason"] is None
        event["choices"][0]["finish_reason"] = "stop"  # the type is that of whole answers
    chunks = [Completion.model_validate(event) for event in events]
    assert [name for chunk in chunks for name in unknown_fields(chunk)] == []
    assert chunks[-1].usage == whole.usage
    pieces = [chunk.choices[0].logprobs for chunk in chunks[:-1]]
    for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset"):
        joined = [value for piece in pieces for value in getattr(piece, name)]
        assert joined == getattr(whole.choices[0].logprobs, name)


def test_bodies_of_generating_routes_forbid_what_they_do_not_know() -> None:
    assert Generate.model_config == ConfigDict(extra="forbid", strict=True)


def test_penalties_and_stop_tokens_are_taken_from_the_official_client(url: str) -> None:
    client = openai.OpenAI(base_url=f"{url}/v1", api_key=TOKEN, max_retries=0)
    asked: dict[str, Any] = {"model": "tiny", "prompt": [5, 6, 7], "temperature": 0, "max_tokens": 12, "logprobs": 0}
    plain = client.completions.create(**asked).choices[0]
    repeats = max(plain.logprobs.tokens.count(token) for token in plain.logprobs.tokens)
    assert repeats > 1  # the tiny model repeats itself when it is greedy
    for settings in (
        {"presence_penalty": 2.0},
        {"frequency_penalty": 2.0},
        {"extra_body": {"repetition_penalty": 9.0}},
    ):
        other = client.completions.create(**asked, **settings).choices[0]
        assert max(other.logprobs.tokens.count(token) for token in other.logprobs.tokens) < repeats
    token = httpx.post(
        f"{url}/tokenize", json={"model": "tiny", "prompt": plain.logprobs.tokens[2]}, headers=AUTH
    ).json()["tokens"]
    assert len(token) == 1
    stopped = client.completions.create(**asked, extra_body={"stop_token_ids": token}).choices[0]
    assert stopped.finish_reason == "stop"
    assert stopped.logprobs.tokens == plain.logprobs.tokens[: plain.logprobs.tokens.index(plain.logprobs.tokens[2])]


def test_the_developer_s_turn_is_the_system_s() -> None:
    assert ChatMessage.model_validate({"role": "developer", "content": "Be brief."}).role == "system"


@pytest.mark.parametrize(
    ("field", "nothing", "something"),
    [
        ("priority", 0, 1),
        ("min_tokens", 0, 3),
        ("bad_words", [], ["no"]),
        ("logits_processors", [], ["a.b"]),
        ("documents", [], [{"text": "a"}]),
        ("detokenize", True, False),
        ("return_token_ids", False, True),
        ("return_tokens_as_token_ids", False, True),
        ("add_special_tokens", False, True),
        ("stream_options", {"include_usage": False}, {"include_usage": 1}),
        ("stream_options", {}, {"include_all": True}),
        ("prompt_cache_retention", "24h", 24),
        ("vllm_xargs", {}, {"a": 1}),
        ("mm_processor_kwargs", {}, {"a": 1}),
        ("typical_p", 1.0, 0.9),
    ],
)
def test_vllm_s_defaults_ask_for_nothing(field: str, nothing: Any, something: Any) -> None:
    asked = {"model": "tiny", "messages": SAY}
    ChatRequest.model_validate(asked | {field: nothing})
    with pytest.raises(ValidationError, match=field):
        ChatRequest.model_validate(asked | {field: something})


@pytest.mark.parametrize("change", [{"logprobs": False}, {"add_special_tokens": True}, {"seed": -1}, {"top_p": 0}])
def test_what_clients_send_for_plain_completions_is_taken(change: dict[str, Any]) -> None:
    CompletionRequest.model_validate({"model": "tiny", "prompt": "a"} | change)


@pytest.mark.parametrize(
    ("turn", "expected"),
    [
        ({"content": None, "reasoning_content": "Hm."}, {"content": "", "reasoning_content": "Hm."}),
        ({"content": "a", "reasoning": "", "reasoning_content": ""}, {"content": "a"}),
        ({"content": "a", "reasoning": "b", "reasoning_content": "b"}, {"content": "a", "reasoning_content": "b"}),
        ({"content": "a", "reasoning": None, "reasoning_details": [], "parsed": None}, {"content": "a"}),
        ({"content": "a", "thinking": "Hm."}, {"content": "a", "reasoning_content": "Hm."}),
        ({"content": "a", "refusal": "", "function_call": {}, "name": "", "tool_call_id": ""}, {"content": "a"}),
        ({"content": "a", "prefix": False, "provider_specific_fields": {}, "images": []}, {"content": "a"}),
        ({"content": "a", "type": "message", "status": "completed", "cache_control": {"type": "x"}}, {"content": "a"}),
        *(
            (
                {"content": None, **call},
                {"content": "", "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": {}}}]},
            )
            for call in (
                {"function_call": {"name": "f", "arguments": "{}"}},
                {"tool_calls": [], "function_call": {"name": "f", "arguments": ""}},
                {"tool_calls": [{"function": {"name": "f", "arguments": None}}]},
                {"tool_calls": [{"function": {"name": "f"}}]},
            )
        ),
        ({"content": [{"type": "text", "text": "a", "cache_control": {"type": "ephemeral"}}]}, {"content": "a"}),
        (
            {"content": None, "tool_calls": [{"id": "1", "function": {"name": "f", "arguments": ""}}]},
            {
                "content": "",
                "tool_calls": [{"type": "function", "id": "1", "function": {"name": "f", "arguments": {}}}],
            },
        ),
    ],
)
def test_an_answer_may_be_sent_back_as_servers_and_clients_write_it(
    turn: dict[str, Any], expected: dict[str, Any]
) -> None:
    asked = ChatMessage.model_validate({"role": "assistant"} | turn)
    assert asked.turn.turn == {"role": "assistant"} | expected


@pytest.mark.parametrize(
    "turn",
    [
        {"role": "user", "content": "Hm."},
        {"role": "user", "content": ["Hm."]},
        {"role": "user", "content": [{"type": "input_text", "text": "Hm."}]},
        {"role": "assistant", "content": [{"type": "output_text", "text": "Hm.", "annotations": [], "logprobs": []}]},
        {"role": "assistant", "content": [{"type": "refusal", "refusal": "Hm."}]},
        {"role": "assistant", "content": None, "refusal": "Hm."},
        {"role": "assistant", "content": "Hm.", "id": "msg_1", "parsed": {"a": 1}},
        {"role": "function", "name": "look", "content": "Hm."},
    ],
)
def test_turns_are_taken_as_openai_s_clients_write_them(turn: dict[str, Any]) -> None:
    asked = ChatMessage.model_validate(turn)
    assert asked.text == "Hm."
    assert asked.role == ("tool" if turn["role"] == "function" else turn["role"])


@pytest.mark.parametrize("role", ["system", "user", "assistant"])
def test_a_speaker_s_name_reaches_the_template(role: str) -> None:
    asked = ChatMessage.model_validate({"role": role, "content": "Hello", "name": "ada"})
    assert asked.turn.turn == {"role": role, "content": "Hello", "name": "ada"}


def test_two_reasonings_of_one_turn_are_refused() -> None:
    with pytest.raises(ValidationError, match="and reasoning_content differ"):
        ChatMessage.model_validate({"role": "assistant", "content": "", "reasoning": "a", "reasoning_content": "b"})


@pytest.mark.parametrize(
    "turn",
    [
        {"content": "a", "prefix": True},
        {"content": "a", "weight": 0.5},
        {"content": "a", "provider_specific_fields": {"signature": "x"}},
        {"content": "a", "function_call": "auto"},
        {"content": "a", "audio": {"id": "a1"}},
        {"content": "a", "thinking": "b", "reasoning": "c"},
    ],
)
def test_what_an_answer_cannot_be_sent_back_with_is_refused(turn: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match=list(turn)[1]):
        ChatMessage.model_validate({"role": "assistant"} | turn)


def test_a_field_of_a_turn_gets_no_advice_that_is_for_the_request(url: str) -> None:
    turn = {"role": "assistant", "content": "a", "function_call": "auto"}
    found = post(url, "/v1/chat/completions", {"model": "tiny", "messages": [turn, *SAY]})
    assert found.json()["error"]["message"] == "messages.0.function_call is not supported by this server; leave it out"


def test_requests_that_run_together_keep_their_own_settings(tiny: Path, url: str) -> None:
    client = openai.OpenAI(base_url=f"{url}/v1", api_key=TOKEN, max_retries=0)
    model, texts = library_model(tiny, None), TokenBytes(AutoTokenizer.from_pretrained(tiny))
    prompt, num_tokens = [5, 6, 7, 5], 24

    def expected(penalty: float) -> list[int]:
        """transformers' greedy tokens; its penalty counts the prompt too."""
        tokens: list[int] = model.generate(
            torch.tensor([prompt]),
            max_new_tokens=num_tokens,
            do_sample=False,
            repetition_penalty=penalty,
            eos_token_id=2,
            pad_token_id=0,
        )[0, len(prompt) :].tolist()
        return [token for token in tokens if token != 2]

    def ask(given: dict[str, Any]) -> list[str]:
        asked = {"model": "tiny", "prompt": prompt, "temperature": 0, "max_tokens": num_tokens, "logprobs": 0} | given
        return list(client.completions.create(**asked).choices[0].logprobs.tokens)

    varied = expected(1.7)
    settings: list[dict[str, Any]] = [
        {},
        {"extra_body": {"repetition_penalty": 1.7}},
        {"extra_body": {"repetition_penalty": 0.5}},
        {"frequency_penalty": 1.5},
        {"presence_penalty": 2.0},
        {"extra_body": {"repetition_penalty": 1.7, "stop_token_ids": [varied[2]]}},
        {"extra_body": {"min_p": 1.0}, "temperature": 1.5},  # only the likeliest token is left
    ]
    alone = [ask(given) for given in settings]
    with ThreadPoolExecutor(len(settings)) as pool:
        assert list(pool.map(ask, settings)) == alone
    for found, penalty in zip(alone, (1.0, 1.7, 0.5), strict=False):
        assert found == [texts.text(token) for token in expected(penalty)]
    assert alone[5] == alone[1][: varied.index(varied[2])]
    assert alone[6] == alone[0]
    assert all(alone[place] != alone[0] for place in (1, 3, 4, 5))
