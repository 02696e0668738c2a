"""How a run of a flow starts from the command line, how it ends, and what is said of an error."""

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

# How a run ends, and the events that tell others of it.

GATE_STOPPED = "graftline.gate.stopped"
"""Event of a run whose gates did not pass; the flow run itself ended well."""
NIGHT_FINISHED = "graftline.night.finished"
"""Event of a night that is over."""


@dataclass(frozen=True)
class Outcome:
    """What a run ends with. Paths are relative to the project's root."""

    pipeline: str
    verdict: str
    summary: str
    version: str | None
    location: str | None
    report: str
    stages_run: tuple[str, ...]


def print_outcome(outcome: Outcome) -> None:
    """Print how a run ended, for a terminal."""
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


# Errors of any kind as a line for people: what a night says of one pipeline, and goes on with the others.

logger = logging.getLogger("graftline.trouble")

_ROOT = Path(__file__).resolve().parents[2]


def error_in_one_line(error: BaseException) -> str:
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


# What every flow's command line does around its flow.

_NO_SERVER = ("Failed to reach API", "Found incompatible versions", "Timed out while attempting to connect to")
"""How Prefect's client begins to say that its server is not there, or is of another version."""


@contextlib.contextmanager
def explained_errors() -> Iterator[None]:
    """End the process as `graftline.program.guarded` does: a message and exit code 2 for what a user can act on.

    A temporary Prefect server that the flow starts ends with this process, however that ends.
    """
    with guarded():
        orphans.watch()
        try:
            yield
        except (RuntimeError, httpx.HTTPError) as error:
            if not (isinstance(error, httpx.HTTPError) or str(error).startswith(_NO_SERVER)):
                raise
            raise GraftlineError(prefect_server.no_answer(" ".join(str(error).split()))) from error
