"""How a run ends, and the events that tell others of it."""

from dataclasses import dataclass

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
