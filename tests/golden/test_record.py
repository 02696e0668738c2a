"""The comparison itself: what it lets pass, what it finds, what an update writes."""

import json
from pathlib import Path

import pytest

from tests.golden.record import RECORDS, Bound, Golden, differences, rendered

BOUND = Bound(relative=1e-3, absolute=0.0)
VALUE = {"losses": [2.0, 1.0], "steps": 2, "name": "lora", "none": None}


@pytest.mark.parametrize("found", [VALUE, VALUE | {"losses": [2.0019, 0.9991]}])
def test_numbers_with_a_fraction_may_differ_within_the_bound(found: object) -> None:
    assert not list(differences(VALUE, found, BOUND))


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"losses": [2.0021, 1.0]}, "losses[0]: recorded 2.0, now 2.0021: +0.0021, allowed ±0.002"),
        ({"losses": [2.0, float("nan")]}, "losses[1]: recorded 1.0, now nan: +nan, allowed ±0.001"),
        ({"losses": [2.0]}, "losses: recorded [2.0, 1.0], now [2.0]"),
        ({"steps": 3}, "steps: recorded 2, now 3"),
        ({"steps": True}, "steps: recorded 2, now true"),
        ({"name": "dora"}, 'name: recorded "lora", now "dora"'),
        ({"none": 0}, "none: recorded null, now 0"),
        ({"more": 1}, "more: not recorded, now 1"),
    ],
    ids=str,
)
def test_anything_else_is_a_difference(change: dict[str, object], line: str) -> None:
    assert list(differences(VALUE, VALUE | change, BOUND)) == [line]


def test_a_key_that_is_gone_is_a_difference() -> None:
    found = {key: value for key, value in VALUE.items() if key != "steps"}
    assert list(differences(VALUE, found, BOUND)) == ["steps: recorded 2, now missing"]


def test_what_is_written_is_read_back_and_has_a_line_for_what_fits_on_one() -> None:
    value = {"short": [1, 2.5], "long": {f"tensor-{index}": [0.5] * 12 for index in range(3)}}
    text = rendered(value)
    assert json.loads(text) == value
    assert len(text.splitlines()) == 8


def test_a_difference_fails_with_what_to_run_and_an_update_writes_and_reports_it(tmp_path: Path) -> None:
    reported: list[str] = []
    update = Golden(True, None, reported.append, tmp_path)
    compare = Golden(False, None, reported.append, tmp_path)
    with pytest.raises(AssertionError, match="there is no record; if this was meant, run `python -m pytest"):
        compare.text("page.txt", "one\n")
    update.text("page.txt", "one\n")
    update.values("values.json", VALUE, BOUND)
    compare.text("page.txt", "one\n")
    compare.values("values.json", VALUE, BOUND)
    with pytest.raises(AssertionError, match=r"(?s)-one\n  \+two\n.*--update-golden"):
        compare.text("page.txt", "two\n")
    with pytest.raises(AssertionError, match="steps: recorded 2, now 3"):
        compare.values("values.json", VALUE | {"steps": 3}, BOUND)
    reported.clear()
    update.text("page.txt", "two\n")
    update.values("values.json", VALUE | {"steps": 3}, BOUND)
    assert [text.splitlines()[0] for text in reported] == ["page.txt:", "values.json:"]
    assert (tmp_path / "page.txt").read_text(encoding="utf-8") == "two\n"


def test_an_update_leaves_a_record_as_it_is_that_only_differs_within_the_bound(tmp_path: Path) -> None:
    update = Golden(True, None, lambda text: None, tmp_path)
    update.values("values.json", VALUE, BOUND)
    before = (tmp_path / "values.json").read_text(encoding="utf-8")
    update.values("values.json", VALUE | {"losses": [2.001, 1.0]}, BOUND)
    assert (tmp_path / "values.json").read_text(encoding="utf-8") == before


def test_exact_bytes_are_kept_the_first_time_and_compared_from_then_on(tmp_path: Path) -> None:
    golden = Golden(False, tmp_path / "exact", lambda text: None, tmp_path)
    golden.bytes_on_this_machine("weights", b"a")
    golden.bytes_on_this_machine("weights", b"a")
    with pytest.raises(AssertionError, match="weights: other bytes than this machine gave before"):
        golden.bytes_on_this_machine("weights", b"b")


def test_records_are_small() -> None:
    large = [path.name for path in RECORDS.rglob("*.*") if path.stat().st_size > 100_000]
    assert not large
