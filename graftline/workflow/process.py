"""What flows are made of: what their process does first, and Prefect's tasks, each in a process of its own."""

import atexit
import contextlib
import logging
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from prefect import Task, get_run_logger, task
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State, TaskRun
from prefect.context import FlowRunContext
from prefect.logging.configuration import setup_logging
from prefect.settings import (
    PREFECT_SERVER_ANALYTICS_ENABLED,
    PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS,
    temporary_settings,
)

from graftline import address, logs, settings, tracing
from graftline.errors import GraftlineError
from graftline.plan import resources
from graftline.workflow import archive, leases, owner, stages
from graftline.workflow.environment import for_flows
from graftline.workflow.outcome import explained_errors

# What a process of the flows does first: each flow calls `begin`, each command line `flow_command`.


class WithoutTraceback(logging.Filter):
    """An error that its message explains needs no traceback in the run's log."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Keep every record."""
        if record.exc_info and isinstance(record.exc_info[1], GraftlineError):
            record.exc_info = None
        return True


def begin() -> None:
    """Make this process one of the flows': called by each flow first, since a worker starts it without a command line.

    It holds the checkout that it works in, asks this machine without a proxy, sends its traces where the environment
    says, and logs errors that explain themselves without a traceback. Twice is as good as once.
    """
    address.spare_loopback(os.environ)
    owner.stay(Path())
    _trace()
    for name in ("prefect.flow_runs", "prefect.task_runs"):
        logger = logging.getLogger(name)
        if not any(isinstance(each, WithoutTraceback) for each in logger.filters):
            logger.addFilter(WithoutTraceback())


def _trace() -> None:
    if not tracing.start("graftline-flows"):
        return
    # A worker's run began before its traces did, so Prefect's span of the flow is lost: ours stands in for it.
    if running := FlowRunContext.get():
        stack = contextlib.ExitStack()
        stack.enter_context(tracing.span(f"flow {running.flow.name if running.flow else ''}".rstrip()))
        atexit.register(stack.close)


@contextlib.contextmanager
def flow_command() -> Iterator[None]:
    """What every flow's command line does around its flow: `begin`, Prefect's settings, and `explained_errors`."""
    with explained_errors():
        for name, value in for_flows(Path()).items():
            os.environ.setdefault(name, value)
        # Prefect has read the environment already, when it was imported.
        if os.environ.get(logs.FORMAT_VARIABLE) == "json":
            setup_logging(incremental=False)
        begin()
        defaults = {PREFECT_SERVER_ANALYTICS_ENABLED: False, PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS: 180}
        with temporary_settings(set_defaults=defaults):
            yield


# What flows are made of, as Prefect's tasks: each works in its own process; what did not answer is asked again.

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
    # A stage whose run is in the cache waits for its resources too: DVC decides while it holds them.
    machine = resources.this_machine()
    wanted = resources.needs(settings.load(root / settings.DEFAULT_FILE).pipeline(pipeline), machine)
    (taken,) = (each for each in wanted if each.stage == stage)
    resources.check_machine([taken], machine, pipeline)
    with leases.stage(taken, machine) as environment:
        ran = stages.reproduce(stage, pipeline, root=root, on_line=pass_on, environment=environment, force=force)
    archive.push(stage, pipeline, root=root)
    return ran


@task(retries=RETRIES, retry_delay_seconds=RETRY_DELAYS_SECONDS, retry_condition_fn=may_pass, cache_policy=NO_CACHE)
def push_package(pipeline: str, remote: str, root: Path) -> None:
    """Push the package to the archive; in a process of its own, as everything that asks DVC."""
    command = [sys.executable, "-m", "graftline.workflow.packages", pipeline, "--remote", remote]
    stages.run_command(command, stage="archive", pipeline=pipeline, root=root, on_line=get_run_logger().info)
