"""A file of rows as records: JSON values with the place that an error can name. jsonl, json, csv and parquet.

Text is UTF-8. A UTF-8 byte order mark at the start is accepted and stripped (spreadsheets write it); UTF-16, UTF-32,
NUL bytes and bytes that are not UTF-8 are refused with their place. No row may be longer than `MAX_ROW_BYTES`;
jsonl and csv are read line by line, so one endless line costs no more memory than that.
"""

import codecs
import csv
import json
import os
import threading
from collections.abc import Callable, Container, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow
import pyarrow.parquet

from graftline.errors import DataError

MAX_ROW_BYTES = 8 << 20
"""A longer row is a damaged file or a whole document set in one cell: about two million tokens."""

UNREAD = "…"
"""Value of a column that was not read: only its name is known."""
_PARQUET = ".parquet"
_PARQUET_BATCH_ROWS = 256
_MOST_TOLD = 10
_WIDE_ENCODINGS = {
    codecs.BOM_UTF32_LE: "UTF-32",
    codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}


@dataclass(frozen=True, slots=True)
class RecordPlace:
    """Where a record stands: a file and its ``number`` (from 1) of ``unit``s, which are lines of text or rows."""

    path: str
    unit: str
    number: int

    def __str__(self) -> str:
        return f"{self.path}, {self.unit} {self.number}"


@dataclass(frozen=True, slots=True)
class Record:
    """One value of a file (an object, if the file is right) and its place; a `DataError` where it cannot be read."""

    place: RecordPlace
    value: Any


def read_records(
    path: Path, *, columns: Container[str] | None = None, on_error: Callable[[DataError], None] | None = None
) -> Iterator[Record]:
    """Read the records of a .jsonl, .json, .csv or .parquet file, in order; blank lines are passed over.

    Args:
        path: the file.
        columns: those of a parquet file that are read; the others are `UNREAD`. All when left out.
        on_error: is told of a line that cannot be read, behind which others can; raised when left out.

    Raises:
        DataError: the file is missing, of another kind, not UTF-8 or damaged; line or row is named.
    """
    suffix = path.suffix.lower()
    if suffix not in (*_READERS, _PARQUET):
        raise DataError(
            f"{path}: the name ends in {path.suffix or 'no suffix'!r}; a file of rows ends in "
            f"{', '.join(sorted([*_READERS, _PARQUET]))}: convert or rename it"
        )
    if path.is_dir():
        raise DataError(f"{path} is a folder; give the path of one file of rows")
    try:
        for record in _parquet(path, columns) if suffix == _PARQUET else _READERS[suffix](path):
            if not isinstance(record, DataError):
                yield record
            elif on_error is None or isinstance(record, _NotLinesError):
                raise record
            else:
                on_error(record)
    except FileNotFoundError as error:
        raise DataError(f"{path}: there is no such file; check data.source or run the fetch stage") from error
    except OSError as error:
        raise DataError(
            f"{path} cannot be read: {error.strerror or error}; check its permission and the disk"
        ) from error


def count_records(path: Path) -> int:
    """About how many records a file has, without reading them; 0 if that is not known."""
    try:
        if path.suffix.lower() == _PARQUET:
            return int(pyarrow.parquet.read_metadata(path).num_rows)
        if path.suffix.lower() == ".json":
            return 0
        with path.open("rb") as file:
            return sum(piece.count(b"\n") for piece in iter(lambda: file.read(1 << 20), b""))
    except (OSError, pyarrow.ArrowException):
        return 0  # Whoever reads the file will say what is wrong with it.


class Problems:
    """What is wrong with rows, told together: mended one by one, each run would find the next."""

    def __init__(self, of: str, names: Mapping[str, str] | None = None) -> None:
        """``of``: what has the problems. ``names``: what people know its files by, for their paths in messages."""
        self._of, self._told, self.number = of, list[str](), 0
        self._names = sorted((names or {}).items(), key=lambda pair: -len(pair[0]))

    def add(self, problem: object) -> None:
        """Remember a problem; the first ten are told."""
        self.number += 1
        if len(self._told) < _MOST_TOLD:
            self._told.append(self.named(problem))

    def named(self, problem: object) -> str:
        """The problem's text with the names of files instead of their paths."""
        text = str(problem)
        for path, name in self._names:
            text = text.replace(path, name)
        return text

    def raise_any(self) -> None:
        """Raise one problem as it is, several as a list with their number.

        Raises:
            DataError: there is a problem.
        """
        if self.number == 1:
            raise DataError(self._told[0])
        if self.number:
            more = [f"and {self.number - _MOST_TOLD} more"] if self.number > _MOST_TOLD else []
            listed = "".join(f"\n  {problem}" for problem in [*self._told, *more])
            raise DataError(f"{self._of}: {self.number} problems:{listed}")


