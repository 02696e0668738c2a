"""Answers keep the JSON schema that was asked for, at any temperature, each beside others that do not."""

import builtins
import json
from typing import Any

import httpx
import numpy as np
import openai
import pytest

from graftline.serve.app import Server
from graftline.serve.generation import Sampler, SamplingParams
from graftline.serve.grammar import GrammarError
from tests.serve.conftest import TOKEN

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
    chosen = [sampler.choose(logits).token for _ in range(20)]
    assert set(chosen) <= {3, 8}
    assert constraint.accepted == chosen
    assert temperature or set(chosen) == {8}


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


@pytest.mark.parametrize("temperature", [0.0, 1.0, 2.0])
@pytest.mark.parametrize("model", ["tiny", "lora"])
def test_an_answer_keeps_its_schema(model: str, temperature: float, url: str) -> None:
    pytest.importorskip("llguidance")
    for seed in range(4):
        answer = client_of(url).chat.completions.create(
            model=model, messages=SAY, temperature=temperature, seed=seed, max_tokens=200, response_format=FORMAT
        )
        assert answer.choices[0].finish_reason == "stop"
        value = json.loads(answer.choices[0].message.content)
        assert value.keys() == SCHEMA["properties"].keys()
        assert value["label"] in ("plant", "animal", "é😀")
        assert 0 <= value["count"] <= 99
        assert 1 <= len(value["tags"]) <= 3


def test_json_mode_begins_an_object(url: str) -> None:
    pytest.importorskip("llguidance")
    answer = client_of(url).chat.completions.create(
        model="tiny", messages=SAY, max_tokens=5, response_format={"type": "json_object"}
    )
    assert answer.choices[0].message.content.startswith("{")


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
