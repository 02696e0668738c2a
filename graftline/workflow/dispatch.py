"""Retrain many pipelines: one after another here, or, from a deployment, each as a separate run on any worker."""

import contextvars
import json
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast
from uuid import UUID

import httpx
from prefect import get_run_logger
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.filters import (
    ArtifactFilter,
    ArtifactFilterFlowRunId,
    ArtifactFilterKey,
)
from prefect.client.schemas.objects import FlowRun, State
from prefect.client.schemas.sorting import ArtifactSort
from prefect.deployments import run_deployment
from prefect.exceptions import ObjectNotFound
from prefect.runtime import deployment, flow_run

from graftline import settings
from graftline.errors import GraftlineError
from graftline.plan.resources import class_of, job_variables
from graftline.workflow.outcome import Outcome, error_in_one_line, first_line, outcome_key, remedy

RETRAIN = "retrain/retrain"
Retrain = Callable[..., Any]
"""The flow `retrain`: Prefect gives a flow more arguments than its function has, such as ``return_state``."""
POLL_SECONDS = 5.0
CRASHED_FOR_GOOD_SECONDS = 120.0
"""An automation restarts crashed runs; one that is still crashed after this time stays so."""
SILENT_SERVER_SECONDS = 900.0
"""How long a server that does not answer is asked again; it may be restarting."""


@dataclass(frozen=True)
class PipelineTurn:
    """How the retraining of one pipeline ended; ``problem`` is the first line of its error."""

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
            "investigate with": remedy(self.pipeline) if self.problem else "",
        }


def print_lines(lines: Sequence[PipelineTurn]) -> None:
    """Print a table for a terminal."""
    for row in (line.as_row() for line in lines):
        print(f"{row['pipeline']:<28} {row['verdict']:<13} {row['release']:<32} {row['stages run']}")


def run_all(pipelines: Sequence[str], *, retrain: Retrain, wait_seconds: float, at_once: int) -> list[PipelineTurn]:
    """Retrain every pipeline, even if others fail.

    Args:
        pipelines: names from pipelines.yaml.
        retrain: the flow `retrain`, which is called here if there is no deployment.
        wait_seconds: how long each waits for another run that holds its pipeline.
        at_once: how many run at the same time in a deployment; without one it is always one.
    """
    if deployment.id is None:
        return [_turn(partial(_run_here, retrain), name, wait_seconds) for name in pipelines]
    context = contextvars.copy_context()  # links the children with this flow run

    def turn(name: str) -> PipelineTurn:
        return context.copy().run(_turn, _run_on_a_worker, name, wait_seconds)

    with ThreadPoolExecutor(at_once) as pool:
        return list(pool.map(turn, pipelines))


def start(pipeline: str, *, wait_seconds: float, key: str, tags: Sequence[str] = (), root: Path = Path()) -> UUID:
    """Start a pipeline's run on a worker of its class's queue; asked twice with the same key it is one run.

    Args:
        pipeline: a name from pipelines.yaml.
        wait_seconds: how long it waits for another run that holds the pipeline.
        key: names the project, the pipeline and the occasion; Prefect keeps it for ever.
        tags: the run's, besides those of its deployment.
        root: the project's folder.
    """
    with get_client(sync_client=True) as client:
        queue, variables = _place(client, settings.load(root / settings.DEFAULT_FILE).pipeline(pipeline))
    started = run_deployment(
        RETRAIN,
        parameters={"pipeline": pipeline, "wait_seconds": wait_seconds},
        timeout=0,
        idempotency_key=key,
        tags=list(tags),
        work_queue_name=queue,
        job_variables=variables,
    )
    return cast(FlowRun, started).id  # the declared coroutine is for async callers


def _place(
    client: SyncPrefectClient, pipeline: settings.Pipeline, deployment: str = RETRAIN
) -> tuple[str | None, dict[str, str]]:
    """The work queue that a run of a pipeline belongs into, and what its job asks for, where the pool can be asked."""
    pool = client.read_deployment_by_name(deployment).work_pool_name
    if pool is None:  # It was deployed by `serve`, without workers.
        return None, {}
    known = client.read_work_pool(pool).base_job_template.get("variables", {}).get("properties", {})
    return class_of(pipeline), {name: value for name, value in job_variables(pipeline).items() if name in known}


