"""Pull requests end to end, with stages that take no time: git, DVC, worktrees and comparison are real."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from graftline.errors import GraftlineError
from graftline.workflow import stages
from graftline.workflow.comment import Answer
from graftline.workflow.pull_request import StageRunner, evaluate_revisions
from tests.line.project import read_yaml, write_yaml
from tests.workflow.stand_in_project import make_repository
from tests.workflow.tiny_project import PIPELINE, change, commit, git

# DVC starts about ten times an evaluation: 20 seconds on a quiet machine. So each landing tries one of each verdict,
# `make test-all` every way to it; the verdicts themselves have unit tests (tests/evaluate/test_verdict.py).
pytestmark = pytest.mark.slow


@dataclass(frozen=True)
class Evaluated:
    """What an evaluation left; ``ran`` are the stages that ran, at both revisions."""

    outcome: Answer
    comment: str
    result: dict[str, Any]
    ran: list[str]

    @property
    def pipeline(self) -> dict[str, Any]:
        """The only pipeline that changed."""
        (found,) = self.result["pipelines"]
        return found

    @property
    def accuracy(self) -> dict[str, Any]:
        """What its comparison with the base revision says about accuracy."""
        (found,) = (gate for gate in self.pipeline["comparison"] if gate["metric"] == "accuracy")
        return found


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Evaluations of this module share its caches, as those of one checkout do."""
    return make_repository(tmp_path_factory.mktemp("repository") / "my project")


@pytest.fixture
def branch(repository: Path):
    """A branch of its own for each test."""
    git(repository, "checkout", "-q", "--detach", "main")
    yield repository
    git(repository, "checkout", "-q", "--force", "main")


def evaluate(repository: Path, out: Path, head: str = "HEAD", base: str = "main") -> Evaluated:
    ran: list[str] = []

    def reproduce(stage: str, pipeline: str, root: Path) -> bool:
        did = stages.reproduce(stage, pipeline, root=root, on_line=lambda line: None)
        ran.extend([stage] if did else [])
        return did

    def resolve(pipeline: str, root: Path) -> None:
        stages.resolve(pipeline, root=root, on_line=lambda line: None)

    outcome = evaluate_revisions(repository, base, head, out=out, runner=StageRunner(resolve, reproduce), link=None)
    return Evaluated(
        outcome, (out / "comment.md").read_text(encoding="utf-8"), json.loads((out / "result.json").read_text()), ran
    )


