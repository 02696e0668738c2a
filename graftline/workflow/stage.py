"""The frame around every stage: which pipeline, which folders, how long, how much memory, how errors end.

    python -m tasks.<stage> PIPELINE

A stage module gives ``run(pipeline, at)``, the work, and ``main()``, which DVC calls.
"""

import argparse
import logging
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from graftline import logs, settings, tracing
from graftline.digest import write_json
from graftline.errors import GraftlineError, PreemptedError, SourceUnavailableError, StoreUnavailableError
from graftline.plan.energy import EnergyMeter
from graftline.program import EXIT_ERROR, guarded
from graftline.workflow.workspace import Workspace

logger = logging.getLogger("graftline")


Run = Callable[[settings.Pipeline, Workspace], None]
"""A stage's work: the pipeline's settings, and where its files lie."""
EXIT_PREEMPTED = 75
"""EX_TEMPFAIL of sysexits.h: nothing is wrong, another try continues."""
TEMPORARY = "error (may pass): "
"""Starts the message of an error that another try, later, may not meet."""


def main(stage: str, run: Run, *, measure: bool = True, package: str = "tasks") -> None:
    """Run one stage as a command: exit code 2 with a message for errors a user can act on, no traceback.

    Args:
        stage: its name.
        run: its work.
        measure: write ``stage.json`` beside the stage's outputs: seconds, peak memory and energy, for the run's report.
        package: where the module lies that is run, for ``--help``.
    """
    parser = argparse.ArgumentParser(prog=f"python -m {package}.{stage}", description=run.__doc__)
    parser.add_argument("pipeline", help="a name from pipelines.yaml")
    run_guarded(stage, parser.parse_args().pipeline, run, measure=measure)


def _check_code() -> None:
    """Refuse to run another checkout's code: a release names the commit of the folder that its stages ran in.

    Raises:
        GraftlineError: the folder has stages of its own, and Python imported others.
    """
    own = Path("graftline", "workflow", "stage.py")
    if own.is_file() and not own.samefile(__file__):
        raise GraftlineError(
            f"this runs the code of {Path(__file__).resolve().parents[2]}, not that of {Path.cwd()}, where it was "
            "started; unset PYTHONSAFEPATH and PYTHONPATH"
        )


def run_guarded(stage: str, name: str, run: Run, *, measure: bool) -> None:
    """What `main` does once it knows the pipeline's name; for a command with arguments of its own."""
    with guarded():
        try:
            _run_measured(stage, name, run, measure=measure)
        except (StoreUnavailableError, SourceUnavailableError) as error:
            print(f"{TEMPORARY}{error}", file=sys.stderr)
            sys.exit(EXIT_ERROR)
        except PreemptedError as error:
            print(f"{TEMPORARY}{error}", file=sys.stderr)
            sys.exit(EXIT_PREEMPTED)
        except FileNotFoundError as error:
            earlier = _stage_of(error, name)
            if earlier in (None, stage):
                raise
            raise GraftlineError(f"{error.filename} is missing: run `graftline {earlier} {name}` first") from error


def _run_measured(stage: str, name: str, run: Run, *, measure: bool) -> None:
    started, meter = time.monotonic(), EnergyMeter()
    _check_code()
    logs.configure(stage, about={"pipeline": name, "stage": stage})
    # Our own messages only: Great Expectations alone writes forty lines a run at this level.
    logger.setLevel(logging.INFO)
    tracing.start("graftline-stages")
    about: dict[str, Any] = {"graftline.pipeline": name, "graftline.stage": stage}
    with tracing.span(f"stage {stage}", **about) as measured:
        at = Workspace(Path.cwd(), name)
        run(settings.load(at.root / settings.DEFAULT_FILE).pipeline(name), at)
        cost = _cost(started, meter)
        measured |= {f"graftline.{key}": value for key, value in cost.items()}
    if measure:
        write_json(at.folder(stage) / "stage.json", cost)


def _stage_of(error: FileNotFoundError, name: str) -> str | None:
    """The stage of this pipeline that makes the file which is missing; None if none does."""
    runs = Path.cwd() / "runs" / name
    path = Path(str(error.filename)).absolute()
    return path.relative_to(runs).parts[0] if path.is_relative_to(runs) and path != runs else None


def _cost(started: float, meter: EnergyMeter) -> dict[str, float | str]:
    peak_mb = peak_rss_mb()
    energy = meter.read(peak_mb * 1e6)
    return {
        "seconds": round(time.monotonic() - started, 2),
        "peak_rss_mb": peak_mb,
        "energy_watt_hours": round(energy.watt_hours, 4),
        "energy_source": energy.source,
    }


def peak_rss_mb() -> int:
    """Peak resident memory of the largest process so far, this one or one that it started, in MB of 10^6 bytes."""
    kibibytes = max(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return round(kibibytes * 1024 / 1e6)
