"""What was fetched becomes the files that a line works on: rows read, drawn and split; general text, a document a line.

A source that has no rows yet is read by a Python file of the project (``prepare``).
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

from graftline.data.mixing import FetchedSource, Span, ages, by_source, read_sources, share_out
from graftline.data.rows import Row, write_rows
from graftline.data.screening import Lines, Screened, contradiction_policy, screen, with_repeats
from graftline.data.scripts import documents_of
from graftline.data.split import Split, find_leaks, sample_rows, split_rows
from graftline.digest import write_text
from graftline.logs import Reporter
from graftline.settings.model import Data, Forgetting

TRAINING, EVALUATION, GENERAL = "train.jsonl", "evaluation.jsonl", "general.jsonl"
CLUSTERS = "clusters.json"
"""Where ``data.cluster`` names a column: its value for each evaluation row, by item id."""
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
    rows, spans = read_sources(sources, root)
    screened = _screen(section, rows)
    kept, dropped = screened.rows, screened.dropped
    frozen: tuple[Row, ...] = ()
    if evaluation:
        frozen, more = _frozen(section, evaluation, spans, root)
        kept, leaked = _without_leaks(kept, frozen, section)
        dropped = dropped | ({"evaluation": leaked} if leaked else {})
        spans += more
    groups = by_source(kept, spans, len(sources))
    shares = [each.share for each in section.all_sources if each.share is not None]
    if shares:
        chosen = share_out(groups, shares, section.max_rows, seed=section.seed)
    else:
        chosen = sample_rows(kept, section.max_rows or len(kept), seed=section.seed)
    groups = by_source(chosen, spans, len(sources))
    split = split_rows(
        chosen,
        section.evaluation_rows,
        seed=section.seed,
        ages=ages(groups) if section.split == "newest" else None,
        on_progress=Reporter("split", "rows"),
    )
    split, evaluated = with_repeats(split, screened.repeats)
    split = replace(split, evaluation=(*split.evaluation, *frozen))
    write_rows(out / TRAINING, split.training)
    write_rows(out / EVALUATION, split.evaluation)
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


def _frozen(
    section: Data, evaluation: FetchedSource, spans: Sequence[Span], root: Path
) -> tuple[tuple[Row, ...], list[Span]]:
    """The rows of ``data.evaluation``, each once, numbered behind those of ``spans``."""
    rows, own = read_sources([evaluation], root)
    before, source = spans[-1].last, spans[-1].source + 1
    rows = [replace(row, source_line=before + row.source_line) for row in rows]
    if section.duplicates != "error":
        rows = list(screen(rows, duplicates="drop", contradictions="keep").rows)
    return tuple(rows), [Span(span.name, source, before + span.first, before + span.last) for span in own]


def _without_leaks(rows: tuple[Row, ...], frozen: Sequence[Row], section: Data) -> tuple[tuple[Row, ...], Lines]:
    """Where leaks are dropped: the rows that no evaluation row is like; of the others, which row that is."""
    if section.evaluation is None or section.evaluation.leaks == "error":
        return rows, ()
    leaks = {leak.evaluation_line: leak.training_line for leak in find_leaks(frozen, rows)}
    return tuple(row for row in rows if row.source_line not in leaks), tuple(leaks.items())


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
