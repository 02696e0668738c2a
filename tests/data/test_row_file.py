"""Rows that lie in a file: what is found in them is what is found in rows that are held, and none is held."""

import random
import resource
import tracemalloc
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy
import pytest

from graftline.data import validation
from graftline.data.checks import check_leakage, check_texts
from graftline.data.mixing import FetchedSource
from graftline.data.preparation import EVALUATION, TRAINING, prepare_rows
from graftline.data.row_file import RowFile, keys_of, spool_rows
from graftline.data.row_keys import KEYS, first_of
from graftline.data.rows import Message, Row, write_rows
from graftline.data.screening import screen, with_repeats
from graftline.data.split import Split, find_leaks, hold_out, sample_rows, split_rows
from graftline.errors import DataError, GraftlineError
from graftline.logs import Reporter
from graftline.settings import RowSource
from tests.sections import data_section

WORDS = ("shank", "lever", "Comet", "comet", "ladder", "straße", "STRASSE", "window", "²", "2", "ｗｉｄｅ", "harvest")


def row(prompt: str, answer: str, line: int) -> Row:
    return Row((Message("user", prompt, False), Message("assistant", answer, True)), line)


def some_rows(chooser: random.Random, count: int, first_line: int = 1) -> list[Row]:
    """Rows of which many repeat others, contradict them, or are nearly the same."""
    found: list[Row] = []
    for line in range(first_line, first_line + count):
        prompt, answer = " ".join(chooser.choices(WORDS, k=chooser.randint(1, 9))), chooser.choice("ab")
        if found and chooser.random() < 0.6:
            earlier = chooser.choice(found)
            changed = (earlier.prompt.upper(), f"{earlier.prompt} x", f" {earlier.prompt}", earlier.prompt)
            prompt, answer = chooser.choice(changed), chooser.choice((answer, earlier.answer))
        found.append(row(prompt, answer, 2 * line))
    return found


TOLD = [
    Row((Message("system", "Be brief.", False), *row("Q", "A", 1).messages), 7),
    Row((*row("Q", "A", 1).messages[:1], Message("assistant", "kept", False), *row("and?", "B", 1).messages), 9),
    Row(
        (
            Message("user", "Weather?", False),
            Message("assistant", '{"tool_calls": []}', True, {"content": "", "tool_calls": []}),
            Message("tool", "rain", False),
            Message("assistant", "It rains.", True),
        ),
        11,
        ({"type": "function", "function": {"name": "weather"}},),
    ),
]


def test_rows_are_read_from_a_spool_as_they_were_with_their_source_lines(tmp_path: Path) -> None:
    rows = [*TOLD[:2], *some_rows(random.Random(1), 30, 10)]
    file = spool_rows(tmp_path / "rows.jsonl", rows)
    assert list(file) == rows
    assert (file[3], file[-1], file[2:7:2]) == (rows[3], rows[-1], rows[2:7:2])
    some = file.take(numpy.array([30, 0, 5]))
    assert list(some) == [rows[30], rows[0], rows[5]]
    assert list(some.take(numpy.array([2]))) == [rows[5]]
    assert keys_of(some)["line"].tolist() == [rows[30].source_line, rows[0].source_line, rows[5].source_line]
    with pytest.raises(IndexError):
        file[len(rows)]


def test_a_row_that_was_damaged_in_its_file_is_an_error_with_its_line(tmp_path: Path) -> None:
    write_rows(tmp_path / "train.jsonl", some_rows(random.Random(1), 5))
    file = RowFile(tmp_path / "train.jsonl")
    assert len(file) == 5
    text = (tmp_path / "train.jsonl").read_bytes()
    (tmp_path / "train.jsonl").write_bytes(text.replace(b"{", b"[", 5)[: len(text)].replace(b"[", b"{", 4))
    with pytest.raises(DataError, match=r"train.jsonl, line 5: broken JSON"):
        file[4]


@pytest.mark.parametrize(
    ("words", "limit", "message"),
    [
        (40, 20_000, r"cannot write .*rows\.jsonl: File too large; free space or permission is missing there"),
        (1, 20_000, r"rows cannot be compared: File too large in .*free space there, or set TMPDIR to a folder"),
    ],
)
def test_a_disk_that_fills_while_rows_are_read_is_told_and_nothing_is_left(
    tmp_path: Path, words: int, limit: int, message: str
) -> None:
    rows = [row(" ".join(WORDS[:2] * words), "a", line) for line in range(1, 300)]
    allowed = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, allowed[1]))
    try:
        with pytest.raises(GraftlineError, match=message):
            spool_rows(tmp_path / "rows.jsonl", rows)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, allowed)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("seed", range(12))
