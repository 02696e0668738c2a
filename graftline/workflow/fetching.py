"""What a line starts from: the pinned base, the rows and the general text, fetched and written for the stages."""

import logging
from pathlib import Path

from graftline import settings
from graftline.data.preparation import (
    CLUSTERS,
    EVALUATION,
    GENERAL,
    TRAINING,
    cluster_values,
    prepare_general_text,
    prepare_rows,
)
from graftline.data.sources import fetch, parse
from graftline.digest import of_file, write_json
from graftline.evaluate.items import item_id
from graftline.logs import Reporter
from graftline.weights.identity import read_identity
from graftline.workflow import resolve
from graftline.workflow.pinned_base import base_folder
from graftline.workflow.workspace import Workspace

logger = logging.getLogger("graftline")


def fetch_inputs(pipeline: settings.Pipeline, at: Workspace, *, out: Path) -> None:
    """Fetch base and rows as they were pinned for this run, and split the rows.

    Raises:
        SourceError: a source is not there, or has another digest than was pinned.
        DataError: the rows cannot be read or split.
    """
    pinned, data, forgetting = resolve.load(at)["sources"], pipeline.data, pipeline.evaluate.forgetting
    digest = read_identity(base_folder(pipeline.base, pinned["base"]["sha256"], at)).digest
    write_json(out / "base.json", {**pinned["base"], "dtype": pipeline.base.dtype, "digest": str(digest)})
    source = _fetch(data.source, pinned["data"]["sha256"], at)
    prepared = prepare_rows(data, source, root=at.root, out=out)
    split = prepared.split
    if data.cluster:
        values = cluster_values(data, source, split.evaluation, root=at.root)
        ids = map(item_id, split.evaluation)
        write_json(out / CLUSTERS, dict(zip(ids, values, strict=True)))
    logger.info("%d rows to train on, %d to evaluate with", len(split.training), len(split.evaluation))
    for name, pairs in prepared.dropped.items():
        logger.warning(
            "data.%s: %d rows were left out; data.json and the validation's report list them", name, len(pairs)
        )
    pinned_text = pinned.get("forgetting")
    general = _fetch(forgetting.source, pinned_text["sha256"], at) if forgetting and pinned_text else None
    prepare_general_text(forgetting, general, root=at.root, out=out)
    files = {name: str(of_file(out / name)) for name in (TRAINING, EVALUATION, GENERAL)}
    screened = {"dropped": prepared.dropped, "near": split.near}
    write_json(out / "data.json", {"source": pinned["data"], "files": files, **screened})


def _fetch(address: str, sha256: str, at: Workspace) -> Path:
    progress = Reporter("fetch data", "bytes")
    return fetch(parse(address), sha256=sha256, cache=at.cache, root=at.root, on_progress=progress)
