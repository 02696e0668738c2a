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


def outcome_key(pipeline: str) -> str:
    """Name of the artifact that holds a run's `Outcome` as a table of one row."""
    return f"outcome-{pipeline}"
