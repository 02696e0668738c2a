"""What a pull request is told: one Markdown comment, readable without opening anything."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from flows.changes import Change
from graftline.address import mask_secrets
from graftline.evaluate.verdict import OUTCOMES, GateResult, Outcome, Verdict

MARKS: dict[Outcome, str] = {"pass": "✅", "fail": "❌", "inconclusive": "❔"}
_BARS = "▁▂▃▄▅▆▇█"
_MAX_REASONS = 12
_MAX_BARS = 40


@dataclass(frozen=True)
class Side:
    """A revision's metrics and training losses, where it has some."""

    metrics: Mapping[str, Any] = field(default_factory=dict)
    losses: Sequence[float] = ()


@dataclass(frozen=True)
class PipelineResult:
    """What was found about one changed pipeline.

    ``verdict`` is the head's own, against production and base as its gates ask; ``comparison`` is the head's candidate
    against the base revision's, by the same metrics and margins. ``problem`` says why one of the two is missing.
    """

    change: Change
    stages_run: tuple[str, ...] = ()
    verdict: Verdict | None = None
    verdict_text: str = ""
    comparison: Verdict | None = None
    base: Side = Side()
    head: Side = Side()
    problem: str | None = None

    @property
    def outcome(self) -> Outcome:
        """The verdict's outcome, but ``fail`` if the head is shown to be worse than the base revision.

        A pipeline that the head removed needs a person: ``inconclusive``.
        """
        if self.change.removed:
            return "inconclusive"
        if self.verdict is None or (self.comparison and self.comparison.outcome == "fail"):
            return "fail"
        return self.verdict.outcome


def worst(results: Sequence[PipelineResult]) -> Outcome:
    """The outcome of all pipelines together; ``pass`` when none changed."""
    order: list[Outcome] = ["fail", "inconclusive", "pass"]
    assert set(order) == set(OUTCOMES)
    return min((result.outcome for result in results), key=order.index, default="pass")


def render(base: str, head: str, results: Sequence[PipelineResult], *, num_pipelines: int, link: str | None) -> str:
    """The comment.

    Args:
        base: commit compared with.
        head: commit looked at.
        results: one a changed pipeline.
        num_pipelines: how many pipelines there are.
        link: address of the run, for whoever wants its log.
    """
    outcome = worst(results)
    title = f"## graftline: {MARKS[outcome]} {outcome}" if results else "## graftline: nothing to evaluate"
    lines = [title, "", f"`{base[:12]}` → `{head[:12]}`: {len(results)} of {num_pipelines} pipelines changed."]
    if not results:
        lines.append("No stage was run: nothing that a pipeline depends on differs.")
    for result in results:
        lines += ["", *_pipeline(result)]
    if link:
        lines += ["", f"[Log and files of this run]({link})"]
    return mask_secrets("\n".join(lines) + "\n")


def _pipeline(result: PipelineResult) -> list[str]:
    change = result.change
    lines = [f"### {change.pipeline}: {MARKS[result.outcome]} {result.outcome}", ""]
    shown = ", ".join(f"`{reason}`" for reason in change.reasons[:_MAX_REASONS])
    more = len(change.reasons) - _MAX_REASONS
    lines.append(f"Changed: {shown}{f' and {more} more' if more > 0 else ''}.")
    lines.append(f"Stages run: {', '.join(result.stages_run) or 'none, all results were in the cache'}.")
    if result.problem:
        lines += ["", f"> {' '.join(result.problem.split())}"]
    if result.verdict_text:
        # The verdict's page has a heading of its own; it becomes a part of this pipeline's section.
        lines += ["", result.verdict_text.strip().replace("### ", "#### ", 1)]
    if result.comparison:
        lines += ["", "#### Against the base revision", "", *_comparison(result.comparison)]
    return [*lines, *_metrics(result), *_losses(result)]


def _comparison(verdict: Verdict) -> list[str]:
    lines = ["| metric | base revision | this revision | difference | interval | |", "|---|---|---|---|---|---|"]
    return lines + [_row(gate) for gate in verdict.gates]


def _row(gate: GateResult) -> str:
    interval = "" if gate.interval is None else f"[{gate.interval[0]:+.3f}, {gate.interval[1]:+.3f}]"
    numbers = [_number(gate.reference), _number(gate.candidate), _number(gate.difference, sign=True)]
    return f"| {gate.metric} | {' | '.join(numbers)} | {interval} | {MARKS[gate.outcome]} {gate.outcome} |"


def _metrics(result: PipelineResult) -> list[str]:
    before, after = result.base.metrics, result.head.metrics
    rows = []
    for name in sorted(before.keys() | after.keys()):
        old, new = before.get(name), after.get(name)
        if old != new:
            delta = new - old if isinstance(old, int | float) and isinstance(new, int | float) else None
            rows.append(f"| {name} | {_number(old)} | {_number(new)} | {_number(delta, sign=True)} |")
    if not rows:
        return []
    head = ["| metric | before | after | difference |", "|---|---|---|---|"]
    return ["", "<details><summary>Metrics that differ</summary>", "", *head, *rows, "", "</details>"]


def _losses(result: PipelineResult) -> list[str]:
    sides = [("before", result.base.losses), ("after", result.head.losses)]
    curves = [
        f"{name:<7}{spark(losses)}  {losses[0]:.3f} → {losses[-1]:.3f}" for name, losses in sides if len(losses) > 1
    ]
    return ["", "Training loss:", "```", *curves, "```"] if curves else []


def spark(values: Sequence[float]) -> str:
    """A curve of at most 40 characters: the mean of each piece, from the lowest to the highest bar."""
    size = max(1, -(-len(values) // _MAX_BARS))
    means = [sum(piece) / len(piece) for piece in (values[i : i + size] for i in range(0, len(values), size))]
    low, high = min(means), max(means)
    span = (high - low) or 1.0
    return "".join(_BARS[round((mean - low) / span * (len(_BARS) - 1))] for mean in means)


def _number(value: object, *, sign: bool = False) -> str:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return "" if value is None else str(value)
    return f"{value:+.4g}" if sign else f"{value:.4g}"
