"""Rows of several files and sources as one sequence: numbered through, each source with its share, their age known.

Where there are several files, a row's ``source_line`` counts through all of them in their order; `Span` says which
file a line is in.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy
from numpy.typing import NDArray

from graftline.address import mask_secrets
from graftline.data.records import Problems, count_records, read_records
from graftline.data.row_file import RowFile, keys_of, spool_rows, take
from graftline.data.row_keys import Integers
from graftline.data.rows import Message, NoRowsError, OnEmpty, Row, each_object, each_row
from graftline.data.scripts import made_by
from graftline.data.sources.files import is_row_file
from graftline.data.split import sample_numbers
from graftline.data.turns import REASONING_WEIGHT
from graftline.errors import DataError
from graftline.logs import OnProgress, silent
from graftline.settings.data import EvaluationRows, Learned, RowSource
from graftline.settings.fields import slice_name


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


def read_sources(
    sources: Sequence[FetchedSource],
    root: Path,
    *,
    learned: Learned = "every-turn",
    reasoning: bool = True,
    on_empty: OnEmpty | None = None,
) -> tuple[list[Row], list[Span]]:
    """The rows of all sources in their order; where there is one file, numbered as in that file.

    Args:
        sources: what was fetched.
        root: the project's root; ``prepare`` is relative to it.
        learned: which turns stay supervised.
        reasoning: whether theirs is.
        on_empty: is told the lines of rows that ask nothing or have nothing to learn, which are left out; None: they
            are an error.

    Raises:
        DataError: a file cannot be read, or there are no rows in all of them.
    """
    spans: list[Span] = []
    rows = _each_row(sources, root, spans, on_empty)
    return list(as_learned(rows, learned, spans, reasoning=reasoning, on_empty=on_empty)), spans


def spool_sources(
    sources: Sequence[FetchedSource],
    root: Path,
    path: Path,
    *,
    learned: Learned = "every-turn",
    reasoning: bool = True,
    on_empty: OnEmpty | None = None,
    on_progress: OnProgress = silent,
) -> tuple[RowFile, list[Span]]:
    """`read_sources`, through a file, so that no rows are held.

    Args:
        sources: what was fetched.
        root: the project's root.
        path: the file, to be removed by whoever asks.
        learned: which turns stay supervised.
        reasoning: whether theirs is.
        on_empty: as in `read_sources`.
        on_progress: called with rows read and in all, as far as that is known.

    Raises:
        DataError: as in `read_sources`.
        GraftlineError: the disk is full.
    """
    spans: list[Span] = []
    rows = _each_row(sources, root, spans, on_empty)
    rows = as_learned(rows, learned, spans, reasoning=reasoning, on_empty=on_empty)
    return spool_rows(path, rows, on_progress=on_progress, num_rows=_count(sources)), spans


def as_learned(
    rows: Iterable[Row],
    learned: Learned,
    spans: Sequence[Span],
    *,
    reasoning: bool = True,
    on_empty: OnEmpty | None = None,
) -> Iterator[Row]:
    """The rows with only the turns supervised that ``data.learned`` names; with or without their ``reasoning``.

    ``on_empty``: is told of rows of which nothing would be learned, which are left out.

    Raises:
        DataError: rows of which nothing would be learned; after the last row, all together, with their lines.
    """
    if learned == "every-turn" and reasoning:
        yield from rows
        return
    empty: list[int] = []
    for row in rows:
        messages = tuple(
            _without_reasoning(
                replace(message, supervised=message.supervised and _is_asked(row, at, learned)), reasoning
            )
            for at, message in enumerate(row.messages)
        )
        if not any(message.supervised for message in messages):
            (on_empty or empty.append)(row.source_line)
            continue
        yield replace(row, messages=messages)
    problems = Problems("data.learned")
    for line in empty:
        place = next((span.place(line) for span in spans if line <= span.last), "a row")
        problems.add(
            f"{place}: no turn is learned with `data.learned: {learned}`; set data.empty to drop to leave such rows "
            "out, or choose otherwise"
        )
    problems.raise_any()


def _without_reasoning(message: Message, reasoning: bool) -> Message:
    if reasoning or "reasoning_content" not in message.fields:
        return message
    return replace(message, fields={**message.fields, REASONING_WEIGHT: 0})


def _is_asked(row: Row, at: int, learned: Learned) -> bool:
    if learned == "every-turn":
        return True
    if learned == "last-turn":
        return at == len(row.messages) - 1
    return ("tool_calls" in row.messages[at].fields) == (learned == "calls")


def _each_row(
    sources: Sequence[FetchedSource], root: Path, spans: list[Span], on_empty: OnEmpty | None
) -> Iterator[Row]:
    """The rows of all files, one by one; ``spans`` grows with each file that has been read."""
    files = [(at, source.section, name, path) for at, source in enumerate(sources) for name, path in _files(source)]
    # A fetched file lies in the cache, below a digest that nobody knows it by.
    wrong = Problems(f"{len(files)} files", {str(path): mask_secrets(name) for _, _, name, path in files})
    for at, section, name, path in files:
        before = line = spans[-1].last if spans else 0
        left_out: list[int] = []
        try:
            for row in _read(
                section, path, root, None if len(files) == 1 else wrong, left_out.append if on_empty else None
            ):
                _refuse_pairs_unless_asked(row, section, name)
                line = before + row.source_line
                yield row.at(line) if before else row
        except NoRowsError as error:
            if len(files) == 1:
                raise NoRowsError(wrong.named(error)) from error
            # A day on which nothing came.
        except DataError as error:
            # The other files are checked too; otherwise each run would report only the next bad file.
            if len(files) == 1:
                raise DataError(wrong.named(error)) from error
            wrong.add(error)
        for number in left_out:
            (on_empty or wrong.add)(before + number)
            line = max(line, before + number)
        if line > before:
            spans.append(Span(name, at, before + 1, line))
    wrong.raise_any()
    if not spans:
        named = ", ".join(name for name, _ in (file for source in sources for file in source.files[:3]))
        raise DataError(f"{named}: no rows in {len(files)} files; check data.source")


def _refuse_pairs_unless_asked(row: Row, section: RowSource | EvaluationRows, name: str) -> None:
    if row.rejected is not None and section.format != "preference":
        raise DataError(
            f"{name}: the rows are preference pairs (chosen, rejected), and the format is {section.format}; write "
            "`format: preference`, or keep one answer of each"
        )


def _count(sources: Sequence[FetchedSource]) -> int:
    """About how many rows there are, to estimate the remaining time; 0 if they would have to be read."""
    counts = [0 if source.section.prepare else count_records(path) for source in sources for _, path in _files(source)]
    return sum(counts) if all(counts) else 0


def column_values(
    columns: Sequence[str],
    sources: Sequence[FetchedSource],
    spans: Sequence[Span],
    rows: Sequence[Row],
    root: Path,
    *,
    for_slices: bool = False,
) -> dict[str, list[str]]:
    """What columns say of each row, by column; the files are read once.

    Args:
        columns: their names.
        sources: what the rows were read from; the numbers of ``spans`` count them.
        spans: which file a row's line is in.
        rows: rows as `read_sources` numbers them.
        root: the project's root.
        for_slices: a row may have nothing there, which gives an empty text, or true or false.

    Raises:
        DataError: rows without a text or a whole number in a column; all of them are told with their lines.
    """
    paths = {(at, name): (source.section, path) for at, source in enumerate(sources) for name, path in _files(source)}
    lines = {row.source_line for row in rows}
    values: dict[str, dict[int, str]] = {column: {} for column in columns}
    problems = Problems(", ".join(span.name for span in spans[:3]))
    for span in spans:
        wanted = {line for line in lines if span.first <= line <= span.last}
        for number, record in _records(*paths[span.source, span.name], columns, root) if wanted else ():
            line = span.first + number - 1
            for column in columns if line in wanted else ():
                try:
                    values[column][line] = _column_value(record.get(column), for_slices=for_slices)
                except ValueError as error:
                    problems.add(f"{span.place(line)}: {column!r} is {error}")
    problems.raise_any()
    return {column: [found[row.source_line] for row in rows] for column, found in values.items()}


def _column_value(value: Any, *, for_slices: bool) -> str:
    if for_slices and (value is None or isinstance(value, bool)):
        return "" if value is None else slice_name(value)
    if isinstance(value, bool) or not isinstance(value, str | int) or (value == "" and not for_slices):
        given = "missing" if value is None else repr(value)[:80]
        if for_slices:
            raise ValueError(f"{given}; `data.slices` asks for a text, a whole number, true or false")
        raise ValueError(f"{given}; `data.cluster` asks for a text or a whole number in every row")
    return str(value)


def _records(
    section: RowSource | EvaluationRows, path: Path, columns: Sequence[str], root: Path
) -> Iterator[tuple[int, Mapping[str, Any]]]:
    if section.prepare is None:
        for record in read_records(path, columns=columns):
            if isinstance(record.value, DataError):
                raise record.value
            yield record.place.number, record.value
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


def _read(
    section: RowSource | EvaluationRows, path: Path, root: Path, problems: Problems | None, on_empty: OnEmpty | None
) -> Iterator[Row]:
    """``problems``: collects bad rows; None: they are raised, after the good rows."""
    if section.prepare is None:
        return each_row(path, format=section.format, problems=problems, on_empty=on_empty)
    objects = made_by(root / section.prepare, "rows", path)
    return each_object(objects, origin=section.prepare, format=section.format, problems=problems, on_empty=on_empty)


def by_source(rows: Sequence[Row], spans: Sequence[Span], num_sources: int) -> list[Integers]:
    """Numbers of the rows, which are in the order of `read_sources`, grouped by source."""
    sources = numpy.array([span.source for span in spans])
    found = sources[numpy.searchsorted([span.last for span in spans], keys_of(rows)["line"])]
    return [numpy.flatnonzero(found == source) for source in range(num_sources)]


def share_out(
    rows: Sequence[Row], groups: Sequence[Integers], shares: Sequence[float], max_rows: int | None, *, seed: int
) -> Integers:
    """As many rows as the shares allow without repeating one, drawn by seed and prompt; their numbers, in order.

    N = min over sources of rows / share, and at most ``max_rows``; each source gives ⌊N · share⌋.

    Raises:
        DataError: a source has too few rows for its share, so that it, or another, gives none.
    """
    bound = min(len(group) / share for group, share in zip(groups, shares, strict=True))
    bound = bound if max_rows is None else min(bound, max_rows)
    # 0.1 · 30 is a little less than 3 in floating point.
    counts = [int(bound * share + 1e-9) for share in shares]
    if 0 in counts:
        had = ", ".join(f"{len(group)} rows with share {share:g}" for group, share in zip(groups, shares, strict=True))
        raise DataError(
            f"data.sources: there are {had}: source {counts.index(0) + 1} gives none; no row is repeated, so the "
            "source that is shortest for its share decides how many there are: add rows to it, or change the shares"
        )
    chosen = (
        group[sample_numbers(take(rows, group), count, seed=seed)] for group, count in zip(groups, counts, strict=True)
    )
    return numpy.concatenate(list(chosen))


def ages(groups: Sequence[Integers]) -> NDArray[numpy.float64]:
    """How old each row is, in the order of the groups put together: 0 the newest, to 1; the last of a source is newest.

    As shares of their own source, so that of several sources each gives its newest rows.
    """
    return numpy.concatenate([(len(group) - 1 - numpy.arange(len(group))) / max(1, len(group)) for group in groups])
