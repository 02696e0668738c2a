"""Stage fetch: the pinned base as a model folder, the rows split into training and evaluation.

Writes ``base.json`` (digest of the converted base), ``train.jsonl``, ``evaluation.jsonl``, ``general.jsonl`` (text for
the forgetting gate, one document a line; empty where none is declared) and ``data.json`` (digests and counts).
"""

from graftline.settings import Pipeline
from graftline.workflow import stage
from graftline.workflow.fetching import fetch_inputs
from graftline.workflow.workspace import Workspace


def run(pipeline: Pipeline, at: Workspace) -> None:
    """Fetch base and rows, and split the rows."""
    fetch_inputs(pipeline, at, out=at.folder("fetch"))


def main() -> None:
    """Command line."""
    stage.main("fetch", run)


if __name__ == "__main__":
    main()
