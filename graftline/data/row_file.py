"""The rows of a file that this program wrote, read again whenever they are asked for: none are held."""

from collections.abc import Iterator, Sequence
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import overload

import numpy
from numpy.typing import NDArray

from graftline.data.rows import Row, each_row
from graftline.digest import Digest, of_file


class RowFile(Sequence[Row]):
    """The rows of a jsonl file that `write_rows` wrote, or some of them."""

    def __init__(self, path: Path, numbers: NDArray[numpy.int64] | None = None) -> None:
        """``numbers``: those of the rows, from 0, ascending; all when left out."""
        self.path, self._numbers = path, numbers

    def __iter__(self) -> Iterator[Row]:
        """Every row, in order."""
        rows = each_row(self.path)
        if self._numbers is None:
            yield from rows
            return
        place = 0
        for number in self._numbers.tolist():
            yield next(islice(rows, number - place, None))
            place = number + 1

    def __len__(self) -> int:
        """Number of rows."""
        return self._num_lines if self._numbers is None else len(self._numbers)

    @overload
    def __getitem__(self, at: int) -> Row: ...
    @overload
    def __getitem__(self, at: slice) -> list[Row]: ...
    def __getitem__(self, at: int | slice) -> Row | list[Row]:
        """A row, or some: all before them are read."""
        if isinstance(at, slice):
            start, stop, step = at.indices(len(self))
            return list(islice(self, start, stop, step))
        return next(islice(self, range(len(self))[at], None))

    def take(self, numbers: NDArray[numpy.int64]) -> "RowFile":
        """Some of a file's rows, by their numbers."""
        return RowFile(self.path, numbers)

    @cached_property
    def digest(self) -> Digest:
        """Of the file."""
        return of_file(self.path)

    @property
    def num_bytes(self) -> int:
        """Of the file."""
        return self.path.stat().st_size

    @cached_property
    def _num_lines(self) -> int:
        with self.path.open("rb") as lines:
            return sum(1 for line in lines if line.strip())