def _turn(run: Callable[[str, float], Outcome], pipeline: str, wait_seconds: float) -> PipelineTurn:
    """Retrain one pipeline; an error of any kind is recorded, so that the others are retrained."""
    started = time.monotonic()
    try:
        outcome = run(pipeline, wait_seconds)
    except (Exception, SystemExit) as error:  # noqa: BLE001
        problem = error_in_one_line(error)
        get_run_logger().error(f"{pipeline} failed: {problem}", extra={"pipeline": pipeline})
        return PipelineTurn(pipeline, time.monotonic() - started, problem=problem)
    return PipelineTurn(pipeline, time.monotonic() - started, outcome)


def _run_here(retrain: Retrain, pipeline: str, wait_seconds: float) -> Outcome:
    # With return_state, Prefect records an error in its run instead of raising it here.
    state = retrain(pipeline, wait_seconds, return_state=True)
    found = state.result(raise_on_failure=False)
    if isinstance(found, BaseException):
        raise found
    if not isinstance(found, Outcome):
        raise GraftlineError(f"its run ended {state.name} without an outcome: {state.message or 'no reason given'}")
    return found


def _run_on_a_worker(pipeline: str, wait_seconds: float) -> Outcome:
    # With this key, a night that restarts after its worker died continues with the runs that it started.
    run_id = start(pipeline, wait_seconds=wait_seconds, key=f"{flow_run.id}-{pipeline}")
    with get_client(sync_client=True) as client:
        state = _wait(client, run_id)
        if not state.is_completed():
            reason = first_line(state.message or "") or "no reason given"
            raise GraftlineError(f"its run ended {state.name or state.type.value}: {reason}")
        return _read_outcome(client, run_id, pipeline)


def _wait(client: SyncPrefectClient, run_id: UUID) -> State:
    """Wait for a run's final state."""
    crashed_since: float | None = None
    for state in _states(client, run_id):
        if state is None or not state.is_final():
            crashed_since = None
        elif not state.is_crashed():
            return state
        else:
            crashed_since = crashed_since or time.monotonic()
            if time.monotonic() - crashed_since > CRASHED_FOR_GOOD_SECONDS:
                return state
    raise AssertionError("states come until one is returned")


def _states(client: SyncPrefectClient, run_id: UUID) -> Iterator[State | None]:
    """A run's states, polled, even while the server does not answer for some time."""
    silent_since: float | None = None
    while True:
        try:
            state = client.read_flow_run(run_id).state
        except ObjectNotFound as error:
            raise GraftlineError(f"its flow run {run_id} was deleted in Prefect") from error
        except httpx.HTTPError:
            silent_since = silent_since or time.monotonic()
            if time.monotonic() - silent_since > SILENT_SERVER_SECONDS:
                raise
        else:
            silent_since = None
            yield state
        time.sleep(POLL_SECONDS)


def _read_outcome(client: SyncPrefectClient, run_id: UUID, pipeline: str) -> Outcome:
    """Read the outcome from the newest artifact of a run, the only place that every machine can read.

    A run whose worker died may have created more than one.

    Raises:
        GraftlineError: there is none, or it cannot be read.
    """
    shown = client.read_artifacts(
        artifact_filter=ArtifactFilter(
            flow_run_id=ArtifactFilterFlowRunId(any_=[run_id]),
            key=ArtifactFilterKey(any_=[outcome_key(pipeline)]),
        ),
        sort=ArtifactSort.CREATED_DESC,
        limit=1,
    )
    if not shown:
        raise GraftlineError(f"its flow run {run_id} completed and shows no artifact {outcome_key(pipeline)}")
    try:
        (row,) = json.loads(str(shown[0].data))
        return Outcome(**{**row, "stages_run": tuple(row["stages_run"])})
    except (ValueError, TypeError, KeyError) as error:
        raise GraftlineError(
            f"the artifact {outcome_key(pipeline)} of flow run {run_id} cannot be read: {error}; was it made by "
            "another version of graftline?"
        ) from error
