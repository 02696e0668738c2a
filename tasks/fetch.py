"""Stage fetch: the pinned base as a model folder, the rows split into training and evaluation.

Writes ``base.json`` (digest of the converted base), ``train.jsonl``, ``evaluation.jsonl``, ``general.jsonl`` (text for
the forgetting gate, one document a line; empty where none is declared) and ``data.json``: digests, ``dropped`` (what
was left out, by the setting that says so, as pairs of source lines: the row's and that of the earlier row) and ``near``
(training rows nearly the same as an earlier one, likewise).
"""

import json
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from graftline.data.rows import Row, read_rows, rows_from_objects, write_rows
from graftline.data.screening import screen, with_repeats
from graftline.data.scripts import documents_of, made_by
from graftline.data.sources import fetch, parse
from graftline.data.split import sample_rows, split_rows
from graftline.digest import of_file, write_json, write_text
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
    screened = _write_rows(context, pinned["data"]["sha256"], out)
    _write_general_text(context, pinned.get("forgetting"), out)
    names = ("train.jsonl", "evaluation.jsonl", "general.jsonl")
    files = {name: str(of_file(out / name)) for name in names}
    write_json(out / "data.json", {"source": pinned["data"], "files": files, **screened})


def _write_rows(context: Context, sha256: str, out: Path) -> dict[str, Any]:
    """Write both sides; returns what was left out and what is nearly the same."""
    section = context.pipeline.data
    source = _fetch(context, section.source, sha256)
    screened = screen(
        _read(context, source),
        duplicates=section.duplicates,
        contradictions=section.contradictions or ("keep" if section.labels is None else "error"),
        near_duplicates=section.near_duplicates,
        on_progress=Reporter("compare", "rows"),
    )
    rows: Sequence[Row] = screened.rows
    if section.max_rows:
        rows = sample_rows(rows, section.max_rows, seed=section.seed)
    split = split_rows(rows, section.evaluation_rows, seed=section.seed, on_progress=Reporter("split", "rows"))
    split, evaluated = with_repeats(split, screened.repeats)
    dropped = screened.dropped | ({"duplicates": evaluated} if evaluated else {})
    write_rows(out / "train.jsonl", split.training)
    write_rows(out / "evaluation.jsonl", split.evaluation)
    stage.logger.info("%d rows to train on, %d to evaluate with", len(split.training), len(split.evaluation))
    for name, pairs in dropped.items():
        stage.logger.warning(
            "data.%s: %d rows were left out; data.json and the validation's report list them", name, len(pairs)
        )
    return {"dropped": dropped, "near": split.near}


def _read(context: Context, source: Path) -> list[Row]:
    section = context.pipeline.data
    if section.prepare is None:
        return read_rows(source, format=section.format)
    objects = made_by(context.root / section.prepare, "rows", source)
    return rows_from_objects(objects, origin=section.prepare, format=section.format)


def _write_general_text(context: Context, pinned: dict[str, Any] | None, out: Path) -> None:
    section = context.pipeline.evaluate.forgetting
    texts: list[str] = []
    if section and pinned:
        source = _fetch(context, section.source, pinned["sha256"])
        documents = (
            documents_of(context.root / section.prepare, source)
            if section.prepare
            else source.read_text(encoding="utf-8").splitlines()
        )
        texts = list(islice(documents, section.max_documents))
    write_text(out / "general.jsonl", "".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts))


def _fetch(context: Context, address: str, sha256: str) -> Path:
    progress = Reporter("fetch data", "bytes")
    return fetch(parse(address), sha256=sha256, cache=context.cache, root=context.root, on_progress=progress)


def main() -> None:
    """Command line."""
    stage.main("fetch", run)


if __name__ == "__main__":
    main()
