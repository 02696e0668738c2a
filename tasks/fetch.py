"""Stage fetch: the pinned base as a model folder, the rows split into training and evaluation.

Writes ``base.json`` (digest of the converted base), ``train.jsonl``, ``evaluation.jsonl``, ``general.jsonl`` (text for
the forgetting gate, one document a line; empty where none is declared) and ``data.json`` (digests and counts).
"""

import importlib.util
import json
from collections.abc import Callable, Iterable, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

from graftline.data.rows import Row, read_rows, rows_from_objects, write_rows
from graftline.data.sources import fetch, parse
from graftline.data.split import sample_rows, split_rows
from graftline.digest import of_file, write_json, write_text
from graftline.errors import DataError
from graftline.progress import Reporter
from graftline.weights.identity import read_identity
from graftline.workflow import resolve, stage
from graftline.workflow.base import base_folder
from graftline.workflow.stage import Context


def run(context: Context) -> None:
    """Fetch base and rows, and split the rows."""
    pinned = resolve.load(context)["sources"]
    out = context.folder("fetch")
    base = base_folder(context, pinned["base"]["sha256"])
    digest = read_identity(base).digest
    write_json(out / "base.json", {**pinned["base"], "dtype": context.pipeline.base.dtype, "digest": str(digest)})
    _write_rows(context, pinned["data"]["sha256"], out)
    _write_general_text(context, pinned.get("forgetting"), out)
    names = ("train.jsonl", "evaluation.jsonl", "general.jsonl")
    files = {name: str(of_file(out / name)) for name in names}
    write_json(out / "data.json", {"source": pinned["data"], "files": files})


def _write_rows(context: Context, sha256: str, out: Path) -> None:
    section = context.pipeline.data
    source = _fetch(context, section.source, sha256)
    rows = _read(context, source)
    if section.max_rows:
        rows = sample_rows(rows, section.max_rows, seed=section.seed)
    split = split_rows(rows, section.evaluation_rows, seed=section.seed, on_progress=Reporter("split", "rows"))
    write_rows(out / "train.jsonl", split.training)
    write_rows(out / "evaluation.jsonl", split.evaluation)
    stage.logger.info("%d rows to train on, %d to evaluate with", len(split.training), len(split.evaluation))


def _read(context: Context, source: Path) -> list[Row]:
    section = context.pipeline.data
    if section.prepare is None:
        return read_rows(source, format=section.format)
    make: Callable[[Path], Iterable[Mapping[str, Any]]] = load_function(context.root / section.prepare, "rows")
    return rows_from_objects(make(source), origin=section.prepare, format=section.format)


def _write_general_text(context: Context, pinned: dict[str, Any] | None, out: Path) -> None:
    section = context.pipeline.evaluate.forgetting
    texts: list[str] = []
    if section and pinned:
        source = _fetch(context, section.source, pinned["sha256"])
        documents = (
            load_function(context.root / section.prepare, "documents")(source)
            if section.prepare
            else source.read_text(encoding="utf-8").splitlines()
        )
        texts = list(islice(documents, section.max_documents))
    write_text(out / "general.jsonl", "".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts))


def _fetch(context: Context, address: str, sha256: str) -> Path:
    progress = Reporter("fetch data", "bytes")
    return fetch(parse(address), sha256=sha256, cache=context.cache, root=context.root, on_progress=progress)


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


def main() -> None:
    """Command line."""
    stage.main("fetch", run)


if __name__ == "__main__":
    main()
