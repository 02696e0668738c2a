"""Trainings that die as in a power cut."""

import os
import signal
from collections.abc import Callable

from graftline.train.results import StepMetrics


def run_and_die(body: Callable[[], object]) -> int:
    """Run ``body`` in a forked process; returns the signal that ended it, or 0."""
    child = os.fork()
    if child == 0:
        try:
            body()
        finally:
            os._exit(0)
    return os.WTERMSIG(os.waitpid(child, 0)[1])


def kill_at(step: int) -> Callable[[StepMetrics], None]:
    """A step callback that kills the process at ``step``."""
    return lambda metrics: os.kill(os.getpid(), signal.SIGKILL) if metrics.step == step else None
