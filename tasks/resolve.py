"""Before the stages: pin what moves (new rows, what production holds), code and settings, for this run.

Writes ``resolved.json``, whose values dvc.yaml compares. The flows do this at the start of each run.
"""

from graftline.settings import Pipeline
from graftline.workflow import resolve
from graftline.workflow.workspace import Workspace


def run(pipeline: Pipeline, at: Workspace) -> None:
    """Look at what moves, and write it down."""
    resolve.run(pipeline, at)


def main() -> None:
    """Command line."""
    resolve.main()


if __name__ == "__main__":
    main()
