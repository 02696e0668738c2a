"""Network retries: bounded, with exponential backoff and full jitter.

Source: M. Brooker, "Exponential Backoff And Jitter", AWS Architecture Blog (2015): the wait before try n is uniform
between 0 and min(cap, base × 2ⁿ), so that clients that failed together do not retry together.

The clients' own retries are off where this is used (botocore's end before a body is read, and would multiply these).
docs/decisions/0066-libraries.md says why neither those nor tenacity are used.
"""

import logging
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from graftline.address import mask_secrets

Result = TypeVar("Result")
_LOG = logging.getLogger(__name__)
_NOTICED_SECONDS = 1.0
"""Waits of at least this length are logged as warnings, shorter ones as INFO."""


def may_pass(status: int) -> bool:
    """Whether the same request may get another HTTP status later.

    True for server errors, overload, timeouts and too many requests. Not for 501 and 505: what a server does not
    support, it will not support a second later.
    """
    return status in (408, 425, 429) or (status >= 500 and status not in (501, 505))


@dataclass(frozen=True)
class Retry:
    """How often to try and how long to wait. The defaults give up after about 10 s of waiting on average."""

    attempts: int = 8
    """Total number of tries, at least 1."""
    base_seconds: float = 0.1
    """Upper bound of the first wait; it doubles with every try."""
    cap_seconds: float = 8.0
    """Upper bound of any wait."""
    deadline_seconds: float = 15.0
    """Counted from the first failure; no try begins later. Immediate refusals use up the tries sooner, and an endpoint
    that does not answer does not take eight timeouts."""

    def call(self, operation: Callable[[], Result], *, transient: Callable[[Exception], bool]) -> Result:
        """Run ``operation`` until it returns or fails permanently; when tries or time run out, its error is raised."""
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
                level = logging.WARNING if wait_seconds >= _NOTICED_SECONDS else logging.INFO
                said = mask_secrets(f"{type(error).__name__}: {error}")
                _LOG.log(
                    level, "try %d of %d failed (%s); next in %.1f s", attempt + 1, self.attempts, said, wait_seconds
                )
                time.sleep(wait_seconds)
        return operation()
