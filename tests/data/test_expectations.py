"""Great Expectations as it is: a declared suite on real frames, rows at fault by line, Data Docs, no telemetry."""

import os
import socket
from pathlib import Path

import pandas
import pytest

from graftline.data.expectations import ALWAYS, run_expectations
from graftline.errors import DataError
from tests.sections import check_section


def frame(**changes: list[object]) -> pandas.DataFrame:
    columns: dict[str, list[object]] = {
        "line": [3, 5, 9], "prompt": ["a", "bb", "ccc"], "completion": ["x", "y", "x"], "supervised_tokens": [2, 2, 2],
    }  # fmt: skip
    return pandas.DataFrame(columns | changes)


def test_rows_that_do_not_meet_an_expectation_are_named_by_line_on_their_side(tmp_path: Path) -> None:
    checks = run_expectations(
        {"training": frame(), "evaluation": frame(completion=["x", "x", "x"])},
        [check_section("expect_column_values_to_be_in_set", {"column": "completion", "value_set": ["x"]})],
        site=tmp_path / "docs",
    )
    assert len(checks) == 2 * (len(ALWAYS) + 1)
    failed = [check for check in checks if not check.passed]
    assert [(check.side, check.lines, check.stops) for check in failed] == [("training", (5,), True)]
    assert failed[0].name == "expect_column_values_to_be_in_set(column='completion', value_set=['x'])"
    assert failed[0].detail == "1 of 3 rows do not meet it: 'y'"


def test_an_expectation_that_always_holds_is_not_run_twice(tmp_path: Path) -> None:
    again = check_section("expect_column_values_to_not_be_null", {"column": "prompt"})
    assert len(run_expectations({"training": frame()}, [again], site=tmp_path / "docs")) == len(ALWAYS)


def test_the_data_docs_have_a_page_for_the_suite_and_one_for_each_side(tmp_path: Path) -> None:
    run_expectations({"training": frame(), "evaluation": frame()}, [], site=tmp_path / "docs")
    pages = sorted(path.name for path in (tmp_path / "docs" / "validations").rglob("*.html"))
    assert pages == ["rows-evaluation.html", "rows-training.html"]
    assert "expectations/rows.html" in {
        p.relative_to(tmp_path / "docs").as_posix() for p in (tmp_path / "docs").rglob("*.html")
    }


def test_an_expectation_about_the_whole_column_says_what_it_saw(tmp_path: Path) -> None:
    rows = check_section("expect_table_row_count_to_be_between", {"min_value": 100})
    checks = run_expectations({"training": frame()}, [rows], site=tmp_path / "docs")
    check = next(check for check in checks if check.name.startswith("expect_table"))
    assert (check.stops, check.detail) == (True, "observed 3")


def test_a_column_that_is_not_there_fails_with_the_reason(tmp_path: Path) -> None:
    wrong = check_section("expect_column_values_to_not_be_null", {"column": "promt"})
    checks = run_expectations({"training": frame()}, [wrong], site=tmp_path / "docs")
    failed = [check for check in checks if not check.passed]
    assert len(failed) == 1
    assert "could not run" in failed[0].detail
    assert "promt" in failed[0].detail


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        (
            "expect_column_values_to_not_be_nul",
            {"column": "prompt"},
            r"knows no .*did you mean expect_column_values_to_not_be_null",
        ),
        ("expect_os_system", {}, r"knows no 'expect_os_system'; see https"),
        ("expect_column_values_to_not_be_null", {}, r"does not take these arguments: column"),
        (
            "expect_column_values_to_not_be_null",
            {"column": "prompt", "colour": 1},
            r"does not take these arguments: colour",
        ),
    ],
)
def test_an_unknown_expectation_or_argument_is_refused(
    tmp_path: Path, name: str, arguments: dict[str, object], message: str
) -> None:
    with pytest.raises(DataError, match=message):
        run_expectations({"training": frame()}, [check_section(name, arguments)], site=tmp_path / "docs")
    assert not (tmp_path / "docs").exists()


def test_nothing_is_sent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        pytest.fail("a connection was attempted")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    before = dict(os.environ)
    run_expectations({"training": frame()}, [], site=tmp_path / "docs")
    assert dict(os.environ) == before
