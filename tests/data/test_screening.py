"""Rows that repeat or contradict each other, before the split."""

from collections.abc import Sequence
from typing import Literal

import pytest

from graftline.data.rows import Message, Row
from graftline.data.screening import Policy, Screened, screen, with_repeats
from graftline.data.split import Split, split_rows


def row(prompt: str, answer: str, line: int) -> Row:
    return Row((Message("user", prompt, False), Message("assistant", answer, True)), line)


ROWS = [
    row("What barks?", "dog", 1),
    row("What purrs?", "cat", 2),
    row("What barks?", "dog", 3),  # repeats 1
    row("What purrs?", "tiger", 4),  # contradicts 2
    row("what barks?", "dog", 5),  # differs from 1
    row("What purrs?", "cat ", 6),  # answers as 2 does
]


def lines(rows: Sequence[Row]) -> list[int]:
    return [row.source_line for row in rows]


def screened(duplicates: Policy, contradictions: Policy, near_duplicates: Literal["drop", "keep"] = "keep") -> Screened:
    return screen(ROWS, duplicates=duplicates, contradictions=contradictions, near_duplicates=near_duplicates)


def test_the_first_of_rows_that_repeat_each_other_stays_and_the_others_are_listed() -> None:
    found = screened("drop", "keep")
    assert (lines(found.rows), lines(found.repeats)) == ([1, 2, 4, 5, 6], [])
    assert found.dropped == {"duplicates": ((3, 1),)}


def test_repeats_that_are_kept_are_set_apart_from_what_is_split() -> None:
    found = screened("keep", "keep")
    assert (lines(found.rows), lines(found.repeats), found.dropped) == ([1, 2, 4, 5, 6], [3], {})


def test_what_is_an_error_stays_for_the_checks() -> None:
    found = screened("error", "error")
    assert (lines(found.rows), found.dropped) == ([1, 2, 3, 4, 5, 6], {})


def test_all_rows_that_contradict_each_other_are_dropped() -> None:
    found = screened("drop", "drop")
    assert lines(found.rows) == [1, 5]
    assert found.dropped["contradictions"] == ((2, 2), (4, 2), (6, 2))


def test_repeats_of_a_row_that_is_dropped_go_too() -> None:
    twice = [*ROWS, row("What purrs?", "tiger", 7)]
    found = screen(twice, duplicates="keep", contradictions="drop")
    assert (lines(found.rows), lines(found.repeats)) == ([1, 5], [3])


def test_near_duplicates_keep_the_first_at_each_distance() -> None:
    found = screened("drop", "keep", "drop")
    assert lines(found.rows) == [1, 2]
    assert found.dropped["near_duplicates"] == ((4, 2), (5, 1), (6, 2))


def test_rows_are_never_set_aside_and_trained_on_at_once_where_repeats_are_kept() -> None:
    rows = [row(f"{at % 30} times {at % 30 * 7919}", str(at % 30), at + 1) for at in range(60)]
    found = screen(rows, duplicates="keep", contradictions="keep")
    split, left_out = with_repeats(split_rows(found.rows, 10, seed=0), found.repeats)
    assert (len(split.evaluation), len(split.training), len(left_out)) == (10, 40, 10)
    assert lines(split.training) == sorted(lines(split.training))
    assert {line for line, _ in left_out} == {first + 30 for first in lines(split.evaluation)}
    assert not {one.prompt for one in split.training} & {one.prompt for one in split.evaluation}


def test_repeats_of_rows_that_were_not_drawn_stay_out() -> None:
    split, left_out = with_repeats(Split((ROWS[0],), (ROWS[1],)), (ROWS[2], ROWS[3]))
    assert (lines(split.training), left_out) == ([1, 3], ())


@pytest.mark.parametrize("near_duplicates", ["drop", "keep"])
def test_rows_that_all_are_nearly_the_same_can_be_split_once_near_duplicates_are_dropped(
    near_duplicates: Literal["drop", "keep"],
) -> None:
    rows = [
        row(f"Is the red house number 12345678{at % 2} to the left of the bridge?", "yes", at) for at in range(1, 9)
    ]
    rows += [row(f"{at} times {at * 7919}", str(at), at) for at in range(9, 12)]
    found = screen(rows, duplicates="drop", contradictions="keep", near_duplicates=near_duplicates)
    split = split_rows(found.rows, 2, seed=1)
    assert len(split.evaluation) == 2
    if near_duplicates == "drop":
        assert split.near == ()
    else:
        assert split.near in ((), ((2, 1),))


def test_a_split_names_the_training_rows_that_are_nearly_the_same() -> None:
    rows = [row("Is the red house to the left of the bridge?", "yes", 1)]
    rows += [
        row("Is the red house to the left of the bridge??", "yes", 2),
        row("IS the red house to the left of the bridge?", "yes", 3),
    ]
    rows += [row(f"{at} times {at * 7919}", str(at), at) for at in range(4, 8)]
    assert split_rows(rows, 0, seed=0).near == ((2, 1), (3, 1))
