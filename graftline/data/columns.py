"""Encoded rows as columns: the concatenated token ids of all rows, and the positions of rows and learned spans.

Columns live in memory or in memory-mapped files: a reader loads only what it touches, and all processes of a machine
share one copy. A row costs 40 bytes besides its ids; as Python objects it would cost thousands.

A folder of columns has four files, of which index.json is written last:

    ids.npy     (T,) uint16 or uint32: token ids
    rows.npy    (R,) of `ROW`: where a row's ids and spans start, how many there are, and its source line
    spans.npy   (S, 2) int32: start and end (exclusive) of each learned span within its row
    index.json  format, digest of the other three, and what was encoded
"""

import contextlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO, overload

import numpy
from numpy.typing import NDArray

from graftline.data.template import Encoded, Part
from graftline.digest import Digest, of_bytes, of_file, of_files, write_json
from graftline.errors import DataError, GraftlineError

ROW = numpy.dtype(
    [("first_id", "<i8"), ("num_ids", "<i8"), ("first_span", "<i8"), ("num_spans", "<i8"), ("line", "<i8")]
)
"""Record of one row in rows.npy."""
Integers = NDArray[numpy.int64]
INDEX = "index.json"
_IDS, _ROWS, _SPANS, _PROGRESS = "ids.npy", "rows.npy", "spans.npy", "progress.json"
_FORMAT = 1
_HEADER_BYTES = 256
"""Header size of an .npy file whose length is known only at the end: room for any shape."""
_CHUNK_ROWS = 50_000


