"""Retrain a pipeline's adapter, gate it, package it and release it. `flows.promote` puts the release into a channel.

Each stage is reproduced through DVC in a separate process; what is up to date is skipped, what moves (new rows, what
production holds now) is looked up first. Where ``release.archive`` names a DVC remote, the package is pushed there.

    python -m flows.retrain wordnet-category
"""

import argparse
import sys

from prefect import flow

from graftline.workflow import line
from graftline.workflow.outcome import Outcome, print_outcome
from graftline.workflow.process import begin, flow_command


@flow(name="retrain", flow_run_name="retrain-{pipeline}")
def retrain(pipeline: str, wait_seconds: float = 0.0) -> Outcome:
    """Bring the pipeline's whole line up to date.

    Args:
        pipeline: a name from pipelines.yaml.
        wait_seconds: how long to wait for another run that holds the pipeline on this machine.
    """
    begin()
    with line.held(pipeline, wait_seconds=wait_seconds) as run:
        run.reproduce("fetch", "validate", "init", "train", "evaluate", "merge", "gate", "package")
        if run.verdict == "pass":
            run.release()
    run.archive()
    return run.outcome


def main() -> None:
    """Command line: exit code 0 released, 1 stopped by a gate, 2 an error that its message explains."""
    parser = argparse.ArgumentParser(
        description=retrain.description, epilog="example: python -m flows.retrain wordnet-category"
    )
    parser.add_argument("pipeline", help="a name from pipelines.yaml")
    parser.add_argument(
        "--wait-seconds", type=float, default=0.0, help="wait for another run in this checkout (default 0)"
    )
    arguments = parser.parse_args()
    with flow_command():
        outcome = retrain(arguments.pipeline, arguments.wait_seconds)
    print_outcome(outcome)
    sys.exit(0 if outcome.version else 1)


if __name__ == "__main__":
    main()
