"""Rows encoded in the tokenizer's own batches: in memory, or once into a folder of columns that all later work maps.

`encode_columns` is a pure function of a batch of rows, so batches may be encoded anywhere, in any order, and joined.

An encoding on disk is named by the digest of all that decides its ids: the file of rows, the template, the tokenizer,
the code and the libraries. How long a row may be does not belong to it: rows are encoded whole and cut when they are
read, so that pipelines that differ in ``data.max_tokens`` share one encoding.
"""

import contextlib
import fcntl
import functools
import json
import os
import shutil
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import Any

import numpy
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from graftline.data import chat, columns, records, row_text, turns
from graftline.data import rows as row_formats
from graftline.data import template as templates
from graftline.data.columns import (
    ColumnWriter,
    EncodedColumns,
    Integers,
    columns_of,
    columns_of_parts,
    id_type,
    joined,
    open_columns,
)
from graftline.data.records import Problems
from graftline.data.row_file import RowFile, take
from graftline.data.rows import Row
from graftline.data.template import Encoded, check_template, encode_batch, name_lines, template_digest
from graftline.digest import Digest, of_file, of_json, rename_synced, write_text
from graftline.errors import DataError
from graftline.logs import OnProgress, silent
from graftline.settings.data import Data, Overlength

BATCH_ROWS, BATCH_CHARACTERS = 1000, 2_000_000
"""Rows of one call of the tokenizer, which holds some hundred bytes a token while it works."""
_SHARD_ROWS = 20_000
"""A killed encoding continues behind a multiple of so many rows."""
_KEEP_SECONDS = 14 * 24 * 3600.0
"""Encodings that nobody has used for so long are removed when another one is made."""


@dataclass(frozen=True, slots=True)
class EncodedRows:
    """Encoded rows, the rows that they come from (same order), and the source lines of what did not fit."""

    encoded: Sequence[Encoded]
    rows: Sequence[Row]
    truncated_lines: tuple[int, ...]
    dropped_lines: tuple[int, ...]

    @property
    def columns(self) -> EncodedColumns:
        """``encoded``, whatever it is."""
        return columns_of(self.encoded)

    def lines(self, at_fault: NDArray[numpy.bool_] | Integers) -> tuple[int, ...]:
        """Source lines of the rows that a mask (R,) or numbers name."""
        if isinstance(self.encoded, EncodedColumns):
            return tuple(self.encoded.lines[at_fault].tolist())
        return tuple(numpy.array([row.source_line for row in self.rows], dtype=numpy.int64)[at_fault].tolist())


@dataclass(frozen=True, slots=True)
class Kept:
    """The columns that are worked on, which rows they are, and the source lines of what did not fit."""

    columns: EncodedColumns
    numbers: Integers
    truncated_lines: tuple[int, ...]
    dropped_lines: tuple[int, ...]

    def of(self, rows: Sequence[Row]) -> EncodedRows:
        """With the rows themselves, of which these are some."""
        kept = take(rows, self.numbers) if len(self.numbers) < len(rows) else rows
        return EncodedRows(self.columns, kept, self.truncated_lines, self.dropped_lines)


def encode_columns(
    rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase, *, template: str
) -> tuple[EncodedColumns, list[DataError]]:
    """A batch of rows as columns, and what is wrong with the rows that are not among them.

    Raises:
        DataError: the template does not suit the tokenizer.
    """
    found = encode_batch(rows, tokenizer, template=template)
    right = [(one, row.source_line) for one, row in zip(found, rows, strict=True) if not isinstance(one, DataError)]
    parts, lines = [one for one, _ in right], [line for _, line in right]
    wrong = [one for one in found if isinstance(one, DataError)]
    return columns_of_parts(parts, lines, _id_type(tokenizer)), wrong


def encode_rows(
    rows: Sequence[Row],
    tokenizer: PreTrainedTokenizerBase,
    *,
    template: str,
    max_tokens: int,
    overlength: Overlength,
    on_progress: OnProgress = silent,
) -> EncodedRows:
    """Encode rows and treat those of more than ``max_tokens`` tokens as ``overlength`` says.

    ``error`` refuses them, ``drop`` leaves them out, ``truncate`` cuts their end, and with it the answer's EOS: what is
    left without a supervised token is for `graftline.data.checks` to find.

    Raises:
        DataError: rows are too long (``error``), none is left, or as in `encode`; rows at fault are told together.
    """
    kept = encode_kept(
        rows, tokenizer, template=template, max_tokens=max_tokens, overlength=overlength, on_progress=on_progress
    )
    return kept.of(rows)


