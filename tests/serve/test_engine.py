"""Scored through the server that serves: our own over HTTP, and a stand-in for vLLM, which never ran it."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import HTMLResponse, RedirectResponse, Response
from starlette.routing import Route
from transformers import PreTrainedTokenizerBase

from graftline.digest import of_json
from graftline.errors import EvaluationError
from graftline.evaluate.engine import KEY, Connection, connect, name_of
from graftline.evaluate.engine_difference import (
    compare_engines,
    engine_numbers,
    refuse_other_model,
    require_log_probabilities,
)
from graftline.evaluate.evaluation import EvaluationPlan, Prepared, answer_work, evaluate_model, prepare, score_prepared
from graftline.evaluate.scores import Scores, read_scores, write_scores
from graftline.retry import Retry
from graftline.settings.engine import Engine
from graftline.settings.model import Answers
from graftline.weights.model_folder import load_tokenizer, read_config
from tests.evaluate.test_evaluation import LABELS, ROWS
from tests.sections import evaluate_section, gate_section
from tests.serve.conftest import TOKEN, library_model
from tests.serve.vllm_stand_in import Process, StandIn

NAME = "pets"
TEXTS = ("Some general words about plants and animals.",)
ONCE = Retry(attempts=1)


@pytest.fixture(scope="module")
def plan() -> EvaluationPlan:
    section = evaluate_section(answers=Answers(max_new_tokens=4, max_rows=2))
    return EvaluationPlan(ROWS[:4], "none", LABELS, TEXTS, section)


@pytest.fixture(scope="module")
def tokenizer(tiny: Path) -> PreTrainedTokenizerBase:
    return load_tokenizer(tiny)


@pytest.fixture(scope="module")
def prepared(plan: EvaluationPlan, tokenizer: PreTrainedTokenizerBase) -> Prepared:
    return prepare(tokenizer, plan)


@pytest.fixture(scope="module")
def own(tiny: Path, adapters: dict[str, Path], plan: EvaluationPlan, tokenizer: PreTrainedTokenizerBase) -> Scores:
    """The adapter's scores by our own code."""
    return evaluate_model(library_model(tiny, adapters["lora"]), tokenizer, plan)


@pytest.fixture(scope="module")
def process(tiny: Path) -> Iterator[Process]:
    """One port; each test puts a stand-in with settings of its own behind it."""
    holder = Starlette()
    made = Process(holder)
    yield made
    made.stop()


@pytest.fixture
def vllm(tiny: Path, adapters: dict[str, Path], process: Process) -> StandIn:
    stand_in = StandIn(tiny)
    stand_in.loaded[NAME] = adapters["lora"]
    assert isinstance(process.app, Starlette)
    process.app.router.routes[:] = stand_in.app.router.routes
    return stand_in


@pytest.fixture
def engine(process: Process) -> Engine:
    return Engine(url=f"{process.url}/v1", model=NAME, concurrency=2)


def scored(connection: Connection, prepared: Prepared, base: Path) -> Scores:
    config, sections = read_config(base), connection.record.sections
    return score_prepared(prepared, load_tokenizer(base), config, connection.runner, only=sections)


@pytest.mark.parametrize("way", ["prompt_logprobs", "echo", "text"])
def test_a_server_that_computes_the_same_scores_the_same(
    way: str, vllm: StandIn, engine: Engine, prepared: Prepared, own: Scores, tiny: Path, tmp_path: Path
) -> None:
    vllm.gives_logprobs, vllm.gives_echo, vllm.takes_ids = way != "echo", True, way != "text"
    with connect(engine, NAME, load_tokenizer(tiny), prepared) as connection:
        found = scored(connection, prepared, tiny)
    record = connection.record
    assert (record.offers, record.takes_ids) == ("echo" if way == "echo" else "prompt_logprobs", way != "text")
    for ours, theirs in zip(own.items, found.items, strict=True):
        assert theirs.log_likelihoods == pytest.approx(ours.log_likelihoods, abs=1e-4)
        assert (theirs.item_id, theirs.chosen, theirs.stop) == (ours.item_id, ours.chosen, ours.stop)
    assert [one.nll for one in found.documents] == pytest.approx([one.nll for one in own.documents], abs=1e-3)
    assert [one.answer for one in found.answers] == [one.answer for one in own.answers]
    kept = Scores(own.template, labels=own.labels, items=found.items, served_by=record.as_json())
    write_scores(tmp_path / "scores.jsonl", kept)
    assert read_scores(tmp_path / "scores.jsonl") == kept
    assert engine_numbers(own, found)["engine_nll_difference"] < 1e-4


