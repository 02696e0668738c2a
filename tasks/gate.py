"""Stage gate: is the candidate good enough? Paired on the same items, with the margins of pipelines.yaml.

It comes after the merge, so that gates may ask about the merged model too. Writes ``verdict.json`` and ``verdict.md``.
A verdict is data: a candidate that fails is no error of this stage, and the release stage refuses it.
"""

from graftline.settings import Pipeline
from graftline.workflow import stage
from graftline.workflow.judging import judge_candidate
from graftline.workflow.workspace import Workspace


def run(pipeline: Pipeline, at: Workspace) -> None:
    """Judge the candidate."""
    judge_candidate(pipeline, at, out=at.folder("gate"))


def main() -> None:
    """Command line."""
    stage.main("gate", run)


if __name__ == "__main__":
    main()
