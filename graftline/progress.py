"""Progress of long work as plain lines with rate and time left.

Library functions take an optional ``on_progress(done, total)``; what prints it is decided outside. `Reporter` prints
a line at most every two seconds, so that the same text is right on a terminal, in a file and in a flow run's log.
"""

import sys
import time
from collections.abc import Callable
from typing import TextIO

OnProgress = Callable[[int, int], None]
"""Called with the number of units done and the total."""


def silent(done: int, total: int) -> None:
    """The progress callback that prints nothing."""


class Reporter:
    """Print ``train  34/84 steps  1.20 steps/s  42 s left`` at most every ``interval_seconds``."""

    def __init__(self, name: str, unit: str, *, interval_seconds: float = 2.0, stream: TextIO | None = None) -> None:
        self._name, self._unit, self._interval_seconds = name, unit, interval_seconds
        self._stream = stream or sys.stderr
        self._started: float | None = None
        self._first_done = 0
        self._printed = 0.0

    def __call__(self, done: int, total: int, *, note: str = "") -> None:
        """Take note of ``done`` of ``total`` units; print if it is time, and at the end. ``note`` is appended."""
        now = time.monotonic()
        if self._started is None:
            # A resumed run starts at done > 0: its rate counts from there.
            self._started, self._first_done, self._printed = now, done, now
            return
        last_of_long_work = done >= total and now - self._started > self._interval_seconds
        if now - self._printed < self._interval_seconds and not last_of_long_work:
            return
        self._printed = now
        line = self._line(done, total, now - self._started)
        print(f"{line}  {note}".rstrip(), file=self._stream, flush=True)

    def _line(self, done: int, total: int, elapsed_seconds: float) -> str:
        rate = (done - self._first_done) / max(elapsed_seconds, 1e-9)
        left = f"{(total - done) / rate:.0f} s left" if rate > 0 else "time left unknown"
        return f"{self._name}  {done}/{total} {self._unit}  {rate:.3g} {self._unit}/s  {left}"
