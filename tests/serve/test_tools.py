"""Tools in a request, calls and reasoning in its answer, whole and streamed, as the official client reads them."""

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import pytest
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from openai.types.chat.chat_completion import Choice
from pydantic import BaseModel
from transformers import AutoTokenizer

from graftline.data.answer_parts import CallFormat, Tags
from graftline.data.records import Record, RecordPlace
from graftline.data.rows import to_row
from graftline.data.template import encode_prompt
from graftline.serve import guidance
from graftline.serve.app import Server
from graftline.serve.catalog import Catalog
from graftline.serve.scheduler import Limits, Scheduler
from graftline.serve.served_base import Base, Runtime
from tests.data import chat_templates
from tests.serve.conftest import run
from tests.serve.test_requests import unknown_fields
from tests.tiny import make_tiny_llama

SCHEMA = {
    "type": "object",
    "properties": {"city": {"enum": ["Oslo", "Rome"]}, "days": {"type": "integer", "minimum": 1, "maximum": 9}},
    "required": ["city", "days"],
    "additionalProperties": False,
}
WEATHER = {"type": "function", "function": {"parameters": SCHEMA, "name": "weather", "description": "How warm"}}
NOW = {"type": "function", "function": {"name": "now"}}
SAY = [{"role": "user", "content": "Is it cold in Oslo?"}]
MARKERS = ("[TOOL_CALLS]", "[ARGS]")
ARGUMENTS = '{"city": "Oslo", "days": 3}'
CALL = '{"name": "weather", "arguments": ' + ARGUMENTS + "}"
REASONED = f"<think>\nThey ask about Oslo.\n</think>\n\nLet me look.\n<tool_call>\n{CALL}\n</tool_call>"
_OPENING = "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n"
THINKS = chat_templates.QWEN3.replace(_OPENING, _OPENING + "<think>\\n")


@pytest.fixture(scope="module")
def catalog(runtime: Runtime, tmp_path_factory: pytest.TempPathFactory) -> Catalog:
    """``qwen``: tags; ``thinks``: its prompt opens the reasoning; ``mistral``: special tokens."""
    catalog = Catalog()
    templates = {"qwen": chat_templates.QWEN3, "thinks": THINKS, "mistral": chat_templates.MISTRAL_TOOLS}
    for name, template in templates.items():
        folder = make_tiny_llama(
            tmp_path_factory.mktemp("tools") / name, num_hidden_layers=1, max_position_embeddings=2048
        )
        tokenizer = AutoTokenizer.from_pretrained(folder)
        if name == "mistral":
            tokenizer.add_special_tokens({"additional_special_tokens": list(MARKERS)})
        tokenizer.chat_template = template
        tokenizer.save_pretrained(folder)
        catalog.add_base(name, Base(folder, runtime))
    return catalog


@pytest.fixture(scope="module")
def url(catalog: Catalog) -> Iterator[str]:
    with run(Server(catalog, Scheduler(Limits(max_batch=4, piece_tokens=256)))) as address:
        yield address


@pytest.fixture
def client(url: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)


class Says:
    """A constraint that lets only one text be said: a model that was trained would say it by itself."""

    def __init__(self, tokens: list[int]) -> None:
        self._tokens = tokens

    def allowed(self, num_tokens: int) -> np.ndarray:
        allowed_V = np.zeros(num_tokens, bool)
        allowed_V[self._tokens[0]] = True
        return allowed_V

    def accept(self, token: int) -> None:
        assert token == self._tokens.pop(0)


