"""The evaluate stage with ``evaluate.engine``: the gates judge what that server answers, our own scores stay beside.

The server is the stand-in for vLLM, made from its documentation; it computes with the candidate's own files.
"""

import json
import logging
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from starlette.responses import Response

from graftline.digest import of_folder
from graftline.errors import EvaluationError
from graftline.evaluate.engine import name_of
from graftline.evaluate.kept import of_release
from graftline.evaluate.scores import read_scores
from graftline.evaluate.verdict import adapter_digest
from graftline.release.manifest import read_manifest
from graftline.settings.engine import Engine
from graftline.workflow import pull_request, resolve
from graftline.workflow.pinned_base import trained_base
from tasks import evaluate, gate, merge, package
from tests.line.project import read_yaml, write_yaml
from tests.serve.vllm_stand_in import Process, StandIn
from tests.tiny import make_tiny_llama
from tests.workflow.opened import Opened, open_pipeline
from tests.workflow.test_scored import UNTIL_SCORES, run_stages
from tests.workflow.tiny_project import change, make_rows, tiny_settings

pytestmark = pytest.mark.slow

MODEL = "pets-{adapter}"


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project whose candidate is trained and not scored yet."""
    folder = tmp_path_factory.mktemp("engine") / "project"
    make_tiny_llama(folder / "base", num_hidden_layers=1)
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in make_rows(60)))
    (folder / "keys.yaml").write_text("unsigned: true\n", encoding="utf-8")
    pipeline = tiny_settings()
    pipeline["data"] |= {"evaluation_rows": 10}
    pipeline["train"] |= {"steps": 4, "batch_size": 8, "learning_rate": 0.05, "checkpoint_every": 0}
    pipeline["gates"]["accuracy"] |= {"margin": 0.9, "min_items": 1}
    pipeline["package"] = {"merged": False}
    write_yaml(folder, {"pipelines": {"pets": pipeline}, "channels": {"production": {"anchor": "off"}}})
    run_stages(open_pipeline("pets", folder), resolve, *UNTIL_SCORES[:-1])
    return folder


@pytest.fixture
def opened(trained: Path, tmp_path: Path) -> Opened:
    folder = tmp_path / "project"
    shutil.copytree(trained, folder)
    return open_pipeline("pets", folder)


@pytest.fixture(scope="module")
def vllm(trained: Path) -> StandIn:
    opened = open_pipeline("pets", trained)
    stand_in = StandIn(trained_base(opened.pipeline.base, opened.at))
    adapter = trained / "runs" / "pets" / "train" / "adapter"
    named = name_of(Engine(url="http://127.0.0.1", model=MODEL), adapter_digest(of_folder(adapter)))
    stand_in.loaded |= {named: adapter, "pets": adapter}
    return stand_in


@pytest.fixture(scope="module")
def process(vllm: StandIn) -> Iterator[Process]:
    made = Process(vllm.app)
    yield made
    made.stop()


@pytest.fixture(autouse=True)
def as_it_was(vllm: StandIn) -> Iterator[None]:
    yield
    vllm.serves_the_base, vllm.gives_logprobs, vllm.spoil = False, True, lambda answer: answer


def ask(opened: Opened, process: Process, **given: Any) -> Opened:
    change(opened.at.root, "evaluate", engine={"url": f"{process.url}/v1", "model": MODEL} | given)
    return open_pipeline("pets", opened.at.root)


def test_gates_judge_the_engine_s_scores_and_the_page_shows_both(
    opened: Opened, vllm: StandIn, process: Process, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="graftline")
    document = read_yaml(opened.at.root)
    document["pipelines"]["pets"]["gates"]["engine"] = {
        "metric": "engine_label_agreement",
        "direction": "higher",
        "test": "limit",
        "limit": 0.9,
    }
    write_yaml(opened.at.root, document)
    asking = ask(opened, process)
    run_stages(asking, resolve, evaluate, merge, gate, package)
    folder = asking.at.folder("evaluate") / "scores"
    judged, own = read_scores(folder / "candidate.jsonl"), read_scores(folder / "own_engine.jsonl")
    assert judged.served_by["offers"] == "prompt_logprobs"
    assert judged.served_by["model"].startswith("pets-")
    assert not own.served_by
    assert judged.key != own.key
    assert judged.scored == own.scored
    assert judged.items != own.items  # rounded otherwise
    assert [item.nll for item in judged.items] == pytest.approx([item.nll for item in own.items], abs=1e-4)
    assert judged.numbers["engine_nll_difference"] < 1e-4
    verdict = json.loads((asking.at.folder("gate") / "verdict.json").read_text())
    assert {one["name"]: one["outcome"] for one in verdict["gates"]}["engine"] == "pass"
    (note,) = verdict["notes"]
    assert note.startswith(f"judged on {judged.served_by['model']} at {process.url}/v1 (log-probabilities by ")
    page = (asking.at.folder("package") / "report.html").read_text()
    assert "The engine that will serve" in page
    assert "0 of 10 items answered differently" in page
    files = [file.path for file in read_manifest(asking.at.folder("package")).files]
    assert "evaluation/own_engine.jsonl" in files
    assert own.key is not None
    assert own.scored is not None
    carried = of_release(asking.at.folder("package"), own.key, own.scored)
    assert carried is not None
    assert carried.items == own.items  # in production it need not be scored again
    assert pull_request._scores_file(asking.at.root, "pets") == folder / "own_engine.jsonl"

    assert "prompts.json" in files
    change(asking.at.root, "package", merged=False, show_texts=False)
    run_stages(open_pipeline("pets", asking.at.root), package)
    hidden = {file.path for file in read_manifest(asking.at.folder("package")).files}
    assert set(files) - hidden == {"prompts.json"}, "hashes of words tell texts"

    asked, before = sum(vllm.asked.values()), [path.read_bytes() for path in sorted(folder.iterdir())]
    run_stages(asking, evaluate)
    assert [path.read_bytes() for path in sorted(folder.iterdir())] == before
    assert sum(vllm.asked.values()) - asked <= 7  # probed, and two items compared
    assert "is not scored again on the engine" in caplog.text


@pytest.mark.long
def test_another_model_under_the_name_is_refused_and_nothing_is_written(
    opened: Opened, vllm: StandIn, process: Process
) -> None:
    vllm.serves_the_base = True
    with pytest.raises(EvaluationError, match="answers like base"):
        run_stages(ask(opened, process, model="pets"), resolve, evaluate)
    assert not list(opened.at.folder("evaluate").glob("**/*.jsonl"))
    vllm.serves_the_base = False
    run_stages(open_pipeline("pets", opened.at.root), evaluate)  # what was kept of the other model does not count


@pytest.mark.long
def test_a_scoring_that_was_broken_off_continues_with_what_is_missing(
    opened: Opened, vllm: StandIn, process: Process
) -> None:
    change(opened.at.root, "evaluate", batch_tokens=64)
    answered: list[dict[str, Any]] = []

    def conflict(answer: dict[str, Any]) -> Any:
        answered.append(answer)
        return Response(status_code=409) if len(answered) > 10 else answer

    vllm.spoil = conflict
    with pytest.raises(EvaluationError, match="answers 409"):
        run_stages(ask(opened, process, concurrency=1), resolve, evaluate)
    answered.clear()

    def count(answer: dict[str, Any]) -> dict[str, Any]:
        answered.append(answer)
        return answer

    vllm.spoil = count
    run_stages(open_pipeline("pets", opened.at.root), evaluate)
    # Probes, less than two labels of each row, and the first and the last row again.
    assert 2 + 4 < len(answered) < 2 + 10 * 2 + 4


@pytest.mark.long
def test_scores_of_two_models_under_one_name_are_not_mixed(opened: Opened, vllm: StandIn, process: Process) -> None:
    """A scoring was broken off and continues, and another model was loaded in the meantime."""
    change(opened.at.root, "evaluate", batch_tokens=64)
    answered: list[dict[str, Any]] = []

    def conflict(answer: dict[str, Any]) -> Any:
        answered.append(answer)
        return Response(status_code=409) if len(answered) > 10 else answer

    vllm.serves_the_base, vllm.spoil = True, conflict
    with pytest.raises(EvaluationError, match="answers 409"):
        run_stages(ask(opened, process, model="pets", concurrency=1), resolve, evaluate)
    vllm.serves_the_base, vllm.spoil = False, lambda answer: answer
    with pytest.raises(EvaluationError, match="answers otherwise than when its scoring began"):
        run_stages(open_pipeline("pets", opened.at.root), evaluate)
    run_stages(open_pipeline("pets", opened.at.root), evaluate)
    folder = opened.at.folder("evaluate") / "scores"
    judged, own = read_scores(folder / "candidate.jsonl"), read_scores(folder / "own_engine.jsonl")
    assert [item.nll for item in judged.items] == pytest.approx([item.nll for item in own.items], abs=1e-4)


@pytest.mark.long
def test_without_log_probabilities_a_gate_on_labels_is_refused_before_anything_is_scored(
    opened: Opened, vllm: StandIn, process: Process
) -> None:
    vllm.gives_logprobs = False
    with pytest.raises(EvaluationError, match=r"gate accuracy \(accuracy\), evaluate\.metric"):
        run_stages(ask(opened, process), resolve, evaluate)
    assert not (opened.at.cache / "scores").exists()


@pytest.mark.long
def test_a_gate_that_came_after_the_scores_is_refused_too(opened: Opened, vllm: StandIn, process: Process) -> None:
    vllm.gives_logprobs = False
    document = read_yaml(opened.at.root)
    pipeline = document["pipelines"]["pets"]
    former = pipeline["gates"]
    pipeline["gates"] = {"answers": former["accuracy"] | {"metric": "exact_match"}}
    pipeline["evaluate"] |= {"metric": "exact_match", "answers": {"max_new_tokens": 2}}
    write_yaml(opened.at.root, document)
    asking = ask(opened, process)
    run_stages(asking, resolve, evaluate, merge, gate)
    scores = read_scores(asking.at.folder("evaluate") / "scores" / "candidate.jsonl")
    assert scores.served_by["offers"] == "generation"
    assert scores.numbers["engine_answer_agreement"] == 1.0
    document = read_yaml(opened.at.root)
    document["pipelines"]["pets"]["gates"] |= former
    write_yaml(opened.at.root, document)
    with pytest.raises(EvaluationError, match=r"gate accuracy \(accuracy\)"):
        run_stages(open_pipeline("pets", opened.at.root), gate)
