"""A night: every pipeline has its turn, whatever became of the one before."""

import shutil
from pathlib import Path
from typing import Any

import pytest
from prefect.logging import disable_run_logger
from prefect.states import Completed, Failed, State

from flows import nightly as night
from flows.retrain import Outcome
from graftline.errors import GraftlineError
from tests.line.project import ROOT, read_yaml, write_yaml


def outcome(pipeline: str, verdict: str) -> Outcome:
    version = f"{pipeline}-1" if verdict == "pass" else None
    return Outcome(pipeline, verdict, "", version, None, "report.html", ("train", "gate"))


@pytest.fixture
def table(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[dict[str, str]]:
    """The rows of the night's table; pipelines end as their names say."""

    def end(pipeline: str, wait_seconds: float, *, return_state: bool) -> State[Any]:
        assert return_state
        if pipeline == "broken":
            return Failed(data=GraftlineError("the source is gone\nmore about it"))
        return Completed(data=outcome(pipeline, pipeline))

    rows: list[dict[str, str]] = []
    monkeypatch.setattr(night, "retrain", end)
    monkeypatch.setattr(night, "create_table_artifact", lambda given, **_: rows.extend(given))
    monkeypatch.chdir(tmp_path)
    shutil.copy(ROOT / "pipelines.yaml", tmp_path)
    document = read_yaml(tmp_path)
    one = next(iter(document["pipelines"].values()))
    document["pipelines"] = {"pass": one, "broken": one, "fail": one}
    write_yaml(tmp_path, document)
    return rows


def test_a_pipeline_that_fails_does_not_stop_the_others_and_fails_the_night(table: list[dict[str, str]]) -> None:
    with (
        disable_run_logger(),
        pytest.raises(GraftlineError, match=r"1 of 3 pipelines failed\nbroken: the source is gone$"),
    ):
        night.nightly.fn()
    assert [(row["pipeline"], row["verdict"], row["release"]) for row in table] == [
        ("broken", "error", "none"), ("fail", "fail", "none"), ("pass", "pass", "pass-1"),
    ]  # fmt: skip
    assert table[0]["problem"] == "the source is gone"


def test_a_gate_that_says_no_is_no_error_of_the_night(table: list[dict[str, str]]) -> None:
    with disable_run_logger():
        lines = night.nightly.fn(["fail", "pass"])
    assert [line.pipeline for line in lines] == ["fail", "pass"]
    assert [row["stages run"] for row in table] == ["train, gate", "train, gate"]


def test_an_unknown_pipeline_is_refused_before_anything_runs(table: list[dict[str, str]]) -> None:
    with (
        disable_run_logger(),
        pytest.raises(GraftlineError, match=r"wordnet is not in pipelines.yaml; expected some of broken, fail, pass"),
    ):
        night.nightly.fn(["pass", "wordnet"])
    assert table == []
