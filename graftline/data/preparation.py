"""What was fetched becomes the files that a line works on: rows read, drawn and split; general text, a document a line.

A source that has no rows yet is read by a Python file of the project (``prepare``).
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from graftline.data.rows import Row, read_rows, rows_from_objects, write_rows
from graftline.data.screening import Lines, contradiction_policy, screen, with_repeats
from graftline.data.scripts import documents_of, made_by
from graftline.data.split import Split, sample_rows, split_rows
from graftline.digest import write_text
from graftline.logs import Reporter
from graftline.settings.model import Data, Forgetting

TRAINING, EVALUATION, GENERAL = "train.jsonl", "evaluation.jsonl", "general.jsonl"
ENCODED = "encoded"
"""Folder of the columns of both sides, below what the validate stage leaves."""


@dataclass(frozen=True)
class Prepared:
    """The rows of a line, and what was left out of them."""

    split: Split
    dropped: dict[str, Lines]
    """By the setting that says so: source lines of a row that was left out and of the earlier row."""


def prepare_rows(section: Data, source: Path, *, root: Path, out: Path) -> Prepared:
    """Read the rows of ``source`` and write ``out``/train.jsonl and ``out``/evaluation.jsonl.

    Args:
        section: the pipeline's ``data``.
        source: what was fetched, a file or a folder.
        root: the project's root; ``prepare`` is relative to it.
        out: folder for the two files.

    Raises:
        DataError: the rows cannot be read, or cannot be split as ``section`` says.
    """
    screened = screen(
        _read(section, source, root),
        duplicates=section.duplicates,
        contradictions=contradiction_policy(section.contradictions, section.labels),
        near_duplicates=section.near_duplicates,
        on_progress=Reporter("compare", "rows"),
    )
    rows: Sequence[Row] = screened.rows
    if section.max_rows:
        rows = sample_rows(rows, section.max_rows, seed=section.seed)
    split = split_rows(rows, section.evaluation_rows, seed=section.seed, on_progress=Reporter("split", "rows"))
    split, evaluated = with_repeats(split, screened.repeats)
    write_rows(out / TRAINING, split.training)
    write_rows(out / EVALUATION, split.evaluation)
    return Prepared(split, screened.dropped | ({"duplicates": evaluated} if evaluated else {}))


def _read(section: Data, source: Path, root: Path) -> list[Row]:
    if section.prepare is None:
        return read_rows(source, format=section.format)
    objects = made_by(root / section.prepare, "rows", source)
    return rows_from_objects(objects, origin=section.prepare, format=section.format)


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
