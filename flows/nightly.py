"""Retrain every pipeline whose data or code changed; one that fails does not stop the others.

1. Pin what moves, and leave out what is made of the same inputs as last time. Who waited longest comes first, so a
   night that is cut short goes on where it stopped; what failed last night is tried again, changed or not.
2. Retrain the others with the flow `retrain`, each as a run of its own.
3. Write a summary page and one event that an automation can send on (graftline.workflow.automations).
4. The run fails if a pipeline ended in an error. A gate that says no is a result, not an error.

Nights that were missed are not made up for one by one: a late run gives way to a newer one that is due.

    python -m flows.nightly
"""

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path

from prefect import flow, get_run_logger
from prefect.artifacts import create_markdown_artifact, create_table_artifact
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import (
    DeploymentFilter,
    DeploymentFilterId,
    FlowRunFilter,
    FlowRunFilterExpectedStartTime,
    FlowRunFilterState,
    FlowRunFilterStateType,
)
from prefect.client.schemas.objects import StateType
from prefect.events import emit_event
from prefect.runtime import deployment, flow_run

from flows.retrain import retrain
from graftline import settings
from graftline.digest import write_text
from graftline.errors import GraftlineError
from graftline.words import count
from graftline.workflow import moving, night_page, shelf, trouble
from graftline.workflow.command import explained_errors
from graftline.workflow.dispatch import Line, run_all
from graftline.workflow.outcome import NIGHT_FINISHED


@flow(name="nightly")
def nightly(pipelines: list[str] | None = None, wait_seconds: float = 3600.0, at_once: int = 4) -> list[Line]:
    """Bring the lines of many pipelines up to date.

    Args:
        pipelines: names from pipelines.yaml; all of them when left out.
        wait_seconds: how long each waits for another run that holds it.
        at_once: how many pipelines run at the same time, on all workers together; one after another without workers.
    """
    if _newer_night_is_due():
        get_run_logger().warning("nothing done: this night is late and a newer one is due, which does the same work")
        return []
    started = time.monotonic()
    root = Path.cwd()
    chosen = _in_order(root, _choose(root, pipelines))
    changed, unchanged, broken = _sort(root, chosen)
    problems = [Line(name, 0.0, problem=problem) for name, problem in broken.items()]
    lines = problems + run_all(changed, retrain=retrain, wait_seconds=wait_seconds, at_once=at_once)
    failed = [f"{line.pipeline}: {line.problem}" for line in lines if line.problem]
    hidden = _show(root, lines, unchanged, time.monotonic() - started)
    if failed:
        raise GraftlineError(
            f"{len(failed)} of {count(len(chosen), 'pipeline')} failed\n" + "\n".join([*failed, *hidden])
        )
    if hidden:
        raise GraftlineError("the night is over and could not be shown everywhere\n" + "\n".join(hidden))
    return lines


def _choose(root: Path, pipelines: Sequence[str] | None) -> list[str]:
    known = settings.load(root / settings.DEFAULT_FILE).names
    chosen = known if pipelines is None else pipelines
    if unknown := sorted(set(chosen) - set(known)):
        raise GraftlineError(f"{', '.join(unknown)} is not in pipelines.yaml; expected some of {', '.join(known)}")
    return list(chosen)


def _sort(root: Path, pipelines: list[str]) -> tuple[list[str], list[str], dict[str, str]]:
    """`moving.sort`; if that fails as a whole, every pipeline has its turn, and its own error there."""
    try:
        return moving.sort(root, pipelines)
    except Exception as error:  # noqa: BLE001
        get_run_logger().warning(f"every pipeline has its turn: what changed is unknown: {trouble.in_one_line(error)}")
        return pipelines, [], {}


def _in_order(root: Path, pipelines: Sequence[str]) -> list[str]:
    """Who never had a whole run first, then who waited longest."""

    def finished(name: str) -> str:
        try:
            last = shelf.last(root, name)
        except Exception:  # noqa: BLE001  # A record that cannot be read is none; it must not end the night of all.
            last = None
        return str(last.finished) if last else ""

    return sorted(pipelines, key=finished)


def _newer_night_is_due() -> bool:
    """Whether another run of this deployment, scheduled later than this one, should have started already."""
    if deployment.id is None:
        return False
    now = datetime.now(UTC)
    with get_client(sync_client=True) as client:
        due = client.read_flow_runs(
            deployment_filter=DeploymentFilter(id=DeploymentFilterId(any_=[deployment.id])),
            flow_run_filter=FlowRunFilter(
                state=FlowRunFilterState(type=FlowRunFilterStateType(any_=[StateType.SCHEDULED, StateType.PENDING])),
                expected_start_time=FlowRunFilterExpectedStartTime(before_=now),  # type: ignore[arg-type]  # any datetime
            ),
        )
    mine = flow_run.scheduled_start_time
    return any(run.expected_start_time and run.expected_start_time > mine for run in due)


def _show(root: Path, lines: Sequence[Line], unchanged: Sequence[str], seconds: float) -> list[str]:
    """Show the night in every place, whatever became of the others; what is wrong with those that failed."""
    page = night_page.render(lines, unchanged, seconds)
    places: dict[str, Callable[[], object]] = {
        "runs/night.md": lambda: write_text(root / "runs" / "night.md", page),
        "artifact night": lambda: create_markdown_artifact(page, key="night", description="Summary of the night"),
        "artifact nightly": lambda: create_table_artifact(
            [line.as_row() for line in lines], key="nightly", description="Every pipeline's retraining"
        ),
        "event": lambda: emit_event(
            event=NIGHT_FINISHED,
            resource={"prefect.resource.id": "graftline.night"},
            related=[{"prefect.resource.id": f"prefect.flow-run.{flow_run.id}", "prefect.resource.role": "flow-run"}],
            payload=night_page.counts(lines, unchanged),
        ),
    }
    hidden = []
    for place, show in places.items():
        try:
            show()
        except Exception as error:  # noqa: BLE001
            hidden.append(f"{place}: {trouble.in_one_line(error)}")
    return hidden


def _print(lines: Sequence[Line]) -> None:
    for row in (line.as_row() for line in lines):
        print(f"{row['pipeline']:<28} {row['verdict']:<13} {row['release']:<32} {row['stages run']}")


def main() -> None:
    """Command line: exit code 0 all released or unchanged, 1 a gate stopped some, 2 an explained error."""
    parser = argparse.ArgumentParser(
        description="Retrain every pipeline whose data or code changed, one after another.",
        epilog="example: python -m flows.nightly",
    )
    parser.add_argument("pipelines", nargs="*", help="names from pipelines.yaml (default: all of them)")
    arguments = parser.parse_args()
    with explained_errors():
        lines = nightly(arguments.pipelines or None)
    _print(lines)
    sys.exit(0 if all(line.outcome and line.outcome.version for line in lines) else 1)


if __name__ == "__main__":
    main()
