"""Answers keep the JSON schema that was asked for, at any temperature, each beside others that do not."""

import builtins
import json
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import numpy as np
import openai
import pytest

from graftline.serve.app import Server
from graftline.serve.generation import Sampler, SamplingParams
from graftline.serve.grammar import AfterReasoning, GrammarError
from tests.serve.conftest import TOKEN
from tests.serve.test_sampling import choose

AUTH = {"authorization": f"Bearer {TOKEN}"}
SAY = [{"role": "user", "content": "a tall plant"}]
SCHEMA = {
    "type": "object",
    "properties": {
        "label": {"enum": ["plant", "animal", "é😀"]},
        "count": {"type": "integer", "minimum": 0, "maximum": 99},
        "tags": {"type": "array", "items": {"enum": ["a", "b"]}, "minItems": 1, "maxItems": 3},
    },
    "required": ["label", "count", "tags"],
    "additionalProperties": False,
}
FORMAT = {"type": "json_schema", "json_schema": {"name": "answer", "schema": SCHEMA, "strict": True}}


class AllowsOnly:
    """A constraint that is as simple as one can be."""

    def __init__(self, *tokens: int) -> None:
        self._tokens, self.accepted = list(tokens), list[int]()

    def allowed(self, num_tokens: int) -> np.ndarray:
        allowed_V = np.zeros(num_tokens, bool)
        allowed_V[self._tokens] = True
        return allowed_V

    def accept(self, token: int) -> None:
        self.accepted.append(token)


@pytest.mark.parametrize("temperature", [0.0, 1.5])
def test_only_what_is_allowed_is_chosen_and_each_choice_is_told(temperature: float) -> None:
    logits = np.linspace(0, 5, 40).astype(np.float32)
    constraint = AllowsOnly(3, 8)
    sampler = Sampler(SamplingParams(temperature, top_p=0.9, seed=0), constraint=constraint)
    chosen = [choose(sampler, logits).token for _ in range(20)]
    assert set(chosen) <= {3, 8}
    assert constraint.accepted == chosen
    assert temperature or set(chosen) == {8}


def test_a_constraint_begins_behind_the_reasoning(server: Server) -> None:
    base = server.catalog.resolve("tiny").base
    inner, stop = AllowsOnly(5), frozenset({base.tokenizer.eos_token_id})
    constraint = AfterReasoning(inner, "</think>", base.token_bytes, stop)
    for token in base.tokenizer("hm </thin </think>", add_special_tokens=False).input_ids:
        # Whatever it thinks, it must not end before its answer.
        assert set(np.flatnonzero(~constraint.allowed(512))) == stop
        constraint.accept(token)
    assert inner.accepted == []
    constraint.accept(5)
    assert inner.accepted == [5]
    assert set(np.flatnonzero(constraint.allowed(512))) == {5}


