"""Making a project, and telling what a newer graftline would write: real git and real DVC in folders of all kinds."""

import json
import os
import subprocess
from collections import Counter
from pathlib import Path

import pytest

from graftline.errors import ConfigError, GraftlineError
from graftline.scaffold import files, project
from graftline.scaffold.project import Difference, compare, make, name_of, update
from graftline.scaffold.rows import NUM_ROWS, rows
from graftline.settings import load


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made") / "My Project_2"
    make(folder)
    return folder


@pytest.fixture
def copy(made: Path, tmp_path: Path) -> Path:
    """A project to change: git and DVC are left out, which only `make` looks at."""
    for path in made.rglob("*"):
        if path.is_file() and ".git" not in path.parts and ".dvc" not in path.parts[:-1]:
            (tmp_path / path.relative_to(made)).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / path.relative_to(made)).write_bytes(path.read_bytes())
    return tmp_path


def git(folder: Path, *arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=folder, check=True, capture_output=True, text=True).stdout.strip()


def everything(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def newer(monkeypatch: pytest.MonkeyPatch, changes: dict[str, str | None]) -> None:
    """A graftline that writes some files otherwise; None: no longer."""
    now = files.contents(files.Names("my-project-2")) | {path: text.encode() for path, text in changes.items() if text}
    gone = {path for path, text in changes.items() if text is None}
    kept = {path: content for path, content in now.items() if path not in gone}
    monkeypatch.setattr(project, "contents", lambda names: kept)


def test_a_project_holds_what_its_readme_names_and_git_and_dvc_are_ready(made: Path) -> None:
    assert git(made, "rev-parse", "--show-toplevel") == str(made)
    assert git(made, "symbolic-ref", "--short", "HEAD") == "main"
    assert "analytics = false" in (made / ".dvc" / "config").read_text()
    named = [
        "pipelines.yaml",
        "rows.jsonl",
        "keys.yaml",
        "flows",
        "tasks",
        "dvc.yaml",
        "prefect.yaml",
        "infra",
        "tests",
    ]
    readme = (made / "README.md").read_text()
    assert all((made / name).exists() and f"`{name}" in readme for name in named)
    assert readme.startswith("# my-project-2\n")
    assert 'name = "my-project-2"' in (made / "pyproject.toml").read_text()
    assert "\nname: my-project-2\n" in (made / "prefect.yaml").read_text()
    assert load(made / "pipelines.yaml").names == ("my-task",)


def test_what_a_run_leaves_and_private_keys_are_not_tracked(made: Path) -> None:
    left = ["runs/my-task/fetch", "store/releases", ".venv/bin", ".cache/x", "infra/.env", "builder.pem"]
    assert git(made, "check-ignore", *left).splitlines() == left


@pytest.mark.parametrize("path", ["README.md", ".gitignore", "flows", "flows/retrain.py", "rows.jsonl", "dvc.yaml"])
def test_what_exists_is_never_overwritten_and_nothing_else_is_written(tmp_path: Path, path: str) -> None:
    (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / path).write_text("mine\n")
    with pytest.raises(ConfigError, match=f"nothing of it is overwritten:\n  {path}"):
        make(tmp_path)
    assert everything(tmp_path) == {path: b"mine\n"}


def test_a_link_to_nothing_counts_as_something_that_exists(tmp_path: Path) -> None:
    (tmp_path / "keys.yaml").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ConfigError, match=r"keys\.yaml"):
        make(tmp_path)
    assert os.listdir(tmp_path) == ["keys.yaml"]


def test_a_file_where_the_folder_should_be_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "p").write_text("mine\n")
    with pytest.raises(ConfigError, match="nothing of it is overwritten"):
        make(tmp_path / "p")


def test_a_second_time_says_that_it_is_a_project_already(made: Path) -> None:
    before = everything(made)
    with pytest.raises(ConfigError, match="is a project already; `graftline init --check`"):
        make(made)
    assert everything(made) == before


def test_a_repository_that_was_cloned_empty_is_kept(tmp_path: Path) -> None:
    git(tmp_path, "init", "-q", "-b", "trunk")
    git(tmp_path, "remote", "add", "origin", "https://git.example.org/team/adapters.git")
    (tmp_path / "LICENSE").write_text("mine\n")
    make(tmp_path)
    assert git(tmp_path, "symbolic-ref", "--short", "HEAD") == "trunk"
    assert git(tmp_path, "remote") == "origin"
    assert (tmp_path / "LICENSE").read_text() == "mine\n"


def test_inside_a_repository_the_project_becomes_a_part_of_it(tmp_path: Path) -> None:
    git(tmp_path, "init", "-q")
    make(tmp_path / "models" / "p")
    assert not (tmp_path / "models" / "p" / ".git").exists()
    assert (tmp_path / "models" / "p" / ".dvc" / "config").is_file()


def test_where_git_cannot_start_nothing_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path / "nothing"))
    with pytest.raises(GraftlineError, match="git is not on the PATH; install it"):
        make(tmp_path / "p")
    assert everything(tmp_path) == {}


