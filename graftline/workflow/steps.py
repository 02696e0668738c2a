"""What flows are made of, as Prefect's tasks: each works in its own process; what did not answer is asked again."""

import contextlib
import sys
from pathlib import Path
from typing import Any

from prefect import Task, get_run_logger, task
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State, TaskRun

from graftline.workflow import archive, leases, stages

RETRIES, RETRY_DELAYS_SECONDS = 2, [30.0, 300.0]


def may_pass(task: Task[..., Any], run: TaskRun, state: State[Any]) -> bool:
    """Whether another try may help: only where something did not answer. Any other error would come again."""
    error = state.result(raise_on_failure=False)
    return isinstance(error, stages.StageFailedError) and error.temporary


@task(retries=RETRIES, retry_delay_seconds=RETRY_DELAYS_SECONDS, retry_condition_fn=may_pass, cache_policy=NO_CACHE)
def resolve(pipeline: str, root: Path) -> None:
    """Pin what moves for this run."""
    stages.resolve(pipeline, root=root, on_line=get_run_logger().info)


@task(
    task_run_name="{stage}",
    retries=RETRIES,
    retry_delay_seconds=RETRY_DELAYS_SECONDS,
    retry_condition_fn=may_pass,
    cache_policy=NO_CACHE,  # DVC decides what is up to date.
)
def reproduce(stage: str, pipeline: str, root: Path, on_line: stages.OnLine | None = None, force: bool = False) -> bool:
    """Bring one stage up to date, or run it in any case (``force``). Its output becomes this task run's log.

    Returns whether it ran.
    """
    log = get_run_logger()

    def pass_on(line: str) -> None:
        log.info(line, extra={"pipeline": pipeline, "stage": stage})
        if on_line:
            on_line(line)

    if not force and archive.fetch(stage, pipeline, root=root):
        log.info("an earlier run of this stage was found", extra={"pipeline": pipeline, "stage": stage})
    # A stage whose run is in the cache waits for a device too: DVC decides while it holds one.
    with leases.device() if stage in stages.ON_DEVICE else contextlib.nullcontext() as device:
        ran = stages.reproduce(stage, pipeline, root=root, on_line=pass_on, device=device, force=force)
    archive.push(stage, pipeline, root=root)
    return ran


@task(retries=RETRIES, retry_delay_seconds=RETRY_DELAYS_SECONDS, retry_condition_fn=may_pass, cache_policy=NO_CACHE)
def push_package(pipeline: str, remote: str, root: Path) -> None:
    """Push the package to the archive; in a process of its own, as everything that asks DVC."""
    command = [sys.executable, "-m", "graftline.workflow.packages", pipeline, "--remote", remote]
    stages.run_command(command, stage="archive", pipeline=pipeline, root=root, on_line=get_run_logger().info)
