"""The frame around a stage: how errors end."""

import json
from pathlib import Path

import pytest

from graftline.errors import PreemptedError
from graftline.settings import Pipeline
from graftline.workflow.stage import run_guarded
from graftline.workflow.workspace import Workspace
from tests.settings.documents import changed


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "pipelines.yaml").write_bytes(changed())
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_file_of_an_earlier_stage_that_is_missing_names_the_stage_to_run(
    project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def read_fetched(pipeline: Pipeline, at: Workspace) -> None:
        (at.folder("fetch") / "base.json").read_text()

    with pytest.raises(SystemExit) as ended:
        run_guarded("validate", "demo", read_fetched, measure=False)
    assert ended.value.code == 2
    assert "base.json is missing: run `graftline fetch demo` first" in capsys.readouterr().err


@pytest.mark.parametrize("missing", ["runs/demo/validate/rows.jsonl", "runs/other/fetch/base.json", "elsewhere"])
def test_any_other_missing_file_is_an_error_of_ours(project: Path, missing: str) -> None:
    def read(pipeline: Pipeline, at: Workspace) -> None:
        (at.root / missing).read_text()

    with pytest.raises(FileNotFoundError):
        run_guarded("validate", "demo", read, measure=False)


def test_a_training_that_was_asked_to_end_has_an_exit_code_that_says_try_again(
    project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def train(pipeline: Pipeline, at: Workspace) -> None:
        raise PreemptedError("asked to end after step 3")

    with pytest.raises(SystemExit) as ended:
        run_guarded("train", "demo", train, measure=False)
    assert ended.value.code == 75
    assert capsys.readouterr().err == "error (may pass): asked to end after step 3\n"


@pytest.mark.parametrize("rank", [0, 1])
def test_only_the_first_of_several_processes_touches_what_the_stage_wrote(
    rank: int, project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", str(rank))
    monkeypatch.setenv("WORLD_SIZE", "2")
    synced: list[Path] = []
    monkeypatch.setattr("graftline.workflow.stage.sync_tree", synced.append)

    def work(pipeline: Pipeline, at: Workspace) -> None:
        at.folder("train").mkdir(parents=True)

    run_guarded("train", "demo", work, measure=True)
    folder = project / "runs" / "demo" / "train"
    assert [path.name for path in synced] == (["train"] if rank == 0 else [])
    assert (folder / "stage.json").exists() == (rank == 0)


def test_the_gpus_that_a_stage_has_for_itself_are_noted_beside_its_time(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (project / "pipelines.yaml").write_bytes(
        changed(**{"demo.resources": {"evaluate": {"gpus": 2}, "merge": {"gpus": 0}}})
    )

    def work(pipeline: Pipeline, at: Workspace) -> None:
        for name in ("evaluate", "merge"):
            at.folder(name).mkdir(parents=True, exist_ok=True)

    for name, gpus in (("evaluate", 2), ("merge", None)):
        run_guarded(name, "demo", work, measure=True)
        noted = json.loads((project / "runs" / "demo" / name / "stage.json").read_text(encoding="utf-8"))
        assert noted.get("gpus") == gpus
