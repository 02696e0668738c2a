"""The rows of a file that this program wrote, read from it whenever they are needed, never held."""

from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import overload

import numpy

from graftline.data.records import RecordPlace, parse_line
from graftline.data.row_keys import Integers, Keys, RowKeys, make_keys
from graftline.data.rows import Row, as_line, detect_format, each_row, is_plain, plain_row, to_row
from graftline.digest import Digest, atomic_write, of_file
from graftline.errors import DataError
from graftline.logs import OnProgress, silent


class RowFile(Sequence[Row]):
    """The rows of a jsonl file that `write_rows` or `spool_rows` wrote, or some of them."""

    def __init__(self, path: Path, *, lines: Integers | None = None, keys: Keys | None = None) -> None:
        """All rows of ``path``.

        Args:
            path: the file.
            lines: (R,) source lines of the rows, where they are not the file's own.
            keys: (R,) of `KEYS`, where they are known.
        """
        self.path = path
        self._file = _File(path, lines, keys)
        self._numbers: Integers | None = None

    def __iter__(self) -> Iterator[Row]:
        """Every row, in order."""
        return self._file.every_row() if self._numbers is None else self._file.rows(self._numbers)

    def __len__(self) -> int:
        """Number of rows."""
        return len(self._file.starts) if self._numbers is None else len(self._numbers)

    @overload
    def __getitem__(self, at: int) -> Row: ...
    @overload
    def __getitem__(self, at: slice) -> list[Row]: ...
    def __getitem__(self, at: int | slice) -> Row | list[Row]:
        """A row, or some: only these are read."""
        wanted = self.numbers[at]
        if isinstance(at, slice):
            return list(self._file.rows(wanted))
        return next(self._file.rows(numpy.atleast_1d(wanted)))

    @property
    def numbers(self) -> Integers:
        """(R,) numbers of the rows in the file, from 0."""
        return numpy.arange(len(self)) if self._numbers is None else self._numbers

    def take(self, numbers: Integers) -> "RowFile":
        """Some of these rows, by their positions among them."""
        return self._part(numbers if self._numbers is None else self._numbers[numbers])

    def with_more(self, others: "RowFile") -> "RowFile | None":
        """These rows and others of the same file, in the file's order; None if those are from another file."""
        if others._file is not self._file:
            return None
        return self._part(numpy.sort(numpy.concatenate([self.numbers, others.numbers])))

    def keys(self, on_progress: OnProgress = silent) -> RowKeys:
        """The rows' keys, made when they are first asked for."""
        return RowKeys(self._file.keys(on_progress), self._numbers)

    @cached_property
    def digest(self) -> Digest:
        """The file's digest."""
        return of_file(self.path)

    @property
    def num_bytes(self) -> int:
        """The file's size."""
        return self.path.stat().st_size

    def _part(self, numbers: Integers) -> "RowFile":
        part = RowFile(self.path)
        part._file, part._numbers = self._file, numbers
        return part


class _File:
    """What all parts of a file share."""

    def __init__(self, path: Path, lines: Integers | None, keys: Keys | None) -> None:
        self._path, self._lines, self._keys = path, lines, keys
        # Rows are checked in the first pass only.
        self._is_checked = keys is not None

    def every_row(self) -> Iterator[Row]:
        if self._lines is None and not self._is_checked:
            yield from each_row(self._path)
            self._is_checked = True
        else:
            yield from self.rows(range(len(self.starts)))

    def rows(self, numbers: Iterable[int]) -> Iterator[Row]:
        """The rows of these numbers, in their order."""
        starts, position = self.starts, -1
        try:
            with self._path.open("rb") as file:
                for number in numbers:
                    if position != starts[number]:
                        file.seek(starts[number])
                    data = file.readline()
                    position = int(starts[number]) + len(data)
                    yield self._row(int(number), data)
        except OSError as error:
            raise DataError(f"{self._path} cannot be read: {error.strerror or error}") from error

    def keys(self, on_progress: OnProgress) -> Keys:
        if self._keys is None:
            self._keys = make_keys(self.every_row(), len(self.starts), on_progress=on_progress)
        return self._keys

    @cached_property
    def starts(self) -> Integers:
        """(R,) where each row begins in the file."""
        found, position = [numpy.zeros(0, dtype=numpy.int64)], 0
        with self._path.open("rb") as lines:
            while batch := list(islice(lines, _BATCH_LINES)):
                ends = position + numpy.cumsum([len(line) for line in batch])
                is_row = numpy.array([not line.isspace() for line in batch])
                found.append(numpy.r_[position, ends[:-1]][is_row])
                position = int(ends[-1])
        return numpy.concatenate(found)

    def _row(self, number: int, data: bytes) -> Row:
        line = number + 1 if self._lines is None else int(self._lines[number])
        if self._is_checked and (row := plain_row(data, line)):
            return row
        record = parse_line(data, RecordPlace(str(self._path), "line", number + 1))
        return to_row(record, detect_format(record)).at(line)


_BATCH_LINES = 1000


def spool_rows(path: Path, rows: Iterable[Row], *, on_progress: OnProgress = silent, num_rows: int = 0) -> RowFile:
    """Write rows to a file, one by one; reading it gives equal rows, source lines included.

    Args:
        path: the file, which the caller removes.
        rows: read once.
        on_progress: called with the rows written and the rows in all.
        num_rows: about how many there are; 0: not known.

    Raises:
        GraftlineError: the disk is full.
    """
    with atomic_write(path) as out:

        def written() -> Iterator[Row]:
            for row in rows:
                out.write(as_line(row, plain=is_plain(row)))
                yield row

        keys = make_keys(written(), num_rows, on_progress=on_progress)
    return RowFile(path, lines=keys["line"], keys=keys)


def keys_of(rows: Sequence[Row], *, on_progress: OnProgress = silent) -> RowKeys:
    """The rows' keys; for a file they are made once for all parts of it."""
    if isinstance(rows, RowFile):
        return rows.keys(on_progress)
    return RowKeys(make_keys(rows, len(rows), on_progress=on_progress))


def take(rows: Sequence[Row], numbers: Integers) -> Sequence[Row]:
    """Some rows, by their numbers: of a file, a part that is read when needed; else a tuple."""
    return rows.take(numbers) if isinstance(rows, RowFile) else tuple(rows[at] for at in numbers.tolist())


def in_order(some: Sequence[Row], others: Sequence[Row]) -> Sequence[Row]:
    """Both sets of rows together, in the order of their source lines."""
    whole = some.with_more(others) if isinstance(some, RowFile) and isinstance(others, RowFile) else None
    return whole if whole is not None else tuple(sorted([*some, *others], key=lambda row: row.source_line))
