"""A file as rows of one format."""

import json
from pathlib import Path

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
