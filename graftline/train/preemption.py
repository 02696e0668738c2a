"""SIGTERM in training: a drained node or a preempted machine asks a process to end, and waits a little before it kills.

The step that runs is finished and kept in a checkpoint before the process ends.
"""

import logging
import signal
import threading
from types import FrameType, TracebackType
from typing import Any, Self

_LOG = logging.getLogger(__name__)
_asked = threading.Event()


def ask() -> None:
    """Ask the training of this process to end, as SIGTERM does: for whoever hears of it in another way."""
    _LOG.warning("asked to end: the step that runs is finished and kept")
    _asked.set()


class Preemption:
    """Catches SIGTERM while it is entered. Only the main thread can; elsewhere nothing is caught."""

    def __init__(self) -> None:
        self._is_asked = False
        self._before: Any = None

    @property
    def is_asked(self) -> bool:
        """Whether the training is to end."""
        return self._is_asked or _asked.is_set()

    def __enter__(self) -> Self:
        """Catch it from now on."""
        _asked.clear()
        if threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGTERM, self._ask)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, frames: TracebackType | None
    ) -> None:
        """What was set before is set again."""
        if self._before is not None:
            signal.signal(signal.SIGTERM, self._before)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        _LOG.warning("asked to end (SIGTERM): the step that runs is finished and kept")
        self._is_asked = True
