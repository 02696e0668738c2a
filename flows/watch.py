"""Run on new data: retrain the pipelines whose source has other content than in their last run, or that drift.

1. Resolve every source that is not pinned by a digest; most servers say by its headers whether it changed.
2. Compare logged prompts with the training rows of what production holds, where `request_log.drift` says so.
3. Start the flow `retrain` for each pipeline with new content, once for each time that it is new: what fails waits for
   the night, and rows that come back after others are new again.

    python -m flows.watch
"""

import argparse

from prefect import flow

from flows.retrain import retrain
from graftline.workflow import watching
from graftline.workflow.process import begin, flow_command


@flow(name="watch")
def watch(wait_seconds: float = 3600.0) -> list[str]:
    """Retrain what has new data; the names of those pipelines.

    Args:
        wait_seconds: how long each retraining waits for another run that holds its pipeline.
    """
    begin()
    new, broken = watching.find_new()
    return watching.run_new(new, broken, retrain=retrain, wait_seconds=wait_seconds)


def main() -> None:
    """Command line: exit code 0 looked and retrained what was new, 2 an error that its message explains."""
    argparse.ArgumentParser(
        description="Retrain the pipelines whose source has new content.", epilog="example: python -m flows.watch"
    ).parse_args()
    with flow_command():
        new = watch()
    print(f"new data: {', '.join(new) or 'none'}")


if __name__ == "__main__":
    main()
