"""Stage train: the adapter, trained on the supervised tokens of the training rows.

Writes ``adapter/`` (PEFT's files and ``graftline.json``), ``history.json`` (loss by step, and on the rows held out
where it was looked at), ``metrics.json``, ``memory.json`` (planned and measured by part) and ``stage.json``.
Checkpoints lie outside the stage's outputs, under ``runs/<pipeline>/.work/train-<digest of inputs>``: DVC empties a
stage's outputs before it runs it, and a killed training must resume where it was. Trackers write under
``runs/<pipeline>/trackers``.
"""

from graftline.settings import Pipeline
from graftline.workflow import stage
from graftline.workflow.training import train_pipeline
from graftline.workflow.workspace import Workspace


def run(pipeline: Pipeline, at: Workspace) -> None:
    """Train the adapter, or resume a killed training; with several processes, start them."""
    train_pipeline(
        pipeline,
        at,
        rows=at.folder("fetch") / "train.jsonl",
        encoded=at.folder("validate") / "encoded" / "training",
        out=at.folder("train"),
    )


def main() -> None:
    """Command line."""
    stage.main("train", run)


if __name__ == "__main__":
    main()
