"""What was fetched becomes the files that a line works on: rows read, drawn and split; general text, a document a line.

A source that has no rows yet is read by a Python file of the project (``prepare``).
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from graftline.data.records import Problems, read_records
from graftline.data.rows import Row, read_rows, rows_from_objects, write_rows
from graftline.data.screening import Lines, contradiction_policy, screen, with_repeats
from graftline.data.scripts import documents_of, made_by
from graftline.data.split import Split, sample_rows, split_rows
from graftline.data.template import EncodedRows, encode_rows
from graftline.digest import write_text
from graftline.logs import Reporter
from graftline.settings.model import Data, Forgetting

TRAINING, EVALUATION, GENERAL = "train.jsonl", "evaluation.jsonl", "general.jsonl"
CLUSTERS = "clusters.json"
"""Where ``data.cluster`` names a column: its value for each evaluation row, by item id."""


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


def cluster_values(section: Data, source: Path, rows: Sequence[Row], *, root: Path) -> list[str]:
    """What the column ``data.cluster`` says of each row that was read from ``source``.

    Args:
        section: the pipeline's ``data``, with a column.
        source: what was fetched, a file or a folder.
        rows: rows of it.
        root: the project's root.

    Raises:
        DataError: rows without a text or a whole number in that column; all of them are told with their lines.
    """
    column = str(section.cluster)
    if section.prepare is None:
        found = {record.place.number: record.value for record in read_records(source, columns=[column])}
    else:
        found = dict(enumerate(made_by(root / section.prepare, "rows", source), start=1))
    problems, values = Problems(str(source)), []
    for row in rows:
        value = found[row.source_line].get(column)
        if isinstance(value, bool) or not isinstance(value, str | int) or value == "":
            given = "missing" if value is None else repr(value)[:80]
            wanted = "`data.cluster` asks for a text or a whole number in every row"
            problems.add(f"row {row.source_line}: {column!r} is {given}; {wanted}")
        values.append(str(value))
    problems.raise_any()
    return values


def encode_declared(
    rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase, section: Data, *, template: str
) -> EncodedRows:
    """Rows encoded as the section ``data`` says: what is trained on, and what a plan looks at.

    Raises:
        DataError: a row cannot be encoded, or is too long where that is an error.
    """
    return encode_rows(rows, tokenizer, template=template, max_tokens=section.max_tokens, overlength=section.overlength)


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
