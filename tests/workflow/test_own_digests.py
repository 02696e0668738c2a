"""What a project's own metrics are made of: a changed file is a reason to evaluate again, a missing one an error."""

from pathlib import Path

import pytest

from graftline.errors import EvaluationError, SourceError
from graftline.settings import AnswerJudge, Answers, Evaluate
from graftline.workflow import resolve
from tests.sections import evaluate_section

ANSWERS = Answers(
    max_new_tokens=4,
    json_schema="schema.json",
    scores={"tone": "metrics/tone.py"},
    judge=AnswerJudge(address="https://judge.example/v1", model="m", rubric="rubric.md", human_labels="people.jsonl"),
)
FILES = {
    "schema.json": "{}",
    "metrics/tone.py": "from helper import words\n\n\ndef score(rows, answers):\n    return words(answers)\n",
    "metrics/helper.py": "def words(answers):\n    return [1.0 for _ in answers]\n",
    "rubric.md": "Short answers are better.",
    "people.jsonl": '{"prompt": "p", "first": "a", "second": "b", "better": "tie"}\n',
}
SECTION: Evaluate = evaluate_section(metric="field_f1", answers=ANSWERS)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "metrics").mkdir()
    for name, text in FILES.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    return tmp_path


@pytest.mark.parametrize(
    ("name", "changed"),
    [
        ("schema.json", {"json_valid", "json_equal", "field_precision", "field_recall", "field_f1"}),
        ("metrics/tone.py", {"tone"}),
        ("metrics/helper.py", {"tone"}),
        ("rubric.md", {"judge"}),
        ("people.jsonl", set()),
    ],
)
def test_a_changed_file_changes_its_metrics_and_the_evaluation(root: Path, name: str, changed: set[str]) -> None:
    before, whole = resolve.own_digests(SECTION, root), resolve.evaluation_digest(SECTION, root)
    (root / name).write_text(FILES[name] + "\n", encoding="utf-8")
    after = resolve.own_digests(SECTION, root)
    assert {metric for metric in before if before[metric] != after[metric]} == changed
    assert resolve.evaluation_digest(SECTION, root) != whole


def test_an_evaluation_without_own_metrics_has_no_digest(root: Path) -> None:
    assert resolve.evaluation_digest(evaluate_section(), root) is None


@pytest.mark.parametrize("name", sorted(FILES.keys() - {"metrics/helper.py"}))
def test_a_missing_file_is_named_before_anything_runs(root: Path, name: str) -> None:
    (root / name).unlink()
    with pytest.raises(SourceError, match=f"pipelines.yaml names {name}, which is not there"):
        resolve.evaluation_digest(SECTION, root)


def test_files_that_cannot_be_used_are_refused_before_anything_runs(root: Path) -> None:
    resolve.check_answers(ANSWERS, root)
    (root / "schema.json").write_text('{"type": 1}', encoding="utf-8")
    with pytest.raises(EvaluationError, match="is not a JSON Schema"):
        resolve.check_answers(ANSWERS, root)