def _jsonl(path: Path) -> Iterator[Record | DataError]:
    for place, data in _raw_lines(path):
        try:
            text = _decode(data, place)
            if not text.strip():
                continue
            if place.number == 1:
                _check_one_row_a_line(text, path)
            yield _text_record(text, place)
        except DataError as error:
            yield error


def _check_one_row_a_line(text: str, path: Path) -> None:
    """Refuse what would be a problem in every line, before the second one is told."""
    if text.lstrip().startswith("[") and (text.strip() == "[" or text.lstrip()[1:].lstrip().startswith("{")):
        raise _NotLinesError(f"{path}: the file is one array of rows, and .jsonl has one object a line; call it .json")
    if text.strip() == "{":
        raise _NotLinesError(
            f"{path}: its first object takes several lines; write each on one line (jq -c . {path.name})"
        )
    if "\r" in text.rstrip() and "\n" not in text.rstrip("\r\n"):
        end = text.find("\r")
        if text[end:].lstrip().startswith("{"):
            raise _NotLinesError(f"{path}: its lines end with CR alone; end them with LF: tr '\\r' '\\n' < {path.name}")


class _NotLinesError(DataError):
    """A file that is not what its name says, so that no line of it is a row."""


def parse_line(data: bytes, place: RecordPlace) -> Record:
    """A line of a .jsonl file as a record.

    Raises:
        DataError: it is not one JSON value in UTF-8.
    """
    return _text_record(_decode(data, place), place)


def _text_record(text: str, place: RecordPlace) -> Record:
    return Record(place, _parse_json(text.rstrip("\r\n"), str(place)))


def _json(path: Path) -> Iterator[Record | DataError]:
    text = "".join(line for _, line in _lines(path, one_value=True))
    if not text.strip():
        return
    if text.lstrip().startswith("{"):
        raise DataError(
            f"{path}: a .json file holds one array of rows, got an object; one object a line is .jsonl: rename it"
        )
    values = _parse_json(text, str(path))
    if not isinstance(values, list):
        raise DataError(f"{path}: expected one array of rows, got {_kind(values)}")
    for number, value in enumerate(values, start=1):
        yield Record(RecordPlace(str(path), "row", number), value)


def _csv(path: Path) -> Iterator[Record | DataError]:
    lines = _CsvLines(path)
    try:
        table = _with_long_fields(csv.reader(lines, strict=True))
        header = next(table, None)
        if header is None:
            return
        if (problem := lines.take_problem()) is not None:
            raise problem
        _check_header(path, header)
        for place, cells in lines.records(table):
            if (problem := lines.take_problem()) is not None:
                yield problem
            elif not cells:
                continue
            elif len(cells) == len(header):
                yield Record(place, dict(zip(header, cells, strict=True)))
            else:
                yield DataError(
                    f"{place}: {len(cells)} fields, the header has {len(header)}; quote fields that hold commas"
                )
    except csv.Error as error:
        raise DataError(
            f"{lines.place}: broken csv: {error}; fields that hold quotes, commas or line ends must be quoted"
        ) from error


_CSV_LIMIT = threading.Lock()


def _with_long_fields(table: Iterator[list[str]]) -> Iterator[list[str]]:
    """Records of ``table`` whose fields may be as long as a row.

    The limit belongs to the csv module as a whole, whoever uses it: it is ours only while a record is read.
    """
    while True:
        with _CSV_LIMIT:
            before = csv.field_size_limit(MAX_ROW_BYTES)
            try:
                cells = next(table, None)
            finally:
                csv.field_size_limit(before)
        if cells is None:
            return
        yield cells


