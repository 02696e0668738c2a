"""Great Expectations as it is: a declared suite on real frames, rows at fault by line, Data Docs, no telemetry."""

import os
import socket
from collections.abc import Iterator
from itertools import pairwise
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


def test_what_the_checks_and_the_suite_both_ask_is_counted_once(tmp_path: Path) -> None:
    asked = check_section("expect_column_values_to_be_in_set", {"column": "completion", "value_set": ["x"]})
    halves = [frame().iloc[:1], frame().iloc[1:]]
    checks = run_expectations({"training": lambda: iter(halves)}, [asked, asked], site=tmp_path / "docs")
    assert len(checks) == len(ALWAYS) + 1
    assert [check.detail for check in checks if not check.passed] == ["1 of 3 rows do not meet it: 'y'"]


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


MANY = frame(
    line=list(range(1, 41)),
    prompt=["p" * (1 + at % 7) for at in range(39)] + [None],
    completion=["x" if at % 5 else "y" for at in range(40)],
    supervised_tokens=[at // 2 for at in range(40)],
)
ASKED = [
    ("expect_column_value_lengths_to_be_between", {"column": "prompt", "max_value": 5}),
    ("expect_column_value_lengths_to_be_between", {"column": "prompt", "max_value": 5, "mostly": 0.6}),
    ("expect_column_values_to_be_in_set", {"column": "completion", "value_set": ["x"], "mostly": 0.8}),
    ("expect_column_values_to_be_in_set", {"column": "completion", "value_set": ["x"], "mostly": 0.81}),
    ("expect_column_values_to_not_match_regex", {"column": "completion", "regex": "y"}),
    ("expect_column_pair_values_to_be_equal", {"column_A": "prompt", "column_B": "completion"}),
    ("expect_column_values_to_be_unique", {"column": "supervised_tokens"}),
    ("expect_column_mean_to_be_between", {"column": "supervised_tokens", "max_value": 3}),
    ("expect_table_row_count_to_be_between", {"min_value": 41}),
    ("expect_column_values_to_not_be_null", {"column": "promt"}),
]


@pytest.mark.parametrize("bounds", [(0, 40), (0, 15, 30, 40), (0, 39, 40)])
def test_rows_in_several_frames_have_the_findings_of_one(tmp_path: Path, bounds: tuple[int, ...]) -> None:
    asked = [check_section(name, arguments) for name, arguments in ASKED]

    def frames() -> Iterator[pandas.DataFrame]:
        return (MANY[start:stop].reset_index(drop=True) for start, stop in pairwise(bounds))

    at_once = run_expectations({"training": MANY}, asked, site=tmp_path / "at once")
    assert run_expectations({"training": frames}, asked, site=tmp_path / "docs") == at_once
    assert sum(not check.passed for check in at_once) == 10
    pages = [next((tmp_path / name / "validations").rglob("*.html")).read_text() for name in ("at once", "docs")]
    for told in ("Failed", "≈20% unexpected rows", "≈25.64% unexpected rows"):
        assert [page.count(told) for page in pages] == [pages[0].count(told)] * 2


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
