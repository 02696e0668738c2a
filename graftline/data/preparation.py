"""What was fetched becomes the files that a line works on: rows read, drawn and split; general text, a document a line.

A source that has no rows yet is read by a Python file of the project (``prepare``).
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

import numpy

from graftline.data.mixing import (
    FetchedSource,
    Span,
    ages,
    by_source,
    read_sources,
    share_out,
    spool_sources,
)
from graftline.data.row_file import RowFile, keys_of, take
from graftline.data.rows import Row, write_rows
from graftline.data.screening import Lines, Screened, contradiction_policy, screen, with_repeats
from graftline.data.scripts import documents_of
from graftline.data.split import Split, find_leaks, sample_numbers, split_rows
from graftline.digest import write_text
from graftline.errors import DataError
from graftline.logs import Reporter
from graftline.settings.data import Data
from graftline.settings.model import Forgetting

TRAINING, EVALUATION, GENERAL = "train.jsonl", "evaluation.jsonl", "general.jsonl"
CLUSTERS = "clusters.json"
"""Where ``data.cluster`` names a column: its value for each evaluation row, by item id."""
SLICES = "slices.json"
"""Where ``data.slices`` names columns: by column, the value of each evaluation row that has one, by item id."""
RESERVE = "reserve"
"""Folder of the rows that only promotions look at, with the files that this folder has of the evaluation's."""
ENCODED = "encoded"
"""Folder of the columns of both sides, below what the validate stage leaves."""


@dataclass(frozen=True)
class Prepared:
    """The rows of a line, and what was left out of them."""

    split: Split
    dropped: dict[str, Lines]
    """By the setting that says so: source lines of a row that was left out and of the earlier row."""
    spans: tuple[Span, ...]
    """Which file a source line is in; those of `data.evaluation` come last."""
    used: tuple[int, ...]
    """Rows of each source that are in the training or the evaluation."""


def prepare_rows(
    section: Data,
    sources: Sequence[FetchedSource],
    evaluation: FetchedSource | None = None,
    *,
    root: Path,
    out: Path,
) -> Prepared:
    """Read the rows of all sources and write ``out``/train.jsonl and ``out``/evaluation.jsonl.

    Args:
        section: the pipeline's ``data``.
        sources: what was fetched.
        evaluation: the rows of ``data.evaluation``.
        root: the project's root; ``prepare`` is relative to it.
        out: folder for the two files.

    Raises:
        DataError: the rows cannot be read, or cannot be split as ``section`` says.
    """
    spool = out / ".rows.jsonl"
    empty: list[int] = []
    try:
        rows, spans = spool_sources(
            sources,
            root,
            spool,
            learned=section.learned,
            reasoning=section.learned_reasoning,
            on_empty=empty.append if section.empty == "drop" else None,
            on_progress=Reporter("read", "rows"),
        )
        frozen = _frozen(section, evaluation, spans, empty, root) if evaluation else ()
        found = _prepared(section, rows, spans, len(sources), frozen, out)
        return replace(found, dropped=_by_itself(empty) | found.dropped)
    finally:
        spool.unlink(missing_ok=True)


def _prepared(
    section: Data,
    rows: RowFile,
    spans: list[Span],
    num_sources: int,
    frozen: tuple[Row, ...],
    out: Path,
) -> Prepared:
    screened = _screen(section, rows)
    kept, dropped = screened.rows, screened.dropped
    if frozen:
        kept, leaked = _without_leaks(kept, frozen, section)
        dropped = dropped | ({"evaluation": leaked} if leaked else {})
    shares = [each.share for each in section.all_sources if each.share is not None]
    if shares:
        groups = by_source(kept, spans, num_sources)
        numbers = share_out(kept, groups, shares, section.max_rows, seed=section.seed)
    else:
        numbers = sample_numbers(kept, section.max_rows or len(kept), seed=section.seed)
    chosen = take(kept, numbers)
    groups = by_source(chosen, spans, num_sources)
    split = split_rows(
        chosen,
        section.evaluation_rows,
        seed=section.seed,
        reserve_rows=section.reserve_rows,
        ages=ages(groups) if section.split == "newest" else None,
        on_progress=Reporter("split", "rows"),
    )
    split, evaluated = with_repeats(split, screened.repeats)
    split = replace(split, evaluation=(*split.evaluation, *frozen), reserve=tuple(split.reserve))
    write_rows(out / TRAINING, split.training, on_progress=Reporter("write", "rows"))
    write_rows(out / EVALUATION, split.evaluation)
    if split.reserve:
        _refuse_seen(frozen, split.reserve)
        write_rows(out / RESERVE / EVALUATION, split.reserve)
        write_text(out / RESERVE / GENERAL, "")
    split = replace(split, training=RowFile(out / TRAINING, lines=keys_of(split.training)["line"]))
    dropped = dropped | ({"duplicates": evaluated} if evaluated else {})
    return Prepared(split, dropped, tuple(spans), tuple(map(len, groups)))