@dataclass(frozen=True, eq=False)
class EncodedColumns(Sequence[Encoded]):
    """Encoded rows. ``rows`` may select some rows of the columns, in any order, and truncate them."""

    ids: NDArray[numpy.unsignedinteger[Any]]
    rows: NDArray[numpy.void]
    spans: NDArray[numpy.int32]
    origin: Digest
    """Digest of the columns as created, whichever part of them ``rows`` selects."""

    def __len__(self) -> int:
        """Number of rows."""
        return len(self.rows)

    @overload
    def __getitem__(self, at: int) -> Encoded: ...
    @overload
    def __getitem__(self, at: slice) -> "EncodedColumns": ...
    def __getitem__(self, at: int | slice) -> "Encoded | EncodedColumns":
        """Row ``at``, or a slice of rows."""
        if isinstance(at, slice):
            return self.take(numpy.arange(len(self))[at])
        first, length, first_span, num_spans, _ = self.rows[at].item()
        supervised = [False] * length
        for start, stop in self.spans[first_span : first_span + num_spans].tolist():
            supervised[start:stop] = [True] * (min(stop, length) - start)
        return Encoded(self.ids[first : first + length].tolist(), supervised)

    def __eq__(self, other: object) -> bool:
        """Whether ``other`` is a sequence of equal rows."""
        return (
            isinstance(other, Sequence)
            and len(self) == len(other)
            and all(mine == theirs for mine, theirs in zip(self, other, strict=True))
        )

    __hash__ = None  # type: ignore[assignment]

    @property
    def lengths(self) -> Integers:
        """(R,) number of tokens in each row."""
        return self.rows["num_ids"]

    @property
    def lines(self) -> Integers:
        """(R,) source line of each row."""
        return self.rows["line"]

    @cached_property
    def digest(self) -> Digest:
        """Digest, equal for equal rows of the same columns in the same order."""
        parts = [numpy.ascontiguousarray(self.rows[name]).tobytes() for name in ("first_id", "num_ids")]
        return of_bytes(str(self.origin).encode() + b"".join(parts))

    def take(self, rows: Integers) -> "EncodedColumns":
        """The rows at these indices, in this order."""
        return EncodedColumns(self.ids, self.rows[rows], self.spans, self.origin)

    def cut(self, max_tokens: int) -> "EncodedColumns":
        """Truncate each row to its first ``max_tokens`` tokens."""
        rows = numpy.array(self.rows)
        rows["num_ids"] = numpy.minimum(rows["num_ids"], max_tokens)
        return EncodedColumns(self.ids, rows, self.spans, self.origin)

    def count_learned(self, *, after: int = 0) -> Integers:
        """(R,) number of learned tokens in each row, from position ``after`` on."""
        found = numpy.zeros(len(self), dtype=numpy.int64)
        for chunk, (row, start, stop) in self._learned():
            numpy.add.at(found[chunk], row, numpy.maximum(0, stop - numpy.maximum(start, after)))
        return found

    def first_learned(self, *, after: int = 0) -> Integers:
        """(R,) position of each row's first learned token from ``after`` on; the row's length if there is none."""
        found = numpy.array(self.lengths)
        for chunk, (row, start, stop) in self._learned():
            start = numpy.maximum(start, after)
            numpy.minimum.at(found[chunk], row[start < stop], start[start < stop])
        return found

    def last_learned(self) -> tuple[Integers, Integers]:
        """(R,) start and stop of each row's last learned span; 0 and 0 if nothing is learned."""
        starts, stops = numpy.zeros((2, len(self)), dtype=numpy.int64)
        for chunk, (row, start, stop) in self._learned():
            starts[chunk][row], stops[chunk][row] = start, stop  # the last of several spans of a row wins
        return starts, stops

    def token_at(self, positions: Integers) -> Integers:
        """(R,) the token at the given position of each row; -1 if the row has no such position."""
        found = numpy.full(len(self), -1, dtype=numpy.int64)
        within = (positions >= 0) & (positions < self.lengths)
        found[within] = self.ids[self.rows["first_id"][within] + positions[within]]
        return found

    def beyond(self, bound: int) -> tuple[Integers, set[int]]:
        """Indices of the rows with a token id of at least ``bound``, and those ids."""
        at_fault, tokens = [], set[int]()
        for at in range(len(self)) if self._may_exceed(bound) else ():
            first, length = self.rows["first_id"][at], self.rows["num_ids"][at]
            ids = self.ids[first : first + length]
            if len(found := ids[ids >= bound]):
                at_fault.append(at)
                tokens |= set(found.tolist())
        return numpy.array(at_fault, dtype=numpy.int64), tokens

    def _may_exceed(self, bound: int) -> bool:
        step = 1 << 22
        return any(self.ids[at : at + step].max() >= bound for at in range(0, len(self.ids), step))

    def _learned(self) -> Iterator[tuple[slice, tuple[Integers, Integers, Integers]]]:
        """Non-empty learned spans by chunk of rows: index of the row in its chunk, start and stop."""
        for begin in range(0, len(self), _CHUNK_ROWS):
            chunk = slice(begin, begin + _CHUNK_ROWS)
            rows = self.rows[chunk]
            row = numpy.repeat(numpy.arange(len(rows)), rows["num_spans"])
            before = numpy.cumsum(rows["num_spans"]) - rows["num_spans"]
            spans = self.spans[rows["first_span"][row] + numpy.arange(len(row)) - before[row]].astype(numpy.int64)
            stop = numpy.minimum(spans[:, 1], rows["num_ids"][row])
            some = spans[:, 0] < stop
            yield chunk, (row[some], spans[some, 0], stop[some])


def id_type(largest: int) -> numpy.dtype[Any]:
    """The dtype of ids up to ``largest``."""
    return numpy.dtype("<u2" if largest < 1 << 16 else "<u4")


def columns_of(rows: Sequence[Encoded]) -> EncodedColumns:
    """Rows as columns in memory, with line 0; columns are returned unchanged."""
    if isinstance(rows, EncodedColumns):
        return rows
    parts = [[Part(row.input_ids[at:to], row.supervised[at]) for at, to in _runs(row.supervised)] for row in rows]
    largest = max((token for row in rows for token in row.input_ids), default=0)
    return columns_of_parts(parts, [0] * len(rows), id_type(largest))


