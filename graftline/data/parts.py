"""Parquet files in S3 or a folder as parts: row groups, with their rows numbered through all files.

S3's endpoint comes from ``AWS_ENDPOINT_URL``, credentials from AWS's usual places.
"""

import contextlib
import os
import urllib.parse
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Self

import pyarrow
import pyarrow.fs
import pyarrow.parquet

from graftline.data.records import Problems, Record, parquet_records
from graftline.data.rows import COLUMNS, Row, to_row
from graftline.errors import DataError

_SUFFIX = ".parquet"
ADDED = frozenset({"line", "input_ids", "supervised"})
"""Columns added to those of the source."""


@dataclass(frozen=True)
class Part:
    """A row group of a file."""

    path: str
    """The file's path, as `Place.open`'s file system knows it."""
    group: int
    first: int
    """Rows before it, in all files."""
    first_in_file: int
    num_rows: int
    version: tuple[int, int]
    """The file's size in bytes, and the time of its last change in nanoseconds."""


@dataclass(frozen=True)
class Place:
    """A folder of a file system. It is sent to workers, each of which opens it anew."""

    address: str
    """A folder's path or s3://bucket/prefix."""

    @classmethod
    def of(cls, address: str) -> Self:
        """The place that a user names.

        Raises:
            DataError: the address is neither a folder's path nor s3://bucket/prefix.
        """
        scheme, separator, rest = address.partition("://")
        if not address.strip() or (separator and (scheme != "s3" or not rest.strip("/"))):
            raise DataError(f"{address!r} is given; expected a folder or s3://bucket/prefix")
        return cls(address if separator else os.path.abspath(address))

    def overlaps(self, other: "Place") -> bool:
        """Whether one of the two places lies in the other."""
        a, b = (f"{place.address.rstrip('/')}/" for place in (self, other))
        return a.startswith(b) or b.startswith(a)

    def resolve(self) -> tuple[pyarrow.fs.FileSystem, str]:
        """The file system, and the folder's path in it."""
        _, is_s3, rest = self.address.partition("://")
        if not is_s3:
            return pyarrow.fs.LocalFileSystem(), self.address
        given = {}
        if endpoint := os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL"):
            parsed = urllib.parse.urlsplit(endpoint)
            given = {"endpoint_override": parsed.netloc, "scheme": parsed.scheme}
        if region := os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION"):
            given["region"] = region
        return pyarrow.fs.S3FileSystem(**given), rest.strip("/")

    def names(self) -> list[str]:
        """Names of the files and folders here."""
        files, folder = self.resolve()
        with _explained(self.address):
            found = files.get_file_info(pyarrow.fs.FileSelector(folder, allow_not_found=True))
        return sorted(one.base_name for one in found)

    def find_parts(self) -> list[Part]:
        """The row groups of every parquet file here, in the order of the files' names.

        Raises:
            DataError: there is none, or one is not parquet or has a column of `ADDED`.
        """
        files, folder = self.resolve()
        with _explained(self.address):
            found = files.get_file_info(pyarrow.fs.FileSelector(folder, recursive=True, allow_not_found=True))
            paths = sorted(one.path for one in found if one.is_file and one.path.endswith(_SUFFIX))
        parts: list[Part] = []
        before = 0
        for path in paths:
            with _explained(path):
                version = _version(files.get_file_info(path))  # a listing of S3 may round the time otherwise
                metadata = pyarrow.parquet.read_metadata(path, filesystem=files)
                taken = ADDED & set(metadata.schema.to_arrow_schema().names)
            if taken:
                raise DataError(f"{path} has a column {min(taken)!r}, which the result adds; rename it")
            in_file = 0
            for group in range(metadata.num_row_groups):
                num_rows = metadata.row_group(group).num_rows
                if not num_rows:
                    continue
                parts.append(Part(path, group, before, in_file, num_rows, version))
                before, in_file = before + num_rows, in_file + num_rows
        if not before:
            raise DataError(f"{self.address} has no rows; expected {_SUFFIX} files of rows there")
        return parts

    def read(self, part: Part) -> pyarrow.Table:
        """All columns of a part.

        Raises:
            DataError: it cannot be read, or has changed.
        """
        with self._opened(part.path, part.version) as file:
            return file.read_row_group(part.group)

    def rows(self, part: Part, *, format: str, problems: Problems) -> Iterator[Row]:
        """The rows of a part one by one, ``source_line`` numbered from 1 through all files.

        Args:
            part: a part of a file here.
            format: the rows' format (`graftline.data.rows`).
            problems: collects bad rows, by file and row in it.

        Raises:
            DataError: it cannot be read.
        """
        moved = part.first - part.first_in_file
        with self._opened(part.path, part.version) as file:
            for record in parquet_records(
                part.path, file, columns=COLUMNS, group=part.group, before=part.first_in_file
            ):
                try:
                    yield replace(to_row(record, format), source_line=moved + record.place.number)
                except DataError as error:
                    problems.add(error)

    def first_record(self, part: Part) -> Record:
        """The first record of a part.

        Raises:
            DataError: it cannot be read, or has changed.
        """
        with self._opened(part.path, part.version) as file:
            return next(parquet_records(part.path, file, columns=COLUMNS, group=part.group))

    @contextlib.contextmanager
    def _opened(self, path: str, version: tuple[int, int] | None = None) -> Iterator[pyarrow.parquet.ParquetFile]:
        files, _ = self.resolve()
        with _explained(path):
            is_changed = version is not None and _version(files.get_file_info(path)) != version
        if is_changed:
            raise DataError(f"{path} has changed since the job began; run it again, when the source is complete")
        with _explained(path), files.open_input_file(path) as stream, pyarrow.parquet.ParquetFile(stream) as file:
            yield file

    def write(self, name: str, table: pyarrow.Table) -> None:
        """Write a file into this folder, whole or not at all; a file of the same name is replaced.

        Raises:
            DataError: it cannot be written.
        """
        with self._written(name) as (files, path):
            pyarrow.parquet.write_table(table, path, filesystem=files)

    def write_text(self, name: str, text: str) -> None:
        """`write` for a text.

        Raises:
            DataError: it cannot be written.
        """
        with self._written(name) as (files, path), files.open_output_stream(path) as stream:
            stream.write(text.encode())

    @contextlib.contextmanager
    def _written(self, name: str) -> Iterator[tuple[pyarrow.fs.FileSystem, str]]:
        """Where a file may be written, which then gets its name; an object in S3 appears with its last byte anyway."""
        files, folder = self.resolve()
        path = f"{folder}/{name}"
        with _explained(path, "written"):
            if not isinstance(files, pyarrow.fs.LocalFileSystem):
                yield files, path
                return
            temporary = f"{path}.{os.getpid()}.part"
            files.create_dir(os.path.dirname(path), recursive=True)
            yield files, temporary
            files.move(temporary, path)

    def read_file(self, name: str) -> pyarrow.Table:
        """A file that `write` wrote."""
        _, folder = self.resolve()
        with self._opened(f"{folder}/{name}") as file:
            return file.read()

    def remove(self, *names: str) -> None:
        """Remove files and folders from this folder, as far as they exist.

        Raises:
            DataError: one cannot be removed.
        """
        files, folder = self.resolve()
        for name in names:
            path = f"{folder}/{name}"
            with _explained(path, "removed"):
                kind = files.get_file_info(path).type
                if kind == pyarrow.fs.FileType.Directory:
                    files.delete_dir(path)
                elif kind == pyarrow.fs.FileType.File:
                    files.delete_file(path)


def _version(file: pyarrow.fs.FileInfo) -> tuple[int, int]:
    return (file.size or 0, file.mtime_ns or 0)


@contextlib.contextmanager
def _explained(path: str, done: str = "read") -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise DataError(
            f"{path} cannot be {done}: {error}; check the address, its permissions, space and the network"
        ) from error
    except pyarrow.ArrowException as error:
        raise DataError(f"{path} is not a whole parquet file: {error}; write or fetch it again") from error
