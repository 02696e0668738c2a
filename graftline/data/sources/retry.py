"""Bounded retries with growing, jittered pauses, for what a network may do now and not a second later."""

import logging
import random
import time
from collections.abc import Callable
from typing import TypeVar

from graftline.errors import SourceUnavailableError

_LOG = logging.getLogger(__name__)
ATTEMPTS = 4
FIRST_PAUSE_SECONDS = 0.5

Result = TypeVar("Result")


class TransientError(Exception):
    """A failure that may be gone at the next attempt."""


def with_retries(attempt: Callable[[], Result], *, what: str) -> Result:
    """Call ``attempt`` up to four times.

    Args:
        attempt: raises `TransientError` for what is worth another try; every other error ends the attempts.
        what: masked address, for messages.

    Raises:
        SourceUnavailableError: the last attempt failed too.
    """
    for number in range(1, ATTEMPTS + 1):
        try:
            return attempt()
        except TransientError as error:
            if number == ATTEMPTS:
                raise SourceUnavailableError(
                    f"{what} could not be fetched in {ATTEMPTS} attempts: {error}; check the network, then run again"
                ) from error
            pause_seconds = FIRST_PAUSE_SECONDS * 2 ** (number - 1) * random.uniform(0.5, 1.5)
            _LOG.warning("%s: %s; attempt %d of %d in %.1f s", what, error, number + 1, ATTEMPTS, pause_seconds)
            time.sleep(pause_seconds)
    raise AssertionError("the loop returns or raises")