class _CsvLines:
    """The lines of a csv file for csv.reader; remembers where the record now being read began."""

    def __init__(self, path: Path) -> None:
        self._lines = _raw_lines(path)
        self._num_bytes = 0
        self._problem: DataError | None = None
        self.place = RecordPlace(str(path), "line", 1)
        self._fresh = True

    def __iter__(self) -> Iterator[str]:
        for place, data in self._lines:
            if self._fresh:
                self.place, self._num_bytes, self._fresh = place, 0, False
            try:
                text = _decode(data, place)
            except DataError as error:
                self._problem = self._problem or error
                text = data.replace(b"\0", b"?").decode("utf-8", "replace")
            self._num_bytes += len(text)
            if self._num_bytes > MAX_ROW_BYTES:
                raise _too_long(self.place)
            yield text

    def take_problem(self) -> DataError | None:
        """What is wrong with a line of the record that was just read, if anything; told once."""
        found, self._problem = self._problem, None
        return found

    def records(self, table: Iterator[list[str]]) -> Iterator[tuple[RecordPlace, list[str]]]:
        """Each record of ``table`` with the place of its first line."""
        self._fresh = True
        for cells in table:
            yield self.place, cells
            self._fresh = True


def _check_header(path: Path, header: list[str]) -> None:
    doubled = sorted({name for name in header if header.count(name) > 1})
    # pandas writes row numbers into a first column without a name.
    named = header[1:] if header[:1] == [""] and len(header) > 1 else header
    if doubled or not all(name.strip() for name in named):
        given = f"{', '.join(doubled)} more than once" if doubled else f"a column without a name in {header}"
        raise DataError(f"{path}, line 1: the csv header has {given}; the first line must name each column once")
    if len(header) == 1 and any(mark in header[0] for mark in ";\t|"):
        raise DataError(
            f"{path}, line 1: the csv header {header[0]!r} is one column; fields must be separated by commas"
        )


def without_nulls(value: Any) -> Any:
    """A value of a table without its nulls: a column is there for every row, null means that it has no such field."""
    if isinstance(value, dict):
        return {key: without_nulls(one) for key, one in value.items() if one is not None}
    return [without_nulls(one) for one in value] if isinstance(value, list) else value


def _parquet(path: Path, columns: Container[str] | None) -> Iterator[Record]:
    number = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as table:
            for record in parquet_records(str(path), table, columns=columns):
                yield record
                number = record.place.number
    except (pyarrow.ArrowException, UnicodeDecodeError) as error:
        raise DataError(
            f"{path}: not a whole parquet file after row {number}: {error}; write or fetch it again"
        ) from error


def parquet_records(
    path: str,
    table: pyarrow.parquet.ParquetFile,
    *,
    columns: Container[str] | None,
    group: int | None = None,
    before: int = 0,
) -> Iterator[Record]:
    """The records of an open parquet file, or of one of its row groups, which has ``before`` rows before it.

    Raises:
        DataError: a column is there twice, or holds what cannot be read.
    """
    names = table.schema_arrow.names
    read = [name for name in dict.fromkeys(names) if columns is None or name in columns]
    if twice := [name for name in read if names.count(name) > 1]:
        raise DataError(f"{path}: the column {twice[0]!r} is there more than once; keep one")
    others = dict.fromkeys(set(names) - set(read), UNREAD)
    groups = None if group is None else [group]
    number = before
    for batch in table.iter_batches(batch_size=_PARQUET_BATCH_ROWS, columns=read, row_groups=groups):
        values = {name: _values(batch, name) for name in read}
        for at in range(batch.num_rows):
            number += 1
            row, place = {name: column[at] for name, column in values.items()}, RecordPlace(path, "row", number)
            unread = next((name for name, cell in row.items() if isinstance(cell, _UnreadableCell)), None)
            yield Record(place, without_nulls(row) | others if unread is None else row[unread].problem(place, unread))


@dataclass(frozen=True, slots=True)
class _UnreadableCell:
    """A cell that Arrow can store and Python cannot read: text that is not UTF-8, a time after the year 9999."""

    kind: str
    reason: str

    def problem(self, place: RecordPlace, column: str) -> DataError:
        return DataError(
            f"{place}: the column {column!r} ({self.kind}) holds what cannot be read: {self.reason}; write it as "
            "UTF-8 text"
        )


