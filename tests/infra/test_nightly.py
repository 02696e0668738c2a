"""A night: every pipeline that changed has its turn, whatever became of the one before."""

import shutil
from pathlib import Path
from typing import Any

import pytest
from prefect.logging import disable_run_logger
from prefect.states import Completed, Failed, State

from flows import nightly as flow
from graftline.errors import GraftlineError
from graftline.workflow import night, shelf, watching
from graftline.workflow.dispatch import PipelineTurn
from graftline.workflow.outcome import Outcome
from graftline.workflow.pages import render_night
from tests.line.project import ROOT, read_yaml, write_yaml


def outcome(pipeline: str, verdict: str) -> Outcome:
    version = f"{pipeline}-1" if verdict == "pass" else None
    return Outcome(pipeline, verdict, "accuracy 0.8", version, None, "report.html", ("train", "gate"))


@pytest.fixture
def changed() -> dict[str, list[str]]:
    """Pipelines that are unchanged, and those that cannot be resolved."""
    return {"unchanged": [], "broken": []}


@pytest.fixture
def table(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, changed: dict[str, list[str]]) -> list[dict[str, str]]:
    """The rows of the night's table; pipelines end as their names say."""

    def end(pipeline: str, wait_seconds: float, *, return_state: bool) -> State[Any]:
        assert return_state
        if pipeline == "broken":
            return Failed(data=GraftlineError("the source is gone\nmore about it"))
        return Completed(data=outcome(pipeline, pipeline))

    def sort(root: Path, names: list[str]) -> tuple[list[str], list[str], dict[str, str]]:
        left = [name for name in names if name not in changed["unchanged"] + changed["broken"]]
        return left, changed["unchanged"], dict.fromkeys(changed["broken"], "no answer")

    rows: list[dict[str, str]] = []
    monkeypatch.setattr(flow, "retrain", end)
    monkeypatch.setattr(night.inputs, "sort_by_news", sort)
    monkeypatch.setattr(night, "create_table_artifact", lambda given, **_: rows.extend(given))
    monkeypatch.setattr(night, "create_markdown_artifact", lambda page, **_: None)
    monkeypatch.setattr(night, "emit_event", lambda **_: None)
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
        flow.nightly.fn()
    assert [(row["pipeline"], row["verdict"], row["release"]) for row in table] == [
        ("broken", "error", "none"), ("fail", "fail", "none"), ("pass", "pass", "pass-1"),
    ]  # fmt: skip
    assert table[0]["problem"] == "the source is gone"


def test_a_gate_that_says_no_is_no_error_of_the_night(table: list[dict[str, str]]) -> None:
    with disable_run_logger():
        lines = flow.nightly.fn(["fail", "pass"])
    assert [line.pipeline for line in lines] == ["fail", "pass"]
    assert [row["stages run"] for row in table] == ["train, gate", "train, gate"]


def test_an_unknown_pipeline_is_refused_before_anything_runs(table: list[dict[str, str]]) -> None:
    with (
        disable_run_logger(),
        pytest.raises(GraftlineError, match=r"wordnet is not in pipelines.yaml; expected some of broken, fail, pass"),
    ):
        flow.nightly.fn(["pass", "wordnet"])
    assert table == []


def test_what_is_unchanged_has_no_turn_and_what_cannot_be_resolved_is_named(
    table: list[dict[str, str]], changed: dict[str, list[str]], tmp_path: Path
) -> None:
    changed |= {"unchanged": ["pass"], "broken": ["broken"]}
    with disable_run_logger(), pytest.raises(GraftlineError, match="broken: no answer"):
        flow.nightly.fn()
    assert [row["pipeline"] for row in table] == ["broken", "fail"]
    page = (tmp_path / "runs" / "night.md").read_text()
    assert page.startswith("## The night: 1 failed, 1 stopped by a gate, 0 released, 1 unchanged\n")
    assert "### Unchanged\n\npass\n" in page