@pytest.fixture
def says(catalog: Catalog, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Make every model say a text, and end."""

    def say(text: str) -> None:
        def constraint(body: Any, served: Any, *given: Any) -> Says:
            tokenizer = served.base.tokenizer
            return Says([*tokenizer(text, add_special_tokens=False).input_ids, tokenizer.eos_token_id])

        monkeypatch.setattr(guidance, "_constraint", constraint)
        monkeypatch.setattr(guidance, "AfterReasoning", lambda inner, *given: inner)

    return say


def asked(**more: Any) -> dict[str, Any]:
    return {"model": "qwen", "messages": SAY, "tools": [WEATHER, NOW], "temperature": 0, "max_tokens": 300} | more


def post(url: str, route: str, body: dict[str, Any]) -> httpx.Response:
    return httpx.post(f"{url}{route}", json=body, timeout=60)


def streamed(client: openai.OpenAI, **body: Any) -> tuple[dict[str, Any], str, list[ChatCompletionChunk]]:
    """A stream's message put together, why it ended, and its chunks."""
    chunks = list(client.chat.completions.create(**body, stream=True, stream_options={"include_usage": True}))
    message: dict[str, Any] = {"content": "", "reasoning_content": "", "tool_calls": []}
    for chunk in chunks:
        for choice in chunk.choices:
            delta = choice.delta.model_dump()
            message["content"] += delta["content"] or ""
            message["reasoning_content"] += delta.get("reasoning_content") or ""
            for call in delta["tool_calls"] or ():
                assert call["index"] == len(message["tool_calls"])
                message["tool_calls"].append((call["function"]["name"], call["function"]["arguments"]))
    (reason,) = [choice.finish_reason for chunk in chunks for choice in chunk.choices if choice.finish_reason]
    return message, reason, chunks


def of(choice: Choice) -> dict[str, Any]:
    """A whole answer's message, as `streamed` gives it."""
    message = choice.message.model_dump()
    return {
        "content": message["content"] or "",
        "reasoning_content": message.get("reasoning_content") or "",
        "tool_calls": [(c["function"]["name"], c["function"]["arguments"]) for c in message["tool_calls"] or ()],
    }


@pytest.mark.parametrize(
    ("model", "text", "expected"),
    [
        ("qwen", REASONED, ("Let me look.", "They ask about Oslo.", 1)),
        ("qwen", f"<tool_call>{CALL}</tool_call>\n<tool_call>{CALL}</tool_call>", ("", "", 2)),
        ("qwen", "It is é😀 cold.\n", ("It is é😀 cold.\n", "", 0)),
        ("thinks", "hm\n</think>\n\nYes.", ("Yes.", "hm", 0)),
        ("mistral", f"[TOOL_CALLS][{CALL}]", ("", "", 1)),
        ("mistral", f"Let me look. [TOOL_CALLS]weather[ARGS]{ARGUMENTS}", ("Let me look.", "", 1)),
    ],
)
def test_reasoning_words_and_calls_are_apart_whole_and_streamed(
    model: str, text: str, expected: tuple[str, str, int], says: Any, client: openai.OpenAI
) -> None:
    says(text)
    whole = client.chat.completions.create(**asked(model=model))
    assert [name for name in unknown_fields(whole) if not name.endswith("reasoning_content")] == []
    message, reason, chunks = streamed(client, **asked(model=model))
    content, reasoning, num_calls = expected
    wanted = {
        "content": content,
        "reasoning_content": reasoning,
        "tool_calls": [("weather", ARGUMENTS)] * num_calls,
    }
    assert of(whole.choices[0]) == message == wanted
    assert whole.choices[0].finish_reason == reason == ("tool_calls" if num_calls else "stop")
    assert whole.choices[0].message.content == (content or None)
    assert chunks[-1].usage == whole.usage
    assert [n for chunk in chunks for n in unknown_fields(chunk) if not n.endswith("reasoning_content")] == []
    ids = [call.id for call in whole.choices[0].message.tool_calls or ()]
    assert len(set(ids)) == num_calls
    assert all(len(one) == 9 and one.isalnum() for one in ids)


def test_without_tools_what_looks_like_a_call_is_words(says: Any, client: openai.OpenAI) -> None:
    says(REASONED)
    for body in (asked(tools=[]), asked(tool_choice="none")):
        choice = client.chat.completions.create(**body).choices[0]
        assert choice.finish_reason == "stop"
        assert of(choice)["content"] == f"Let me look.\n<tool_call>\n{CALL}\n</tool_call>"
        assert of(choice)["tool_calls"] == []


def test_reasoning_can_be_left_out_of_the_answer(says: Any, client: openai.OpenAI) -> None:
    says(REASONED)
    body = asked(extra_body={"include_reasoning": False})
    assert of(client.chat.completions.create(**body).choices[0])["reasoning_content"] == ""
    assert streamed(client, **body)[0]["reasoning_content"] == ""


def test_one_call_where_parallel_ones_are_not_wanted(says: Any, client: openai.OpenAI) -> None:
    says(f"<tool_call>{CALL}</tool_call>\n<tool_call>{CALL}</tool_call>")
    body = asked(parallel_tool_calls=False)
    assert len(of(client.chat.completions.create(**body).choices[0])["tool_calls"]) == 1
    assert len(streamed(client, **body)[0]["tool_calls"]) == 1


def test_an_answer_that_is_cut_ends_by_its_length_and_shows_what_there_is(says: Any, client: openai.OpenAI) -> None:
    says(REASONED)
    for num_tokens in (3, 60, 110):
        body = asked(max_tokens=num_tokens)
        whole, (message, reason, _) = client.chat.completions.create(**body), streamed(client, **body)
        assert whole.choices[0].finish_reason == reason == "length"
        assert of(whole.choices[0]) == message
        assert message["tool_calls"] == []
        assert whole.usage is not None
        assert whole.usage.completion_tokens == num_tokens


def test_logprobs_are_of_every_token_that_was_generated(says: Any, client: openai.OpenAI) -> None:
    says(REASONED)
    body = asked(logprobs=True)
    whole = client.chat.completions.create(**body)
    assert whole.choices[0].logprobs is not None
    tokens = [one.token for one in whole.choices[0].logprobs.content or ()]
    assert "".join(tokens) == REASONED
    _, _, chunks = streamed(client, **body)
    found = [t.token for c in chunks for o in c.choices if o.logprobs for t in o.logprobs.content or ()]
    assert found == tokens


CONVERSATION: list[dict[str, Any]] = [
    *SAY,
    {
        "role": "assistant",
        "content": None,
        "reasoning_content": "They ask.",
        "tool_calls": [
            {"id": "abcdefghi", "type": "function", "function": {"name": "weather", "arguments": ARGUMENTS}}
        ],
    },
    {"role": "tool", "tool_call_id": "abcdefghi", "content": "12 °C"},
]


@pytest.mark.parametrize("model", ["qwen", "thinks", "mistral"])
def test_a_conversation_with_tools_is_rendered_as_its_training_row_is(model: str, url: str, catalog: Catalog) -> None:
    assert THINKS != chat_templates.QWEN3
    place = RecordPlace("rows.jsonl", "line", 1)
    final = {"role": "assistant", "content": "Yes."}
    row = to_row(Record(place, {"messages": [*CONVERSATION, final], "tools": [WEATHER, NOW]}), "messages")
    tokenizer = catalog.resolve(model).base.tokenizer
    expected = encode_prompt(row, tokenizer, template="tokenizer")
    body = {"model": model, "messages": CONVERSATION, "tools": [WEATHER, NOW]}
    shown = post(url, "/tokenize", body)
    assert shown.status_code == 200, shown.text
    assert shown.json()["tokens"] == expected
    usage = post(url, "/v1/chat/completions", body | {"max_tokens": 1}).json()["usage"]
    assert usage["prompt_tokens"] == len(expected)
    text = post(url, "/detokenize", {"model": model, "tokens": expected}).json()["prompt"]
    assert text == tokenizer.decode(expected)
    assert '"parameters": {"type": "object"' in text
    assert text.index('"parameters"') < text.index('"name": "weather"')  # in the order in which they were sent


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"tools": [WEATHER, WEATHER]}, "tools"),
        ({"tools": [WEATHER | {"type": "custom"}]}, "tools.0.type"),
        ({"tools": [{"type": "function", "function": {"name": "two words"}}]}, "tools.0.function.name"),
        ({"tools": [{"type": "function", "function": {"name": "f", "parameters": []}}]}, "tools.0.function.parameters"),
        ({"tools": "weather"}, "tools"),
        ({"tools": [NOW] * 129}, "tools"),
        ({"tool_choice": "always"}, "tool_choice"),
        ({"tool_choice": {"type": "function", "function": {"name": "unknown"}}}, "tool_choice"),
        ({"tool_choice": {"type": "function"}}, "tool_choice"),
        ({"tool_choice": "required", "tools": []}, "tool_choice"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"parallel_tool_calls": "no"}, "parallel_tool_calls"),
        ({"messages": [*SAY, {"role": "assistant"}]}, "messages.1.content"),
        ({"messages": [SAY[0] | {"reasoning_content": "hm"}]}, "messages.0.reasoning_content"),
        ({"messages": [SAY[0] | {"tool_call_id": "a"}]}, "messages.0.tool_call_id"),
        (
            {
                "messages": [
                    *SAY,
                    {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "[1]"}}]},
                ]
            },
            "messages.1.tool_calls.0.function.arguments",
        ),
        (
            {
                "model": "mistral",
                "messages": [
                    *CONVERSATION[:1],
                    CONVERSATION[1] | {"tool_calls": [CONVERSATION[1]["tool_calls"][0] | {"id": "call_1"}]},
                ],
            },
            "messages",
        ),
    ],
)
def test_what_is_wrong_with_tools_is_named(change: dict[str, Any], param: str, url: str) -> None:
    response = post(url, "/v1/chat/completions", asked(**change))
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert error["param"] == param
    assert error["message"].startswith(param)
    assert error["type"] == "invalid_request_error"


