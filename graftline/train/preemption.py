"""Handles SIGTERM in training: a drained node or preempted machine asks a process to stop shortly before killing it.

The current step is finished and saved in a checkpoint before the process ends.
"""

import logging
import signal
import threading
from types import FrameType, TracebackType
from typing import Any, Self

_LOG = logging.getLogger(__name__)
_asked = threading.Event()


def ask() -> None:
    """Ask this process's training to stop, as SIGTERM does, when the request arrives in another way."""
    if not _asked.is_set():
        _LOG.warning("asked to end: the step that runs is finished and kept")
    _asked.set()


class Preemption:
    """Context that catches SIGTERM. This works only in the main thread; elsewhere nothing is caught."""

    def __init__(self) -> None:
        self._is_asked = False
        self._before: Any = None

    @property
    def is_asked(self) -> bool:
        """Whether the training should stop."""
        return self._is_asked or _asked.is_set()

    def __enter__(self) -> Self:
        """Install the handler."""
        _asked.clear()
        if threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGTERM, self._ask)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, frames: TracebackType | None
    ) -> None:
        """Restore the previous handler."""
        if self._before is not None:
            signal.signal(signal.SIGTERM, self._before)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        _LOG.warning("asked to end (SIGTERM): the step that runs is finished and kept")
        self._is_asked = True
