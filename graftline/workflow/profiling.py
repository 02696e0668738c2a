"""The command ``graftline validate --profile``: a Great Expectations suite from the fetched rows, and its page."""

import logging
from itertools import chain

from graftline import settings
from graftline.data.columns import open_columns
from graftline.data.preparation import ENCODED, EVALUATION, TRAINING
from graftline.data.profile import profile
from graftline.data.row_file import RowFile
from graftline.digest import write_json
from graftline.errors import DataError
from graftline.workflow import stage
from graftline.workflow.checking import check_rows
from graftline.workflow.pinned_base import original_base
from graftline.workflow.workspace import Workspace

logger = logging.getLogger("graftline")


def run(pipeline: settings.Pipeline, at: Workspace) -> None:
    """Write the suite to ``data.suite``, or checks/PIPELINE.json, and validate the rows with it.

    Raises:
        DataError: no rows were fetched, or one of the other checks fails.
    """
    name = pipeline.data.suite or f"checks/{at.name}.json"
    fetched, out = at.folder("fetch"), at.folder("validate")
    if not (fetched / TRAINING).is_file():
        raise DataError(f"{fetched / TRAINING} is missing; run `graftline fetch {at.name}` first")
    place = {"base": original_base(pipeline.base, at), "rows": fetched, "root": at.root, "cache": at.encodings}
    before = pipeline.replace(data=pipeline.data.replace(suite=None))
    check_rows(before, **place, out=out)
    sides = [open_columns(out / ENCODED / side) for side in ("training", "evaluation")]
    files = [RowFile(fetched / TRAINING), RowFile(fetched / EVALUATION)]
    suite = profile(
        chain(*files),
        [length for side in sides for length in side.lengths.tolist()],
        [length for side in sides for length in side.count_learned().tolist()],
    )
    (at.root / name).parent.mkdir(parents=True, exist_ok=True)
    write_json(at.root / name, suite)
    check_rows(before.replace(data=before.data.replace(suite=name)), **place, out=out)
    added = "" if pipeline.data.suite else f", add `suite: {name}` to `data`"
    logger.info(
        "%d expectations in %s; read them%s, and commit the file. The page: %s",
        len(suite["expectations"]),
        name,
        added,
        out / "data_docs" / "index.html",
    )


def main() -> None:
    """Command line."""
    stage.main("profiling", run, measure=False, package="graftline.workflow")


if __name__ == "__main__":
    main()
