"""Rows of several files and sources: their numbers, their shares, and which of them judge."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from graftline.data.mixing import FetchedSource, Span, read_sources
from graftline.data.preparation import EVALUATION, TRAINING, Prepared, prepare_rows
from graftline.errors import DataError
from graftline.settings import EvaluationRows, RowSource
from tests.sections import data_section

WORDS = ("oak", "wren", "flint", "dusk", "ember", "fjord", "glade", "heron", "inlet", "jetty")


def objects(start: int, count: int) -> list[dict[str, str]]:
    """Rows of which no two are alike."""
    spoken = [
        " ".join(WORDS[int(digit)] for digit in f"{at * 7919 % 100_000:05}") for at in range(start, start + count)
    ]
    return [{"prompt": f"{text}:", "completion": f" {at}"} for at, text in enumerate(spoken, start)]


def write(path: Path, rows: Sequence[dict[str, str]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def source(*paths: Path, **given: Any) -> FetchedSource:
    section = RowSource(**{"source": f"path:{paths[0].name}"} | given)
    return FetchedSource(section, tuple((path.name, path) for path in paths))


def prepared(
    folder: Path, sources: Sequence[FetchedSource], frozen: FetchedSource | None = None, **given: Any
) -> Prepared:
    section = data_section(
        **{"source": None, "sources": [each.section for each in sources], "evaluation": frozen and frozen.section}
        | given
    )
    return prepare_rows(section, sources, frozen, root=folder, out=folder)


def answers(path: Path) -> list[int]:
    return [int(json.loads(line)["completion"]) for line in path.read_text(encoding="utf-8").splitlines()]


def test_lines_are_counted_through_all_files(tmp_path: Path) -> None:
    one, two = write(tmp_path / "1.jsonl", objects(0, 3)), write(tmp_path / "2.jsonl", objects(3, 2))

    rows, spans = read_sources([source(one, two)], tmp_path)

    assert [row.source_line for row in rows] == [1, 2, 3, 4, 5]
    assert spans == [Span("1.jsonl", 0, 1, 3), Span("2.jsonl", 0, 4, 5)]
    assert spans[1].place(5) == "2.jsonl:2"


def test_a_day_on_which_nothing_came_is_passed_over_and_no_rows_at_all_are_an_error(tmp_path: Path) -> None:
    one, empty = write(tmp_path / "1.jsonl", objects(0, 3)), write(tmp_path / "2.jsonl", [])

    rows, spans = read_sources([source(empty, one)], tmp_path)

    assert (len(rows), [span.name for span in spans]) == (3, ["1.jsonl"])
    with pytest.raises(DataError, match=r"2\.jsonl.*: no rows in 2 files; check data\.source"):
        read_sources([source(empty), source(write(tmp_path / "3.jsonl", []))], tmp_path)


@pytest.mark.parametrize("text", ['{"prompt": "?"}\n', "broken\n", '[{"prompt": "a", "completion": "b"}]', ""])
@pytest.mark.parametrize("beside", [0, 2])
def test_an_error_names_a_fetched_file_as_its_source_does_not_by_its_place_in_the_cache(
    tmp_path: Path, text: str, beside: int
) -> None:
    fetched = tmp_path / "cache" / ("3f" * 32) / "data.jsonl"
    fetched.parent.mkdir(parents=True)
    fetched.write_text(text, encoding="utf-8")
    others = [(f"s3://rows/{at}.jsonl", write(tmp_path / f"{at}.jsonl", [])) for at in range(beside)]
    address = "https://example.org/rows.jsonl"
    section = RowSource(source=address)

    with pytest.raises(DataError) as caught:
        read_sources([FetchedSource(section, ((address, fetched), *others))], tmp_path)

    assert address in str(caught.value)
    assert str(tmp_path) not in str(caught.value)


def test_bad_rows_of_all_files_are_told_together_with_their_lines(tmp_path: Path) -> None:
    files = [write(tmp_path / f"{at:03}.jsonl", objects(2 * at, 2)) for at in range(905)]
    for at, text in ((3, '{"prompt": "?"}\n'), (900, "broken\n")):
        with files[at].open("a", encoding="utf-8") as file:
            file.write(text)
    files[901].write_bytes("ü".encode("latin-1"))
    files.append(write(tmp_path / "905.txt", []))
    with pytest.raises(DataError) as told:
        prepared(tmp_path, [source(*files)])
    first, *lines = str(told.value).splitlines()
    assert first == "906 files: 4 problems:"
    for line, expected in zip(
        lines,
        (
            "003.jsonl, line 3: 'completion' missing",
            "900.jsonl, line 3: broken JSON",
            "901.jsonl, line 1: byte 0xfc",
            "905.txt: the name ends in",
        ),
        strict=True,
    ):
        assert expected in line
    assert not list(tmp_path.glob(".*"))
    for at in range(20):
        files[at].write_text("broken\n", encoding="utf-8")
    with pytest.raises(DataError, match=r"906 files: 23 problems:(\n.*){10}\n  and 13 more$"):
        prepared(tmp_path, [source(*files)])


def test_rows_that_repeat_one_of_another_file_are_found(tmp_path: Path) -> None:
    one, two = write(tmp_path / "1.jsonl", objects(0, 30)), write(tmp_path / "2.jsonl", objects(29, 3))

    made = prepared(tmp_path, [source(one), source(two)], evaluation_rows=4)

    assert made.dropped == {"duplicates": ((31, 30),)}
    assert sorted(answers(tmp_path / TRAINING) + answers(tmp_path / EVALUATION)) == list(range(32))


@pytest.mark.parametrize(
    ("shares", "max_rows", "expected"),
    [
        ((0.7, 0.3), None, (70, 30)),  # The second has 30 rows, which decide.
        ((0.2, 0.8), None, (7, 30)),  # 30 / 0.8 = 37.5
        ((0.5, 0.5), 20, (10, 10)),
        ((0.999, 0.001), 1000, (100, 0)),
    ],
)
def test_each_source_gives_its_share_without_repeating_a_row(
    tmp_path: Path, shares: tuple[float, float], max_rows: int | None, expected: tuple[int, int]
) -> None:
    paths = write(tmp_path / "1.jsonl", objects(0, 100)), write(tmp_path / "2.jsonl", objects(100, 30))
    sources = [source(path, share=share) for path, share in zip(paths, shares, strict=True)]
    if 0 in expected:
        with pytest.raises(DataError, match=r"source 2 gives none; no row is repeated"):
            prepared(tmp_path, sources, max_rows=max_rows, evaluation_rows=4)
        return

    made = prepared(tmp_path, sources, max_rows=max_rows, evaluation_rows=4)

    assert made.used == expected
    used = answers(tmp_path / TRAINING) + answers(tmp_path / EVALUATION)
    assert (len(used), len(set(used))) == (sum(expected), sum(expected))
    assert sum(answer < 100 for answer in used) == expected[0]


def test_a_share_is_drawn_by_the_seed_and_stays_when_rows_are_added(tmp_path: Path) -> None:
    def used(count: int, seed: int) -> set[int]:
        paths = write(tmp_path / "1.jsonl", objects(0, count)), write(tmp_path / "2.jsonl", objects(500, 40))
        prepared(tmp_path, [source(path, share=0.5) for path in paths], seed=seed, evaluation_rows=4)
        return {answer for name in (TRAINING, EVALUATION) for answer in answers(tmp_path / name) if answer < 500}

    assert used(200, 0) == used(200, 0)
    assert used(200, 0) != used(200, 1)
    assert len(used(200, 0) & used(210, 0)) >= 35


class TestNewest:
    def night(self, folder: Path, days: int, **given: Any) -> tuple[set[int], set[int]]:
        """What is trained on and what judges, when so many days have brought a file of 20 rows each."""
        paths = [write(folder / f"day={day:02}.jsonl", objects(20 * day, 20)) for day in range(days)]
        prepared(folder, [source(*paths)], evaluation_rows=15, split="newest", **given)
        return set(answers(folder / TRAINING)), set(answers(folder / EVALUATION))

    def test_over_three_nights_new_rows_judge_first_and_are_trained_on_from_the_next_one(self, tmp_path: Path) -> None:
        first, second, third = (self.night(tmp_path, days) for days in (3, 4, 5))

        assert (first[1], second[1], third[1]) == (set(range(45, 60)), set(range(65, 80)), set(range(85, 100)))
        # What a night's candidate learned never judges the candidates of later nights; what judged is learned.
        assert not first[0] & (first[1] | second[1] | third[1])
        assert not second[0] & (second[1] | third[1])
        assert first[1] <= second[0]
        assert first[1] | second[1] <= third[0]

    def test_a_night_without_new_rows_judges_by_the_same(self, tmp_path: Path) -> None:
        assert self.night(tmp_path, 3) == self.night(tmp_path, 3)

    def test_a_new_row_that_nearly_repeats_an_old_one_is_not_new(self, tmp_path: Path) -> None:
        rows = objects(0, 40)
        rows[39] = {"prompt": rows[3]["prompt"].replace(":", "!:"), "completion": " 39"}
        path = write(tmp_path / "rows.jsonl", rows)

        prepared(tmp_path, [source(path)], evaluation_rows=10, split="newest")

        assert set(answers(tmp_path / EVALUATION)) == set(range(29, 39))

    def test_of_several_sources_each_gives_its_newest(self, tmp_path: Path) -> None:
        large, small = write(tmp_path / "1.jsonl", objects(0, 60)), write(tmp_path / "2.jsonl", objects(60, 20))

        prepared(tmp_path, [source(large), source(small)], evaluation_rows=16, split="newest")

        assert set(answers(tmp_path / EVALUATION)) == {*range(48, 60), *range(76, 80)}


class TestFrozen:
    def frozen(self, path: Path, **given: Any) -> FetchedSource:
        section = EvaluationRows(**{"source": f"path:{path.name}", "sha256": "0" * 64} | given)
        return FetchedSource(section, ((path.name, path),))

    @pytest.mark.parametrize(("beside", "drawn"), [(0, 0), (5, 5)])
    def test_they_judge_beside_the_split_or_in_its_place(self, tmp_path: Path, beside: int, drawn: int) -> None:
        rows, judge = write(tmp_path / "1.jsonl", objects(0, 50)), write(tmp_path / "2.jsonl", objects(50, 10))

        made = prepared(tmp_path, [source(rows)], self.frozen(judge), evaluation_rows=beside)

        judging = answers(tmp_path / EVALUATION)
        assert judging[-10:] == list(range(50, 60))
        assert (len(judging), len(answers(tmp_path / TRAINING))) == (10 + drawn, 50 - drawn)
        assert made.spans[-1] == Span("2.jsonl", 1, 51, 60)
        assert made.used == (50,)

    def test_rows_like_them_are_left_out_of_the_training_and_listed_where_that_is_asked_for(
        self, tmp_path: Path
    ) -> None:
        judge = write(tmp_path / "2.jsonl", objects(50, 10))
        near = [{"prompt": row["prompt"].replace(":", "!:"), "completion": " 777"} for row in objects(53, 2)]
        rows = write(tmp_path / "1.jsonl", [*objects(0, 50), *objects(50, 1), *near])

        made = prepared(tmp_path, [source(rows)], self.frozen(judge, leaks="drop"), evaluation_rows=0)
        assert made.dropped == {"evaluation": ((51, 54), (52, 57), (53, 58))}
        assert answers(tmp_path / TRAINING) == list(range(50))

        made = prepared(tmp_path, [source(rows)], self.frozen(judge), evaluation_rows=0)
        assert made.dropped == {}
        assert answers(tmp_path / TRAINING)[-3:] == [50, 777, 777]

    def test_each_of_them_counts_once(self, tmp_path: Path) -> None:
        rows, judge = write(tmp_path / "1.jsonl", objects(0, 5)), write(tmp_path / "2.jsonl", objects(50, 3) * 2)

        prepared(tmp_path, [source(rows)], self.frozen(judge), evaluation_rows=0)

        assert answers(tmp_path / EVALUATION) == [50, 51, 52]
