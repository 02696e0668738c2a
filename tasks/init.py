"""Stage init: the base as the adapter will be trained on it, quantized as the pipeline says.

Writes ``base/``: a model folder with its error report and, where base and adapter are made together (LoftQ, QPiSSA),
the adapter's first values. Where nothing is quantized the fetched base serves as it is; ``init.json`` says so.
"""

from graftline.settings import Pipeline
from graftline.workflow import stage
from graftline.workflow.calibrating import init_pipeline
from graftline.workflow.workspace import Workspace


def run(pipeline: Pipeline, at: Workspace) -> None:
    """Quantize the base, one tensor at a time."""
    init_pipeline(pipeline, at, out=at.folder("init"))


def main() -> None:
    """Command line."""
    stage.main("init", run)


if __name__ == "__main__":
    main()
