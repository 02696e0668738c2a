"""Classes and embeddings as the official openai client and vLLM's clients see them, against our own layers."""

import asyncio
import concurrent.futures
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import pytest
import torch

from graftline.adapters.class_head import class_head_of
from graftline.data.rows import Message
from graftline.serve import pooled
from graftline.serve.catalog import Catalog
from tests.serve.conftest import TOKEN, library_model, make_adapter
from tests.serve.test_app import AUTH

LABELS = ("animal", "plant", "person")
TEXTS = ["a tall plant with green leaves", "a person", "an animal that lives in water and eats plants " * 3]


@pytest.fixture
def classes(catalog: Catalog, tiny: Path, tmp_path: Path) -> Path:
    """Served under the name ``classes``."""
    folder = make_adapter(tiny, tmp_path / "classes", labels=LABELS)
    catalog.load_adapter("classes", folder)
    return folder


@pytest.fixture
def client(url: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{url}/v1", api_key=TOKEN, max_retries=0)


def hidden_of(catalog: Catalog, name: str, folder: Path | None, ids: list[int]) -> tuple[Any, torch.Tensor]:
    model = library_model(catalog.resolve(name).base.folder, folder)
    with torch.no_grad():
        return model, model.base_model(input_ids=torch.tensor([ids]), use_cache=False).last_hidden_state[0]


def probabilities(catalog: Catalog, folder: Path, ids: list[int]) -> list[float]:
    model, hidden_TH = hidden_of(catalog, "classes", folder, ids)
    with torch.no_grad():
        found: list[float] = class_head_of(model)(hidden_TH[-1:])[0].softmax(-1).tolist()
    return found


def ask(url: str, path: str, **body: Any) -> httpx.Response:
    return httpx.post(f"{url}{path}", json=body, headers=AUTH, timeout=30)


@pytest.mark.parametrize(("name", "pooling"), [("tiny", None), ("tiny", "last"), ("classes", None), ("dora", "mean")])
def test_embeddings_are_pooled_hidden_states_of_length_one(
    name: str, pooling: str | None, client: openai.OpenAI, catalog: Catalog, classes: Path, adapters: dict[str, Path]
) -> None:
    more = {"pooling": pooling} if pooling else {}
    found = client.embeddings.create(model=name, input=TEXTS, extra_body=more)  # the client asks for base64
    as_floats = client.embeddings.create(model=name, input=TEXTS, encoding_format="float", extra_body=more)
    base = catalog.resolve(name).base
    ids = [base.encode_text(text) for text in TEXTS]
    is_last = (pooling or ("last" if name == "classes" else "mean")) == "last"
    for at, prompt in enumerate(ids):
        _, hidden_TH = hidden_of(catalog, name, classes if name == "classes" else adapters.get(name), prompt)
        vector = (hidden_TH[-1] if is_last else hidden_TH.mean(0)).numpy()
        np.testing.assert_allclose(found.data[at].embedding, vector / np.linalg.norm(vector), atol=1e-5)
        np.testing.assert_allclose(found.data[at].embedding, as_floats.data[at].embedding, atol=1e-7)
        assert (found.data[at].index, found.data[at].object) == (at, "embedding")
    assert found.usage.prompt_tokens == found.usage.total_tokens == sum(map(len, ids))
    assert (found.model, found.object) == (name, "list")


@pytest.mark.parametrize("path", ["/v1/classify", "/classify"])
def test_classes_of_texts_are_those_of_the_prompt_as_training_rendered_it(
    path: str, url: str, catalog: Catalog, classes: Path
) -> None:
    served = catalog.resolve("classes")
    answer = ask(url, path, model="classes", input=TEXTS).json()
    assert (answer["object"], answer["model"]) == ("list", "classes")
    assert answer["id"].startswith("classify-")
    for text, found in zip(TEXTS, answer["data"], strict=True):
        ids = served.base.encode_chat([Message("user", text, supervised=False)], served.template)
        expected = probabilities(catalog, classes, ids)
        assert found["probs"] == pytest.approx(expected, abs=1e-5)
        assert found["label"] == LABELS[int(np.argmax(expected))]
        assert found["num_classes"] == 3
    assert [one["index"] for one in answer["data"]] == [0, 1, 2]
    assert answer["usage"]["completion_tokens"] == 0


def test_a_conversation_and_token_ids_have_the_class_of_the_text(url: str, catalog: Catalog, classes: Path) -> None:
    served = catalog.resolve("classes")
    ids = served.base.encode_chat([Message("user", TEXTS[0], supervised=False)], served.template)
    asked: list[dict[str, Any]] = [
        {"input": TEXTS[0]},
        {"input": ids},
        {"input": [ids]},
        {"messages": [{"role": "user", "content": TEXTS[0]}]},
    ]
    found = [ask(url, "/v1/classify", model="classes", **body).json()["data"] for body in asked]
    assert all(one == [found[0][0]] for one in found)


def test_requests_that_cannot_be_answered_say_what_can(url: str, client: openai.OpenAI, classes: Path) -> None:
    cases = [
        ("/v1/classify", {"model": "tiny", "input": "a"}, "has no head for classes"),
        ("/v1/classify", {"model": "classes"}, "input or messages is needed"),
        ("/v1/classify", {"model": "classes", "input": []}, "takes a text or a list"),
        ("/v1/classify", {"model": "classes", "input": ["a"] * 257}, "1 to 256"),
        ("/v1/embeddings", {"model": "tiny", "input": ""}, "none empty"),
        ("/v1/embeddings", {"model": "tiny"}, "input"),
        ("/v1/embeddings", {"model": "tiny", "input": [99_999]}, "not in the vocabulary"),
        ("/v1/embeddings", {"model": "tiny", "input": [5] * 513}, "expected 1 to 512"),
        ("/v1/embeddings", {"model": "tiny", "input": "a", "dimensions": 8}, "dimensions is not supported"),
        ("/v1/completions", {"model": "classes", "prompt": "a"}, "ask /v1/classify"),
    ]
    for path, body, message in cases:
        answer = ask(url, path, **body)
        assert answer.status_code == 400, body
        assert message in answer.json()["error"]["message"], body
    with pytest.raises(openai.NotFoundError):
        client.embeddings.create(model="nobody", input="a")
    listed = {model["id"]: model.get("labels") for model in httpx.get(f"{url}/v1/models", headers=AUTH).json()["data"]}
    assert (listed["classes"], listed["tiny"]) == (list(LABELS), None)


def test_reading_goes_on_beside_writing(url: str, client: openai.OpenAI, classes: Path) -> None:
    alone = ask(url, "/v1/classify", model="classes", input=TEXTS).json()["data"]
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        written = [
            pool.submit(client.completions.create, model="dora", prompt=TEXTS[0], max_tokens=40, temperature=0)
            for _ in range(4)
        ]
        read = [pool.submit(ask, url, "/v1/classify", model="classes", input=TEXTS) for _ in range(4)]
        assert all(one.result().json()["data"] == alone for one in read)
        assert len({one.result().choices[0].text for one in written}) == 1


def test_prompts_share_steps_of_bounded_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pooled, "STEP_TOKENS", 20)
    monkeypatch.setattr(pooled, "STEP_ROWS", 3)
    prompts = [[1] * length for length in (2, 30, 5, 9, 2, 2, 9)]
    steps = list(pooled._steps(prompts))
    assert steps == [[1], [3, 6], [2, 0, 4], [5]]


def test_of_too_many_readers_the_last_are_told_to_come_back(classes: Path, catalog: Catalog) -> None:
    reader, served = pooled.Reader(max_waiting=1), catalog.resolve("classes")

    async def both() -> list[Any]:
        return await asyncio.gather(*(reader.read(served, [[5]], "last") for _ in range(2)), return_exceptions=True)

    first, second = asyncio.run(both())
    assert len(first) == 1
    assert "requests wait already" in str(second)