def encode_kept(
    rows: Sequence[Row],
    tokenizer: PreTrainedTokenizerBase,
    *,
    template: str,
    max_tokens: int,
    overlength: Overlength,
    on_progress: OnProgress = silent,
) -> Kept:
    """`encode_rows`, as columns and the numbers of the rows.

    Raises:
        DataError: as in `encode_rows`.
    """
    check_template(tokenizer, template)
    problems = Problems(f"{len(rows)} rows")
    pieces = []
    for piece, wrong in _encoded(rows, tokenizer, template):
        pieces.append(piece)
        for error in wrong:
            problems.add(error)
        on_progress(sum(map(len, pieces)) + problems.number, len(rows))
    whole = joined(pieces) if pieces else columns_of_parts([], [], _id_type(tokenizer))
    return fit(whole, len(rows), max_tokens=max_tokens, overlength=overlength, problems=problems)


def fit(
    whole: EncodedColumns, num_rows: int, *, max_tokens: int, overlength: Overlength, problems: Problems | None = None
) -> Kept:
    """Treat rows of more than ``max_tokens`` tokens as ``overlength`` says.

    Args:
        whole: rows that could be encoded.
        num_rows: rows that there are.
        max_tokens: the most that a row may have.
        overlength: what happens to longer ones.
        problems: what is wrong with the others.

    Raises:
        DataError: there is a problem, rows are too long, or none is left.
    """
    problems = problems or Problems(f"{num_rows} rows")
    long = whole.lengths > max_tokens
    lines = tuple(whole.lines[long].tolist())
    if lines and overlength != "truncate" and (overlength == "error" or (long.all() and not problems.number)):
        problems.add(
            f"{len(lines)} of {num_rows} rows have more than {max_tokens} tokens (the longest has "
            f"{int(whole.lengths.max())}): {name_lines(lines)}; raise data.max_tokens, or set data.overlength to drop "
            "or truncate"
        )
    problems.raise_any()
    if overlength == "truncate":
        return Kept(whole.cut(max_tokens) if lines else whole, numpy.arange(len(whole)), lines, ())
    numbers = numpy.flatnonzero(~long)
    return Kept(whole.take(numbers) if lines else whole, numbers, (), lines)


def encode_file(
    file: RowFile,
    tokenizer: PreTrainedTokenizerBase,
    data: Data,
    *,
    template: str,
    cache: Path,
    on_progress: OnProgress = silent,
) -> Path:
    """The folder of a file's columns below ``cache``: made if it is not there, continued if it was killed.

    Args:
        file: the rows.
        tokenizer: what encodes them.
        data: says which rows are too long; read only to tell of them beside rows that cannot be encoded.
        template: name of the template.
        cache: where encodings lie by content. Several processes may ask for the same one.
        on_progress: called with rows encoded and in all.

    Raises:
        DataError: the template does not suit the tokenizer, or rows cannot be encoded; they are told together.
        GraftlineError: the disk is full; what is encoded is kept.
    """
    made_of = {"source": str(file.digest), "source_bytes": file.num_bytes, **_encoder(tokenizer, template)}
    folder = cache / of_json([made_of, _code()]).hex[:32]
    if not columns.read_index(folder):
        with _alone(cache):
            if not columns.read_index(folder):
                partial = folder.with_suffix(".part")
                writer = ColumnWriter(partial, _id_type(tokenizer))
                with contextlib.closing(writer):
                    _write(writer, file, tokenizer, data, template, on_progress)
                    writer.finish(made_of)
                shutil.rmtree(folder, ignore_errors=True)
                rename_synced(partial, folder)
                _remove_unused(cache)
    (folder / columns.INDEX).touch()
    return folder


def open_encoded(
    file: RowFile,
    tokenizer: PreTrainedTokenizerBase,
    data: Data,
    *,
    template: str,
    made: Path,
    cache: Path,
    on_progress: OnProgress = silent,
) -> EncodedColumns:
    """The rows of a file, whole, mapped into memory.

    Args:
        file: the rows.
        tokenizer: what encodes them.
        data: as in `encode_file`.
        template: name of the template.
        made: the folder that the stage validate left; taken if it is of this file, template and tokenizer.
        cache: where they are encoded otherwise.
        on_progress: called with rows encoded and in all, where they are.

    Raises:
        DataError: rows cannot be encoded.
    """
    index, wanted = columns.read_index(made), {"source_bytes": file.num_bytes, **_encoder(tokenizer, template)}
    if any(index.get(key) != value for key, value in wanted.items()):
        made = encode_file(file, tokenizer, data, template=template, cache=cache, on_progress=on_progress)
    return open_columns(made)


