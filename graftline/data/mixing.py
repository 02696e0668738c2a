"""Rows of several files and sources as one sequence: numbered through, each source with its share, their age known.

Where there are several files, a row's ``source_line`` counts through all of them in their order; `Span` says which
file a line is in.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from graftline.data.records import Problems, read_records
from graftline.data.rows import NoRowsError, Row, read_rows, rows_from_objects
from graftline.data.scripts import made_by
from graftline.data.sources.files import is_row_file
from graftline.data.split import sample_rows
from graftline.errors import DataError
from graftline.settings.model import EvaluationRows, RowSource


@dataclass(frozen=True)
class FetchedSource:
    """One source of rows: its settings, and its files, each with the name that people know it by."""

    section: RowSource | EvaluationRows
    files: tuple[tuple[str, Path], ...]


@dataclass(frozen=True)
class Span:
    """The rows of one file: lines ``first`` up to ``last`` of the whole. ``source``: number of its source, from 0."""

    name: str
    source: int
    first: int
    last: int

    def place(self, line: int) -> str:
        """The line as people look for it."""
        return f"{self.name}:{line - self.first + 1}"


def read_sources(sources: Sequence[FetchedSource], root: Path) -> tuple[list[Row], list[Span]]:
    """The rows of all sources in their order; where there is one file, numbered as in that file.

    Args:
        sources: what was fetched.
        root: the project's root; ``prepare`` is relative to it.

    Raises:
        DataError: a file cannot be read, or there are no rows in all of them.
    """
    files = [(at, source.section, name, path) for at, source in enumerate(sources) for name, path in _files(source)]
    rows: list[Row] = []
    spans: list[Span] = []
    for at, section, name, path in files:
        try:
            read = _read(section, path, root)
        except NoRowsError:
            if len(files) == 1:
                raise
            continue  # A day on which nothing came.
        before = spans[-1].last if spans else 0
        rows += [replace(row, source_line=before + row.source_line) for row in read] if before else read
        spans.append(Span(name, at, before + 1, before + read[-1].source_line))
    if not rows:
        named = ", ".join(name for name, _ in (file for source in sources for file in source.files[:3]))
        raise DataError(f"{named}: no rows in {len(files)} files; check data.source")
    return rows, spans


def column_values(
    column: str, sources: Sequence[FetchedSource], spans: Sequence[Span], rows: Sequence[Row], root: Path
) -> list[str]:
    """What a column says of each row.

    Args:
        column: its name.
        sources: what the rows were read from; the numbers of ``spans`` count them.
        spans: which file a row's line is in.
        rows: rows as `read_sources` numbers them.
        root: the project's root.

    Raises:
        DataError: rows without a text or a whole number in that column; all of them are told with their lines.
    """
    paths = {(at, name): (source.section, path) for at, source in enumerate(sources) for name, path in _files(source)}
    values: dict[int, str] = {}
    problems = Problems(", ".join(span.name for span in spans[:3]))
    for span in spans:
        section, path = paths[span.source, span.name]
        wanted = {row.source_line for row in rows if span.first <= row.source_line <= span.last}
        for number, record in _records(section, path, column, root) if wanted else ():
            line = span.first + number - 1
            value = record.get(column)
            if line not in wanted:
                continue
            if isinstance(value, bool) or not isinstance(value, str | int) or value == "":
                given = "missing" if value is None else repr(value)[:80]
                expected = "`data.cluster` asks for a text or a whole number in every row"
                problems.add(f"{span.place(line)}: {column!r} is {given}; {expected}")
            values[line] = str(value)
    problems.raise_any()
    return [values[row.source_line] for row in rows]


def _records(
    section: RowSource | EvaluationRows, path: Path, column: str, root: Path
) -> Iterator[tuple[int, Mapping[str, Any]]]:
    if section.prepare is None:
        yield from ((record.place.number, record.value) for record in read_records(path, columns=[column]))
    else:
        yield from enumerate(made_by(root / section.prepare, "rows", path), start=1)


def _files(source: FetchedSource) -> Iterator[tuple[str, Path]]:
    """The files that rows are read from, one by one; a folder without a script has rows in its files."""
    for name, path in source.files:
        if source.section.prepare or not path.is_dir():
            yield name, path
            continue
        inside = sorted(file.relative_to(path).as_posix() for file in path.rglob("*") if file.is_file())
        chosen = [file for file in inside if is_row_file(file.split("/"))]
        if not chosen:
            raise DataError(f"{name} is a folder without a file of rows; name a Python file that reads it in `prepare`")
        yield from ((f"{name}/{file}", path / file) for file in chosen)


def _read(section: RowSource | EvaluationRows, path: Path, root: Path) -> list[Row]:
    if section.prepare is None:
        return read_rows(path, format=section.format)
    objects = made_by(root / section.prepare, "rows", path)
    return rows_from_objects(objects, origin=section.prepare, format=section.format)


def by_source(rows: Sequence[Row], spans: Sequence[Span], num_sources: int) -> list[list[Row]]:
    """Rows in the order of `read_sources`, apart by their source."""
    found: list[list[Row]] = [[] for _ in range(num_sources)]
    at = 0
    for row in rows:
        while row.source_line > spans[at].last:
            at += 1
        found[spans[at].source].append(row)
    return found


def share_out(
    groups: Sequence[Sequence[Row]], shares: Sequence[float], max_rows: int | None, *, seed: int
) -> list[Row]:
    """As many rows as the shares allow without repeating one, drawn by seed and prompt; in their order.

    N = min over sources of rows / share, and at most ``max_rows``; each source gives ⌊N · share⌋.

    Raises:
        DataError: a source has too few rows for its share, so that it, or another, gives none.
    """
    bound = min(len(rows) / share for rows, share in zip(groups, shares, strict=True))
    bound = bound if max_rows is None else min(bound, max_rows)
    # 0.1 · 30 is a little less than 3 in floating point.
    counts = [int(bound * share + 1e-9) for share in shares]
    if 0 in counts:
        had = ", ".join(f"{len(rows)} rows with share {share:g}" for rows, share in zip(groups, shares, strict=True))
        raise DataError(
            f"data.sources: there are {had}: source {counts.index(0) + 1} gives none; no row is repeated, so the "
            "source that is shortest for its share decides how many there are: add rows to it, or change the shares"
        )
    return [row for rows, count in zip(groups, counts, strict=True) for row in sample_rows(rows, count, seed=seed)]


def ages(groups: Sequence[Sequence[Row]]) -> list[float]:
    """How old each row is, in the order of the groups put together: 0 the newest, to 1; the last of a source is newest.

    As shares of their own source, so that of several sources each gives its newest rows.
    """
    return [(len(rows) - 1 - at) / len(rows) for rows in groups for at in range(len(rows))]