def test_whether_an_answer_would_end_is_read_from_the_likeliest_token(
    vllm: StandIn, engine: Engine, prepared: Prepared, tiny: Path
) -> None:
    def end_is_likeliest(answer: dict[str, Any]) -> dict[str, Any]:
        for position in answer["choices"][0]["prompt_logprobs"][1:]:
            position |= {str(token): {"logprob": 0.0} for token in prepared.stop_ids[:1]}
        return answer

    with connect(engine, NAME, load_tokenizer(tiny), prepared) as connection:
        vllm.spoil = lambda answer: end_is_likeliest(answer) if "prompt_logprobs" in answer["choices"][0] else answer
        assert all(item.stop for item in scored(connection, prepared, tiny).items)


def test_our_own_server_generates_the_same_answers_and_gives_no_log_probabilities(
    url: str,
    prepared: Prepared,
    own: Scores,
    tiny: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv(KEY, TOKEN)
    with connect(Engine(url=f"{url}/v1/", model="lora"), "lora", load_tokenizer(tiny), prepared) as connection:
        assert (connection.record.offers, connection.record.takes_ids) == ("generation", True)
        found = scored(connection, prepared, tiny)
    assert [(one.answer, one.stop) for one in found.answers] == [(one.answer, one.stop) for one in own.answers]
    assert not found.items


def test_gates_on_log_probabilities_are_refused_where_the_server_gives_none() -> None:
    gate = gate_section("exact_match", "higher", "non-inferiority", margin=0.1, against="base")
    section = evaluate_section(metric="exact_match", answers=Answers(max_new_tokens=4))
    require_log_probabilities(section, {"answers": gate}, "generation")
    needing = ("accuracy", "nll", "option_stop_rate", "forgetting_nll", "general_accuracy", "engine_nll_difference")
    for metric in needing:
        asked = {"task": gate.replace(metric=metric)}
        require_log_probabilities(section, asked, "echo")
        with pytest.raises(EvaluationError, match=rf"gate task \({metric}\); serve with one that does"):
            require_log_probabilities(section, asked, "generation")
    with pytest.raises(EvaluationError, match=r"evaluate\.metric \(accuracy\)"):
        require_log_probabilities(evaluate_section(), {"answers": gate}, "generation")
    with pytest.raises(EvaluationError, match="no answers are asked for"):
        require_log_probabilities(section.replace(answers=None), {"answers": gate}, "generation")


def _truncated(answer: dict[str, Any]) -> dict[str, Any]:
    choice = answer["choices"][0]
    return answer | {"choices": [choice | {"prompt_logprobs": choice["prompt_logprobs"][:-1]}]}


def _at_last(value: Any) -> Any:
    def spoil(answer: dict[str, Any]) -> dict[str, Any]:
        choice = answer["choices"][0]
        return answer | {"choices": [choice | {"prompt_logprobs": [*choice["prompt_logprobs"][:-1], value]}]}

    return spoil


def _all_zero(answer: dict[str, Any]) -> dict[str, Any]:
    for choice in answer["choices"]:
        for position in choice.get("prompt_logprobs") or ():
            for one in (position or {}).values():
                one["logprob"] = 0.0
    return answer


FAULTS: dict[str, tuple[Any, str]] = {
    "a page instead of JSON": (lambda answer: HTMLResponse("<html>"), "what is not JSON"),
    "JSON without an end": (lambda answer: HTMLResponse("[" * 100_000), "what is not JSON"),
    "a list": (lambda answer: [answer], "expected an object"),
    "no choices": (lambda answer: answer | {"choices": []}, "gave no completion"),
    "choices that are text": (lambda answer: answer | {"choices": ["x"]}, "gave no completion"),
    "no model": (lambda answer: {"choices": answer["choices"]}, "gave no completion"),
    "another model": (lambda answer: answer | {"model": "other"}, "answered for 'other'"),
    "one token more": (
        lambda answer: answer | {"usage": {"prompt_tokens": answer["usage"]["prompt_tokens"] + 1}},
        "tokenizes differently",
    ),
    "one log-probability less": (_truncated, "no whole log-probabilities"),
    "a position without": (_at_last(None), "no whole log-probabilities"),
    "other tokens": (_at_last({"511": {"logprob": -1.0}}), "no whole log-probabilities"),
    "not a number": (_at_last({str(token): {"logprob": "-Infinity"} for token in range(512)}), "not finite"),
    "a number without bound": (_at_last({str(token): {"logprob": 10**400} for token in range(512)}), "no whole log"),
    "a number above 0": (_at_last({str(token): {"logprob": 0.5} for token in range(512)}), "above 0 is no log-prob"),
    "zeros alone": (_all_zero, "every value is 0"),
    "a key is asked for": (lambda answer: Response(status_code=401), f"none is set: check the variable {KEY}"),
    "overload": (lambda answer: Response(status_code=503), "cannot be asked"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_an_answer_that_cannot_be_trusted_is_refused(
    fault: str, vllm: StandIn, engine: Engine, prepared: Prepared, tiny: Path
) -> None:
    vllm.spoil, message = FAULTS[fault]
    with (
        pytest.raises(EvaluationError, match=message),
        connect(engine, NAME, load_tokenizer(tiny), prepared, retry=ONCE),
    ):
        pass


def test_a_server_that_takes_text_must_say_how_many_tokens_it_made(
    vllm: StandIn, engine: Engine, prepared: Prepared, tiny: Path
) -> None:
    vllm.takes_ids, vllm.spoil = False, lambda answer: answer | {"usage": None}
    with (
        pytest.raises(EvaluationError, match="nothing shows that it tokenizes"),
        connect(engine, NAME, load_tokenizer(tiny), prepared),
    ):
        pass


def test_a_fault_in_the_middle_ends_the_scoring_and_a_passing_one_does_not(
    vllm: StandIn, engine: Engine, prepared: Prepared, tiny: Path
) -> None:
    answers = {"left": 2}

    def overloaded_twice(answer: dict[str, Any]) -> Any:
        answers["left"] -= 1
        return Response(status_code=429) if answers["left"] >= 0 else answer

    with connect(engine, NAME, load_tokenizer(tiny), prepared) as connection:
        vllm.spoil = overloaded_twice
        assert len(scored(connection, prepared, tiny).items) == len(prepared.items)
        vllm.spoil = lambda answer: answer | {"model": "replaced meanwhile"}
        with pytest.raises(EvaluationError, match="replaced meanwhile"):
            scored(connection, prepared, tiny)


def test_what_a_server_tells_is_recorded_as_plain_text(
    vllm: StandIn, process: Process, engine: Engine, prepared: Prepared, tiny: Path
) -> None:
    described = '{"id": "pets", "root": "/ad\\ud800apter\\u001b", "parent": "tiny", "max_model_len": NaN, "created": 3}'
    completed = vllm.app.router.routes[-2:]

    async def models(request: Request) -> Response:
        return Response(f'{{"data": [{described}]}}', media_type="application/json")

    assert isinstance(process.app, Starlette)
    process.app.router.routes[:] = [Route("/v1/models", models), *completed]
    with connect(engine, NAME, load_tokenizer(tiny), prepared) as connection:
        assert connection.record.served == {"root": r"/ad\ud800apter\x1b", "parent": "tiny"}
        assert of_json(connection.record.as_json())
        vllm.spoil = lambda answer: Response(
            '{"model": "pets", "choices": [{"text": "half \\ud800", "finish_reason": "stop"}]}'
        )
        answers: list[Any] = []
        work = answer_work(prepared.answers, read_config(tiny), stop_ids=prepared.stop_ids, max_new_tokens=4)
        connection.runner(work, [0], lambda index, rows: answers.extend(rows))
    assert {answer.answer for answer in answers} == {"half ?"}


def test_a_model_that_is_not_there_and_a_server_that_is_down_are_named(
    vllm: StandIn, engine: Engine, prepared: Prepared, tiny: Path
) -> None:
    with (
        pytest.raises(EvaluationError, match="no model 'absent'; it has pets, tiny: load the candidate"),
        connect(engine, "absent", load_tokenizer(tiny), prepared),
    ):
        pass
    elsewhere = Engine(url=engine.url.removesuffix("/v1"), model=NAME)
    with (
        pytest.raises(EvaluationError, match=r"answers 404.*often ends in /v1"),
        connect(elsewhere, NAME, load_tokenizer(tiny), prepared),
    ):
        pass
    down = Engine(url="http://127.0.0.1:9/v1", model=NAME)
    with (
        pytest.raises(EvaluationError, match=r"127\.0\.0\.1:9/v1 cannot be asked"),
        connect(down, NAME, load_tokenizer(tiny), prepared, retry=ONCE),
    ):
        pass


def test_the_key_is_not_sent_on_to_another_address_nor_unencrypted_nor_shown(
    vllm: StandIn,
    process: Process,
    engine: Engine,
    prepared: Prepared,
    tiny: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: list[str | None] = []

    async def elsewhere(request: Request) -> Response:
        seen.append(request.headers.get("authorization"))
        return Response()

    async def moved(request: Request) -> Response:
        return RedirectResponse(f"{process.url}/elsewhere")

    monkeypatch.setenv(KEY, "sk-secret")
    assert isinstance(process.app, Starlette)
    process.app.router.routes[:] = [Route("/elsewhere", elsewhere), Route("/v1/models", moved)]
    with pytest.raises(EvaluationError, match="redirects"), connect(engine, NAME, load_tokenizer(tiny), prepared):
        pass
    assert seen == []
    away = Engine(url="http://vllm.example/v1", model=NAME)
    with pytest.raises(EvaluationError, match="unencrypted"), connect(away, NAME, load_tokenizer(tiny), prepared):
        pass

    async def echoes(request: Request) -> Response:
        return Response(request.headers["authorization"], status_code=409)

    process.app.router.routes[:] = [Route("/v1/models", echoes)]
    with pytest.raises(EvaluationError, match="409") as caught, connect(engine, NAME, load_tokenizer(tiny), prepared):
        pass
    assert "sk-secret" not in str(caught.value)


def test_kept_scores_count_only_while_the_server_answers_as_it_did(
    vllm: StandIn, engine: Engine, prepared: Prepared, tiny: Path, adapters: dict[str, Path]
) -> None:
    with connect(engine, NAME, load_tokenizer(tiny), prepared) as connection:
        kept = scored(connection, prepared, tiny)
        assert connection.still_answers(prepared, kept)
        vllm.loaded[NAME] = adapters["dora"]
        assert not connection.still_answers(prepared, kept)


def test_scores_of_another_model_are_refused_and_rounding_is_not(
    vllm: StandIn, engine: Engine, prepared: Prepared, own: Scores, plan: EvaluationPlan, tiny: Path
) -> None:
    base = evaluate_model(library_model(tiny, None), load_tokenizer(tiny), plan)
    with connect(engine, NAME, load_tokenizer(tiny), prepared) as connection:
        right = replace(own, served_by=connection.record.as_json())
        refuse_other_model(right, own, {"base": base})
        vllm.serves_the_base = True
        found = scored(connection, prepared, tiny)
    wrong = replace(found, served_by=connection.record.as_json())
    with pytest.raises(EvaluationError, match="'pets' answers like base"):
        refuse_other_model(wrong, own, {"base": base})
    shown = compare_engines(own, wrong, ROWS[:4], with_texts=True)
    different = [
        line for line, (a, b) in enumerate(zip(own.items, wrong.items, strict=True), 1) if a.chosen != b.chosen
    ]
    assert [item.line for item in shown.items] == different
    assert engine_numbers(own, wrong)["engine_label_agreement"] == 1 - len(different) / 4
    assert ("nll", *[sum(i.nll for i in s.items) / sum(i.num_tokens for i in s.items) for s in (own, wrong)]) in [
        (name, pytest.approx(a), pytest.approx(b)) for name, a, b in shown.metrics
    ]


def test_a_name_may_hold_the_adapter_s_digest() -> None:
    digest = of_json("an adapter")
    assert name_of(Engine(url="https://v.example/v1", model="pets-{adapter}"), digest) == f"pets-{digest.hex[:12]}"
    assert name_of(Engine(url="https://v.example/v1", model="pets"), digest) == "pets"
