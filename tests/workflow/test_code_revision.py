"""The revision that a release's manifest names."""

import logging
from pathlib import Path

import pytest

from graftline.workflow.assembling import _code_revision
from tests.workflow.tiny_project import commit, git


def test_a_revision_that_git_does_not_tell_is_unknown_with_a_warning_in_git_s_words(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        assert _code_revision(tmp_path) == "unknown"
    assert "the release will say `code_revision: unknown`" in caplog.text
    assert "not a git repository" in caplog.text


def test_the_revision_is_that_of_the_folder_and_not_of_a_hook_s_repository(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("own", "foreign"):
        (tmp_path / name).mkdir()
        git(tmp_path / name, "init", "-q")
        (tmp_path / name / "words").write_text(name)
    own, _ = (commit(tmp_path / name, name) for name in ("own", "foreign"))
    monkeypatch.setenv("GIT_DIR", str(tmp_path / "foreign" / ".git"))
    monkeypatch.setenv("GIT_INDEX_FILE", str(tmp_path / "foreign" / ".git" / "index"))
    assert _code_revision(tmp_path / "own") == own