def _screen(section: Data, rows: Sequence[Row]) -> Screened:
    return screen(
        rows,
        duplicates=section.duplicates,
        contradictions=contradiction_policy(section.contradictions, section.labels),
        near_duplicates=section.near_duplicates,
        on_progress=Reporter("compare", "rows"),
    )


def _by_itself(lines: Sequence[int]) -> dict[str, Lines]:
    """What is said of empty rows, which no earlier row is to blame for."""
    return {"empty": tuple((line, line) for line in lines)} if lines else {}


def _frozen(
    section: Data, evaluation: FetchedSource, spans: list[Span], empty: list[int], root: Path
) -> tuple[Row, ...]:
    """The rows of ``data.evaluation``, each once, numbered behind those of ``spans``.

    ``spans`` grows with theirs, ``empty`` with the lines of rows that are left out for being so.
    """
    before, source = spans[-1].last, spans[-1].source + 1
    read, own = read_sources(
        [evaluation],
        root,
        learned=section.learned,
        reasoning=section.learned_reasoning,
        on_empty=(lambda line: empty.append(before + line)) if section.empty == "drop" else None,
    )
    rows = [row.at(before + row.source_line) for row in read]
    if section.duplicates != "error":
        rows = list(screen(rows, duplicates="drop", contradictions="keep").rows)
    spans += [Span(span.name, source, before + span.first, before + span.last) for span in own]
    return tuple(rows)


def _without_leaks(rows: Sequence[Row], frozen: Sequence[Row], section: Data) -> tuple[Sequence[Row], Lines]:
    """Where leaks are dropped: the rows that no evaluation row is like; of the others, which row that is."""
    if section.evaluation is None or section.evaluation.leaks == "error":
        return rows, ()
    found = find_leaks(frozen, rows, on_progress=Reporter("compare with data.evaluation", "rows"))
    leaks = {leak.evaluation_line: leak.training_line for leak in found}
    stays = ~numpy.isin(keys_of(rows)["line"], list(leaks)) if leaks else numpy.ones(len(rows), dtype=numpy.bool_)
    return take(rows, numpy.flatnonzero(stays)), tuple(leaks.items())


def _refuse_seen(frozen: Sequence[Row], reserve: Sequence[Row]) -> None:
    """Raise DataError if a row of the reserve is, or is nearly, one that every run looks at."""
    if leaks := find_leaks(frozen, reserve) if frozen else ():
        lines = ", ".join(str(leak.evaluation_line) for leak in leaks[:5])
        raise DataError(
            f"data.reserve_rows: {len(leaks)} rows that only promotions are to look at are, or are nearly, rows of "
            f"data.evaluation, which every run looks at (lines {lines}); set data.evaluation.leaks to drop"
        )


def prepare_general_text(section: Forgetting | None, source: Path | None, *, root: Path, out: Path) -> None:
    """Write the forgetting gate's text to ``out``/general.jsonl; an empty file where none is declared."""
    texts: Iterable[str] = ()
    if section and source:
        documents = (
            documents_of(root / section.prepare, source)
            if section.prepare
            else source.read_text(encoding="utf-8").splitlines()
        )
        texts = islice(documents, section.max_documents)
    write_text(out / GENERAL, "".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts))