def test_where_dvc_cannot_start_its_reason_is_told(tmp_path: Path) -> None:
    git(tmp_path, "init", "-q")
    (tmp_path / ".gitignore").write_text(".dvc\n", encoding="utf-8")
    with pytest.raises(GraftlineError, match=r"dvc init failed in .*/p: .*\.dvc is ignored by your SCM tool") as raised:
        make(tmp_path / "p")
    assert "troubles" not in str(raised.value)


def test_the_environment_of_a_git_hook_does_not_lead_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    git(tmp_path, "init", "-q", "other")
    monkeypatch.setenv("GIT_DIR", str(tmp_path / "other" / ".git"))
    make(tmp_path / "p")
    assert (tmp_path / "p" / ".git").is_dir()


@pytest.mark.parametrize(
    ("folder", "name"), [("p", "p"), ("My Adapters", "my-adapters"), ("2026_q4.x", "2026-q4-x"), ("größe", "gr-e")]
)
def test_a_project_is_named_after_its_folder(tmp_path: Path, folder: str, name: str) -> None:
    assert name_of(tmp_path / folder) == name


def test_a_folder_without_a_letter_or_digit_gives_no_name(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="expected a folder whose name holds letters or digits"):
        make(tmp_path / "---")
    assert os.listdir(tmp_path) == []


def test_a_new_project_has_nothing_to_take_over(copy: Path) -> None:
    assert compare(copy) == []


def test_what_only_the_user_changed_is_nothing_to_take_over(copy: Path) -> None:
    (copy / "flows" / "retrain.py").write_text("mine\n")
    (copy / "infra" / "compose.yaml").unlink()
    (copy / "README.md").write_text("mine\n")
    assert compare(copy) == []


def test_files_of_a_newer_graftline_are_told_by_who_changed_them(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    changed = ("flows/x", "tasks/x", "prefect.yaml", "keys.yaml", "dvc.yaml")
    newer(monkeypatch, {**dict.fromkeys(changed, "new"), "infra/env.example": None})
    (copy / "tasks" / "x").write_text("mine\n")
    (copy / "keys.yaml").write_text("mine\n")
    (copy / "dvc.yaml").unlink()
    before = everything(copy)

    assert compare(copy) == [
        Difference("dvc.yaml", "removed"),
        Difference("flows/x", "new"),
        Difference("infra/env.example", "gone"),
        Difference("keys.yaml", "edited"),
        Difference("prefect.yaml", "changed"),
        Difference("tasks/x", "taken"),
    ]
    assert everything(copy) == before


def test_an_update_writes_what_nobody_changed_and_tells_the_rest_once(
    copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    newer(monkeypatch, {"flows/x": "new", "prefect.yaml": "new", "keys.yaml": "new"})
    (copy / "keys.yaml").write_text("mine\n")

    assert update(copy) == [Difference("keys.yaml", "edited")]

    assert [(copy / path).read_text() for path in ("flows/x", "prefect.yaml", "keys.yaml")] == ["new", "new", "mine\n"]
    assert compare(copy) == []


def test_a_file_that_is_what_would_be_written_is_no_difference(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    newer(monkeypatch, {"flows/x": "new", "prefect.yaml": "new"})
    (copy / "prefect.yaml").write_text("new")
    (copy / "flows" / "x").write_text("new")
    assert compare(copy) == []


def test_a_pipeline_more_makes_another_graph(copy: Path) -> None:
    text = (copy / "pipelines.yaml").read_text()
    (copy / "pipelines.yaml").write_text(text.replace("  my-task:", "  my-other:", 1))
    assert compare(copy) == [Difference("dvc.yaml", "changed")]
    assert update(copy) == []
    assert "my-other: { path: runs/my-other/package" in (copy / "dvc.yaml").read_text()


@pytest.mark.parametrize(
    "record", ["", "[]", "{}", '{"project": 1, "files": {}}', '{"project": "p", "files": []}', "\\xff"]
)
def test_a_damaged_record_is_named(copy: Path, record: str) -> None:
    (copy / project.RECORD).write_text(record)
    with pytest.raises(ConfigError, match=r"scaffold\.json cannot be read: .*; restore it from git"):
        compare(copy)


def test_a_folder_that_is_no_project_is_told_so(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"scaffold\.json is missing; run in the folder of a project"):
        compare(tmp_path)


def test_the_record_names_every_file_and_the_version(made: Path) -> None:
    record = json.loads((made / project.RECORD).read_text())
    assert record["project"] == "my-project-2"
    assert record["files"].keys() == files.contents(files.Names("x")).keys()


def test_the_rows_are_distinct_balanced_and_the_same_each_time() -> None:
    found = rows()
    assert len({row["prompt"] for row in found}) == len(found) == NUM_ROWS
    assert Counter(row["completion"] for row in found) == {" positive": 650, " negative": 650}
    assert found == rows()
