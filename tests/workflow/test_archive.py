"""The archive: two checkouts that share nothing but a DVC remote."""

import shutil
from pathlib import Path

import pytest

from graftline.workflow import archive, stages
from tests.workflow.stand_in_project import make_repository
from tests.workflow.tiny_project import PIPELINE, commit, git

# DVC starts a few times: 15 seconds on a quiet machine.
pytestmark = pytest.mark.slow
EARLY = stages.STAGES[:5]


def silent(line: str) -> None: ...


def run(root: Path, count: int) -> list[str]:
    stages.resolve(PIPELINE, root=root, on_line=silent)
    ran = []
    for stage in EARLY[:count]:
        archive.fetch(stage, PIPELINE, root=root)
        if stages.reproduce(stage, PIPELINE, root=root, on_line=silent):
            ran.append(stage)
        archive.push(stage, PIPELINE, root=root)
    return ran


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("archive")
    root = make_repository(folder / "first")
    (root / ".dvc" / "config").write_text(
        f"[core]\n    analytics = false\n    remote = there\n['remote \"there\"']\n    url = {folder / 'remote'}\n"
    )
    commit(root, "remote")
    assert run(root, 3) == ["fetch", "validate", "init"]
    return root


@pytest.mark.long
def test_a_fresh_checkout_without_the_cache_runs_only_what_nobody_has_run(first: Path, tmp_path: Path) -> None:
    git(tmp_path, "clone", "-q", str(first), "second")

    assert run(tmp_path / "second", 5) == ["train", "evaluate"]

    metrics = tmp_path / "second" / "runs" / PIPELINE / "train" / "metrics.json"
    assert metrics.is_file()
    git(tmp_path, "clone", "-q", str(first), "third")
    assert run(tmp_path / "third", 5) == []
    assert (tmp_path / "third" / metrics.relative_to(tmp_path / "second")).read_text() == metrics.read_text()


def test_what_was_removed_from_a_full_cache_comes_back_from_the_archive(first: Path, tmp_path: Path) -> None:
    git(tmp_path, "clone", "-q", str(first), "before")
    assert run(tmp_path / "before", 1) == []
    git(tmp_path, "clone", "-q", str(first), "after")
    shutil.copytree(emptied(tmp_path / "before"), tmp_path / "after" / ".dvc" / "cache")

    assert run(tmp_path / "after", 1) == []
    assert (tmp_path / "after" / "runs" / PIPELINE / "fetch" / "evaluation.jsonl").is_file()


@pytest.mark.long
def test_what_was_removed_from_a_full_cache_is_made_again_without_an_archive(tmp_path: Path) -> None:
    root = make_repository(tmp_path / "before")
    assert run(root, 1) == ["fetch"]
    git(tmp_path, "clone", "-q", str(root), "after")
    shutil.copytree(emptied(root), tmp_path / "after" / ".dvc" / "cache")

    assert run(tmp_path / "after", 1) == ["fetch"]


def emptied(root: Path) -> Path:
    """DVC's cache as docs/runbooks.md leaves it: without its files, but with what it knows about runs."""
    cache = root / ".dvc" / "cache"
    for path in (cache / "files").rglob("*"):
        if path.is_file():
            path.unlink()
    assert list((cache / "runs").rglob("*"))
    return cache


@pytest.mark.long
def test_an_archive_that_does_not_answer_costs_a_warning_and_not_the_run(
    first: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    root = tmp_path / "fourth"
    git(tmp_path, "clone", "-q", str(first), "fourth")
    (tmp_path / "file").touch()
    config = (root / ".dvc" / "config").read_text()
    (root / ".dvc" / "config").write_text(
        config.replace("/remote\n", "/remote/../file/below\n").replace(str(first.parent), str(tmp_path))
    )

    assert run(root, 1) == ["fetch"]
    assert "the archive did not answer" in caplog.text


@pytest.mark.long
def test_a_project_without_a_remote_archives_nothing(tmp_path: Path) -> None:
    root = make_repository(tmp_path / "alone")
    assert not archive.has_remote(root)
    assert not archive.push("fetch", PIPELINE, root=root)
    shutil.rmtree(root)
