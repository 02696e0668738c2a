"""Stage package: one folder with all that a release needs (graftline.workflow.assembling lists its files).

``report.html`` is also made for a candidate that did not pass: the release stage refuses its manifest. What is packed
must be what was scored and judged: each file is hashed here and compared with the digests in the scores.
"""

from graftline.settings import Pipeline
from graftline.workflow import stage
from graftline.workflow.assembling import assemble_package
from graftline.workflow.workspace import Workspace


def run(pipeline: Pipeline, at: Workspace) -> None:
    """Assemble the package and describe it."""
    assemble_package(pipeline, at, out=at.folder("package"))


def main() -> None:
    """Command line."""
    stage.main("package", run, measure=False)


if __name__ == "__main__":
    main()
