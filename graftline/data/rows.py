"""Rows from a file: one format a file, found from its keys or named. Errors name file and line (or row)."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from graftline.data.formats import AUTO, FORMATS, Message, Row, check_format_name, detect_format, to_row
from graftline.data.records import Place, Record, read_records
from graftline.errors import DataError

__all__ = ["AUTO", "FORMATS", "Message", "Row", "read_rows", "rows_from_objects"]


def read_rows(path: Path, *, format: str = AUTO) -> list[Row]:
    """Read a .jsonl, .json, .csv or .parquet file of rows in one of `FORMATS`.

    With ``auto`` the first row decides the format, and a row of another format is refused: half of a file read wrongly
    would not be noticed.

    Raises:
        DataError: the file or a row of it is not right; file, line or row, what was given, what was expected.
    """
    return _to_rows(read_records(path), format, str(path))


def rows_from_objects(objects: Iterable[Mapping[str, Any]], *, origin: str, format: str = AUTO) -> list[Row]:
    """Rows from objects made by code (``data.prepare``), numbered from 1; ``origin`` names them in errors.

    Raises:
        DataError: as in `read_rows`.
    """
    records = (Record(Place(origin, "row", number), value) for number, value in enumerate(objects, start=1))
    return _to_rows(records, format, origin)


def _to_rows(records: Iterable[Record], format_name: str, origin: str) -> list[Row]:
    check_format_name(format_name)
    rows: list[Row] = []
    for record in records:
        if format_name == AUTO:
            format_name = detect_format(record)
        rows.append(to_row(record, format_name))
    if not rows:
        raise DataError(f"{origin}: no rows; the file is empty or has only blank lines: check data.source")
    return rows
