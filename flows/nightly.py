"""Retrain every pipeline, one after another; a pipeline that fails does not stop the others.

1. For each pipeline of pipelines.yaml: the flow `retrain`, as a run of its own. What is up to date costs a second.
2. Write one table: verdict, release, stages that ran, time, and what went wrong.
3. The run fails if a pipeline ended in an error. A gate that says no is a result, not an error.

    python -m flows.nightly
"""

import argparse
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from prefect import flow, get_run_logger
from prefect.artifacts import create_table_artifact

from flows.retrain import Outcome, retrain
from graftline import config
from graftline.errors import GraftlineError


@dataclass(frozen=True)
class Line:
    """How one pipeline's retraining ended; ``problem`` is the first line of its error."""

    pipeline: str
    seconds: float
    outcome: Outcome | None = None
    problem: str = ""

    def as_row(self) -> dict[str, str]:
        """A row of the table."""
        outcome = self.outcome
        return {
            "pipeline": self.pipeline,
            "verdict": outcome.verdict if outcome else "error",
            "release": (outcome.version if outcome else None) or "none",
            "stages run": (", ".join(outcome.stages_run) if outcome else "") or "none",
            "seconds": f"{self.seconds:.0f}",
            "problem": self.problem,
        }


@flow(name="nightly")
def nightly(pipelines: list[str] | None = None, wait_seconds: float = 3600.0) -> list[Line]:
    """Bring the lines of many pipelines up to date.

    Args:
        pipelines: names from pipelines.yaml; all of them when left out.
        wait_seconds: how long each waits for another run that holds it.
    """
    known = config.load(Path.cwd() / config.DEFAULT_FILE).names
    chosen = known if pipelines is None else pipelines
    if unknown := sorted(set(chosen) - set(known)):
        raise GraftlineError(f"{', '.join(unknown)} is not in pipelines.yaml; expected some of {', '.join(known)}")
    lines = [_retrain(name, wait_seconds) for name in chosen]
    create_table_artifact([line.as_row() for line in lines], key="nightly", description="Every pipeline's retraining")
    if failed := [f"{line.pipeline}: {line.problem}" for line in lines if line.problem]:
        raise GraftlineError(f"{len(failed)} of {len(lines)} pipelines failed\n" + "\n".join(failed))
    return lines


def _retrain(pipeline: str, wait_seconds: float) -> Line:
    started = time.monotonic()
    # The state instead of its result: an error of one pipeline must not end the night of the others.
    state = retrain(pipeline, wait_seconds, return_state=True)
    found = state.result(raise_on_failure=False)
    seconds = time.monotonic() - started
    if isinstance(found, Outcome):
        return Line(pipeline, seconds, found)
    problem = (str(found) or type(found).__name__).splitlines()[0]
    get_run_logger().error(f"{pipeline} failed: {problem}")
    return Line(pipeline, seconds, problem=problem)


def _print(lines: Sequence[Line]) -> None:
    for row in (line.as_row() for line in lines):
        print(f"{row['pipeline']:<28} {row['verdict']:<13} {row['release']:<32} {row['stages run']}")


def main() -> None:
    """Command line: exit code 0 all released, 1 a gate stopped some, 2 an error that its message explains."""
    parser = argparse.ArgumentParser(
        description="Retrain every pipeline, one after another.", epilog="example: python -m flows.nightly"
    )
    parser.add_argument("pipelines", nargs="*", help="names from pipelines.yaml (default: all of them)")
    arguments = parser.parse_args()
    try:
        lines = nightly(arguments.pipelines or None)
    except GraftlineError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    _print(lines)
    sys.exit(0 if all(line.outcome and line.outcome.version for line in lines) else 1)


if __name__ == "__main__":
    main()
