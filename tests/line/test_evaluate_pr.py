"""The pull request flow as CI calls it, with real stages: a branch that trains longer, and one of docs only.

The base is tiny, so that a stage takes seconds. Each landing has the same with stages that take none
(tests/workflow/test_pull_request.py), and real stages in a line (test_line.py).
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.line.project import environment
from tests.workflow.tiny_project import change, commit, git, make_repository

pytestmark = [pytest.mark.slow, pytest.mark.long, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_repository(tmp_path_factory.mktemp("evaluate-pr") / "checkout")
    git(folder, "checkout", "-q", "-b", "longer", "main")
    change(folder, "train", steps=12)
    commit(folder, "longer")
    git(folder, "checkout", "-q", "-b", "back")
    git(folder, "revert", "--no-edit", "HEAD")
    git(folder, "checkout", "-q", "-b", "docs", "main")
    (folder / "README.md").write_text("other words\n")
    commit(folder, "docs")
    return folder


def evaluate(repository: Path, head: str, base: str = "main") -> tuple[int, str, dict[str, Any]]:
    """Exit code, comment and result of what .github/workflows/evaluate-pr.yaml runs."""
    command = [sys.executable, "-m", "flows.evaluate_pr", "--base", base, "--head", head, "--out", "pull-request"]
    done = subprocess.run(
        command, cwd=repository, env=environment(repository, repository / ".cache"), capture_output=True, text=True
    )
    assert done.returncode in (0, 1, 3), done.stdout + done.stderr
    out = repository / "pull-request"
    return done.returncode, (out / "comment.md").read_text(), json.loads((out / "result.json").read_text())


def test_real_stages_judge_a_branch_run_once_and_not_at_all_for_docs(repository: Path) -> None:
    """One test, because the later comparisons reuse what the first one ran.

    That better and worse branches are told apart is shown in tests/workflow/test_pull_request.py, with stand-in stages:
    a tiny random base learns nothing in a few steps.
    """
    code, comment, result = evaluate(repository, "docs")
    assert (code, result["pipelines"]) == (0, [])
    assert "No stage was run" in comment

    code, comment, result = evaluate(repository, "longer")
    (found,) = result["pipelines"]
    assert (code, found["outcome"]) == (0, "pass"), comment
    assert found["stages_run"] == ["train", "evaluate", "merge", "gate"]
    assert found["comparison"][0]["num_items"] == 120
    assert "train.steps" in found["reasons"]

    code, comment, result = evaluate(repository, "back", base="longer")
    (found,) = result["pipelines"]
    # It was trained and scored as the base of the comparison before; what only a head needs is left.
    assert (code, found["stages_run"]) == (0, ["merge", "gate"]), comment
