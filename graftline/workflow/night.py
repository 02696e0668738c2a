"""A nightly run: which pipelines are retrained and in which order, and how it ended."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from prefect import get_run_logger
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

from graftline import settings
from graftline.digest import write_text
from graftline.errors import GraftlineError
from graftline.plain_text import count
from graftline.workflow import inputs, outcome, pages, shelf
from graftline.workflow.dispatch import PipelineTurn
from graftline.workflow.outcome import NIGHT_FINISHED


@dataclass(frozen=True)
class Night:
    """The work of one night."""

    root: Path
    started: float
    """By the monotonic clock."""
    changed: list[str]
    """Pipelines to retrain, the longest wait first."""
    unchanged: list[str]
    broken: dict[str, str]
    """Problems by pipeline whose inputs cannot be resolved."""


def newer_is_due() -> bool:
    """Whether a later scheduled run of this deployment should have started already."""
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
    is_due = any(run.expected_start_time and run.expected_start_time > mine for run in due)
    if is_due:
        get_run_logger().warning("nothing done: this night is late and a newer one is due, which does the same work")
    return is_due


def plan(pipelines: Sequence[str] | None) -> Night:
    """Find out which of these pipelines, or of all, changed since their last complete run.

    Raises:
        GraftlineError: a name is not in pipelines.yaml.
    """
    started, root = time.monotonic(), Path.cwd()
    known = settings.load(root / settings.DEFAULT_FILE).names
    chosen = known if pipelines is None else pipelines
    if unknown := sorted(set(chosen) - set(known)):
        raise GraftlineError(f"{', '.join(unknown)} is not in pipelines.yaml; expected some of {', '.join(known)}")
    return Night(root, started, *_sort(root, in_order(root, chosen)))


def in_order(root: Path, pipelines: Sequence[str]) -> list[str]:
    """Pipelines without a complete run first, then by the age of the last one."""

    def finished(name: str) -> str:
        try:
            last = shelf.last_run(root, name)
        except Exception:  # noqa: BLE001  # an unreadable record must not end the night of all
            last = None
        return str(last.finished) if last else ""

    return sorted(pipelines, key=finished)


def _sort(root: Path, pipelines: list[str]) -> tuple[list[str], list[str], dict[str, str]]:
    """`inputs.sort_by_news`; if it fails, every pipeline is run, and reports its own error."""
    try:
        return inputs.sort_by_news(root, pipelines)
    except Exception as error:  # noqa: BLE001
        get_run_logger().warning(
            f"all pipelines are run, because what changed is unknown: {outcome.error_in_one_line(error)}"
        )
        return pipelines, [], {}


def end(night: Night, lines: Sequence[PipelineTurn]) -> list[PipelineTurn]:
    """Show how a night ended: ``lines`` for its changed pipelines, and its broken ones.

    Raises:
        GraftlineError: a pipeline failed, or the night could not be shown everywhere.
    """
    lines = [*(PipelineTurn(name, 0.0, problem=problem) for name, problem in night.broken.items()), *lines]
    failed = [f"{line.pipeline}: {line.problem}" for line in lines if line.problem]
    hidden = _show(night, lines)
    if failed:
        all_of_them = count(len(lines) + len(night.unchanged), "pipeline")
        raise GraftlineError(f"{len(failed)} of {all_of_them} failed\n" + "\n".join([*failed, *hidden]))
    if hidden:
        raise GraftlineError("the night is over and could not be shown everywhere\n" + "\n".join(hidden))
    return lines


def _show(night: Night, lines: Sequence[PipelineTurn]) -> list[str]:
    """Show the night in every place; returns the problems of places that failed."""
    page = pages.render_night(lines, night.unchanged, time.monotonic() - night.started)
    places: dict[str, Callable[[], object]] = {
        "runs/night.md": lambda: write_text(night.root / "runs" / "night.md", page),
        "artifact night": lambda: create_markdown_artifact(page, key="night", description="Summary of the night"),
        "artifact nightly": lambda: create_table_artifact(
            [line.as_row() for line in lines], key="nightly", description="Every pipeline's retraining"
        ),
        "event": lambda: emit_event(
            event=NIGHT_FINISHED,
            resource={"prefect.resource.id": "graftline.night"},
            related=[{"prefect.resource.id": f"prefect.flow-run.{flow_run.id}", "prefect.resource.role": "flow-run"}],
            payload=pages.count_night(lines, night.unchanged),
        ),
    }
    hidden = []
    for place, show in places.items():
        try:
            show()
        except Exception as error:  # noqa: BLE001
            hidden.append(f"{place}: {outcome.error_in_one_line(error)}")
    return hidden
