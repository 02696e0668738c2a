"""A night on one page, for whoever looks at it in the morning: what needs a person comes first."""

from collections.abc import Sequence

from graftline.address import mask_secrets
from graftline.words import count, duration
from graftline.workflow import trouble
from graftline.workflow.dispatch import Line

_MAX_NAMES = 50


def counts(lines: Sequence[Line], unchanged: Sequence[str]) -> dict[str, int]:
    """How many pipelines ended in which way."""
    return {
        "failed": sum(1 for line in lines if line.problem),
        "stopped by a gate": sum(1 for line in lines if line.outcome and line.outcome.verdict != "pass"),
        "released": sum(1 for line in lines if line.outcome and line.outcome.version),
        "unchanged": len(unchanged),
    }


def render(lines: Sequence[Line], unchanged: Sequence[str], seconds: float) -> str:
    """The page as Markdown.

    Args:
        lines: pipelines that had their turn.
        unchanged: pipelines whose inputs are those of their last run.
        seconds: how long the night took.
    """
    counted = ", ".join(f"{number} {name}" for name, number in counts(lines, unchanged).items())
    total = count(len(lines) + len(unchanged), "pipeline")
    page = [f"## The night: {counted}", "", f"{total} in {duration(seconds)}."]
    if failed := [line for line in lines if line.problem]:
        page += ["", "### Failed: somebody has to look", "", "| pipeline | error | look at it with |", "|---|---|---|"]
        page += [f"| {line.pipeline} | {_cell(line.problem)} | `{trouble.remedy(line.pipeline)}` |" for line in failed]
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