def test_who_waited_longest_comes_first(table: list[dict[str, str]], tmp_path: Path) -> None:
    for name, day in (("pass", 2), ("fail", 1)):
        shelf.keep_run(tmp_path, name, inputs="", outcome="pass", version=None)
        record = shelf.shelf_folder(tmp_path, name) / "last.json"
        last = shelf.last_run(tmp_path, name)
        assert last
        record.write_text(record.read_text().replace(last.finished, f"2026-01-0{day}T00:00:00+00:00"))
    assert night.in_order(tmp_path, ["pass", "fail", "broken"]) == ["broken", "fail", "pass"]


def test_the_page_starts_with_what_needs_a_person() -> None:
    lines = [
        PipelineTurn("pets", 60.0, outcome("pass", "pass")),
        PipelineTurn("noun", 3.0, outcome("fail", "fail")),
        PipelineTurn("a", 1.0, problem="x|y"),
    ]
    page = render_night(lines, ["quiet"], 120.0)
    places = [page.index(f"### {title}") for title in ("Failed", "Stopped by a gate", "Released", "Unchanged")]
    assert places == sorted(places)
    assert "| a | x\\|y |" in page
    assert "4 pipelines in 2 minutes." in page


def test_the_page_says_what_failed_and_which_command_shows_more() -> None:
    page = render_night([PipelineTurn("pets", 3.0, problem="KeyError: 'x' (graftline/workflow/inputs.py:3)")], [], 61.0)
    assert "| pets | KeyError: 'x' (graftline/workflow/inputs.py:3) | `python -m flows.retrain pets` |" in page
    assert "\n1 pipeline in 61 seconds.\n" in page


def test_a_night_that_cannot_be_shown_in_one_place_is_shown_in_the_others(
    table: list[dict[str, str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def away(*_: object, **__: object) -> None:
        raise ConnectionError("no server")

    monkeypatch.setattr(night, "create_markdown_artifact", away)
    with disable_run_logger(), pytest.raises(GraftlineError, match=r"shown everywhere\nartifact night: .*no server"):
        flow.nightly.fn(["pass"])
    assert [row["pipeline"] for row in table] == ["pass"]
    assert (tmp_path / "runs" / "night.md").read_text(encoding="utf-8").startswith("## The night: 0 failed")


@pytest.mark.parametrize(
    "record", ["", "[]", '{"finished": 5}', '{"inputs": "", "outcome": "", "version": null, "finished": 5}']
)
def test_a_record_of_the_last_run_that_cannot_be_read_ends_no_night(
    table: list[dict[str, str]], tmp_path: Path, record: str
) -> None:
    shelf.keep_run(tmp_path, "pass", inputs="", outcome="pass", version=None)
    shelf.keep_run(tmp_path, "fail", inputs="", outcome="pass", version=None)
    (shelf.shelf_folder(tmp_path, "pass") / "last.json").write_text(record)
    assert sorted(night.in_order(tmp_path, ["pass", "fail", "broken"])) == ["broken", "fail", "pass"]


def test_if_nobody_can_say_what_changed_every_pipeline_has_its_turn(
    table: list[dict[str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(root: Path, names: list[str]) -> None:
        raise PermissionError(13, "Permission denied", "dvc.lock")

    monkeypatch.setattr(night.inputs, "sort_by_news", fail)
    with disable_run_logger(), pytest.raises(GraftlineError, match="1 of 3 pipelines failed"):
        flow.nightly.fn()
    assert sorted(row["pipeline"] for row in table) == ["broken", "fail", "pass"]


def test_one_pipeline_that_ends_the_whole_look_is_looked_at_by_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def look(root: Path, names: list[str]) -> tuple[dict[str, str], dict[str, str]]:
        if "bad" in names:
            raise KeyError("sources")
        return dict.fromkeys(names, "sha256:0"), {}

    monkeypatch.setattr(watching.inputs, "with_new_data", look)
    new, broken = watching.sort_out(tmp_path, ["good", "bad", "other"])
    assert set(new) == {"good", "other"}
    assert set(broken) == {"bad"}
    assert broken["bad"].startswith("KeyError: 'sources'")
