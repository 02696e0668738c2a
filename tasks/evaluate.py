"""Stage evaluate: every held-out item scored for the candidate, for the base and for what production holds.

Writes ``scores/{candidate,base,production,...}.jsonl`` (one line an item; no production at first; one file for each of
``evaluate.references``) and ``metrics.json``: a summary of each, confusion and calibration included.
"""

from graftline.settings import Pipeline
from graftline.workflow import stage
from graftline.workflow.scoring import score_models
from graftline.workflow.workspace import Workspace


def run(pipeline: Pipeline, at: Workspace) -> None:
    """Score candidate, base, production and further references on the same items."""
    score_models(pipeline, at, rows=at.folder("fetch"), out=at.folder("evaluate"))


def main() -> None:
    """Command line."""
    stage.main("evaluate", run)


if __name__ == "__main__":
    main()