def test_a_template_is_told_what_it_reads_and_the_rest_is_refused_by_name(url: str, catalog: Catalog) -> None:
    base, body = catalog.resolve("qwen").base, {"model": "qwen", "messages": SAY, "max_tokens": 1}
    off: dict[str, Any] = {"chat_template_kwargs": {"enable_thinking": False}}
    counts, plain = list[int](), dict[str, Any]()
    for more in (plain, off):
        shown = httpx.post(f"{url}/tokenize", json={"model": "qwen", "messages": SAY} | more).json()
        answered = httpx.post(f"{url}/v1/chat/completions", json=body | more).json()
        assert answered["usage"]["prompt_tokens"] == shown["count"]
        counts.append(shown["count"])
        assert base.tokenizer.decode(shown["tokens"]).endswith("</think>\n\n") == (more == off)
    assert counts[1] > counts[0]
    for effort, expected in (("none", counts[1]), ("medium", counts[0])):  # OpenAI's name for it, and its default
        answered = httpx.post(f"{url}/v1/chat/completions", json=body | {"reasoning_effort": effort}).json()
        assert answered["usage"]["prompt_tokens"] == expected
    refused = httpx.post(f"{url}/v1/chat/completions", json=body | {"reasoning_effort": "high"})
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "reasoning_effort")
    wrong: dict[str, Any] = {"chat_template_kwargs": {"enable_thinking": False, "enable_think": True, "tokenize": True}}
    for route, model in (("/v1/chat/completions", "qwen"), ("/tokenize", "qwen"), ("/tokenize", "mistral")):
        refused = httpx.post(f"{url}{route}", json={"model": model, "messages": SAY} | wrong)
        error = refused.json()["error"]
        assert (refused.status_code, error["param"]) == (400, "chat_template_kwargs")
        assert "does not read enable_think, " in error["message"]
        assert error["message"].endswith("it reads " + ("enable_thinking" if model == "qwen" else "no such arguments"))
    assert httpx.post(f"{url}/tokenize", json={"model": "qwen", "prompt": "a"} | off).status_code == 400


