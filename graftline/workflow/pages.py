"""The page of a flow run in Prefect: verdict, gates, costs of the stages, links, progress; and the page of a night."""

import json
import logging
import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast
from uuid import UUID

from prefect.artifacts import (
    create_link_artifact,
    create_markdown_artifact,
    create_progress_artifact,
    create_table_artifact,
    update_progress_artifact,
)

from graftline.address import mask_secrets
from graftline.evaluate.verdict import GateResult, verdict_from_dict
from graftline.plain_text import count, duration
from graftline.workflow import outcome
from graftline.workflow.dispatch import PipelineTurn
from graftline.workflow.stages import STAGES

logger = logging.getLogger("graftline.pages")

_COUNTED = re.compile(r"  (\d+)/(\d+) \S+  ")  # as graftline.logs.Reporter prints it
_UPDATE_SECONDS = 5.0


def show_outcome(root: Path, pipeline: str, location: str | None) -> None:
    """Create the artifacts of a run that reached a verdict; ``location`` is the release's address, if there is one."""
    runs = root / "runs" / pipeline
    verdict = verdict_from_dict(json.loads((runs / "gate" / "verdict.json").read_text(encoding="utf-8")))
    create_markdown_artifact(
        (runs / "gate" / "verdict.md").read_text(encoding="utf-8"),
        key=f"verdict-{pipeline}",
        description=f"Verdict: {verdict.outcome}",
    )
    create_table_artifact([_gate(gate) for gate in verdict.gates], key=f"gates-{pipeline}", description="Gates")
    create_table_artifact(stage_costs(root, pipeline), key=f"stages-{pipeline}", description="What the stages cost")
    if location:
        create_link_artifact(location, key=f"release-{pipeline}", link_text=location, description="The release")


def _gate(gate: GateResult) -> dict[str, Any]:
    return {
        "gate": gate.name,
        "outcome": gate.outcome,
        "metric": gate.metric,
        "candidate": gate.candidate,
        "reference": gate.reference,
        "against": gate.against or "a limit",
        "difference": gate.difference,
        "interval": gate.interval and list(gate.interval),
        "items": gate.num_items,
        "reason": gate.reason,
    }


def stage_costs(root: Path, pipeline: str) -> list[dict[str, Any]]:
    """Seconds, peak memory and tokens per second of each stage's last run, if it was measured."""
    rows = []
    for stage in STAGES:
        folder = root / "runs" / pipeline / stage
        cost = _read(folder / "stage.json")
        if cost:
            speed = _read(folder / "metrics.json").get("tokens_per_second")
            rows.append({"stage": stage, **cost, "tokens_per_second": speed})
    return rows


def _read(path: Path) -> dict[str, Any]:
    """A stage's measurements; empty if they cannot be read, because a page must not fail a run that has released."""
    try:
        found = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except (OSError, ValueError) as error:
        logger.warning("%s cannot be read: %s", path, error)
        return {}
    return found if isinstance(found, dict) else {}


class Progress:
    """A progress bar on the run's page: each stage is an equal part, within which its own progress moves."""

    def __init__(self, pipeline: str, num_stages: int) -> None:
        self._num_stages, self._done, self._shown = max(num_stages, 1), 0, 0.0
        made = create_progress_artifact(0.0, key=f"progress-{pipeline}", description="How far the line is")
        self._artifact = cast(UUID, made)  # the declared coroutine is for async callers

    def read(self, line: str) -> None:
        """Read the progress from a line of a stage's output; the page is updated at most every five seconds."""
        counted = _COUNTED.search(line)
        if counted and time.monotonic() - self._shown > _UPDATE_SECONDS:
            self._show(min(int(counted[1]) / max(int(counted[2]), 1), 1.0))

    def end_stage(self) -> None:
        """Count a stage as done."""
        self._done += 1
        self._show(0.0)

    def _show(self, within_stage: float) -> None:
        self._shown = time.monotonic()
        percent = 100 * (self._done + within_stage) / self._num_stages
        update_progress_artifact(self._artifact, progress=min(percent, 100.0))


_MAX_NAMES = 50


def count_night(lines: Sequence[PipelineTurn], unchanged: Sequence[str]) -> dict[str, int]:
    """Numbers of pipelines by how they ended."""
    return {
        "failed": sum(1 for line in lines if line.problem),
        "stopped by a gate": sum(1 for line in lines if line.outcome and line.outcome.verdict != "pass"),
        "released": sum(1 for line in lines if line.outcome and line.outcome.version),
        "unchanged": len(unchanged),
    }


def render_night(lines: Sequence[PipelineTurn], unchanged: Sequence[str], seconds: float) -> str:
    """A night's page as Markdown, with what needs attention first.

    Args:
        lines: pipelines that were run.
        unchanged: pipelines whose inputs equal their last run's.
        seconds: how long the night took.
    """
    counted = ", ".join(f"{number} {name}" for name, number in count_night(lines, unchanged).items())
    total = count(len(lines) + len(unchanged), "pipeline")
    page = [f"## The night: {counted}", "", f"{total} in {duration(seconds)}."]
    if failed := [line for line in lines if line.problem]:
        page += ["", "### Failed: needs attention", "", "| pipeline | error | investigate with |", "|---|---|---|"]
        page += [f"| {line.pipeline} | {_cell(line.problem)} | `{outcome.remedy(line.pipeline)}` |" for line in failed]
    judged = [(line.pipeline, line.outcome) for line in lines if line.outcome]
    if stopped := [(name, outcome) for name, outcome in judged if outcome.verdict != "pass"]:
        page += ["", "### Stopped by a gate", "", "| pipeline | verdict | why |", "|---|---|---|"]
        page += [f"| {name} | {outcome.verdict} | {_cell(outcome.summary)} |" for name, outcome in stopped]
    if released := [(name, outcome) for name, outcome in judged if outcome.version]:
        page += ["", "### Released", "", "| pipeline | release | gates | stages run |", "|---|---|---|---|"]
        page += [
            f"| {name} | {outcome.version} | {_cell(outcome.summary)} | {', '.join(outcome.stages_run) or 'none'} |"
            for name, outcome in released
        ]
    if unchanged:
        more = f" and {len(unchanged) - _MAX_NAMES} more" if len(unchanged) > _MAX_NAMES else ""
        page += ["", "### Unchanged", "", ", ".join(unchanged[:_MAX_NAMES]) + more]
    return mask_secrets("\n".join(page) + "\n")


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
