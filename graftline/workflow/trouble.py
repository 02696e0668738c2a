"""Errors of any kind as a line for people: what a night says of one pipeline, and goes on with the others."""

import logging
import traceback
from pathlib import Path

from graftline.address import mask_secrets
from graftline.errors import GraftlineError

logger = logging.getLogger("graftline.trouble")

_ROOT = Path(__file__).resolve().parents[2]


def in_one_line(error: BaseException) -> str:
    """What went wrong: the first line of an error that explains itself; any other with its type and its place.

    The latter is logged whole: only its traceback may tell what happened.
    """
    words = first_line(str(error))
    if isinstance(error, GraftlineError) and words:
        return mask_secrets(words)
    logger.error("not an error that explains itself", exc_info=error)
    said = f"{type(error).__name__}: {words}" if words else type(error).__name__
    place = _place(error)
    return mask_secrets(f"{said} ({place})" if place else said)


def first_line(text: str) -> str:
    """The first line with words in it; empty if there is none."""
    return next((line.strip() for line in text.splitlines() if line.strip()), "")


def remedy(pipeline: str) -> str:
    """The command that shows the error with all that led to it."""
    return f"python -m flows.retrain {pipeline}"


def _place(error: BaseException) -> str:
    """The last line of our own code on the way to the error, as FILE:LINE."""
    ours = [
        f"{Path(frame.filename).relative_to(_ROOT)}:{frame.lineno}"
        for frame in traceback.extract_tb(error.__traceback__)
        if Path(frame.filename).is_relative_to(_ROOT) and ".venv" not in frame.filename
    ]
    return ours[-1] if ours else ""