def test_a_template_without_tools_refuses_them_instead_of_leaving_them_out(tiny: Path, runtime: Runtime) -> None:
    catalog = Catalog()
    catalog.add_base("plain", Base(tiny, runtime))
    with run(Server(catalog, Scheduler())) as url:
        refused = post(url, "/v1/chat/completions", asked(model="plain"))
        assert refused.status_code == 400
        assert refused.json()["error"]["param"] == "tools"
        assert (
            post(url, "/v1/chat/completions", asked(model="plain", tool_choice="none", max_tokens=1)).status_code == 200
        )
        called = post(url, "/v1/chat/completions", {"model": "plain", "messages": CONVERSATION})
        assert called.status_code == 400
        assert called.json()["error"]["param"] == "messages"
        unknown = post(url, "/detokenize", {"model": "plain", "tokens": [100_000]})
        assert unknown.status_code == 400
        assert unknown.json()["error"]["param"] == "tokens"


def test_without_the_package_a_call_is_read_but_not_enforced(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "llguidance", None)
    assert post(url, "/v1/chat/completions", asked(max_tokens=2)).status_code == 200
    strict = WEATHER | {"function": WEATHER["function"] | {"strict": True}}
    for change, param in (({"tool_choice": "required"}, "tool_choice"), ({"tools": [strict]}, "tools")):
        response = post(url, "/v1/chat/completions", asked(**change))
        assert response.status_code == 400
        assert response.json()["error"]["param"] == param
        assert "graftline[structured]" in response.json()["error"]["message"]


