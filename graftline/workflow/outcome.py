"""The outcome of a flow run, its errors in one line, and the exit code of a flow's command."""

import contextlib
import logging
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx

from graftline.address import mask_secrets
from graftline.doctor import prefect_server
from graftline.errors import GraftlineError
from graftline.program import guarded
from graftline.workflow import orphans

GATE_STOPPED = "graftline.gate.stopped"
"""Event of a run whose gates did not pass; the flow run itself completed."""
NIGHT_FINISHED = "graftline.night.finished"
"""Event at the end of a night."""


@dataclass(frozen=True)
class Outcome:
    """The outcome of a run. Paths are relative to the project's root."""

    pipeline: str
    verdict: str
    summary: str
    version: str | None
    location: str | None
    report: str
    stages_run: tuple[str, ...]


def print_outcome(outcome: Outcome) -> None:
    """Print an outcome for a terminal."""
    ran = ", ".join(outcome.stages_run)
    rows = {
        "pipeline": outcome.pipeline,
        "stages run": f"{len(outcome.stages_run)} ({ran})" if ran else "none, all up to date",
        "verdict": f"{outcome.verdict}: {outcome.summary}",
        "release": f"{outcome.version}  in  {outcome.location}" if outcome.version else "none: the gates did not pass",
        "report": outcome.report,
    }
    print("\n" + "\n".join(f"{name + ':':<12} {value}" for name, value in rows.items()))


def outcome_key(pipeline: str) -> str:
    """Name of the artifact that holds a run's `Outcome` as a table of one row."""
    return f"outcome-{pipeline}"


logger = logging.getLogger("graftline.trouble")

_ROOT = Path(__file__).resolve().parents[2]


def error_in_one_line(error: BaseException) -> str:
    """The first line of a `GraftlineError`; any other error is logged with its traceback, and named with its place."""
    words = first_line(str(error))
    if isinstance(error, GraftlineError) and words:
        return mask_secrets(words)
    logger.error("not an error that explains itself", exc_info=error)
    said = f"{type(error).__name__}: {words}" if words else type(error).__name__
    place = _place(error)
    return mask_secrets(f"{said} ({place})" if place else said)


def first_line(text: str) -> str:
    """The first line that is not blank; empty if there is none."""
    return next((line.strip() for line in text.splitlines() if line.strip()), "")


def remedy(pipeline: str) -> str:
    """The command that shows a pipeline's error in full."""
    return f"python -m flows.retrain {pipeline}"


def _place(error: BaseException) -> str:
    """The innermost line of our code in the traceback, as FILE:LINE."""
    ours = [
        f"{Path(frame.filename).relative_to(_ROOT)}:{frame.lineno}"
        for frame in traceback.extract_tb(error.__traceback__)
        if Path(frame.filename).is_relative_to(_ROOT) and ".venv" not in frame.filename
    ]
    return ours[-1] if ours else ""


_NO_SERVER = ("Failed to reach API", "Found incompatible versions", "Timed out while attempting to connect to")
"""Starts of Prefect's messages about a server that does not answer, or has another version."""


@contextlib.contextmanager
def explained_errors() -> Iterator[None]:
    """`graftline.program.guarded` for a flow's command: a message and exit code 2 for errors that a user can act on.

    A temporary Prefect server of the flow ends with this process, even if it is killed.
    """
    with guarded():
        orphans.watch()
        try:
            yield
        except (RuntimeError, httpx.HTTPError) as error:
            if not (isinstance(error, httpx.HTTPError) or str(error).startswith(_NO_SERVER)):
                raise
            raise GraftlineError(prefect_server.no_answer(" ".join(str(error).split()))) from error