@pytest.fixture(scope="module")
def better(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Evaluated:
    """A branch that trains longer, evaluated; main's stages have run then, too."""
    git(repository, "checkout", "-q", "-b", "better", "main")
    change(repository, "train", steps=40)
    commit(repository, "better")
    found = evaluate(repository, tmp_path_factory.mktemp("better"), head="better")
    git(repository, "checkout", "-q", "main")
    return found


def test_the_docs_run_no_stage(branch: Path, tmp_path: Path) -> None:
    (branch / "README.md").write_text("other words\n")
    commit(branch, "docs")

    found = evaluate(branch, tmp_path)

    assert (found.outcome, found.ran, found.result["pipelines"]) == ("pass", [], [])
    assert "No stage was run" in found.comment


def test_a_better_head_passes_and_shows_by_how_much(better: Evaluated) -> None:
    found, gate = better, better.accuracy
    assert (found.outcome, found.pipeline["reasons"]) == ("pass", ["train.steps"])
    assert gate["difference"] == pytest.approx(0.32, abs=0.1)
    assert found.pipeline["stages_run"] == ["train", "evaluate", "merge", "gate"]
    assert f"### {PIPELINE}: ✅ pass" in found.comment
    assert "| steps | 8 | 40 | +32 |" in found.comment
    assert "10 held-out rows that this revision answered worst" in found.comment
    assert "| row | prompt | expected | base | base revision | this revision |" in found.comment


@pytest.mark.long
def test_texts_that_the_base_revision_hides_are_not_shown_because_a_pull_request_says_so(
    branch: Path, tmp_path: Path
) -> None:
    change(branch, "package", show_texts=False)
    hidden = commit(branch, "hide")
    change(branch, "package", show_texts=True)
    change(branch, "train", steps=40)
    commit(branch, "better, and shown")

    found = evaluate(branch, tmp_path, base=hidden)

    assert "| row | base | base revision | this revision |" in found.comment


def test_a_worse_head_fails_though_its_own_gates_pass(branch: Path, tmp_path: Path) -> None:
    git(branch, "checkout", "-q", "--force", "--detach", "main")
    change(branch, "train", steps=40)
    good = commit(branch, "good")
    change(branch, "train", steps=8)
    commit(branch, "worse")

    found = evaluate(branch, tmp_path, base=good)

    gate = found.accuracy
    assert (found.outcome, gate["outcome"]) == ("fail", "fail")
    assert gate["difference"] < 0
    assert "#### Gate: ✅ pass" in found.comment


def set_margin(folder: Path, margin: float) -> None:
    document = read_yaml(folder)
    document["pipelines"][PIPELINE]["gates"]["accuracy"]["margin"] = margin
    write_yaml(folder, document)


def test_a_worse_head_that_loosens_its_gate_in_the_same_commit_fails(branch: Path, tmp_path: Path) -> None:
    change(branch, "train", steps=40)
    good = commit(branch, "good")
    change(branch, "train", steps=25)
    set_margin(branch, 0.5)
    commit(branch, "worse, and loosened")

    found = evaluate(branch, tmp_path, base=good)

    gate = found.accuracy
    assert (found.outcome, gate["outcome"], gate["margin"]) == ("fail", "fail", 0.1)
    assert [(each["key"], each["old"], each["new"]) for each in found.result["settings"]] == [
        ("gates.accuracy.margin", "0.1", "0.5")
    ]
    assert found.comment.index("| `gates.accuracy.margin` | `0.1` | `0.5` |") < found.comment.index("### pets")


@pytest.mark.long
def test_a_worse_head_that_drops_a_gate_is_judged_by_the_base_revision_s(branch: Path, tmp_path: Path) -> None:
    change(branch, "train", steps=40)
    good = commit(branch, "good")
    change(branch, "train", steps=25)
    document = read_yaml(branch)
    document["pipelines"][PIPELINE]["gates"] = {
        "size": {"metric": "nll", "direction": "lower", "test": "limit", "limit": 1000}
    }
    write_yaml(branch, document)
    commit(branch, "worse, with another gate")

    found = evaluate(branch, tmp_path, base=good)

    assert (found.outcome, found.accuracy["outcome"]) == ("fail", "fail")
    assert found.pipeline["former"][0]["name"] == "accuracy"
    assert {each["key"] for each in found.result["settings"]} == {"gates.accuracy", "gates.size"}


@pytest.mark.usefixtures("better")
def test_what_was_run_before_is_not_run_again(repository: Path, tmp_path: Path) -> None:
    again = evaluate(repository, tmp_path, head="better")

    assert again.ran == []
    assert again.outcome == "pass"
    assert "Stages run: none, all results were in the cache." in again.comment


@pytest.mark.long
@pytest.mark.usefixtures("better")
def test_another_margin_trains_nothing_and_needs_a_look(branch: Path, tmp_path: Path) -> None:
    set_margin(branch, 0.2)
    commit(branch, "margin")

    found = evaluate(branch, tmp_path)

    assert found.outcome == "needs a look"
    # The base revision's candidate is scored and not merged: that may be left to do.
    assert [stage for stage in found.pipeline["stages_run"] if stage != "merge"] == ["gate"]
    assert found.pipeline["reasons"] == ["gates.accuracy.margin"]
    assert found.accuracy["method"] == "digest"


@pytest.mark.long
def test_a_channel_s_policy_needs_a_look_though_no_stage_runs(branch: Path, tmp_path: Path) -> None:
    document = read_yaml(branch)
    document["channels"]["production"] = {"verdicts": ["pass", "inconclusive"]}
    write_yaml(branch, document)
    commit(branch, "channel")

    found = evaluate(branch, tmp_path)

    assert (found.outcome, found.ran) == ("needs a look", [])
    assert '| all | `channels.production.verdicts` | `["pass"]` | `["pass", "inconclusive"]` |' in found.comment


@pytest.mark.long
def test_other_rows_cannot_be_compared_and_need_a_look(branch: Path, tmp_path: Path) -> None:
    change(branch, "train", steps=41)
    (branch / "rows.jsonl").write_text('{"prompt": "digs:", "completion": " dog"}\n')
    commit(branch, "rows")

    found = evaluate(branch, tmp_path)

    gate = found.accuracy
    assert (found.outcome, gate["outcome"]) == ("needs a look", "inconclusive")
    assert gate["reason"].startswith("cannot be shown: the candidate was scored on items ")
    assert {each["key"] for each in found.result["settings"]} == {"content of rows.jsonl", "what was scored: items"}


@pytest.mark.long
def test_a_new_pipeline_passes_its_own_gates_and_needs_a_look(branch: Path, tmp_path: Path) -> None:
    document = read_yaml(branch)
    document["pipelines"]["more-pets"] = document["pipelines"][PIPELINE] | {
        "train": {"steps": 45, "batch_size": 4, "learning_rate": 0.01}
    }
    write_yaml(branch, document)
    commit(branch, "new")

    found = evaluate(branch, tmp_path)

    assert (found.outcome, found.pipeline["pipeline"]) == ("needs a look", "more-pets")
    assert "The pipeline is new" in found.comment
    assert "#### Gate: ✅ pass" in found.comment


@pytest.mark.long
def test_a_removed_pipeline_needs_a_look(branch: Path, tmp_path: Path) -> None:
    document = read_yaml(branch)
    document["pipelines"]["more-pets"] = document["pipelines"].pop(PIPELINE)
    write_yaml(branch, document)
    commit(branch, "only another one")

    found = evaluate(branch, tmp_path)

    assert found.outcome == "needs a look"
    assert (
        f"| {PIPELINE} | `the whole pipeline` | `gates accuracy; guards switched off: stops; rows path:rows.jsonl; "
        in found.comment
    )


@pytest.mark.long
def test_a_head_whose_training_breaks_fails_with_the_reason(branch: Path, tmp_path: Path) -> None:
    change(branch, "train", learning_rate=9.0)
    commit(branch, "broken")

    found = evaluate(branch, tmp_path)

    assert found.outcome == "fail"
    assert "error: the loss is not finite" in found.pipeline["problem"]


@pytest.mark.long
def test_a_base_revision_that_breaks_leaves_the_head_to_a_person(branch: Path, tmp_path: Path) -> None:
    change(branch, "train", learning_rate=9.0)
    broken = commit(branch, "broken")
    change(branch, "train", learning_rate=0.01, steps=42)
    commit(branch, "repaired")

    found = evaluate(branch, tmp_path, base=broken)

    assert found.outcome == "needs a look"
    assert "The base revision could not be evaluated: " in found.comment


@pytest.mark.long
@pytest.mark.parametrize("file", ["scores/candidate.jsonl", "metrics.json"])
def test_a_base_revision_that_wrote_other_files_leaves_the_head_to_a_person(
    branch: Path, tmp_path: Path, file: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    change(branch, "train", steps=21)
    commit(branch, "more steps")
    real, damaged = stages.reproduce, []

    def reproduce(stage: str, *arguments: Any, root: Path, **more: Any) -> bool:
        did = real(stage, *arguments, root=root, **more)
        if stage == "evaluate" and not damaged:  # The base revision's: it comes first.
            damaged.append(root / "runs" / PIPELINE / "evaluate" / file)
            damaged[0].unlink()
            damaged[0].write_text('{"format": 1}\n')
        return did

    monkeypatch.setattr(stages, "reproduce", reproduce)
    found = evaluate(branch, tmp_path)
    assert found.outcome == "needs a look"
    assert found.pipeline["problem"].startswith("The base revision could not be evaluated: ")


@pytest.mark.long
def test_the_checkout_is_left_alone(branch: Path, tmp_path: Path) -> None:
    change(branch, "train", steps=43)
    commit(branch, "steps")

    evaluate(branch, tmp_path)

    assert git(branch, "status", "--porcelain") == ""
    assert git(branch, "worktree", "list").count("\n") == 0
    assert not (branch / "runs").exists()
    assert not (branch / "dvc.lock").exists()


def test_an_unknown_revision_is_an_error(repository: Path, tmp_path: Path) -> None:
    with pytest.raises(GraftlineError, match="revision 'nope' is not in"):
        evaluate(repository, tmp_path, head="nope")


@pytest.mark.long
def test_a_removed_pipeline_needs_a_person(branch: Path, tmp_path: Path) -> None:
    document = read_yaml(branch)
    document["pipelines"]["more-pets"] = document["pipelines"][PIPELINE]
    write_yaml(branch, document)
    base = commit(branch, "two pipelines")
    del document["pipelines"][PIPELINE]
    write_yaml(branch, document)
    commit(branch, "one pipeline less")

    found = evaluate(branch, tmp_path, base=base)

    assert (found.outcome, found.pipeline["pipeline"], found.ran) == ("needs a look", PIPELINE, [])
    assert f"removes the pipeline {PIPELINE}. Its channel production in store is still served" in found.comment


@pytest.mark.long
def test_a_branch_behind_its_base_is_compared_with_where_it_left_it(branch: Path, tmp_path: Path) -> None:
    start = git(branch, "rev-parse", "HEAD")
    change(branch, "train", steps=40)
    ahead = commit(branch, "main moves on")
    git(branch, "checkout", "-q", "--detach", start)
    (branch / "README.md").write_text("other words\n")
    commit(branch, "docs")

    found = evaluate(branch, tmp_path, base=ahead)

    assert (found.outcome, found.ran, found.result["base"]) == ("pass", [], start)


@pytest.mark.long
def test_rows_that_git_ignores_are_evaluated_from_a_hook_with_another_python_path(
    branch: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (branch / ".gitignore").write_text("/runs/\n/.cache\n/here/\n")
    (branch / "here").mkdir()
    (branch / "here" / "rows.jsonl").write_text('{"prompt": "barks:", "completion": " dog"}\n')
    work = (branch / "tasks" / "work.py").read_text().replace('Path("rows.jsonl")', 'Path("here/rows.jsonl")')
    (branch / "tasks" / "work.py").write_text(work)
    change(branch, "data", source="path:here/rows.jsonl")
    base = commit(branch, "rows")
    change(branch, "train", steps=44)
    commit(branch, "steps")
    for name, value in {
        "GIT_DIR": str(branch / ".git"),
        "GIT_INDEX_FILE": str(branch / ".git" / "index"),
        "GIT_WORK_TREE": str(branch),
        "PYTHONSAFEPATH": "1",
        "PYTHONPATH": str(tmp_path),
    }.items():
        monkeypatch.setenv(name, value)

    found = evaluate(branch, tmp_path, base=base)

    assert (found.outcome, found.pipeline["problem"]) == ("pass", None)
    assert found.pipeline["reasons"] == ["here/rows.jsonl (not in git)", "train.steps"]
    for name in ("GIT_DIR", "GIT_INDEX_FILE", "GIT_WORK_TREE"):
        monkeypatch.delenv(name)
    assert git(branch, "status", "--porcelain") == ""
