"""Rows set aside for evaluation: deterministic, and duplicates stay on one side."""

import random

import numpy
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from graftline.data.near import normalize
from graftline.data.rows import Message, Row
from graftline.data.split import find_leaks, sample_rows, split_rows
from graftline.errors import DataError

WORDS = [
    "river",
    "stone",
    "lamp",
    "violin",
    "engine",
    "harvest",
    "comet",
    "ladder",
    "pepper",
    "sailor",
    "window",
    "glacier",
]


def row(prompt: str, line: int = 1, answer: str = "A") -> Row:
    return Row((Message("user", prompt, False), Message("assistant", answer, True)), line)


def rows(count: int, seed: int = 0) -> list[Row]:
    chooser = random.Random(seed)
    return [row(" ".join(chooser.choices(WORDS, k=8)), line) for line in range(1, count + 1)]


def test_the_split_has_the_asked_size_and_loses_nothing() -> None:
    split = split_rows(rows(50), 12, seed=0)
    assert len(split.evaluation) == 12
    assert sorted(r.source_line for r in [*split.training, *split.evaluation]) == list(range(1, 51))
    assert [r.source_line for r in split.training] == sorted(r.source_line for r in split.training)


def test_the_seed_decides_and_the_order_of_the_file_does_not() -> None:
    given_rows = rows(40)
    shuffled = random.Random(1).sample(given_rows, 40)
    chosen = [
        frozenset(r.prompt for r in split_rows(r, 10, seed=s).evaluation)
        for r, s in [(given_rows, 0), (shuffled, 0), (given_rows, 1)]
    ]
    assert chosen[0] == chosen[1]
    assert chosen[0] != chosen[2]


def test_most_evaluation_rows_stay_when_rows_are_added() -> None:
    before = {r.prompt for r in split_rows(rows(200), 40, seed=0).evaluation}
    after = {
        r.prompt
        for r in split_rows(
            rows(200) + [row(f"new {n} {WORDS[n % 12]} {n * 7919}", 200 + n) for n in range(20)], 40, seed=0
        ).evaluation
    }
    assert len(before & after) >= 30


def test_near_duplicates_stay_on_one_side_even_through_a_chain() -> None:
    text = (
        "the front part of the human leg between the knee and the ankle, seen from the side where it is widest of all"
    )
    chain = [row(text, 1), row(text + " and so", 2), row(text + " and so on for it", 3)]
    for seed in range(20):
        split = split_rows(chain + rows(6), 5, seed=seed)
        assert len(
            {r.source_line for r in chain} & {r.source_line for r in split.evaluation if len(r.prompt) > 90}
        ) in (0, 3)


@settings(max_examples=60, deadline=None)
@given(
    prompts=st.lists(
        st.sampled_from(["Red  apple", "red apple", "blue sky", "BLUE SKY ", "green", "grey", "pink"]),
        min_size=2,
        max_size=14,
    ),
    seed=st.integers(0, 5),
    share=st.floats(0, 0.9),
)
def test_duplicates_never_straddle_the_split(prompts: list[str], seed: int, share: float) -> None:
    given_rows = [row(prompt, line) for line, prompt in enumerate(prompts, start=1)]
    wanted = int(share * len(prompts))
    try:
        split = split_rows(given_rows, wanted, seed=seed)
    except DataError:
        return
    assert len(split.evaluation) == wanted
    assert split.training
    assert not {normalize(r.prompt) for r in split.training} & {normalize(r.prompt) for r in split.evaluation}
    assert find_leaks(split.training, split.evaluation) == ()


@pytest.mark.parametrize("wanted", [-1, 5, 6])
def test_more_rows_than_there_are_are_refused(wanted: int) -> None:
    with pytest.raises(DataError, match=rf"evaluation_rows is {wanted}, but there are 5 rows.*set it to 0..4"):
        split_rows(rows(5), wanted, seed=0)


def test_rows_that_are_all_the_same_cannot_be_split() -> None:
    with pytest.raises(
        DataError,
        match=r"only 0 of 4 rows can be set aside without leaving a near duplicate.*set data.near_duplicates",
    ):
        split_rows([row("same", line) for line in range(4)], 2, seed=0)


def test_a_sample_is_not_the_start_of_the_file_and_keeps_its_order() -> None:
    lines = [r.source_line for r in sample_rows(rows(100), 10, seed=0)]
    assert len(lines) == 10
    assert lines == sorted(lines)
    assert lines != list(range(1, 11))
    assert sample_rows(rows(100), 100, seed=0) == rows(100)
    assert [r.source_line for r in sample_rows(rows(100), 10, seed=1)] != lines


def lines_of(some: object) -> list[int]:
    return [each.source_line for each in some]  # type: ignore[attr-defined]


def test_a_reserve_is_kept_back_without_changing_an_evaluation_row() -> None:
    given_rows = rows(60)
    before, split = split_rows(given_rows, 12, seed=0), split_rows(given_rows, 12, seed=0, reserve_rows=9)
    assert lines_of(split.evaluation) == lines_of(before.evaluation)
    assert len(split.reserve) == 9
    assert before.reserve == ()
    sides = (split.training, split.evaluation, split.reserve)
    assert sorted(line for side in sides for line in lines_of(side)) == list(range(1, 61))
    assert find_leaks([*split.training, *split.evaluation], split.reserve) == ()


@pytest.mark.parametrize("newest", [False, True])
def test_no_row_that_was_evaluated_enters_the_reserve_when_rows_are_added(newest: bool) -> None:
    every, seen = rows(240), set[int]()
    for count in range(120, 241, 20):  # in ages, the newest row has the lowest
        ages = numpy.arange(count, 0, -1, dtype=float) if newest else None
        split = split_rows(every[:count], 30, seed=3, reserve_rows=30, ages=ages)
        assert not seen & {*lines_of(split.reserve)}
        seen |= {*lines_of(split.evaluation)}
    assert len(seen) > 30


def test_near_duplicates_of_the_reserve_are_neither_trained_on_nor_evaluated() -> None:
    text = "the front part of the human leg between the knee and the ankle, seen from the side where it is widest"
    chain = [row(text, 101), row(text + " and so", 102), row(text.upper(), 103)]
    sides = set()
    for seed in range(20):
        split = split_rows(chain + rows(8), 4, seed=seed, reserve_rows=4)
        where = [[line for line in lines_of(side) if line > 100] for side in (split.training, split.evaluation)]
        kept = [line for line in lines_of(split.reserve) if line > 100]
        assert sorted(map(len, [*where, kept])) == [0, 0, 3]
        sides.add(bool(kept))
    assert sides == {False, True}


def test_both_settings_are_named_where_rows_do_not_suffice() -> None:
    with pytest.raises(DataError, match=r"data.evaluation_rows \+ data.reserve_rows is 5, but there are 5 rows"):
        split_rows(rows(5), 3, seed=0, reserve_rows=2)
    with pytest.raises(DataError, match=r"data.reserve_rows is 2, but only 0 of 4 rows"):
        split_rows([row("same", line) for line in range(4)], 0, seed=0, reserve_rows=2)
