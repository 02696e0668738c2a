"""Answers that are JSON: valid, equal as values, and field by field."""

import json
from pathlib import Path
from typing import Any

import pytest

from graftline.data.rows import rows_from_objects
from graftline.errors import EvaluationError
from graftline.evaluate.extraction import NAMES, JsonSchema
from graftline.workflow.checking import check_json

EXPECTED = '{"name": "Ada", "born": 1815, "tags": ["a", "b"]}'


def schema(folder: Path, content: Any = None) -> JsonSchema:
    path = folder / "schema.json"
    path.write_text(json.dumps({} if content is None else content), encoding="utf-8")
    return JsonSchema.read(path)


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ('{"tags":["a","b"],"born":1815,"name":"Ada"}', EXPECTED),
        (' {"born": 1815.0, "name": "\\u0041da", "tags": ["a", "b"]}\n', EXPECTED),
        ("1e2", "100"),
        ("0.10", "0.1"),
        ("-0", "0"),
        ("10", "1e1"),
        ("1000000000000000000000001", "1.000000000000000000000001e24"),
        ("1e999999999", "10e999999998"),
        ("null", " null "),
    ],
)
def test_the_same_value_written_otherwise_is_equal(tmp_path: Path, answer: str, expected: str) -> None:
    assert schema(tmp_path).score(answer, expected) == dict.fromkeys(NAMES, 1.0)


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("1", "true"),
        ("0", "false"),
        ('"1"', "1"),
        ("[1, 2]", "[2, 1]"),
        ('{"a": null}', "{}"),
        ("[]", "{}"),
        ('""', "null"),
        ("1000000000000000000000001", "1000000000000000000000000"),
        ("0.30000000000000004", "0.3"),
        ('{"a": "x "}', '{"a": "x"}'),
        ("-1", "1"),
    ],
)
def test_another_value_is_valid_and_not_equal(tmp_path: Path, answer: str, expected: str) -> None:
    found = schema(tmp_path).score(answer, expected)
    assert (found["json_valid"], found["json_equal"]) == (1.0, 0.0)


@pytest.mark.parametrize(
    "answer",
    [
        "",
        "Ada",
        "```json\n{}\n```",
        "{} {}",
        '{"a": 1,}',
        "{'a': 1}",
        "NaN",
        '{"a": Infinity}',
        '{"a": 1, "a": 1}',
        '{"a": 1',
        "[" * 100_000,
        "\ufeff{}",
    ],
)
def test_what_is_not_json_scores_nothing(tmp_path: Path, answer: str) -> None:
    assert schema(tmp_path).score(answer, "{}") == dict.fromkeys(NAMES, 0.0)


def test_fields_are_counted_one_by_one(tmp_path: Path) -> None:
    # Of the answer's five fields three are expected, of the four expected ones three are found.
    answer = '{"name": "Ada", "born": 1816, "tags": ["b", "a"], "died": 1852}'
    found = schema(tmp_path).score(answer, EXPECTED)
    assert found == {
        "json_valid": 1.0,
        "json_equal": 0.0,
        "field_precision": 3 / 5,
        "field_recall": 3 / 4,
        "field_f1": 6 / 9,
    }


def test_a_field_s_name_is_its_whole_path(tmp_path: Path) -> None:
    found = schema(tmp_path).score('{"a.b": 1, "to": {"city": "Ulm"}}', '{"a": {"b": 1}, "from": {"city": "Ulm"}}')
    assert found["field_recall"] == 0.0


def test_a_repeated_item_counts_as_often_as_it_is_expected(tmp_path: Path) -> None:
    found = schema(tmp_path).score("[1, 1, 1]", "[1, 1]")
    assert (found["field_precision"], found["field_recall"]) == (2 / 3, 1.0)


def test_an_answer_that_does_not_meet_the_schema_scores_nothing(tmp_path: Path) -> None:
    content = {
        "type": "object",
        "required": ["born"],
        "properties": {"born": {"$ref": "#/$defs/year"}},
        "$defs": {"year": {"type": "integer"}},
    }
    asked = schema(tmp_path, content)
    assert asked.score('{"born": 1815}', '{"born": 1815.0}')["json_equal"] == 1.0
    assert asked.score('{"born": "1815"}', '{"born": 1815}')["json_valid"] == 0.0
    assert asked.score("{}", '{"born": 1815}')["json_valid"] == 0.0


def test_a_row_whose_own_answer_does_not_meet_the_schema_is_named(tmp_path: Path) -> None:
    with pytest.raises(EvaluationError, match=r"the row's own answer 'Ada' is not JSON that meets schema\.json"):
        schema(tmp_path).score("{}", "Ada")


def test_validation_names_every_row_whose_answer_does_not_meet_the_schema(tmp_path: Path) -> None:
    answers = ["{}", "Ada", " {} ", "{"]
    rows = rows_from_objects([{"prompt": f"p{at}", "completion": text} for at, text in enumerate(answers)], origin="t")
    check = check_json(rows, schema(tmp_path))
    assert (check.passed, check.lines, check.side) == (False, (2, 4), "evaluation")
    assert "2 of 4 answers are not JSON that meets schema.json, such as 'Ada'" in check.detail
    assert check_json(rows[:1], schema(tmp_path)).passed


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ({"type": "objects"}, "is not a JSON Schema: 'objects'"),
        ([], "is not a JSON Schema"),
        ({"$ref": "https://example.com/other.json"}, "refers to https://example.com/other.json; only its own parts"),
        ({"properties": {"a": {"$ref": "file:///etc/passwd"}}}, "only its own parts"),
        ({"$ref": "#/$defs/none"}, "which it does not have"),
        ({"properties": {"a": {"$ref": "#/$defs/none"}}}, "which it does not have"),
    ],
)
def test_a_schema_that_cannot_be_used_is_refused(tmp_path: Path, content: Any, problem: str) -> None:
    with pytest.raises(EvaluationError, match=problem):
        schema(tmp_path, content)


@pytest.mark.parametrize("data", [b"", b"{", b"\xff\xfe{}"])
def test_a_file_that_is_not_json_is_refused(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "schema.json").write_bytes(data)
    with pytest.raises(EvaluationError, match=r"schema\.json is not a JSON Schema"):
        JsonSchema.read(tmp_path / "schema.json")


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(EvaluationError, match=r"none\.json is not a JSON Schema: .*No such file"):
        JsonSchema.read(tmp_path / "none.json")