def fit_declared(whole: EncodedColumns, data: Data) -> Kept:
    """Rows as long as the section ``data`` allows.

    Raises:
        DataError: rows are too long where that is an error, or none is left.
    """
    return fit(whole, len(whole), max_tokens=data.max_tokens, overlength=data.overlength)


def publish(folder: Path, out: Path) -> None:
    """Give an encoding a second name: the files are linked, or copied where the disk is another one."""
    out.mkdir(parents=True, exist_ok=True)
    for path in sorted(folder.iterdir()):
        (out / path.name).unlink(missing_ok=True)
        if path.name != columns.INDEX:
            try:
                os.link(path, out / path.name)
            except OSError:
                shutil.copyfile(path, out / path.name)
    write_text(out / columns.INDEX, (folder / columns.INDEX).read_text(encoding="utf-8"))


def _write(
    writer: ColumnWriter,
    file: RowFile,
    tokenizer: PreTrainedTokenizerBase,
    data: Data,
    template: str,
    on_progress: OnProgress,
) -> None:
    check_template(tokenizer, template)
    num_rows, done = len(file), writer.num_rows
    problems = Problems(f"{num_rows} rows")
    for piece, wrong in _encoded(islice(file, done, None), tokenizer, template):
        for error in wrong:
            problems.add(error)
        writer.append(piece)
        done += len(piece) + len(wrong)
        on_progress(done, num_rows)
        # Behind a row that is wrong nothing is kept: the line numbers of the rest would not be known.
        if not problems.number and writer.num_unkept_rows >= _SHARD_ROWS:
            writer.keep()
    if problems.number:
        fit(writer.columns(), num_rows, max_tokens=data.max_tokens, overlength=data.overlength, problems=problems)


def _encoded(
    rows: Iterable[Row], tokenizer: PreTrainedTokenizerBase, template: str
) -> Iterator[tuple[EncodedColumns, list[DataError]]]:
    """`encode_columns` batch by batch."""
    for batch in batches(rows, most_rows=BATCH_ROWS, most_characters=BATCH_CHARACTERS):
        yield encode_columns(batch, tokenizer, template=template)


def batches(rows: Iterable[Row], *, most_rows: int, most_characters: int) -> Iterator[list[Row]]:
    """Rows in lists of this many, or of fewer if they are long."""
    batch, num_characters = list[Row](), 0
    for row in rows:
        batch.append(row)
        num_characters += sum(len(message.content) for message in row.messages)
        if len(batch) == most_rows or num_characters > most_characters:
            yield batch
            batch, num_characters = [], 0
    if batch:
        yield batch


def _id_type(tokenizer: PreTrainedTokenizerBase) -> numpy.dtype[Any]:
    return id_type(max(tokenizer.get_vocab().values(), default=0))


def _encoder(tokenizer: PreTrainedTokenizerBase, template: str) -> dict[str, str]:
    """What decides the ids of a row, as far as the model's folder does."""
    return {
        "template": str(template_digest(tokenizer, template)),
        "tokenizer": str(_tokenizer_digest(tokenizer)),
    }


def _tokenizer_digest(tokenizer: PreTrainedTokenizerBase) -> Digest:
    if tokenizer.is_fast:
        described = json.loads(tokenizer.backend_tokenizer.to_str())
        # Set by each call, and by none that encodes rows.
        return of_json(described | {"padding": None, "truncation": None})
    added = {str(number): str(token) for number, token in tokenizer.added_tokens_decoder.items()}
    return of_json([type(tokenizer).__name__, tokenizer.get_vocab(), added])


@functools.cache
def _code() -> list[str]:
    """What else decides the ids: the code, to the letter, and the libraries."""
    modules = (chat, columns, records, row_formats, row_text, templates, turns)
    files = [Path(str(module.__file__)) for module in modules]
    libraries = [f"{name} {version(name)}" for name in ("jinja2", "tokenizers", "transformers")]
    return [str(of_file(path)) for path in [*files, Path(__file__)]] + libraries


@contextlib.contextmanager
def _alone(cache: Path) -> Iterator[None]:
    """One process encodes at a time: each takes all cores, and two may want the same."""
    cache.mkdir(parents=True, exist_ok=True)
    with (cache / "lock").open("ab") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def _remove_unused(cache: Path) -> None:
    oldest = time.time() - _KEEP_SECONDS
    for folder in (path for path in cache.iterdir() if path.is_dir()):
        used = folder / columns.INDEX if (folder / columns.INDEX).exists() else folder
        if used.stat().st_mtime < oldest:
            shutil.rmtree(folder, ignore_errors=True)