def columns_of_parts(rows: Sequence[Sequence[Part]], lines: Sequence[int], ids: numpy.dtype[Any]) -> EncodedColumns:
    """Columns in memory from rows given as runs of ids. ``ids``: dtype of the ids."""
    table = numpy.zeros(len(rows), dtype=ROW)
    spans: list[tuple[int, int]] = []
    for at, parts in enumerate(rows):
        place, before = 0, len(spans)
        for part in parts:
            start, place = place, place + len(part.ids)
            if not part.supervised or start == place:
                continue
            if len(spans) > before and spans[-1][1] == start:
                start = spans.pop()[0]
            spans.append((start, place))
        table[at] = (0, place, before, len(spans) - before, lines[at])
    table["first_id"] = numpy.cumsum(table["num_ids"]) - table["num_ids"]
    flat = chain.from_iterable(part.ids for parts in rows for part in parts)
    tokens = numpy.fromiter(flat, dtype=ids, count=int(table["num_ids"].sum()))
    return _with_origin(tokens, table, numpy.array(spans, dtype="<i4").reshape(-1, 2))


def joined(pieces: Sequence[EncodedColumns]) -> EncodedColumns:
    """Concatenate columns that hold all of their rows."""
    if len(pieces) == 1:
        return pieces[0]
    num_ids = num_spans = 0
    tables = []
    for piece in pieces:
        tables.append(_moved(piece.rows, num_ids, num_spans))
        num_ids, num_spans = num_ids + len(piece.ids), num_spans + len(piece.spans)
    return _with_origin(
        numpy.concatenate([piece.ids for piece in pieces]),
        numpy.concatenate(tables),
        numpy.concatenate([piece.spans for piece in pieces]),
    )


def _moved(rows: NDArray[numpy.void], num_ids: int, num_spans: int) -> NDArray[numpy.void]:
    """``rows`` with their offsets shifted by this many ids and spans."""
    table = numpy.array(rows)
    table["first_id"] += num_ids
    table["first_span"] += num_spans
    return table


def _with_origin(
    ids: NDArray[numpy.unsignedinteger[Any]], rows: NDArray[numpy.void], spans: NDArray[numpy.int32]
) -> EncodedColumns:
    return EncodedColumns(ids, rows, spans, of_bytes(ids.astype("<u4").tobytes() + spans.tobytes() + rows.tobytes()))


def _runs(marks: Sequence[bool]) -> list[tuple[int, int]]:
    """Start and end of each run of equal marks."""
    edges = [at for at in range(1, len(marks)) if marks[at] != marks[at - 1]]
    return list(zip([0, *edges], [*edges, len(marks)], strict=True)) if marks else []


