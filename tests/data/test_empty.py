"""Rows that ask nothing or have no answer to learn: an error, or left out, counted and listed."""

import json
from pathlib import Path
from typing import Any

import pytest

from graftline.data.checks import check_dropped
from graftline.data.mixing import FetchedSource
from graftline.data.preparation import EVALUATION, TRAINING, Prepared, prepare_rows
from graftline.data.rows import read_rows, rows_from_objects
from graftline.errors import DataError
from graftline.settings.data import Data, EvaluationRows, RowSource


def chat(*turns: tuple[str, str | None], **more: Any) -> dict[str, Any]:
    return {"messages": [{"role": role, "content": content} for role, content in turns], **more}


EMPTY: dict[str, dict[str, Any]] = {
    "empty prompt": {"prompt": "", "completion": "a"},
    "blank completion": {"prompt": "q", "completion": " \n"},
    "null completion": {"prompt": "q", "completion": None},
    "no turns": chat(),
    "null turn": chat(("user", "q"), ("assistant", None)),
    "blank turn of several": chat(("user", "q"), ("assistant", "a"), ("user", " "), ("assistant", "b")),
    "no answer": chat(("user", "q")),
    "a question behind the last answer": chat(("user", "q"), ("assistant", "a"), ("user", "q2")),
    "empty sharegpt answer": {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": ""}]},
    "null output": {"instruction": "q", "output": None},
}
GOOD: dict[str, dict[str, Any]] = {
    "prompt": {"prompt": "what", "completion": "that"},
    "messages": chat(("user", "what"), ("assistant", "that")),
    "conversations": {"conversations": [{"from": "human", "value": "what"}, {"from": "gpt", "value": "that"}]},
    "instruction": {"instruction": "what", "output": "that"},
}


def write(path: Path, *objects: dict[str, Any]) -> FetchedSource:
    path.write_text("".join(json.dumps(one) + "\n" for one in objects))
    return FetchedSource(RowSource(source=f"path:{path.name}"), ((path.name, path),))


def prepared(folder: Path, *sources: FetchedSource, frozen: FetchedSource | None = None, **given: Any) -> Prepared:
    named = [{"source": each.section.source} for each in sources]
    section = Data.model_validate({"sources": named, "evaluation_rows": 1, "max_tokens": 64, **given})
    return prepare_rows(section, sources, frozen, root=folder, out=folder)


def good(start: int, count: int) -> list[dict[str, Any]]:
    return [{"prompt": f"{n * 7919} is what?", "completion": f"n{n}"} for n in range(start, start + count)]


@pytest.mark.parametrize("name", EMPTY)
def test_an_empty_row_is_an_error_that_names_the_way_out(name: str) -> None:
    with pytest.raises(DataError, match=r"rows, row 1: .*data\.empty to drop"):
        rows_from_objects([EMPTY[name]], origin="rows")


@pytest.mark.parametrize("name", EMPTY)
def test_an_empty_row_is_left_out_even_if_it_is_the_first(tmp_path: Path, name: str) -> None:
    kept = next(good for key, good in GOOD.items() if key in EMPTY[name])
    rows = [EMPTY[name], kept, json.loads(json.dumps(kept).replace("what", "Who is it?")), EMPTY[name]]
    found = prepared(tmp_path, write(tmp_path / "rows.jsonl", *rows), empty="drop")
    assert found.dropped == {"empty": ((1, 1), (4, 4))}
    assert sorted(row.source_line for row in (*found.split.training, *found.split.evaluation)) == [2, 3]
    (check, _) = check_dropped(found.dropped, ())
    assert "2 ask nothing or have no answer to learn (lines 1, 4)" in check.detail


def test_lines_go_on_behind_empty_ones_in_other_files_and_in_the_evaluation(tmp_path: Path) -> None:
    empty = EMPTY["empty prompt"]
    sources = [
        write(tmp_path / "a.jsonl", *good(0, 2), empty),
        write(tmp_path / "b.jsonl", empty, empty),  # a day without a row
        write(tmp_path / "c.jsonl", empty, *good(2, 2)),
    ]
    judge = write(tmp_path / "judge.jsonl", empty, *good(9, 1))
    section = EvaluationRows(source="path:judge.jsonl", sha256="0" * 64)
    found = prepared(tmp_path, *sources, frozen=FetchedSource(section, judge.files), empty="drop", evaluation_rows=0)
    assert found.dropped["empty"] == tuple((line, line) for line in (3, 4, 5, 6, 9))
    assert [(span.name, span.first, span.last) for span in found.spans] == [
        ("a.jsonl", 1, 3),
        ("b.jsonl", 4, 5),
        ("c.jsonl", 6, 8),
        ("judge.jsonl", 9, 10),
    ]
    assert [row.source_line for row in found.split.training] == [1, 2, 7, 8]
    assert [row.answer for row in read_rows(tmp_path / EVALUATION)] == ["n9"]


def test_rows_without_a_turn_that_is_asked_for_are_left_out_too(tmp_path: Path) -> None:
    call = {"role": "assistant", "tool_calls": [{"function": {"name": "look", "arguments": {}}}]}
    calls = [{"messages": [{"role": "user", "content": f"{n * 7919} is what?"}, call]} for n in range(2)]
    source = write(tmp_path / "rows.jsonl", GOOD["messages"], *calls)
    found = prepared(tmp_path, source, empty="drop", learned="calls")
    assert found.dropped == {"empty": ((1, 1),)}
    assert len(read_rows(tmp_path / TRAINING)) == 1


def test_a_file_with_nothing_but_empty_rows_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"rows\.jsonl: no rows; all 1 rows are empty"):
        prepared(tmp_path, write(tmp_path / "rows.jsonl", EMPTY["empty prompt"]), empty="drop")


def test_what_is_malformed_stays_an_error(tmp_path: Path) -> None:
    source = write(tmp_path / "rows.jsonl", {"prompt": 1, "completion": "a"}, *good(0, 3))
    with pytest.raises(DataError, match=r"rows\.jsonl, line 1: 'prompt' is int '1'"):
        prepared(tmp_path, source, empty="drop")


def test_a_tool_that_printed_nothing_and_instructions_that_say_nothing_are_turns() -> None:
    call = {"role": "assistant", "tool_calls": [{"function": {"name": "touch", "arguments": {}}}]}
    turns = [
        {"role": "system", "content": ""},
        {"role": "user", "content": "Make the file."},
        call,
        {"role": "tool", "content": ""},
        {"role": "assistant", "content": "Done."},
    ]
    (row,) = rows_from_objects([{"messages": turns}], origin="rows")
    assert [message.content for message in row.messages if message.role in ("system", "tool")] == ["", ""]
