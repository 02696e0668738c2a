"""Rows and documents from a Python file of the project: ``data.prepare``, ``evaluate.forgetting.prepare``.

The file runs as if started from its own folder: dataclasses work, it may import neighbouring files (``import helpers``
or ``from .helpers import clean``), and it may return a pandas or pyarrow table instead of an iterable.
"""

import contextlib
import dataclasses
import importlib.util
import sys
import traceback
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy
import pandas
import pyarrow

from graftline.data.records import without_nulls
from graftline.errors import DataError, GraftlineError

_PACKAGE = "graftline_prepare"
_MOST_BITS = 14_000
"""Of a whole number: Python writes none of more than 4,300 digits."""
_TABLES = (pandas.DataFrame, pyarrow.Table, pyarrow.RecordBatch, pyarrow.RecordBatchReader)


def made_by(script: Path, name: str, source: Path) -> Iterator[Any]:
    """Yield what function ``name`` of ``script`` returns for ``source``, one by one; table rows as dicts.

    Raises:
        DataError: the file cannot be imported, has no such function, fails (the line is named), or returns no rows.
    """
    number = 0
    with _imported(script) as module:
        function = getattr(module, name, None)
        if not callable(function):
            raise DataError(f"{script} has no function {name}(source: Path); write one that yields the rows")
        try:
            for value in _each(function(source), f"{script}: {name}()"):
                number += 1
                yield value
        except GraftlineError:
            raise
        except (Exception, SystemExit) as error:
            raise DataError(
                f"{script}{_line(error, script)}: {name}() failed after {number} rows: {_named(error)}"
            ) from error


def call(script: Path, name: str, *arguments: Any) -> list[Any]:
    """What function ``name`` of ``script`` returns, as a list of plain values.

    Raises:
        DataError: as in `made_by`.
    """
    with _imported(script) as module:
        function = getattr(module, name, None)
        if not callable(function):
            raise DataError(f"{script} has no function {name}(); write one")
        try:
            return list(_each(function(*arguments), f"{script}: {name}()"))
        except GraftlineError:
            raise
        except (Exception, SystemExit) as error:
            raise DataError(f"{script}{_line(error, script)}: {name}() failed: {_named(error)}") from error


def documents_of(script: Path, source: Path) -> Iterator[str]:
    """The texts that ``documents(source)`` of ``script`` yields.

    Raises:
        DataError: as in `made_by`, or a document is not text.
    """
    for number, document in enumerate(made_by(script, "documents", source), start=1):
        if not isinstance(document, str):
            raise DataError(f"{script}: document {number} is {type(document).__name__}; expected text")
        yield document


@contextlib.contextmanager
def _imported(script: Path) -> Iterator[ModuleType]:
    """Import the file as a module in a package for its folder; on exit, unload it and its imports from there.

    Two scripts may each have a different ``helpers`` in their folder.
    """
    folder, before = script.resolve().parent, set(sys.modules)
    package = ModuleType(_PACKAGE)
    package.__path__ = [str(folder)]
    name = f"{_PACKAGE}.{script.stem}"
    spec = importlib.util.spec_from_file_location(name, script)
    if spec is None or spec.loader is None:
        raise DataError(f"{script} is not a Python file that can be imported")
    module = importlib.util.module_from_spec(spec)
    sys.modules |= {_PACKAGE: package, name: module}
    sys.path.insert(0, str(folder))
    try:
        try:
            spec.loader.exec_module(module)
        except (Exception, SystemExit) as error:
            raise DataError(f"{script}{_line(error, script)} cannot be imported: {_named(error)}") from error
        yield module
    finally:
        with contextlib.suppress(ValueError):  # the script may have removed it
            sys.path.remove(str(folder))
        for added in set(sys.modules) - before:
            if added.startswith(_PACKAGE) or _lies_in(sys.modules[added], folder):
                del sys.modules[added]


def _lies_in(module: ModuleType, folder: Path) -> bool:
    file = getattr(module, "__file__", None)
    return file is not None and Path(file).is_relative_to(folder)


def _each(made: Any, who: str) -> Iterator[Any]:
    if isinstance(made, _TABLES):
        yield from _table(made, who)
        return
    if made is None or isinstance(made, str | bytes | Mapping) or not isinstance(made, Iterable):
        raise DataError(f"{who} returned {type(made).__name__}; expected an iterable of rows, or a table")
    for value in made:
        if isinstance(value, _TABLES):
            yield from _table(value, who)
        else:
            yield _plain(value)


def _table(table: Any, who: str) -> Iterator[Any]:
    """Rows of a table; missing values are left out of the row."""
    if isinstance(table, pandas.DataFrame):
        if not table.columns.is_unique:
            twice = sorted({str(name) for name in table.columns[table.columns.duplicated()]})
            raise DataError(f"{who} returned a table that has {', '.join(twice)} more than once; name each column once")
        for row in table.to_dict("records"):
            plain = {str(key): _plain(value) for key, value in row.items()}
            yield {key: value for key, value in plain.items() if not _is_missing(value)}
        return
    for batch in [table] if isinstance(table, pyarrow.RecordBatch) else _batches(table):
        yield from map(without_nulls, batch.to_pylist())


def _batches(table: Any) -> Iterable[pyarrow.RecordBatch]:
    return table.to_batches() if isinstance(table, pyarrow.Table) else table


def _is_missing(value: Any) -> bool:
    return not isinstance(value, dict | list | str) and bool(pandas.isna(value))


def _plain(value: Any) -> Any:
    """Convert dataclasses, named tuples, tuples and numpy values to JSON types."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return _plain(dataclasses.asdict(value))
    if isinstance(value, numpy.generic):
        return value.item()
    if isinstance(value, tuple) and hasattr(value, "_asdict"):
        return _plain(value._asdict())
    if isinstance(value, int) and abs(value).bit_length() > _MOST_BITS:
        raise ValueError(f"a number of {value.bit_length()} bits, which JSON files cannot hold; write it as text")
    if isinstance(value, Mapping):
        return {key: _plain(one) for key, one in value.items()}
    if isinstance(value, numpy.ndarray):
        return [_plain(one) for one in value.tolist()]
    return [_plain(one) for one in value] if isinstance(value, list | tuple) else value


def _named(error: BaseException) -> str:
    try:
        return f"{type(error).__name__}: {error}"
    except Exception as another:  # noqa: BLE001  # an exception of the project's own may fail to tell what it is
        return f"{type(error).__name__}, whose text cannot be made: {type(another).__name__}"


def _line(error: BaseException, script: Path) -> str:
    """``, line 12``: the last line of the script in the error's traceback, if any."""
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if Path(frame.filename) == script]
    return f", line {lines[-1]}" if lines else ""
