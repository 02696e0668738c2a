"""Stage validate: the rows against declared expectations, the template, labels, leakage between the two sides.

Writes ``report.json``, ``data_docs/index.html`` and ``encoded/``, the rows of both sides as token ids, which later
stages map into memory instead of encoding again. A failing check names its rows and stops the line.
"""

from graftline.settings import Pipeline
from graftline.workflow import stage
from graftline.workflow.checking import check_rows
from graftline.workflow.pinned_base import original_base
from graftline.workflow.workspace import Workspace


def run(pipeline: Pipeline, at: Workspace) -> None:
    """Check the rows before anything is spent on them."""
    check_rows(
        pipeline,
        base=original_base(pipeline.base, at),
        rows=at.folder("fetch"),
        root=at.root,
        cache=at.encodings,
        out=at.folder("validate"),
    )


def main() -> None:
    """Command line."""
    stage.main("validate", run)


if __name__ == "__main__":
    main()
