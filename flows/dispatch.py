"""Retrain many pipelines: here one after another, or, from a deployment, each as a run of its own on any worker."""

import contextvars
import json
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import cast
from uuid import UUID

from prefect import get_run_logger
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.filters import (
    ArtifactFilter,
    ArtifactFilterFlowRunId,
    ArtifactFilterKey,
)
from prefect.client.schemas.objects import FlowRun, State
from prefect.deployments import run_deployment
from prefect.runtime import deployment, flow_run

from flows.retrain import Outcome, outcome_key, retrain

RETRAIN = "retrain/retrain"
POLL_SECONDS = 5.0
CRASHED_FOR_GOOD_SECONDS = 120.0
"""A run that crashed is started again by an automation; if nobody has by then, nobody will."""


@dataclass(frozen=True)
class Line:
    """How one pipeline's turn ended; ``problem`` is the first line of its error."""

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


def run_all(pipelines: Sequence[str], *, wait_seconds: float, at_once: int) -> list[Line]:
    """Give every pipeline its turn, whatever becomes of the others.

    Args:
        pipelines: names from pipelines.yaml.
        wait_seconds: how long each waits for another run that holds it.
        at_once: how many run at the same time; one where the flow runs without a deployment.
    """
    if deployment.id is None:
        return [_run_here(name, wait_seconds) for name in pipelines]
    context = contextvars.copy_context()  # Children are linked with the flow run that starts them.
    with ThreadPoolExecutor(at_once) as pool:
        return list(pool.map(lambda name: context.copy().run(_run_on_a_worker, name, wait_seconds), pipelines))


def start(pipeline: str, *, wait_seconds: float, key: str) -> UUID:
    """Start a pipeline's run on some worker; asked twice with the same key it is one run."""
    started = run_deployment(
        RETRAIN,
        parameters={"pipeline": pipeline, "wait_seconds": wait_seconds},
        timeout=0,
        idempotency_key=key,
    )
    return cast(FlowRun, started).id  # Prefect declares a coroutine too, which only async callers get.


def _run_here(pipeline: str, wait_seconds: float) -> Line:
    started = time.monotonic()
    # The state instead of its result: an error of one pipeline must not end the night of the others.
    state = retrain(pipeline, wait_seconds, return_state=True)
    found = state.result(raise_on_failure=False)
    seconds = time.monotonic() - started
    if isinstance(found, Outcome):
        return Line(pipeline, seconds, found)
    return _failed(pipeline, seconds, str(found) or type(found).__name__)


def _run_on_a_worker(pipeline: str, wait_seconds: float) -> Line:
    started = time.monotonic()
    # A night that is started again after its worker died goes on with the runs that it had started.
    run_id = start(pipeline, wait_seconds=wait_seconds, key=f"{flow_run.id}-{pipeline}")
    with get_client(sync_client=True) as client:
        state = _wait(client, run_id)
        seconds = time.monotonic() - started
        if state.is_completed():
            return Line(pipeline, seconds, _read_outcome(client, run_id, pipeline))
    return _failed(pipeline, seconds, state.message or state.name or "no state")


def _wait(client: SyncPrefectClient, run_id: UUID) -> State:
    crashed_since: float | None = None
    while True:
        state = client.read_flow_run(run_id).state
        if state is not None and state.is_final():
            if not state.is_crashed():
                return state
            crashed_since = crashed_since or time.monotonic()
            if time.monotonic() - crashed_since > CRASHED_FOR_GOOD_SECONDS:
                return state
        else:
            crashed_since = None
        time.sleep(POLL_SECONDS)


def _read_outcome(client: SyncPrefectClient, run_id: UUID, pipeline: str) -> Outcome:
    """What the run showed on its page: results are kept nowhere else that every machine can read."""
    (artifact,) = client.read_artifacts(
        artifact_filter=ArtifactFilter(
            flow_run_id=ArtifactFilterFlowRunId(any_=[run_id]),
            key=ArtifactFilterKey(any_=[outcome_key(pipeline)]),
        )
    )
    assert isinstance(artifact.data, str)
    (row,) = json.loads(artifact.data)
    return Outcome(**{**row, "stages_run": tuple(row["stages_run"])})


def _failed(pipeline: str, seconds: float, reason: str) -> Line:
    problem = reason.splitlines()[0]
    get_run_logger().error(f"{pipeline} failed: {problem}", extra={"pipeline": pipeline})
    return Line(pipeline, seconds, problem=problem)
