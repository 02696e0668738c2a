"""What was fetched becomes the files that a line works on: rows read, drawn and split; general text, a document a line.

A source that has no rows yet is read by a Python file of the project (``prepare``).
"""

import importlib.util
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from graftline.data.formats import Row
from graftline.data.rows import read_rows, rows_from_objects, write_rows
from graftline.data.split import Split, sample_rows, split_rows
from graftline.data.template import EncodedRows, encode_rows
from graftline.digest import write_text
from graftline.errors import DataError
from graftline.progress import Reporter
from graftline.settings.model import Data, Forgetting

TRAINING, EVALUATION, GENERAL = "train.jsonl", "evaluation.jsonl", "general.jsonl"


def prepare_rows(section: Data, source: Path, *, root: Path, out: Path) -> Split:
    """Read the rows of ``source`` and write ``out``/train.jsonl and ``out``/evaluation.jsonl.

    Args:
        section: the pipeline's ``data``.
        source: what was fetched, a file or a folder.
        root: the project's root; ``prepare`` is relative to it.
        out: folder for the two files.

    Raises:
        DataError: the rows cannot be read, or cannot be split as ``section`` says.
    """
    rows = _read(section, source, root)
    if section.max_rows:
        rows = sample_rows(rows, section.max_rows, seed=section.seed)
    split = split_rows(rows, section.evaluation_rows, seed=section.seed, on_progress=Reporter("split", "rows"))
    write_rows(out / TRAINING, split.training)
    write_rows(out / EVALUATION, split.evaluation)
    return split


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
    make: Callable[[Path], Iterable[Mapping[str, Any]]] = load_function(root / section.prepare, "rows")
    return rows_from_objects(make(source), origin=section.prepare, format=section.format)


def prepare_general_text(section: Forgetting | None, source: Path | None, *, root: Path, out: Path) -> None:
    """Write the forgetting gate's text to ``out``/general.jsonl; an empty file where none is declared."""
    texts: Iterable[str] = ()
    if section and source:
        documents = (
            load_function(root / section.prepare, "documents")(source)
            if section.prepare
            else source.read_text(encoding="utf-8").splitlines()
        )
        texts = islice(documents, section.max_documents)
    write_text(out / GENERAL, "".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts))


def load_function(script: Path, name: str) -> Callable[[Path], Iterable[Any]]:
    """The function ``name`` of a Python file of the project (``data.prepare``).

    Raises:
        DataError: the file cannot be imported, or has no such function.
    """
    spec = importlib.util.spec_from_file_location(script.stem, script)
    if spec is None or spec.loader is None:
        raise DataError(f"{script} is not a Python file that can be imported")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise DataError(f"{script} cannot be imported: {type(error).__name__}: {error}") from error
    function = getattr(module, name, None)
    if not callable(function):
        raise DataError(f"{script} has no function {name}(source: Path); write one that yields the rows")
    checked: Callable[[Path], Iterable[Any]] = function
    return checked