@pytest.mark.parametrize("model", ["qwen", "thinks", "mistral"])
def test_a_call_that_is_required_keeps_its_schema_at_any_temperature(model: str, client: openai.OpenAI) -> None:
    pytest.importorskip("llguidance")
    named = {"type": "function", "function": {"name": "weather"}}

    def ask(seed: int) -> Choice:
        choice = "required" if seed % 2 else named
        body = asked(model=model, temperature=2.0, seed=seed, tool_choice=choice)
        return client.chat.completions.create(**body).choices[0]

    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(ask, range(4)))
    for seed, choice in enumerate(found):
        if model == "thinks":  # this one was never taught to close the reasoning that its prompt opens
            assert choice.finish_reason == "length"
            assert of(choice)["reasoning_content"]
            continue
        assert choice.finish_reason == "tool_calls"
        ((name, arguments),) = of(choice)["tool_calls"]
        assert of(choice)["content"] == ""
        assert name == "weather" or (seed % 2 and name == "now")
        if name == "now":
            assert arguments == "{}"  # without parameters there are no arguments
        else:
            value = json.loads(arguments)
            assert value.keys() == {"city", "days"}
            assert value["city"] in ("Oslo", "Rome")
            assert 1 <= value["days"] <= 9


def test_the_client_s_own_stream_puts_a_call_together_and_parses_it(says: Any, client: openai.OpenAI) -> None:
    class weather(BaseModel):  # noqa: N801 - the tool's name
        city: str
        days: int

    says(REASONED)
    body = asked(tools=[openai.pydantic_function_tool(weather)])
    with client.chat.completions.stream(**body) as stream:
        final = stream.get_final_completion()
    (call,) = final.choices[0].message.tool_calls or ()
    assert call.function.parsed_arguments == weather(city="Oslo", days=3)
    assert final.choices[0].message.content == "Let me look."
    assert final.choices[0].finish_reason == "tool_calls"


STYLES = {
    "tags": ("<tool_call>", "</tool_call>", ('<tool_call>\n{"name": "', '", "arguments": ', "}\n</tool_call>")),
    "bare": ("", "", ('{"name": "', '", "parameters": ', "}")),
    "special": ("[TOOL_CALLS]", "", ('[TOOL_CALLS][{"name": "', '", "arguments": ', ', "id": "a1b2c3d4e"}]')),
}


@pytest.mark.parametrize("style", STYLES)
def test_a_grammar_of_calls_takes_calls_of_the_tools_and_nothing_like_them(style: str, catalog: Catalog) -> None:
    pytest.importorskip("llguidance")
    base = catalog.resolve("mistral").base
    opens, closes, written = STYLES[style]
    end = base.tokenizer.eos_token_id

    def takes(text: str, *, must_call: bool) -> bool:
        form = CallFormat(Tags(opens, closes), written)
        schemas = {"weather": SCHEMA, "now": {}}
        constraint = base.grammars.calls(form, schemas, frozenset({end}), must_call=must_call)
        for token in [*base.tokenizer(text, add_special_tokens=False).input_ids, end]:
            if not constraint.allowed(base.session.layout.vocab_size)[token]:
                return False
            constraint.accept(token)
        return True

    def call(name: str, arguments: str) -> str:
        return written[0] + name + written[1] + arguments + written[2]

    good, now = call("weather", '{"city":"Oslo","days":3}'), call("now", "{}")
    for must_call in (True, False):
        assert takes(good, must_call=must_call)
        assert takes(now, must_call=must_call)
        for wrong in (call("weather", '{"city":"Paris","days":3}'), call("weather", "{}"), call("nobody", "{}")):
            assert not takes(wrong, must_call=must_call)
        assert takes("It is cold.", must_call=must_call) is not must_call
        assert takes("", must_call=must_call) is not must_call
        assert takes(f"So: {good}", must_call=must_call) is not must_call
    assert takes(f"{good}\n{now} Done.", must_call=False) is bool(opens)


def test_strict_tools_are_enforced_where_the_model_chooses(client: openai.OpenAI) -> None:
    pytest.importorskip("llguidance")
    strict = WEATHER | {"function": {**WEATHER["function"], "strict": True}}
    for model in ("qwen", "mistral"):
        choice = client.chat.completions.create(**asked(model=model, tools=[strict], max_tokens=8)).choices[0]
        assert choice.finish_reason in ("length", "stop")


def test_bodies_of_the_client_s_own_types_are_taken(says: Any, client: openai.OpenAI) -> None:
    """An answer's message is sent back as it came, as agents do."""
    says(REASONED)
    first = client.chat.completions.create(**asked()).choices[0].message
    assert first.tool_calls is not None
    result = {"role": "tool", "tool_call_id": first.tool_calls[0].id, "content": "12 °C"}
    says("Cold.")
    again = client.chat.completions.create(**asked(messages=[*SAY, first, result]))
    assert ChatCompletion.model_validate(again.model_dump()).choices[0].message.content == "Cold."
