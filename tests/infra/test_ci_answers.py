"""What a server is told, by exit code and by what it refuses: scripts of the CI files, with stand-ins for programs."""

import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from tests.line.project import ROOT

REFUSED = "GraphQL: Resource not accessible by integration (addComment)"
PYTHON = """#!/bin/sh
if [ "$EXIT" != 2 ]; then mkdir -p pull-request && echo "## graftline: told" > pull-request/comment.md; fi
exit $EXIT
"""
SERVER = """#!/bin/sh
printf '%s ' {name} "$@" >> called.txt
echo >> called.txt
if [ -n "$REFUSES" ]; then echo "$REFUSES" >&2; exit 1; fi
"""


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    programs = {".venv/bin/python": PYTHON, "bin/make": "#!/bin/sh\n"}
    programs |= {f"bin/{name}": SERVER.replace("{name}", name) for name in ("gh", "curl")}
    for name, text in programs.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text, encoding="utf-8")
        (tmp_path / name).chmod(0o755)
    return tmp_path


def read(name: str) -> Any:
    return YAML(typ="safe").load((ROOT / name).read_text(encoding="utf-8"))


def run(folder: Path, script: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """A script as GitHub's runner and GitLab's would run it: bash that stops at the first error."""
    environment = {"PATH": f"{folder / 'bin'}{os.pathsep}{os.environ['PATH']}", **variables}
    command = ["bash", "--noprofile", "--norc", "-eo", "pipefail", "-c", script]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)


def github(folder: Path, code: int, refuses: str = "") -> tuple[int, str, list[str]]:
    """The job's exit code, the log, and what `gh` was called with."""
    steps = [step for step in read(".github/workflows/evaluate-pr.yaml")["jobs"]["evaluate"]["steps"] if "run" in step]
    variables = {"EXIT": f"{code}", "REFUSES": refuses, "BASE": "a", "HEAD": "b", "LINK": "l", "NUMBER": "7"}
    variables |= {"GITHUB_STEP_SUMMARY": str(folder / "summary.md"), "GITHUB_REPOSITORY": "team/project"}
    evaluated = run(folder, steps[1]["run"], **variables)
    if not (folder / "pull-request" / "comment.md").exists():
        return evaluated.returncode, evaluated.stdout, []
    told = run(folder, steps[2]["run"], **variables)
    called = (folder / "called.txt").read_text(encoding="utf-8").splitlines()
    return evaluated.returncode or told.returncode, told.stdout + told.stderr, called


@pytest.mark.parametrize(
    ("code", "job", "conclusion"), [(0, 0, "success"), (1, 1, "failure"), (3, 0, "neutral"), (137, 137, "failure")]
)
def test_github_gets_a_comment_and_a_check_and_3_is_neutral(
    checkout: Path, code: int, job: int, conclusion: str
) -> None:
    ended, _, (comment, check) = github(checkout, code)

    assert ended == job
    assert comment.startswith("gh pr comment 7 --body-file pull-request/comment.md ")
    assert check.startswith("gh api repos/team/project/check-runs ")
    assert f"conclusion={conclusion} " in check
    assert "output[title]=graftline: told " in check
    assert (checkout / "summary.md").read_text(encoding="utf-8") == "## graftline: told\n"


def test_an_error_before_the_comment_ends_the_job(checkout: Path) -> None:
    assert github(checkout, 2)[0] == 2


@pytest.mark.parametrize(("code", "job"), [(0, 0), (1, 1), (3, 3)])
def test_a_fork_s_token_is_named_in_the_log_and_nothing_unshown_turns_green(
    checkout: Path, code: int, job: int
) -> None:
    ended, log, called = github(checkout, code, REFUSED)

    assert ended == job
    assert "::notice title=graftline::The token of this run may not write" in log
    assert len(called) == 2


def test_any_other_refusal_of_the_comment_is_an_error_with_github_s_words(checkout: Path) -> None:
    ended, log, called = github(checkout, 0, "GraphQL: Body is too long (maximum is 65536 characters) (addComment)")

    assert ended == 1
    assert "Body is too long" in log
    assert "::error title=graftline::" in log
    assert len(called) == 1


def gitlab(folder: Path, *, token: str = "", refuses: str = "") -> subprocess.CompletedProcess[str]:
    (script,) = read("infra/ci/gitlab.yaml")["evaluate-pr"]["after_script"]
    return run(folder, script, GRAFTLINE_COMMENT_TOKEN=token, REFUSES=refuses)


def test_gitlab_takes_3_for_a_warning_and_no_other_code() -> None:
    assert read("infra/ci/gitlab.yaml")["evaluate-pr"]["allow_failure"] == {"exit_codes": 3}


def test_gitlab_s_log_says_why_there_is_no_note(checkout: Path) -> None:
    assert "the evaluation ended before it had one" in gitlab(checkout, token="x").stdout
    (checkout / "pull-request").mkdir()
    (checkout / "pull-request" / "comment.md").write_text("told\n")

    assert "GRAFTLINE_COMMENT_TOKEN is not set" in gitlab(checkout).stdout
    refused = gitlab(checkout, token="x", refuses="curl: (22) 403")
    assert refused.returncode == 1
    assert "GitLab refused the note" in refused.stderr
    assert gitlab(checkout, token="x").returncode == 0
