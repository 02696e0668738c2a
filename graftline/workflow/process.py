"""The set-up of a flow's process, and the Prefect tasks that flows share, each of which runs a subprocess."""

import atexit
import contextlib
import logging
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from prefect import Task, get_run_logger, task
from prefect import settings as prefect_settings
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State, TaskRun
from prefect.context import FlowRunContext
from prefect.logging.configuration import setup_logging

from graftline import address, logs, settings, tracing
from graftline.errors import GraftlineError
from graftline.plan import resources
from graftline.workflow import archive, leases, owner, stages
from graftline.workflow.environment import check_names_of_files, for_flows
from graftline.workflow.outcome import explained_errors


class WithoutTraceback(logging.Filter):
    """Removes the traceback of a GraftlineError, whose message explains it, from the run's log."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Keep every record."""
        if record.exc_info and isinstance(record.exc_info[1], GraftlineError):
            record.exc_info = None
        return True


def begin() -> None:
    """Set up the process of a flow; every flow calls it first, because a worker does not use the command line.

    The process holds its checkout, connects to this machine without a proxy, sends traces if the environment says so,
    and logs a GraftlineError without a traceback. Repeated calls have no further effect.
    """
    check_names_of_files(Path.cwd())
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
    # A worker starts the run before tracing, so that Prefect's span of the flow is lost; this one replaces it.
    if running := FlowRunContext.get():
        stack = contextlib.ExitStack()
        stack.enter_context(tracing.span(f"flow {running.flow.name if running.flow else ''}".rstrip()))
        atexit.register(stack.close)


@contextlib.contextmanager
def flow_command() -> Iterator[None]:
    """The frame of every flow's command: `begin`, Prefect's settings, and `explained_errors`."""
    with explained_errors():
        defaults = for_flows(Path())
        for name, value in defaults.items():
            os.environ.setdefault(name, value)
        # Prefect read the environment when it was imported.
        if os.environ.get(logs.FORMAT_VARIABLE) == "json":
            setup_logging(incremental=False)
        begin()
        server = {
            getattr(prefect_settings, name): defaults[name] for name in defaults if name.startswith("PREFECT_SERVER_")
        }
        with prefect_settings.temporary_settings(set_defaults=server):
            yield


RETRIES, RETRY_DELAYS_SECONDS = 2, [30.0, 300.0]


def may_pass(task: Task[..., Any], run: TaskRun, state: State[Any]) -> bool:
    """Whether another try may help, because a server did not answer; other errors would recur."""
    error = state.result(raise_on_failure=False)
    return isinstance(error, stages.StageFailedError) and error.temporary


@task(retries=RETRIES, retry_delay_seconds=RETRY_DELAYS_SECONDS, retry_condition_fn=may_pass, cache_policy=NO_CACHE)
def resolve(pipeline: str, root: Path) -> None:
    """Pin the moving inputs for this run."""
    stages.resolve(pipeline, root=root, on_line=get_run_logger().info)


@task(
    task_run_name="{stage}",
    retries=RETRIES,
    retry_delay_seconds=RETRY_DELAYS_SECONDS,
    retry_condition_fn=may_pass,
    cache_policy=NO_CACHE,  # DVC decides what is up to date.
)
def reproduce(stage: str, pipeline: str, root: Path, on_line: stages.OnLine | None = None, force: bool = False) -> bool:
    """Bring one stage up to date, or run it anyway (``force``), with its output in this task run's log.

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
    """Push the package to the archive, in a subprocess, like everything that uses DVC."""
    command = [sys.executable, "-m", "graftline.workflow.packages", pipeline, "--remote", remote]
    stages.run_command(command, stage="archive", pipeline=pipeline, root=root, on_line=get_run_logger().info)
