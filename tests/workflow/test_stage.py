"""The frame around a stage: how errors end."""

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