class ColumnWriter:
    """Appends to a folder of columns. After a kill, a new writer continues after the last kept row."""

    def __init__(self, folder: Path, ids: numpy.dtype[Any]) -> None:
        """Continue in ``folder``, or start there. ``ids``: dtype of the ids.

        Raises:
            GraftlineError: the folder is not writable.
        """
        self._folder = folder
        self._types: dict[str, tuple[numpy.dtype[Any], tuple[int, ...]]] = {
            _IDS: (ids, ()),
            _ROWS: (ROW, ()),
            _SPANS: (numpy.dtype("<i4"), (2,)),
        }
        with self._told():
            folder.mkdir(parents=True, exist_ok=True)
            self._counts = self._kept()
            self._num_kept = self._counts[_ROWS]
            self._files = {name: self._open(name) for name in self._types}

    @property
    def num_rows(self) -> int:
        """Number of rows written."""
        return self._counts[_ROWS]

    @property
    def num_unkept_rows(self) -> int:
        """Number of rows that a kill would lose."""
        return self._counts[_ROWS] - self._num_kept

    def columns(self) -> EncodedColumns:
        """The rows written so far, kept or not."""
        ids, rows, spans = (self._mapped(name) for name in (_IDS, _ROWS, _SPANS))
        return EncodedColumns(ids, rows, spans, Digest("0" * 64))

    def _mapped(self, name: str) -> NDArray[Any]:
        self._files[name].flush()
        dtype, shape = self._types[name]
        if not self._counts[name]:
            return numpy.zeros((0, *shape), dtype=dtype)
        return numpy.asarray(
            numpy.memmap(self._folder / name, dtype, "r", offset=_HEADER_BYTES, shape=(self._counts[name], *shape))
        )

    def append(self, columns: EncodedColumns) -> None:
        """Append columns with all of their rows; they survive a kill only after `keep`."""
        moved = _moved(columns.rows, self._counts[_IDS], self._counts[_SPANS])
        with self._told():
            for name, values in ((_IDS, columns.ids), (_ROWS, moved), (_SPANS, columns.spans)):
                typed = numpy.ascontiguousarray(values).astype(self._types[name][0], casting="safe", copy=False)
                self._files[name].write(typed.data)
                self._counts[name] += len(values)

    def keep(self) -> None:
        """Make the appended rows survive a kill."""
        with self._told():
            for file in self._files.values():
                file.flush()
                os.fsync(file.fileno())
        write_json(self._folder / _PROGRESS, self._counts)
        self._num_kept = self._counts[_ROWS]

    def finish(self, about: Mapping[str, Any]) -> None:
        """Complete the folder. ``about``: what was encoded, for readers."""
        with self._told():
            for name, file in self._files.items():
                file.seek(0)
                file.write(self._header(name))
        self.keep()
        self.close()
        files = {name: of_file(self._folder / name) for name in self._types}
        write_json(self._folder / INDEX, {"format": _FORMAT, "digest": str(of_files(files)), **about})
        (self._folder / _PROGRESS).unlink()

    def close(self) -> None:
        """Close the files."""
        for file in self._files.values():
            with contextlib.suppress(OSError):  # unflushed rows were not kept
                file.close()

    def _kept(self) -> dict[str, int]:
        try:
            found = json.loads((self._folder / _PROGRESS).read_text(encoding="utf-8"))
        except FileNotFoundError:
            found = {}
        return {name: int(found.get(name, 0)) for name in self._types}

    def _open(self, name: str) -> BinaryIO:
        path = self._folder / name
        path.touch()
        file = path.open("r+b")
        dtype, shape = self._types[name]
        file.write(self._header(name))
        file.truncate(_HEADER_BYTES + self._counts[name] * dtype.itemsize * int(numpy.prod(shape)))
        file.seek(0, os.SEEK_END)
        return file

    def _header(self, name: str) -> bytes:
        """Header of an .npy file, version 1.0 (numpy.lib.format)."""
        dtype, shape = self._types[name]
        descr = numpy.lib.format.dtype_to_descr(dtype)
        text = repr({"descr": descr, "fortran_order": False, "shape": (self._counts[name], *shape)})
        size = _HEADER_BYTES - 10
        return b"\x93NUMPY\x01\x00" + size.to_bytes(2, "little") + text.ljust(size - 1).encode() + b"\n"

    @contextlib.contextmanager
    def _told(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise GraftlineError(
                f"cannot write {self._folder}: {error.strerror or error}; free space or permission is missing there; "
                "what was encoded so far is kept, and the next run continues behind it"
            ) from error


def read_index(folder: Path) -> dict[str, Any]:
    """The index of a folder of columns; empty if there is none or its format differs."""
    try:
        found = json.loads((folder / INDEX).read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return {}
    return found if isinstance(found, dict) and found.get("format") == _FORMAT else {}


def open_columns(folder: Path) -> EncodedColumns:
    """Memory-map a finished folder of columns.

    Raises:
        DataError: there is none, or one of its files is damaged.
    """
    index = read_index(folder)
    try:
        ids, rows, spans = (
            numpy.asarray(numpy.load(folder / name, mmap_mode="r", allow_pickle=False))
            for name in (_IDS, _ROWS, _SPANS)
        )
        if rows.dtype != ROW or not index:
            raise ValueError("its index or its rows are of another format")
    except (OSError, EOFError, ValueError) as error:
        raise DataError(f"{folder} holds no whole set of encoded rows: {error}; remove it and encode again") from error
    return EncodedColumns(ids, rows, spans, Digest.parse(index["digest"]))
