"""What a process of the flows does first: each flow calls `begin`, each command line `flow_command`."""

import atexit
import contextlib
import logging
import os
from collections.abc import Iterator
from pathlib import Path

from prefect.context import FlowRunContext
from prefect.logging.configuration import setup_logging
from prefect.settings import (
    PREFECT_SERVER_ANALYTICS_ENABLED,
    PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS,
    temporary_settings,
)

from graftline import logs, proxies, tracing
from graftline.errors import GraftlineError
from graftline.workflow import owner
from graftline.workflow.command import explained_errors
from graftline.workflow.environment import for_flows


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
    proxies.spare_loopback(os.environ)
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
