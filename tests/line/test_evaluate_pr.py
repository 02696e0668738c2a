"""The pull request flow as CI calls it, with real stages: a branch that is better, one that is worse, one of docs only.

The base is tiny, so that a stage takes seconds.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.flows.tiny_project import change, commit, git, make_repository
from tests.line.project import environment

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_repository(tmp_path_factory.mktemp("evaluate-pr") / "checkout")
    for branch, values in {"better": {"steps": 40}, "worse": {"learning_rate": 1e-7}}.items():
        git(folder, "checkout", "-q", "-b", branch, "main")
        change(folder, "train", **values)
        commit(folder, branch)
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
    assert done.returncode in (0, 1), done.stdout + done.stderr
    out = repository / "pull-request"
    return done.returncode, (out / "comment.md").read_text(), json.loads((out / "result.json").read_text())


def test_a_better_a_worse_and_a_docs_branch_get_what_they_deserve(repository: Path) -> None:
    """One test, because the later branches reuse what the first one ran at their common base revision."""
    code, comment, result = evaluate(repository, "docs")
    assert (code, result["pipelines"]) == (0, [])
    assert "No stage was run" in comment

    code, comment, result = evaluate(repository, "better")
    (found,) = result["pipelines"]
    assert (code, found["outcome"]) == (0, "pass"), comment
    assert found["stages_run"] == ["train", "evaluate", "merge", "gate"]
    assert found["comparison"][0]["difference"] > 0.05
    assert "train.steps" in found["reasons"]

    # Against the better branch the old settings are worse, though their own gates pass; everything is in the cache.
    code, comment, result = evaluate(repository, "main", base="better")
    (found,) = result["pipelines"]
    assert (code, found["outcome"], found["stages_run"]) == (1, "fail", []), comment
    assert found["comparison"][0]["difference"] < -0.05

    code, comment, result = evaluate(repository, "worse", base="better")
    assert (code, result["outcome"]) == (1, "fail"), comment
    assert "❌ fail" in comment