def _values(batch: pyarrow.RecordBatch, name: str) -> list[Any]:
    """The values of a column; maps are objects. A cell that cannot be read is an `_UnreadableCell`."""
    column = batch.column(name)
    try:
        values: list[Any] = column.to_pylist(maps_as_pydicts="strict")
    except (ValueError, OverflowError, KeyError):
        return [_value(cell, str(column.type)) for cell in column]
    return values


def _value(cell: pyarrow.Scalar, kind: str) -> Any:
    try:
        return cell.as_py(maps_as_pydicts="strict")
    except (ValueError, OverflowError, KeyError) as error:
        return _UnreadableCell(kind, str(error.args[0] if isinstance(error, KeyError) else error))


_READERS: dict[str, Callable[[Path], Iterator[Record | DataError]]] = {
    ".jsonl": _jsonl,
    ".json": _json,
    ".csv": _csv,
}
"""By suffix: records, and errors of lines behind which others can be read."""


def _lines(path: Path, *, one_value: bool = False) -> Iterator[tuple[RecordPlace, str]]:
    """Lines of a UTF-8 file with their endings. ``one_value``: they are pieces of one value and have no limit."""
    return ((place, _decode(data, place)) for place, data in _raw_lines(path, one_value=one_value))


def _raw_lines(path: Path, *, one_value: bool = False) -> Iterator[tuple[RecordPlace, bytes]]:
    limit = -1 if one_value else MAX_ROW_BYTES + 1
    with path.open("rb") as stream:
        _refuse_wide_encoding(path, stream)
        number = 0
        while data := stream.readline(limit):
            number += 1
            place = RecordPlace(str(path), "line", number)
            if not one_value and len(data) > MAX_ROW_BYTES:
                raise _too_long(place)
            yield place, data.removeprefix(codecs.BOM_UTF8) if number == 1 else data


def _refuse_wide_encoding(path: Path, stream: BinaryIO) -> None:
    start = stream.read(4)
    stream.seek(0, os.SEEK_SET)
    for mark, name in _WIDE_ENCODINGS.items():
        if start.startswith(mark):
            raise DataError(
                f"{path}: the file is {name}, expected UTF-8; convert it: iconv -f {name} -t UTF-8 {path.name}"
            )


def _decode(data: bytes, place: RecordPlace) -> str:
    if (position := data.find(b"\0")) >= 0:
        raise DataError(
            f"{place}: NUL byte at byte {position + 1}; a text file has none: the file is damaged or not UTF-8 text"
        )
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{place}: byte 0x{data[error.start]:02x} at byte {error.start + 1} is not UTF-8; "
            f"convert the file, for example: iconv -f WINDOWS-1252 -t UTF-8 {Path(place.path).name}"
        ) from error


def _parse_json(text: str, place: str) -> Any:
    try:
        return json.loads(text, object_pairs_hook=unique_keys)
    except json.JSONDecodeError as error:
        where = f"line {error.lineno}, column {error.colno}" if "\n" in text else f"column {error.colno}"
        raise DataError(
            f"{place}: broken JSON at {where}: {error.msg}; each row must be one complete JSON object"
        ) from error
    except RecursionError as error:
        raise DataError(f"{place}: broken JSON: nested too deeply; a row is a flat object") from error
    except ValueError as error:
        raise DataError(f"{place}: broken JSON: {error}; each row must be one complete JSON object") from error


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of JSON from its pairs.

    Raises:
        ValueError: a key appears twice.
    """
    value = dict(pairs)
    if len(value) != len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"key {next(n for n in names if names.count(n) > 1)!r} appears twice in one object")
    return value


def _too_long(place: RecordPlace) -> DataError:
    return DataError(
        f"{place}: the row is longer than {MAX_ROW_BYTES >> 20} MiB, the most that one row may have; "
        "split the document into several rows, or look for a missing line end or quote"
    )


def _kind(value: Any) -> str:
    return {dict: "an object", list: "an array", str: "text", bool: "true or false", type(None): "null"}.get(
        type(value), "a number"
    )
