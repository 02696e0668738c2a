"""Stage merge: the adapter folded into its base, and proof that the result answers as the judged model did.

Writes ``model/`` and ``parity.json``: every candidate, what was chosen and why. Where no merged model answers the same
in any number type, ``parity.json`` says why and the release holds the adapter alone. Where the pipeline asks for no
merged model, ``parity.json`` says so and nothing is folded.
"""

from graftline.settings import Pipeline
from graftline.workflow import stage
from graftline.workflow.merging import merge_adapter
from graftline.workflow.workspace import Workspace


def run(pipeline: Pipeline, at: Workspace) -> None:
    """Merge, compare with the unmerged model, and keep what the evidence allows."""
    merge_adapter(
        pipeline,
        at,
        rows=at.folder("fetch") / "evaluation.jsonl",
        adapter=at.folder("train") / "adapter",
        out=at.folder("merge"),
    )


def main() -> None:
    """Command line."""
    stage.main("merge", run)


if __name__ == "__main__":
    main()
