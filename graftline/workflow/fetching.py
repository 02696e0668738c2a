"""The fetch stage: the pinned base, the rows and the general text, prepared for the other stages."""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from graftline import settings
from graftline.address import mask_secrets
from graftline.data.mixing import FetchedSource, Span, column_values
from graftline.data.preparation import (
    CLUSTERS,
    EVALUATION,
    GENERAL,
    RESERVE,
    SLICES,
    TRAINING,
    Prepared,
    prepare_general_text,
    prepare_rows,
)
from graftline.data.rows import Row, as_line
from graftline.data.split import calibration_rows
from graftline.digest import of_file, of_stream, write_json
from graftline.errors import DataError
from graftline.evaluate.scores import item_id
from graftline.weights.identity import read_identity
from graftline.workflow import resolve
from graftline.workflow.pinned_base import base_folder
from graftline.workflow.pinned_sources import Versions, fetch_one, fetch_rows
from graftline.workflow.workspace import Workspace

logger = logging.getLogger("graftline")


def fetch_inputs(pipeline: settings.Pipeline, at: Workspace, *, out: Path) -> None:
    """Fetch base and rows as pinned for this run, and split the rows.

    Raises:
        SourceError: a source is missing, or differs from the pinned digest.
        DataError: the rows cannot be read or split.
    """
    resolved, data, forgetting = resolve.load(at), pipeline.data, pipeline.evaluate.forgetting
    pinned, versions = resolved["sources"], resolved.get("versions", {})
    digest = read_identity(base_folder(pipeline.base, pinned["base"]["sha256"], at)).digest
    base = {**pinned["base"], "dtype": pipeline.base.dtype, "digest": str(digest)}
    frozen = None
    if data.evaluation:
        address = data.evaluation.source
        path = fetch_one(address, pinned["evaluation"]["sha256"], versions, at)
        frozen = FetchedSource(data.evaluation, ((pinned["evaluation"]["source"], path),))
    sources = fetch_rows(data, pinned["data"], versions, at)
    prepared = prepare_rows(data, sources, frozen, root=at.root, out=out)
    split = prepared.split
    read = [*sources, frozen] if frozen else sources
    _write_columns(data, read, prepared.spans, split.evaluation, at.root, out)
    if split.reserve:
        _write_columns(data, read, prepared.spans, split.reserve, at.root, out / RESERVE)
    logger.info("%d rows to train on, %d to evaluate with", len(split.training), len(split.evaluation))
    if split.reserve:
        logger.info("%d rows are kept back for promotions", len(split.reserve))
    for told in _sources(prepared, data) if data.sources else ():
        logger.info("%s: %d of %d rows used", told["source"], told["used"], told["rows"])
    for name, pairs in prepared.dropped.items():
        logger.warning(
            "data.%s: %d rows were left out; data.json and the validation's report list them", name, len(pairs)
        )
    pinned_text = pinned.get("forgetting")
    general = fetch_one(forgetting.source, pinned_text["sha256"], versions, at) if forgetting and pinned_text else None
    prepare_general_text(forgetting, general, root=at.root, out=out)
    # The stage init depends on this file alone: where it is calibrated on training rows, it runs again with others.
    write_json(out / "base.json", base | _calibration(pipeline, split.training))
    kept_back = (f"{RESERVE}/{EVALUATION}",) if split.reserve else ()
    files = {name: str(of_file(out / name)) for name in (TRAINING, EVALUATION, GENERAL, *kept_back)}
    write_json(
        out / "data.json", {"source": pinned["data"], "files": files} | _details(prepared, data, pinned, versions)
    )


def _write_columns(
    data: settings.Data,
    read: Sequence[FetchedSource],
    spans: Sequence[Span],
    rows: Sequence[Row],
    root: Path,
    out: Path,
) -> None:
    """Write which of the rows that are set aside belong together, and which slices they are in."""
    ids = [item_id(row) for row in rows] if data.cluster or data.slices else []
    if data.cluster:
        values = column_values([data.cluster], read, spans, rows, root)[data.cluster]
        write_json(out / CLUSTERS, dict(zip(ids, values, strict=True)))
    if not data.slices:
        return
    found = dict[str, dict[str, str]]()
    for column, values in column_values(data.slices, read, spans, rows, root, for_slices=True).items():
        found[column] = {one: value for one, value in zip(ids, values, strict=True) if value}
        if not found[column]:
            raise DataError(
                f"data.slices names {column!r}, which no evaluation row has; check its name, or that data.prepare "
                "gives it"
            )
    write_json(out / SLICES, found)


def _calibration(pipeline: settings.Pipeline, training: Sequence[Row]) -> dict[str, str]:
    if pipeline.quantize.weighting == "none":
        return {}
    rows = calibration_rows(training, held_out_rows=pipeline.train.held_out_rows, seed=pipeline.data.seed)
    return {"calibration_rows": str(of_stream(map(as_line, rows)))}


def _details(prepared: Prepared, data: settings.Data, pinned: Mapping[str, Any], versions: Versions) -> dict[str, Any]:
    """What else the record of the rows says; of one file, which has a plain record, only what was left out."""
    details: dict[str, Any] = {"dropped": prepared.dropped, "near": prepared.split.near}
    if len(prepared.spans) > 1:
        details["files_of_lines"] = [vars(span) for span in prepared.spans]
    if data.sources:
        details["rows_of_sources"] = _sources(prepared, data)
    if "evaluation" in pinned:
        details["evaluation"] = pinned["evaluation"]
    return details | ({"versions": versions} if versions else {})


def _sources(prepared: Prepared, data: settings.Data) -> list[dict[str, Any]]:
    """Each source with the rows that it has and those that are used."""
    spans = [[span for span in prepared.spans if span.source == at] for at in range(len(data.sources))]
    return [
        {
            "source": mask_secrets(each.source),
            "share": each.share,
            "rows": sum(span.last - span.first + 1 for span in own),
            "used": used,
        }
        for each, own, used in zip(data.sources, spans, prepared.used, strict=True)
    ]