def test_without_the_package_a_schema_is_refused_and_the_rest_is_served(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = builtins.__import__

    def missing(name: str, *given: Any, **more: Any) -> Any:
        if name == "llguidance":
            raise ImportError(name)
        return original(name, *given, **more)

    monkeypatch.setattr(builtins, "__import__", missing)
    body = {"model": "tiny", "messages": SAY, "max_tokens": 2}
    for kind in ({"type": "json_object"}, FORMAT):
        response = httpx.post(f"{url}/v1/chat/completions", json=body | {"response_format": kind}, headers=AUTH)
        assert response.status_code == 400
        assert "graftline[structured]" in response.json()["error"]["message"]
    text = httpx.post(f"{url}/v1/chat/completions", json=body | {"response_format": {"type": "text"}}, headers=AUTH)
    assert text.status_code == 200


def test_a_grammar_that_fails_ends_its_own_answer_alone(
    url: str, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Fails(AllowsOnly):
        def accept(self, token: int) -> None:
            raise GrammarError("too many states")

    grammars = server.catalog.resolve("tiny").base.grammars
    monkeypatch.setattr(grammars, "constraint", lambda schema, stop: Fails(5))
    body = {"model": "tiny", "messages": SAY, "max_tokens": 4}
    failed = httpx.post(f"{url}/v1/chat/completions", json=body | {"response_format": FORMAT}, headers=AUTH)
    assert failed.status_code == 500
    assert httpx.post(f"{url}/v1/chat/completions", json=body, headers=AUTH).status_code == 200


def client_of(url: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{url}/v1", api_key=TOKEN, max_retries=0)


def answered(url: str, *, stream: bool, **more: Any) -> tuple[str, str]:
    """An answer's text and why it ended."""
    body: dict[str, Any] = {"model": "tiny", "messages": SAY, "max_tokens": 200, "response_format": FORMAT} | more
    if not stream:
        choice = client_of(url).chat.completions.create(**body).choices[0]
        return choice.message.content or "", choice.finish_reason
    choices = [c for chunk in client_of(url).chat.completions.create(**body, stream=True) for c in chunk.choices]
    (reason,) = [choice.finish_reason for choice in choices if choice.finish_reason]
    return "".join(choice.delta.content or "" for choice in choices), reason


def check_kept(text: str) -> None:
    value = json.loads(text)
    assert value.keys() == SCHEMA["properties"].keys()
    assert value["label"] in ("plant", "animal", "é😀")
    assert 0 <= value["count"] <= 99
    assert 1 <= len(value["tags"]) <= 3


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("temperature", [0.0, 2.0])
@pytest.mark.parametrize("model", ["tiny", "lora"])
def test_answers_keep_their_schema_side_by_side(model: str, temperature: float, stream: bool, url: str) -> None:
    pytest.importorskip("llguidance")

    def ask(seed: int) -> tuple[str, str]:
        return answered(url, stream=stream, model=model, temperature=temperature, seed=seed)

    with ThreadPoolExecutor(4) as pool:
        for text, reason in pool.map(ask, range(4)):
            assert reason == "stop"
            check_kept(text)


@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_that_is_cut_says_so_and_one_that_is_stopped_too(stream: bool, url: str) -> None:
    pytest.importorskip("llguidance")
    text, reason = answered(url, stream=stream, max_tokens=9)
    assert reason == "length"
    with pytest.raises(json.JSONDecodeError):
        json.loads(text)
    stopped, reason = answered(url, stream=stream, stop=['"count"'])
    assert reason == "stop"
    assert '"label"' in stopped
    assert '"count"' not in stopped


def test_a_stop_token_of_one_request_changes_neither_its_grammar_nor_that_of_others(url: str, server: Server) -> None:
    pytest.importorskip("llguidance")
    tokenizer = server.catalog.resolve("tiny").base.tokenizer
    quote, number = (tokenizer.convert_tokens_to_ids(text) for text in ('"', "0"))
    for stops in ([quote], [number], [0, 1, number]):
        text, reason = answered(url, stream=False, temperature=0, extra_body={"stop_token_ids": stops})
        assert reason == "stop"
        if stops == [quote]:
            assert text == "{"  # it ended where its token came, and nowhere else
        elif not text.endswith(":"):
            check_kept(text)
        text, reason = answered(url, stream=False)
        assert reason == "stop"
        check_kept(text)


def test_json_mode_begins_an_object(url: str) -> None:
    pytest.importorskip("llguidance")
    text, _ = answered(url, stream=False, max_tokens=5, response_format={"type": "json_object"})
    assert text.startswith("{")


def test_plain_completions_keep_a_schema_too(url: str) -> None:
    pytest.importorskip("llguidance")
    choice = client_of(url).completions.create(
        model="tiny", prompt="a tall plant", max_tokens=200, extra_body={"response_format": FORMAT}
    )
    check_kept(choice.choices[0].text)


@pytest.mark.parametrize(
    "schema", [{"type": "nothing"}, {"type": "object", "unknownKeyword": 1, "not": {}}, {"$ref": "#/x"}]
)
def test_a_schema_that_cannot_be_kept_is_refused(schema: dict[str, Any], url: str) -> None:
    pytest.importorskip("llguidance")
    kind = {"type": "json_schema", "json_schema": {"name": "a", "schema": schema}}
    body = {"model": "tiny", "messages": SAY, "max_tokens": 4, "response_format": kind}
    response = httpx.post(f"{url}/v1/chat/completions", json=body, headers=AUTH)
    assert response.status_code == 400
    assert "response_format: this schema cannot be kept" in response.json()["error"]["message"]
    assert response.json()["error"]["param"] == "response_format"
