"""A file as rows of one format."""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from graftline.data.rows import read_rows, rows_from_objects, write_rows
from graftline.errors import DataError

PLAIN = {"prompt": "Q", "completion": "A"}
CHAT = {"messages": [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]}


def jsonl(path: Path, *rows: object) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def test_rows_carry_the_line_that_they_come_from(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(PLAIN) + "\n\n" + json.dumps(PLAIN) + "\n", encoding="utf-8")
    assert [row.source_line for row in read_rows(path)] == [1, 3]


def test_mixed_formats_are_refused_at_the_first_row_that_differs(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "rows.jsonl", PLAIN, PLAIN, CHAT)
    with pytest.raises(DataError, match=r"line 3: .*looks like messages: one file holds one format"):
        read_rows(path)


def test_a_named_format_reads_rows_that_fit_two(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "rows.jsonl", PLAIN | CHAT)
    assert read_rows(path, format="messages")[0].answer == "A"


def test_a_misspelt_format_gets_the_nearest_name(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"'sharegtp' is not known; expected auto, .*did you mean 'sharegpt'"):
        read_rows(jsonl(tmp_path / "rows.jsonl", PLAIN), format="sharegtp")


@pytest.mark.parametrize(
    ("name", "content"), [("r.jsonl", ""), ("r.jsonl", "\n \n"), ("r.json", "[]"), ("r.csv", "a,b\n"), ("r.csv", "")]
)
def test_a_file_without_rows_is_refused(tmp_path: Path, name: str, content: str) -> None:
    (tmp_path / name).write_text(content, encoding="utf-8")
    with pytest.raises(DataError, match="no rows"):
        read_rows(tmp_path / name)


def test_objects_made_by_code_are_rows_numbered_from_1() -> None:
    assert [row.source_line for row in rows_from_objects([PLAIN, PLAIN], origin="prepare.py")] == [1, 2]
    with pytest.raises(DataError, match=r"prepare.py, row 2: 'prompt' is empty"):
        rows_from_objects([PLAIN, PLAIN | {"prompt": ""}], origin="prepare.py")


SAMPLES = [
    [PLAIN, {"prompt": "Grüße \u2028", "completion": " A\n"}],
    [CHAT, {"messages": [{"role": "system", "content": "S"}, *CHAT["messages"]]}],
    [{"messages": [*CHAT["messages"][:1], {"role": "assistant", "content": "x", "weight": 0}, *CHAT["messages"]]}],
    [
        {
            "messages": [
                CHAT["messages"][0],
                {"role": "assistant", "content": None, "tool_calls": [{"name": "f", "arguments": {"a": None}}]},
                {"role": "tool", "content": "12", "name": "f"},
                {"role": "assistant", "content": "A", "thinking": "B"},
            ],
            "tools": [{"name": "f"}],
        },
    ],
]


@pytest.mark.parametrize("objects", SAMPLES)
def test_written_rows_are_read_back_equal(tmp_path: Path, objects: list[dict[str, object]]) -> None:
    rows = rows_from_objects(objects, origin="test")
    digest = write_rows(tmp_path / "a.jsonl", rows)
    again = read_rows(tmp_path / "a.jsonl")
    assert again == rows
    assert write_rows(tmp_path / "b.jsonl", again) == digest


def test_prompts_and_completions_are_written_as_such(tmp_path: Path) -> None:
    write_rows(tmp_path / "a.jsonl", rows_from_objects([PLAIN], origin="test"))
    assert json.loads((tmp_path / "a.jsonl").read_text()) == PLAIN


def test_all_rows_that_are_not_right_are_told_with_their_lines(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    lines: list[bytes] = [json.dumps(PLAIN).encode() for _ in range(30)]
    lines[0] = b'{"question": "Q", "completion": "A"}'  # the format is that of the next row
    lines[4] = b'{"prompt": "Q", '
    lines[7] = b'{"prompt": "\xe9", "completion": "A"}'
    lines[9] = json.dumps(CHAT).encode()
    lines[12] = json.dumps(PLAIN | {"completion": " "}).encode()
    lines[20:30] = [json.dumps(PLAIN | {"label": False}).encode()] * 10
    path.write_bytes(b"\n".join(lines))
    with pytest.raises(DataError) as caught:
        read_rows(path)
    told = str(caught.value).splitlines()
    assert told[0] == f"{path}: 15 problems:"
    assert [int(line.split("line ")[1].split(":")[0]) for line in told[1:-1]] == [1, 5, 8, 10, 13, 21, 22, 23, 24, 25]
    assert told[-1] == "  and 5 more"


@pytest.mark.parametrize(
    ("name", "content", "places"),
    [
        ("r.csv", "prompt,completion\nQ,A\nQ\nQ,\nQ,A\n", ["line 3", "line 4"]),
        ("r.json", json.dumps([PLAIN, {"prompt": "Q"}, PLAIN, 3]), ["row 2", "row 4"]),
    ],
)
def test_rows_of_other_files_are_told_together_too(tmp_path: Path, name: str, content: str, places: list[str]) -> None:
    (tmp_path / name).write_text(content, encoding="utf-8")
    with pytest.raises(DataError) as caught:
        read_rows(tmp_path / name)
    assert [line.split(", ")[1].split(":")[0] for line in str(caught.value).splitlines()[1:]] == places


UNREADABLE = {
    "a time after the year 9999": pa.array([10**15], pa.timestamp("s")),
    "a duration of ages": pa.array([2**62], pa.duration("s")),
    "such a time in a list": pa.array([[10**15]], pa.list_(pa.timestamp("s"))),
    "such a time in a field": pa.array([{"at": 10**15}], pa.struct([("at", pa.timestamp("s"))])),
    "bytes that are not text": pa.array([b"\xff"], pa.binary()),
}


@pytest.mark.parametrize("what", UNREADABLE)
def test_columns_that_mean_nothing_here_are_not_read(tmp_path: Path, what: str) -> None:
    path = tmp_path / "rows.parquet"
    pq.write_table(pa.table({"prompt": ["Q"], "completion": ["A"], "seen": UNREADABLE[what]}), path)
    assert [row.answer for row in read_rows(path)] == ["A"]
    pq.write_table(pa.table({"question": ["Q"], "seen": UNREADABLE[what]}), path)
    with pytest.raises(DataError, match="row 1: no known format has the keys question, seen"):
        read_rows(path)


def test_a_column_that_is_needed_and_cannot_be_read_is_named(tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    pq.write_table(pa.table({"prompt": pa.array([10**15], pa.timestamp("s")), "completion": ["A"]}), path)
    with pytest.raises(DataError, match=r"row 1: the column 'prompt' \(timestamp\[ms\]\) holds what cannot be read"):
        read_rows(path)
    pq.write_table(pa.Table.from_arrays([pa.array(["Q"])] * 3, ["prompt", "completion", "prompt"]), path)
    with pytest.raises(DataError, match="the column 'prompt' is there more than once"):
        read_rows(path)


def test_fields_that_a_table_fills_up_with_nulls_are_not_there(tmp_path: Path) -> None:
    def call(arguments: dict[str, object]) -> dict[str, object]:
        return {"tool_calls": [{"function": {"name": "f", "arguments": arguments}}]}

    user, answer = CHAT["messages"]
    chats = [[user, answer | call({"city": "Oslo"})], [user, answer | call({"days": 2})]]
    pq.write_table(pa.Table.from_pylist([{"messages": chat} for chat in chats]), tmp_path / "rows.parquet")
    rows = read_rows(tmp_path / "rows.parquet")
    assert rows == rows_from_objects([{"messages": chat} for chat in chats], origin="rows")
