"""A suite of Great Expectations from the rows of today, and the rows of tomorrow held against it."""

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from graftline.data.profile import profile, read_suite
from graftline.data.rows import Row, rows_from_objects
from graftline.data.template import encode
from graftline.data.validation import validate
from graftline.errors import DataError
from tests.sections import data_section


def rows(number: int, *, words: int = 3, answers: tuple[str, ...] = (" cat", " dog")) -> list[Row]:
    objects = [
        {"prompt": f"animal {at} " + "word " * words, "completion": answers[at % len(answers)]} for at in range(number)
    ]
    return rows_from_objects(objects, origin="test")


def suite_of(given: list[Row], folder: Path, tiny_llama: Path) -> Path:
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    encoded = [encode(row, tokenizer, template="none") for row in given]
    suite = profile(given, [len(row.input_ids) for row in encoded], [sum(row.supervised) for row in encoded])
    path = folder / "suite.json"
    path.write_text(json.dumps(suite), encoding="utf-8")
    return path


def unmet(given: list[Row], suite: Path, tiny_llama: Path, out: Path) -> set[str]:
    """Expectations of the suite that rows do not meet."""
    tokenizer, checks = AutoTokenizer.from_pretrained(tiny_llama), read_suite(suite)
    data = data_section(max_tokens=2000, checks=checks, duplicates="keep")
    try:
        report = validate(given, [], tokenizer=tokenizer, data=data, template="none", out=out)
        found = report.as_json()
    except DataError:
        found = json.loads((out / "report.json").read_text(encoding="utf-8"))
    return {check["name"] for check in found["checks"] if check["name"].startswith("expect_") and not check["passed"]}


def test_the_rows_of_today_and_more_of_their_kind_meet_the_suite(tmp_path: Path, tiny_llama: Path) -> None:
    suite = suite_of(rows(40), tmp_path, tiny_llama)
    assert unmet(rows(60), suite, tiny_llama, tmp_path / "out") == set()
    page = (tmp_path / "out" / "data_docs" / "expectations" / "rows.html").read_text(encoding="utf-8")
    assert "proportion" in page


@pytest.mark.parametrize(
    ("more", "expectation"),
    [
        ({"words": 9}, "expect_column_value_lengths_to_be_between(column='prompt'"),
        ({"words": 9}, "expect_column_mean_to_be_between(column='tokens'"),
        ({"answers": (" cat", " dog", " cow")}, "expect_column_values_to_be_in_set(column='completion'"),
    ],
)
def test_rows_of_another_kind_do_not(tmp_path: Path, tiny_llama: Path, more: dict[str, Any], expectation: str) -> None:
    suite = suite_of(rows(40), tmp_path, tiny_llama)
    assert any(name.startswith(expectation) for name in unmet(rows(40, **more), suite, tiny_llama, tmp_path / "out"))


def test_rows_that_repeat_one_prompt_do_not(tmp_path: Path, tiny_llama: Path) -> None:
    suite = suite_of(rows(40), tmp_path, tiny_llama)
    repeated = [*rows(20), *(rows(1) * 20)]
    (name,) = unmet(repeated, suite, tiny_llama, tmp_path / "out")
    assert name.startswith("expect_column_proportion_of_unique_values_to_be_between")


def test_answers_that_are_many_or_seldom_are_no_labels() -> None:
    many = rows(600, answers=tuple(f" {at}" for at in range(60)))
    seldom = rows(40, answers=tuple(f" {at}" for at in range(20)))
    for given in (many, seldom):
        kinds = [each["type"] for each in profile(given, [5] * len(given), [2] * len(given))["expectations"]]
        assert "expect_column_values_to_be_in_set" not in kinds


def test_no_rows_have_no_profile() -> None:
    with pytest.raises(DataError, match="no rows to profile"):
        profile([], [], [])


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("{", "is not a suite of Great Expectations"),
        ("{}", "is not a suite of Great Expectations"),
        ("[]", "is not a suite of Great Expectations"),
        ('{"expectations": {}}', "expectation 1 has no type or kwargs"),
        ('{"expectations": [{"type": "expect_x"}]}', "expectation 1 has no type or kwargs"),
        ('{"expectations": [{"type": "drop", "kwargs": {}}]}', "expectation 1 has no type or kwargs"),
    ],
)
def test_a_file_that_is_no_suite_is_named(tmp_path: Path, text: str, problem: str) -> None:
    (tmp_path / "suite.json").write_text(text, encoding="utf-8")
    with pytest.raises(DataError, match=problem):
        read_suite(tmp_path / "suite.json")


def test_a_missing_suite_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"none\.json is not a suite .*--profile"):
        read_suite(tmp_path / "none.json")