def test_what_is_found_in_rows_of_a_file_is_what_is_found_in_rows_that_are_held(tmp_path: Path, seed: int) -> None:
    chooser = random.Random(seed)
    held, others = some_rows(chooser, 60), some_rows(chooser, 15)
    file, other_file = spool_rows(tmp_path / "rows", held), spool_rows(tmp_path / "others", others)
    given = {
        "duplicates": chooser.choice(["drop", "keep", "error"]),
        "contradictions": chooser.choice(["drop", "keep"]),
        "near_duplicates": chooser.choice(["drop", "keep"]),
    }
    ages = numpy.arange(60.0)[::-1] if seed % 2 else None

    def split(rows: Sequence[Row]) -> Any:
        found = screen(rows, **given)  # type: ignore[arg-type]
        parted = split_rows(found.rows, 3, seed=seed, ages=None if ages is None else ages[-len(found.rows) :])
        whole, left_out = with_repeats(parted, found.repeats)
        sides = [list(side) for side in (found.rows, found.repeats, whole.training, whole.evaluation)]
        return sides, found.dropped, whole.near, left_out

    def checked(training: Sequence[Row], evaluation: Sequence[Row]) -> Any:
        texts = check_texts("training", training, labels=["a"], duplicates="keep")
        leaks = find_leaks(training, evaluation), find_leaks(evaluation, training)
        drawn = sample_rows(training, 9, seed=seed), hold_out(training, 2, seed=seed).tolist()
        return texts, check_leakage(training, evaluation), leaks, drawn

    assert outcome(lambda: split(file)) == outcome(lambda: split(held))
    assert checked(file, other_file) == checked(held, others)


def outcome(work: Any) -> Any:
    try:
        return work()
    except DataError as error:
        return str(error)


def test_repeats_of_another_file_come_back_in_the_order_of_their_lines(tmp_path: Path) -> None:
    rows = [row("Q", "A", 3), row("R", "B", 5)]
    file = spool_rows(tmp_path / "rows", rows)
    split, _ = with_repeats(Split(file, ()), [row("Q", "A", 4)])
    assert [one.source_line for one in split.training] == [3, 4, 5]


def test_the_first_of_equal_keys_is_found_among_none_one_and_many() -> None:
    assert first_of(numpy.zeros(0, dtype=KEYS["text"])).tolist() == []
    keys = numpy.array([b"b", b"a", b"b", b"c", b"a", b"b"], dtype=KEYS["text"])
    assert first_of(keys).tolist() == [0, 1, 0, 3, 1, 0]
    assert first_of(keys[:1]).tolist() == [0]


def test_what_fetch_and_validate_hold_does_not_grow_with_the_texts(tmp_path: Path) -> None:
    """Peaks at two sizes: a row held as an object costs its text, 4,000 bytes here, and is seen at once."""

    def peak(count: int) -> int:
        folder = tmp_path / str(count)
        folder.mkdir()
        rows = [row(f"{at * 7919} {'lever ' * 20}{at}", f"{at} " + "window " * 550, at + 1) for at in range(count)]
        write_rows(folder / "rows.jsonl", rows)
        del rows
        source = FetchedSource(RowSource(source="path:rows.jsonl"), (("rows.jsonl", folder / "rows.jsonl"),))
        section = data_section(evaluation_rows=5)
        tracemalloc.start()
        try:
            prepare_rows(section, [source], root=folder, out=folder)
            training, evaluation = RowFile(folder / TRAINING), RowFile(folder / EVALUATION)
            check_texts("training", training, labels=None)
            check_leakage(training, evaluation)
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    peak(50)
    few, many = peak(1000), peak(2000)
    assert many - few < 1000 * 1000


def test_great_expectations_sees_every_row_once_in_frames(monkeypatch: pytest.MonkeyPatch) -> None:
    from graftline.data.encoding import EncodedRows
    from graftline.data.template import Encoded

    rows = some_rows(random.Random(3), 25)
    encoded = EncodedRows([Encoded([1] * (1 + at), [True] * (1 + at)) for at in range(25)], rows, (), ())
    whole = next(validation._frames(encoded))
    monkeypatch.setattr(validation, "_FRAME_ROWS", 10)
    frames = list(validation._frames(encoded))
    assert [len(frame) for frame in frames] == [10, 10, 5]
    for name in whole:
        assert [value for frame in frames for value in frame[name]] == list(whole[name])


def test_progress_of_rows_that_nobody_has_counted_has_a_rate_and_no_end(capsys: pytest.CaptureFixture[str]) -> None:
    reporter = Reporter("read", "rows", interval_seconds=0.0)
    reporter(0, 0)
    reporter(1000, 0)
    line = capsys.readouterr().err
    assert line.startswith("read  1000 rows  ")
    assert "left" not in line
