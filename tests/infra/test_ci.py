"""The CI files of pull requests: their scripts are run here as the servers would, with stand-ins for `gh` and `curl`.

What only a server can show: the triggers, the cache, the upload and the permissions of the token.
"""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from tests.line.project import ROOT, environment
from tests.workflow.tiny_project import commit, git, make_repository

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


def read(name: str) -> Any:
    return YAML(typ="safe").load((ROOT / name).read_text())


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkout whose head changes documentation only: no stage runs, so it is the scripts that are tried."""
    folder = make_repository(tmp_path_factory.mktemp("ci") / "checkout")
    (folder / "README.md").write_text("other words\n")
    commit(folder, "docs")
    (folder / ".venv").symlink_to(sys.prefix, target_is_directory=True)
    programs = folder.parent / "programs"
    programs.mkdir()
    for name in ("gh", "curl", "make"):
        # Arguments one a line, so that a test can see that none was split or expanded.
        (programs / name).write_text(f'#!/bin/sh\nprintf "%s\\n" {name} "$@" >> {folder.parent}/called\n')
        (programs / name).chmod(0o755)
    return folder


def run(repository: Path, script: str, variables: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """Run a step's script as GitHub's runner does: bash that stops at the first error."""
    path = f"{repository.parent / 'programs'}{os.pathsep}{os.environ['PATH']}"
    env = environment(repository, repository / ".cache") | {"PATH": path} | variables
    command = ["bash", "--noprofile", "--norc", "-eo", "pipefail", "-c", script]
    return subprocess.run(command, cwd=repository, env=env, capture_output=True, text=True)


def called(repository: Path) -> list[str]:
    """What the stand-ins were called with since the last look."""
    record = repository.parent / "called"
    lines = record.read_text().splitlines()
    record.unlink()
    return lines


def test_github_s_steps_set_up_evaluate_and_comment(repository: Path) -> None:
    setup, evaluate, comment = (
        step for step in read(".github/workflows/evaluate-pr.yaml")["jobs"]["evaluate"]["steps"] if "run" in step
    )
    run(repository, setup["run"], {}).check_returncode()
    assert called(repository) == ["make", "setup"]
    values = {"BASE": git(repository, "rev-parse", "HEAD~1"), "HEAD": git(repository, "rev-parse", "HEAD")}
    assert evaluate["env"].keys() == values.keys() | {"LINK"}
    done = run(repository, evaluate["run"], values | {"LINK": "https://ci.example/runs/1"})
    assert done.returncode == 0, done.stdout + done.stderr
    text = (repository / "pull-request" / "comment.md").read_text()
    assert "No stage was run" in text
    assert "https://ci.example/runs/1" in text
    assert "hashFiles('pull-request/comment.md')" in comment["if"]
    summary = repository.parent / "summary.md"
    done = run(repository, comment["run"], {"GH_TOKEN": "x", "NUMBER": "7", "GITHUB_STEP_SUMMARY": str(summary)})
    assert done.returncode == 0, done.stderr
    assert summary.read_text() == text
    assert called(repository)[:5] == ["gh", "pr", "comment", "7", "--body-file"]


@pytest.mark.long
def test_gitlab_s_job_evaluates_and_notes_only_with_a_token(repository: Path) -> None:
    job = read("infra/ci/gitlab.yaml")["evaluate-pr"]
    variables = {
        "CI_MERGE_REQUEST_DIFF_BASE_SHA": git(repository, "rev-parse", "HEAD~1"),
        "CI_COMMIT_SHA": git(repository, "rev-parse", "HEAD"),
        "CI_JOB_URL": "https://ci.example/jobs/1",
        "CI_API_V4_URL": "https://ci.example/api/v4",
        "CI_PROJECT_ID": "3",
        "CI_MERGE_REQUEST_IID": "7",
        "GRAFTLINE_COMMENT_TOKEN": "",
    }
    done = run(repository, "\n".join(job["script"]), variables)
    assert done.returncode == 0, done.stdout + done.stderr
    assert called(repository) == ["make", "setup"]
    (after,) = job["after_script"]
    run(repository, after, variables).check_returncode()
    assert not (repository.parent / "called").exists()
    run(repository, after, variables | {"GRAFTLINE_COMMENT_TOKEN": "glpat-1"}).check_returncode()
    note = called(repository)
    assert note[-1] == "https://ci.example/api/v4/projects/3/merge_requests/7/notes"
    assert "body@pull-request/comment.md" in note
    assert "PRIVATE-TOKEN: glpat-1" in note


def test_a_branch_s_name_is_never_part_of_a_github_command() -> None:
    """An expression inside `run` is pasted before bash reads it: what somebody names a branch would be executed."""
    steps = read(".github/workflows/evaluate-pr.yaml")["jobs"]["evaluate"]["steps"]
    assert [step["run"] for step in steps if "${{" in step.get("run", "")] == []
