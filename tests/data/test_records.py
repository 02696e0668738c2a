"""Files of rows: what is read, and that each kind of damage is named with its place."""

import contextlib
import csv
import io
import json
import re
import struct
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from graftline.data import records
from graftline.data.records import MAX_ROW_BYTES, Problems, read_records
from graftline.data.rows import read_rows
from graftline.errors import DataError

GOOD = b'{"prompt": "a", "completion": "b"}\n'


def write(folder: Path, name: str, content: bytes) -> Path:
    path = folder / name
    path.write_bytes(content)
    return path


def values(path: Path) -> list[object]:
    return [record.value for record in read_records(path)]


def test_the_same_rows_are_read_from_all_four_kinds_of_file(tmp_path: Path) -> None:
    rows = [
        {"prompt": 'Gr\u00fc\u00dfe, "x"', "completion": "two\nlines"},
        {"prompt": "\u2028 \U0001f600", "completion": ""},
    ]
    text = io.StringIO()
    table = csv.DictWriter(text, ["prompt", "completion"])
    table.writeheader()
    table.writerows(rows)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "rows.parquet")
    paths = [
        write(tmp_path, "rows.jsonl", "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()),
        write(tmp_path, "rows.json", json.dumps(rows, indent=2).encode()),
        write(tmp_path, "rows.csv", text.getvalue().encode()),
        tmp_path / "rows.parquet",
    ]
    assert [values(path) for path in paths] == [rows] * 4


def test_a_csv_record_stands_at_its_first_line_even_after_fields_with_line_ends(tmp_path: Path) -> None:
    path = write(tmp_path, "rows.csv", b'prompt,completion\n"a\nb\nc",d\n\ne,f\n')
    assert [str(record.place).rsplit(", ", 1)[1] for record in read_records(path)] == ["line 2", "line 6"]


def test_blank_lines_are_passed_over_and_counted(tmp_path: Path) -> None:
    path = write(tmp_path, "rows.jsonl", b"\n" + GOOD + b"  \r\n" + GOOD)
    assert [record.place.number for record in read_records(path)] == [2, 4]


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.csv", "rows.json"])
def test_a_utf8_byte_order_mark_is_stripped(tmp_path: Path, name: str) -> None:
    content = {"rows.jsonl": GOOD, "rows.csv": b"prompt,completion\na,b\n", "rows.json": b"[" + GOOD + b"]"}[name]
    assert values(write(tmp_path, name, b"\xef\xbb\xbf" + content)) == [{"prompt": "a", "completion": "b"}]


def test_null_in_a_parquet_row_is_a_field_that_the_row_does_not_have(tmp_path: Path) -> None:
    pyarrow.parquet.write_table(pyarrow.table({"a": ["x", None], "b": ["y", "z"]}), tmp_path / "rows.parquet")
    assert values(tmp_path / "rows.parquet") == [{"a": "x", "b": "y"}, {"b": "z"}]


def test_the_row_numbers_that_pandas_writes_are_a_column_like_others(tmp_path: Path) -> None:
    path = write(tmp_path, "r.csv", b",prompt,completion\n0,a,b\n1,c,d\n")
    assert [row.answer for row in read_rows(path)] == ["b", "d"]


DAMAGED = {
    "broken json names its line": ("r.jsonl", GOOD + GOOD + b'{"prompt": "a"\n', r"line 3: broken JSON at column 15"),
    "text after the object": ("r.jsonl", GOOD + GOOD.strip() + GOOD, r"line 2: broken JSON at column 35: Extra data"),
    "single quotes": ("r.jsonl", b"{'prompt': 'a'}\n", r"line 1: broken JSON"),
    "cut in the middle": ("r.jsonl", GOOD + GOOD[:20], r"line 2: broken JSON"),
    "key twice": ("r.jsonl", b'{"prompt": "a", "prompt": "b"}', r"line 1: broken JSON: key 'prompt' appears twice"),
    "nested too deeply": ("r.jsonl", b"[" * 200_000, r"line 1: broken JSON: nested too deeply"),
    "number without end": ("r.jsonl", b"1" * 10_000, r"line 1: broken JSON: Exceeds the limit"),
    "latin-1": ("r.jsonl", GOOD + b'{"prompt": "caf\xe9"}\n', r"line 2: byte 0xe9 at byte 16 is not UTF-8.*iconv"),
    "half a utf-8 sequence": ("r.jsonl", b'{"prompt": "\xc3"}\n', r"line 1: byte 0xc3"),
    "overlong utf-8": ("r.jsonl", b'{"prompt": "\xc0\x80"}\n', r"line 1: byte 0xc0"),
    "NUL byte": ("r.jsonl", GOOD + b'{"prompt": "a\0b"}\n', r"line 2: NUL byte at byte 14"),
    "utf-16": ("r.jsonl", GOOD.decode().encode("utf-16"), r"the file is UTF-16, expected UTF-8.*iconv -f UTF-16"),
    "utf-16 without mark": ("r.jsonl", GOOD.decode().encode("utf-16-le"), r"line 1: NUL byte at byte 2"),
    "utf-32": ("r.csv", "a,b\n".encode("utf-32"), r"the file is UTF-32"),
    "mark in the middle": ("r.jsonl", GOOD + b"\xef\xbb\xbf" + GOOD, r"line 2: broken JSON.*BOM"),
    "json that is jsonl": ("r.json", GOOD + GOOD, r"one array of rows, got an object.*rename"),
    "json that is a text": ("r.json", b'"rows"', r"expected one array of rows, got text"),
    "json cut off": ("r.json", b'[{"prompt": "a"},\n', r"broken JSON"),
    "csv with a field more": ("r.csv", b"a,b\n1,2\n1,2,3\n", r"line 3: 3 fields, the header has 2"),
    "csv with a field less": ("r.csv", b"a,b\n1\n", r"line 2: 1 fields"),
    "csv with an open quote": ("r.csv", b'a,b\n1,2\n"1,2\n3,4\n', r"line 3: broken csv: unexpected end of data"),
    "csv with text after a quote": ("r.csv", b'a,b\n"1"x,2\n', r"line 2: broken csv"),
    "csv with a column twice": ("r.csv", b"a,a\n1,2\n", r"line 1: the csv header has a more than once"),
    "csv with a nameless column": ("r.csv", b"a,\n1,2\n", r"line 1: the csv header has a column without a name"),
    "csv with semicolons": ("r.csv", b"prompt;completion\na;b\n", r"separated by commas"),
    "one array over several lines": ("r.jsonl", b'[\n{"prompt": "a"}\n]\n', r"one array of rows.*call it \.json"),
    "one array in one line": ("r.jsonl", b'[{"prompt": "a"}]', r"one array of rows.*call it \.json"),
    "an object over several lines": ("r.jsonl", b'{\n "prompt": "a"\n}\n', r"on one line \(jq -c \. r\.jsonl\)"),
    "lines that end with CR": ("r.jsonl", GOOD.replace(b"\n", b"\r") * 3, r"end with CR alone; .* tr "),
    "csv in latin-1": ("r.csv", b"a,b\ncaf\xe9,2\n", r"line 2: byte 0xe9"),
    "parquet that is text": ("r.parquet", GOOD, r"not a whole parquet file"),
    "parquet that is empty": ("r.parquet", b"", r"not a whole parquet file"),
    "unknown kind of file": ("r.xlsx", b"x", r"ends in '.xlsx'; a file of rows ends in .csv, .json, .jsonl, .parquet"),
    "no kind of file": ("rows", GOOD, r"ends in 'no suffix'"),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_damage_is_named(tmp_path: Path, case: str) -> None:
    name, content, message = DAMAGED[case]
    path = write(tmp_path, name, content)
    with pytest.raises(DataError, match=message) as error:
        values(path)
    assert str(path) in str(error.value)


def told(path: Path) -> tuple[list[Any], list[str]]:
    """Records that can be read, and what is said of the others."""
    found = Problems("")
    read = []
    for record in read_records(path, on_error=found.add):
        if isinstance(record.value, DataError):
            found.add(record.value)
        else:
            read.append(record.value)
    return read, list(found._told)


def test_every_csv_line_that_is_not_utf8_is_named_and_the_others_are_read(tmp_path: Path) -> None:
    content = b'a,b\ncaf\xe9,1\nx,2\n"long\n\xfctext",3\ny,\0\nz,5\n'
    read, problems = told(write(tmp_path, "r.csv", content))
    assert read == [{"a": "x", "b": "2"}, {"a": "z", "b": "5"}]
    assert [re.search(r"line \d+: (byte 0x..|NUL)", problem)[0] for problem in problems] == [  # type: ignore[index]
        "line 2: byte 0xe9",
        "line 5: byte 0xfc",
        "line 6: NUL",
    ]


def test_every_parquet_cell_that_cannot_be_read_is_named_with_its_row(tmp_path: Path) -> None:
    offsets = struct.pack("<4i", 0, 1, 2, 3)
    texts = pyarrow.StringArray.from_buffers(3, pyarrow.py_buffer(offsets), pyarrow.py_buffer(b"a\xffc"))
    times = pyarrow.array([0, 0, 2**62], pyarrow.duration("s"))
    pyarrow.parquet.write_table(pyarrow.table({"prompt": texts, "time": times}), tmp_path / "r.parquet")
    read, problems = told(tmp_path / "r.parquet")
    assert [value["prompt"] for value in read] == ["a"]
    assert "r.parquet, row 2: the column 'prompt' (string) holds what cannot be read" in problems[0]
    assert "r.parquet, row 3: the column 'time' (duration[s]) holds what cannot be read" in problems[1]
    assert len(problems) == 2


def test_a_map_in_a_parquet_column_is_an_object(tmp_path: Path) -> None:
    kind = pyarrow.list_(pyarrow.map_(pyarrow.string(), pyarrow.string()))
    turns = [[[("role", "user"), ("content", "a")]], [[("role", "user"), ("role", "tool")]]]
    pyarrow.parquet.write_table(pyarrow.table({"messages": pyarrow.array(turns, kind)}), tmp_path / "r.parquet")
    read, problems = told(tmp_path / "r.parquet")
    assert read == [{"messages": [{"role": "user", "content": "a"}]}]
    assert "row 2: the column 'messages'" in problems[0]
    assert "duplicate key was 'role'" in problems[0]


def test_a_parquet_file_cut_anywhere_is_refused(tmp_path: Path) -> None:
    pyarrow.parquet.write_table(pyarrow.table({"prompt": ["a"] * 50}), tmp_path / "whole.parquet")
    whole = (tmp_path / "whole.parquet").read_bytes()
    for length in range(0, len(whole), 7):
        with pytest.raises(DataError):
            values(write(tmp_path, "cut.parquet", whole[:length]))


def test_others_read_csv_with_their_own_limit_while_a_file_is_half_read(tmp_path: Path) -> None:
    long = "x" * (csv.field_size_limit() + 1)
    path = write(tmp_path, "rows.csv", f"prompt,completion\n{long},d\n{long},f\n".encode())
    before = csv.field_size_limit()
    reading = [read_records(path) for _ in range(2)]
    first = [next(each) for each in reading]
    assert csv.field_size_limit() == before
    with pytest.raises(csv.Error, match="field larger than field limit"):
        next(csv.reader([long]))
    rest = [record for each in reversed(reading) for record in each]
    assert [record.value["prompt"] for record in (*first, *rest)] == [long] * 4
    assert csv.field_size_limit() == before


@pytest.mark.parametrize("name", ["big.jsonl", "big.csv"])
def test_a_row_of_50_mb_is_refused_without_being_read_whole(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = 0

    def count(data: bytes, place: records.RecordPlace) -> str:
        nonlocal seen
        seen += len(data)
        return data.decode()

    monkeypatch.setattr(records, "_decode", count)
    start = GOOD if name == "big.jsonl" else b"prompt,completion\na,b\n"
    path = write(tmp_path, name, start + b"x" * 50_000_000)
    with pytest.raises(DataError, match=r"(line 2|line 3): the row is longer than 8 MiB.*split"):
        values(path)
    assert seen < MAX_ROW_BYTES


def test_an_open_quote_does_not_swallow_a_large_csv(tmp_path: Path) -> None:
    path = write(tmp_path, "r.csv", b'a,b\n"1,2\n' + b"word,word\n" * 1_000_000)
    with pytest.raises(DataError, match=r"line 2: (the row is longer|broken csv)"):
        values(path)


def test_the_csv_field_limit_of_the_process_is_put_back(tmp_path: Path) -> None:
    before = 131_072
    csv.field_size_limit(before)
    values(write(tmp_path, "r.csv", b"a,b\n1,2\n"))
    assert csv.field_size_limit() == before


def test_a_missing_file_a_folder_and_a_forbidden_file_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="there is no such file"):
        values(tmp_path / "none.jsonl")
    (tmp_path / "folder.jsonl").mkdir()
    with pytest.raises(DataError, match="is a folder"):
        values(tmp_path / "folder.jsonl")
    loop = tmp_path / "loop.jsonl"
    loop.symlink_to(loop)
    with pytest.raises(DataError, match="cannot be read"):
        values(loop)


@settings(max_examples=300, deadline=None)
@given(content=st.binary(max_size=200), suffix=st.sampled_from([".jsonl", ".json", ".csv", ".parquet"]))
def test_any_bytes_give_records_or_a_data_error(
    tmp_path_factory: pytest.TempPathFactory, content: bytes, suffix: str
) -> None:
    path = tmp_path_factory.getbasetemp() / f"any{suffix}"
    path.write_bytes(content)
    try:
        found = list(read_records(path))
    except DataError:
        return
    assert all(record.place.number >= 1 for record in found)


@settings(max_examples=100, deadline=None)
@given(
    middle=st.binary(max_size=100), flips=st.lists(st.tuples(st.integers(0, 10_000), st.integers(1, 255)), max_size=8)
)
def test_a_parquet_file_with_changed_bytes_gives_records_or_a_data_error(
    tmp_path_factory: pytest.TempPathFactory, middle: bytes, flips: list[tuple[int, int]]
) -> None:
    buffer = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table({"prompt": ["a", "b"], "completion": ["c", "d"]}), buffer)
    content = bytearray(buffer.getvalue())
    for at, change in flips:
        content[at % len(content)] ^= change
    path = tmp_path_factory.getbasetemp() / "flipped.parquet"
    path.write_bytes(bytes(content) if flips else b"PAR1" + middle + b"PAR1")
    with contextlib.suppress(DataError):
        list(read_records(path))


@settings(max_examples=200, deadline=None)
@given(rows=st.lists(st.dictionaries(st.text(max_size=5), st.text(max_size=20), min_size=1), max_size=5))
def test_whatever_json_writes_is_read_back(
    tmp_path_factory: pytest.TempPathFactory, rows: list[dict[str, str]]
) -> None:
    path = tmp_path_factory.getbasetemp() / "back.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    assert values(path) == rows
