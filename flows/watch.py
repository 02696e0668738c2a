"""Run on new data: retrain the pipelines whose source has other content than in their last run.

1. Resolve every source that is not pinned by a digest; most servers say by its headers whether it changed.
2. Start the flow `retrain` for each pipeline with new content, once for each content: what fails waits for the night.

    python -m flows.watch
"""

import argparse
from pathlib import Path

from prefect import flow, get_run_logger
from prefect.runtime import deployment

from flows import moving
from flows.command import explained_errors
from flows.dispatch import run_all, start
from graftline import config
from graftline.errors import GraftlineError


@flow(name="watch")
def watch(wait_seconds: float = 3600.0) -> list[str]:
    """Retrain what has new data; the names of those pipelines.

    Args:
        wait_seconds: how long each retraining waits for another run that holds its pipeline.
    """
    root = Path.cwd()
    document = config.load(root / config.DEFAULT_FILE).document
    watched = [name for name, pipeline in document.pipelines.items() if pipeline.data.sha256 is None]
    new, broken = moving.with_new_data(root, watched)
    get_run_logger().info(f"{len(watched)} pipelines have a source that may move; new data: {', '.join(new) or 'none'}")
    if deployment.id is None:
        lines = run_all(list(new), wait_seconds=wait_seconds, at_once=1)
        broken |= {line.pipeline: line.problem for line in lines if line.problem}
    else:
        for name, sources in new.items():
            start(name, wait_seconds=wait_seconds, key=f"{name}-{sources}")
    if broken:
        reasons = "\n".join(f"{name}: {problem}" for name, problem in broken.items())
        raise GraftlineError(f"{len(broken)} of {len(watched)} watched pipelines failed\n{reasons}")
    return list(new)


def main() -> None:
    """Command line: exit code 0 looked and retrained what was new, 2 an error that its message explains."""
    argparse.ArgumentParser(
        description="Retrain the pipelines whose source has new content.", epilog="example: python -m flows.watch"
    ).parse_args()
    with explained_errors():
        new = watch()
    print(f"new data: {', '.join(new) or 'none'}")


if __name__ == "__main__":
    main()
