"""Bounded retries with exponential backoff and full jitter.

Source: M. Brooker, "Exponential Backoff And Jitter", AWS Architecture Blog (2015): the wait before try n is uniform
between 0 and min(cap, base × 2ⁿ), so that clients which failed together do not come back together.
"""

import logging
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

Result = TypeVar("Result")
_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class Retry:
    """How often to try and how long to wait. The defaults end after about 10 s of waiting in the mean."""

    attempts: int = 8
    """Tries in all, at least 1."""
    base_seconds: float = 0.1
    """Upper bound of the first wait; it doubles with every try."""
    cap_seconds: float = 8.0
    """Upper bound of any wait."""
    deadline_seconds: float = 15.0
    """From the first failure on; no try begins later. What answers "no" at once uses up its tries before, what does
    not answer at all does not get eight times a timeout."""

    def call(self, operation: Callable[[], Result], *, transient: Callable[[Exception], bool]) -> Result:
        """Run ``operation`` until it returns or fails for good; at the end of tries or time its error is raised."""
        failed_first: float | None = None
        for attempt in range(self.attempts - 1):
            try:
                return operation()
            except Exception as error:
                if not transient(error):
                    raise
                wait_seconds = random.uniform(0, min(self.cap_seconds, self.base_seconds * 2**attempt))
                now = time.monotonic()
                failed_first = now if failed_first is None else failed_first
                if now + wait_seconds - failed_first > self.deadline_seconds:
                    raise
                _LOG.info("try %d of %d failed (%s); next in %.1f s", attempt + 1, self.attempts, error, wait_seconds)
                time.sleep(wait_seconds)
        return operation()
