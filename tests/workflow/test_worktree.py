from pathlib import Path

import pytest

from graftline.workflow import worktree
from tests.line.project import write_yaml
from tests.workflow.tiny_project import PIPELINE, commit, git, tiny_settings


@pytest.fixture
def repository(tmp_path: Path) -> tuple[Path, str, str]:
    """A repository with two commits."""
    root = tmp_path / "project"
    root.mkdir()
    git(root, "init", "-q", "-b", "main")
    (root / ".gitignore").write_text("/runs/\n/.cache\n/.dvc/\n")
    write_yaml(root, {"pipelines": {PIPELINE: tiny_settings()}, "channels": {"production": {}}})
    (root / "words").write_text("first")
    first = commit(root, "first")
    (root / "words").write_text("second")
    return root, first, commit(root, "second")


def test_a_worktree_that_is_there_goes_on_at_the_asked_commit_with_what_git_ignores(
    repository: tuple[Path, str, str], tmp_path: Path
) -> None:
    root, first, second = repository
    tree = tmp_path / "tree"
    worktree.open_at(root, tree, first)
    assert (tree / "words").read_text() == "first"
    (tree / "runs").mkdir()
    (tree / "runs" / "checkpoint").write_text("kept")
    worktree.open_at(root, tree, second)
    assert (tree / "words").read_text() == "second"
    assert (tree / "runs" / "checkpoint").read_text() == "kept"


def test_a_passing_worktree_is_removed_after_an_error_too(repository: tuple[Path, str, str]) -> None:
    root, first, _ = repository
    seen: list[Path] = []

    def work() -> None:
        with worktree.isolated(root, first) as tree:
            assert (tree / "words").read_text() == "first"
            seen.append(tree)
            raise KeyError

    with pytest.raises(KeyError):
        work()
    assert not seen[0].exists()
    assert git(root, "worktree", "list").count("\n") == 0


def test_what_cannot_be_removed_beside_a_worktree_is_left(repository: tuple[Path, str, str]) -> None:
    root, first, _ = repository
    left = root / ".cache" / "worktrees" / "left.lock"
    left.mkdir(parents=True)
    with worktree.isolated(root, first) as tree:
        assert (tree / "words").read_text() == "first"
    assert left.is_dir()
