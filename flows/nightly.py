"""Retrain every pipeline whose data or code changed; one that fails does not stop the others.

The longest wait comes first, so the next night continues one that was cut short; what failed last night is tried
again, changed or not. The night is shown on a page and in one event (graftline.workflow.automations). It fails if a
pipeline ended in an error; a gate that says no is a result. A late night gives way to a newer one that is due.

    python -m flows.nightly
"""

import argparse
import sys

from prefect import flow

from flows.retrain import retrain
from graftline.workflow import night, promotion
from graftline.workflow.dispatch import PipelineTurn, print_lines, run_all
from graftline.workflow.process import begin, flow_command


@flow(name="nightly")
def nightly(pipelines: list[str] | None = None, wait_seconds: float = 3600.0, at_once: int = 4) -> list[PipelineTurn]:
    """Bring the lines of many pipelines up to date.

    Args:
        pipelines: names from pipelines.yaml; all of them when left out.
        wait_seconds: how long each waits for another run that holds it.
        at_once: how many pipelines run at the same time, on all workers together; one after another without workers.
    """
    begin()
    if night.newer_is_due():
        return []
    promotion.tell_all()
    tonight = night.plan(pipelines)
    lines = run_all(tonight.changed, retrain=retrain, wait_seconds=wait_seconds, at_once=at_once)
    return night.end(tonight, lines)


def main() -> None:
    """Command line: exit code 0 all released or unchanged, 1 a gate stopped some, 2 an explained error."""
    parser = argparse.ArgumentParser(
        description="Retrain every pipeline whose data or code changed, one after another.",
        epilog="example: python -m flows.nightly",
    )
    parser.add_argument("pipelines", nargs="*", help="names from pipelines.yaml (default: all of them)")
    arguments = parser.parse_args()
    with flow_command():
        lines = nightly(arguments.pipelines or None)
    print_lines(lines)
    sys.exit(0 if all(line.outcome and line.outcome.version for line in lines) else 1)


if __name__ == "__main__":
    main()
