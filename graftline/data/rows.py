"""Rows from a file: one format a file, found from its keys or named. Errors name file and line (or row)."""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from graftline.data.formats import AUTO, COLUMNS, FORMATS, Message, Row, check_format_name, detect_format, to_row
from graftline.data.records import Place, Problems, Record, read_records
from graftline.digest import Digest, write_text
from graftline.errors import DataError

__all__ = ["AUTO", "FORMATS", "Message", "Row", "read_rows", "rows_from_objects", "write_rows"]


def read_rows(path: str | Path, *, format: str = AUTO) -> list[Row]:
    """Read a .jsonl, .json, .csv or .parquet file of rows in one of `FORMATS`.

    With ``auto`` the first row decides the format, and a row of another format is refused: half of a file read wrongly
    would not be noticed.

    Raises:
        DataError: the file or rows of it are not right; file, line or row, what was given, what was expected. Rows that
            are not right are told together.
    """
    problems = Problems(str(path))
    return _to_rows(read_records(Path(path), columns=COLUMNS, on_error=problems.add), format, str(path), problems)


def rows_from_objects(objects: Iterable[Mapping[str, Any]], *, origin: str, format: str = AUTO) -> list[Row]:
    """Rows from objects made by code (``data.prepare``), numbered from 1; ``origin`` names them in errors.

    Raises:
        DataError: as in `read_rows`.
    """
    records = (Record(Place(origin, "row", number), value) for number, value in enumerate(objects, start=1))
    return _to_rows(records, format, origin, Problems(origin))


def write_rows(path: Path, rows: Sequence[Row]) -> Digest:
    """Write rows as jsonl: prompt-completion if each is one prompt and one completion, messages otherwise.

    Law: `read_rows` gives equal rows back, except that ``source_line`` counts the lines of this file.
    """
    plain = all(_is_plain(row) for row in rows)
    objects = ({"prompt": row.prompt, "completion": row.answer} if plain else _as_messages(row) for row in rows)
    return write_text(path, "".join(json.dumps(value, ensure_ascii=False) + "\n" for value in objects))


def _is_plain(row: Row) -> bool:
    roles = [message.role for message in row.messages]
    return roles == ["user", "assistant"] and not row.tools and not any(message.fields for message in row.messages)


def _as_messages(row: Row) -> dict[str, Any]:
    def turn(message: Message) -> dict[str, Any]:
        learned = {} if message.supervised or message.role != "assistant" else {"weight": 0}
        return message.turn | learned

    return {"messages": [turn(message) for message in row.messages]} | ({"tools": row.tools} if row.tools else {})


def _to_rows(records: Iterable[Record], format_name: str, origin: str, problems: Problems) -> list[Row]:
    """``problems``: those of ``records`` so far, and then of their rows."""
    check_format_name(format_name)
    rows: list[Row] = []
    for record in records:
        try:
            if format_name == AUTO:
                format_name = detect_format(record)
            rows.append(to_row(record, format_name))
        except DataError as error:
            problems.add(error)
    problems.raise_any()
    if not rows:
        raise DataError(f"{origin}: no rows; the file is empty or has only blank lines: check data.source")
    return rows
