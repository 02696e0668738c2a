"""The comment on a pull request: one Markdown text, complete without links, short enough for any server."""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from graftline.address import mask_secrets
from graftline.evaluate.scores import CANDIDATE
from graftline.evaluate.side_by_side import ShownAnswer, ShownRow
from graftline.evaluate.verdict import GateResult, Verdict
from graftline.plain_text import count, one_line
from graftline.workflow.against_base import decided, explain
from graftline.workflow.changes import PipelineChange
from graftline.workflow.deciding import DecidingSetting

MAX_BYTES = 60_000
"""Of a comment. GitHub refuses more than 65,536 characters, however it counts them; the rest is for what a server
adds."""
_MAX_LINE_BYTES = 4_000
_FENCE = re.compile(r"\s*(`{3,}|~{3,})")


def size(lines: Sequence[str]) -> int:
    """UTF-8 bytes of the lines with their newlines."""
    return sum(len(line.encode()) + 1 for line in lines)


def clip(text: str, max_bytes: int) -> str:
    """The start of a text, in whole characters, with … if something was cut."""
    data = text.encode()
    return text if len(data) <= max_bytes else data[: max_bytes - 3].decode(errors="ignore") + "…"


def clip_pair(old: str, new: str, max_bytes: int) -> tuple[str, str]:
    """Two different texts, each cut so that the first difference remains visible."""
    same = next(
        (i for i, pair in enumerate(zip(old, new, strict=False)) if pair[0] != pair[1]), min(len(old), len(new))
    )
    start = max(0, same - max_bytes // 8)
    if start and max(size([old]), size([new])) > max_bytes:
        old, new = "…" + old[start:], "…" + new[start:]
    return clip(old, max_bytes), clip(new, max_bytes)


def cut(lines: Sequence[str], max_bytes: int) -> list[str]:
    """The lines, or those that fit and a note with the number of missing ones.

    A code block or ``<details>`` that is open at the cut is closed.
    """
    lines = [clip(line, _MAX_LINE_BYTES) for line in lines]
    if size(lines) <= max_bytes:
        return lines
    room = max_bytes - size(_note(len(lines)))
    used, state = 0, _Open()
    for kept, line in enumerate(lines):
        used, after = used + size([line]), state.after(line)
        if used + size(after.closers) > room:
            return [*lines[:kept], *state.closers, *_note(len(lines) - kept)]
        state = after
    return lines


def _note(missing: int) -> list[str]:
    return ["", f"*{missing} more lines are in the run's files.*"]


@dataclass(frozen=True)
class _Open:
    """What is open after some lines of Markdown: a code block's fence, and the number of ``<details>``."""

    fence: str = ""
    details: int = 0

    def after(self, line: str) -> "_Open":
        found = _FENCE.match(line)
        if self.fence:
            ends = found and found[1].startswith(self.fence) and not line.strip().strip(self.fence[0])
            return replace(self, fence="") if ends else self
        if found:
            return replace(self, fence=found[1])
        return replace(self, details=max(0, self.details + line.count("<details") - line.count("</details>")))

    @property
    def closers(self) -> list[str]:
        return [*([self.fence] if self.fence else []), *(["", "</details>"] * self.details)]


Answer = Literal["pass", "fail", "inconclusive", "needs a look"]
"""The result for a pull request. ``needs a look``: a deciding setting was changed, or there is nothing to compare with,
so that a person must accept it."""
MARKS: dict[Answer, str] = {"fail": "❌", "needs a look": "👀", "inconclusive": "❔", "pass": "✅"}
"""Worst first."""
_BARS = "▁▂▃▄▅▆▇█"
_MAX_REASONS = 12
_MAX_BARS = 40
_MAX_NAMES = 5
_MAX_VALUE_BYTES = 240
_MAX_REASON_BYTES = 160
_MAX_ANSWER_BYTES = 240
_MAX_PROBLEM_BYTES = 2_000
_SETTINGS_BYTES = 16_000
_SECTION_BYTES = 16_000
_REST_BYTES = 6_000


@dataclass(frozen=True)
class RevisionFigures:
    """A revision's metrics and training losses, if it has any."""

    metrics: Mapping[str, Any] = field(default_factory=dict)
    losses: Sequence[float] = ()


@dataclass(frozen=True)
class PipelineResult:
    """The findings about one changed pipeline.

    ``verdict``: the head's gates, against production and base. ``comparison``: the head's candidate against the base
    revision's, by the base revision's gates. ``former``: the base revision's gates on the head, against production and
    base; None if the gates are unchanged. ``settings``: deciding settings that differ. ``problem``: why the head cannot
    pass automatically, or has no verdict. ``worst_rows``: held-out rows that the head answered worst.
    """

    change: PipelineChange
    stages_run: tuple[str, ...] = ()
    verdict: Verdict | None = None
    verdict_text: str = ""
    comparison: Verdict | None = None
    former: Verdict | None = None
    settings: tuple[DecidingSetting, ...] = ()
    base: RevisionFigures = RevisionFigures()
    head: RevisionFigures = RevisionFigures()
    problem: str | None = None
    worst_rows: tuple[ShownRow, ...] = ()

    @property
    def compared(self) -> tuple[GateResult, ...]:
        """The gates of the comparison with their final outcomes."""
        return tuple(decided(gate) for gate in self.comparison.gates) if self.comparison else ()

    @property
    def outcome(self) -> Answer:
        """``pass`` only if every gate passes, including those that the head did not write."""
        if self.change.removed:
            return "needs a look"
        verdicts = [verdict.outcome for verdict in (self.verdict, self.former) if verdict]
        outcomes = {*verdicts, *(gate.outcome for gate in self.compared)}
        if self.verdict is None or "fail" in outcomes:
            return "fail"
        if self.settings or self.problem or self.comparison is None:
            return "needs a look"
        return "inconclusive" if "inconclusive" in outcomes else "pass"


def worst(results: Sequence[PipelineResult], settings: Sequence[DecidingSetting] = ()) -> Answer:
    """The outcome of all changed pipelines and deciding settings together; ``pass`` if nothing changed."""
    found: set[Answer] = {result.outcome for result in results}
    return _worst(found | {"needs a look"} if settings else found)


def _worst(found: set[Answer]) -> Answer:
    return next((outcome for outcome in MARKS if outcome in found), "pass")


def render(
    base: str,
    head: str,
    results: Sequence[PipelineResult],
    *,
    num_pipelines: int,
    link: str | None,
    settings: Sequence[DecidingSetting] = (),
) -> str:
    """The comment, of at most `MAX_BYTES` bytes.

    Args:
        base: commit compared with.
        head: commit evaluated.
        results: one per changed pipeline; the worst are shown first.
        num_pipelines: number of all pipelines.
        link: address of the run with its log.
        settings: deciding settings that differ, besides those of ``results``.
    """
    all_settings = list(dict.fromkeys([*settings, *(each for result in results for each in result.settings)]))
    ending = ["", f"[Log and files of this run]({clip(mask_secrets(link), _MAX_PROBLEM_BYTES)})"] if link else []
    lines = _heading(base, head, results, all_settings, num_pipelines)
    lines += cut(_masked(_settings_table(all_settings)), _SETTINGS_BYTES)
    ordered = sorted(results, key=lambda result: list(MARKS).index(result.outcome))
    for number, result in enumerate(ordered):
        section = cut(_masked(["", *_pipeline(result)]), _SECTION_BYTES)
        if size([*lines, *section, *ending]) > MAX_BYTES - _REST_BYTES:
            lines += _rest(ordered[number:])
            break
        lines += section
    return "\n".join([*cut(lines, MAX_BYTES - size(ending)), *ending]) + "\n"


def _masked(lines: Sequence[str]) -> list[str]:
    """The lines without secrets; to be called before cutting, because a cut address would not be recognized."""
    return mask_secrets("\n".join(lines)).split("\n") if lines else []


def _heading(
    base: str, head: str, results: Sequence[PipelineResult], settings: Sequence[DecidingSetting], num_pipelines: int
) -> list[str]:
    outcome = worst(results, settings)
    nothing = not results and not settings
    title = "## graftline: nothing to evaluate" if nothing else f"## graftline: {MARKS[outcome]} {outcome}"
    counts = f": {_counts(results)}" if len(results) > 1 else ""
    lines = [
        title,
        "",
        f"`{base[:12]}` → `{head[:12]}`: {len(results)} of {count(num_pipelines, 'pipeline')} changed{counts}.",
    ]
    if not results:
        lines.append("No stage was run: nothing that a pipeline depends on differs.")
    return lines


def _counts(results: Sequence[PipelineResult]) -> str:
    found = Counter(result.outcome for result in results)
    return ", ".join(f"{found[outcome]} {mark} {outcome}" for outcome, mark in MARKS.items() if found[outcome])


def _settings_table(settings: Sequence[DecidingSetting]) -> list[str]:
    if not settings:
        return []
    # A change that many pipelines share through an anchor is one row.
    pipelines: dict[tuple[str, str | None, str | None], list[str]] = {}
    for each in settings:
        pipelines.setdefault((each.key, each.old, each.new), []).append(each.pipeline or "all")
    rows = [
        f"| {_names(names)} | {_cell(clip(key, _MAX_VALUE_BYTES))} | {_values(old, new)} |"
        for (key, old, new), names in pipelines.items()
    ]
    return [
        "",
        "### 👀 Changed here, and a person has to look: what decides",
        "",
        "This pull request changes what is measured, what passes or who may release. It does not pass by itself, "
        "whatever the results below.",
        "",
        "| pipeline | what decides | base revision | this revision |",
        "|---|---|---|---|",
        *rows,
    ]


def _names(names: Sequence[str]) -> str:
    more = len(names) - _MAX_NAMES
    return ", ".join(names[:_MAX_NAMES]) + (f" and {more} more" if more > 0 else "")


def _values(old: str | None, new: str | None) -> str:
    if old is None or new is None:
        return " | ".join("–" if value is None else _cell(clip(value, _MAX_VALUE_BYTES)) for value in (old, new))
    return " | ".join(_cell(value) for value in clip_pair(old, new, _MAX_VALUE_BYTES))


def _cell(text: str) -> str:
    """`_code` in a table's cell."""
    return _code(text).replace("|", "\\|")


def _code(text: str) -> str:
    """Text as code, so that a file's content cannot format the comment or mention anybody."""
    text = one_line(mask_secrets(" ".join(text.split())))
    longest = max((len(run) for run in "".join(c if c == "`" else " " for c in text).split()), default=0)
    mark, space = "`" * (longest + 1), " " if longest else ""
    return f"{mark}{space}{text}{space}{mark}"


def _rest(results: Sequence[PipelineResult]) -> list[str]:
    lines = ["", f"### {len(results)} more pipelines: {_counts(results)}", ""]
    for number, result in enumerate(results):
        line = f"- {clip(result.change.pipeline, _MAX_REASON_BYTES)}: {MARKS[result.outcome]} {result.outcome}"
        if size([*lines, line]) > _REST_BYTES - 200:
            return [*lines, f"- and {len(results) - number} more: {_counts(results[number:])}"]
        lines.append(line)
    return lines


def _pipeline(result: PipelineResult) -> list[str]:
    change = result.change
    lines = [f"### {change.pipeline}: {MARKS[result.outcome]} {result.outcome}", ""]
    shown = ", ".join(_code(clip(mask_secrets(reason), _MAX_REASON_BYTES)) for reason in change.reasons[:_MAX_REASONS])
    more = len(change.reasons) - _MAX_REASONS
    lines.append(f"Changed: {shown}{f' and {more} more' if more > 0 else ''}.")
    if result.verdict:
        lines.append(f"Stages run: {', '.join(result.stages_run) or 'none, all results were in the cache'}.")
    if result.problem:
        lines += ["", f"> {_code(clip(mask_secrets(' '.join(result.problem.split())), _MAX_PROBLEM_BYTES))}"]
    if result.comparison:
        lines += ["", "#### Against the base revision, by its gates", "", *_comparison(result.compared)]
    if result.former:
        lines += ["", "#### Against production and base, by the base revision's gates", "", *_former(result.former)]
    if result.verdict_text:
        # The verdict has a heading, which goes one level down.
        lines += ["", *result.verdict_text.strip().replace("### ", "#### ", 1).split("\n")]
    return [*lines, *_losses(result), *_metrics(result), *_answers(result.worst_rows)]


def _comparison(gates: Sequence[GateResult]) -> list[str]:
    lines = ["| metric | base revision | this revision | difference | interval | |", "|---|---|---|---|---|---|"]
    lines += [_row(gate) for gate in gates]
    return [*lines, "", *dict.fromkeys(f"- **{_label(gate)}**: {explain(gate)}" for gate in gates)]


def _label(gate: GateResult) -> str:
    return f"{gate.metric} (guard)" if gate.guard else gate.metric


def _row(gate: GateResult) -> str:
    paired = gate.interval if gate.test != "limit" else None
    interval = "" if paired is None else f"[{paired[0]:+.3f}, {paired[1]:+.3f}]"
    numbers = [_number(gate.reference), _number(gate.candidate), _number(gate.difference, sign=True)]
    return f"| {_label(gate)} | {' | '.join(numbers)} | {interval} | {MARKS[gate.outcome]} {gate.outcome} |"


def _former(verdict: Verdict) -> list[str]:
    return [f"- **{gate.name}**: {MARKS[gate.outcome]} {gate.outcome}: {gate.reason}" for gate in verdict.gates]


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


def _answers(rows: Sequence[ShownRow]) -> list[str]:
    if not rows:
        return []
    with_texts = rows[0].prompt is not None
    texts = ["prompt", "expected"] if with_texts else []
    columns = ["row", *texts, *("this revision" if name == CANDIDATE else name for name in rows[0].answers)]
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for row in rows:
        shown = [_text(row.prompt or ""), _text(row.expected or "")] if with_texts else []
        lines.append(f"| {' | '.join([str(row.line), *shown, *map(_answer, row.answers.values())])} |")
    title = f"{count(len(rows), 'held-out row')} that this revision answered worst"
    return ["", f"<details><summary>{title}</summary>", "", *lines, "", "</details>"]


def _answer(answer: ShownAnswer | None) -> str:
    if answer is None:
        return "–"
    score = f"{answer.score:.3g}"
    return score if answer.text is None else f"{_text(answer.text)} {score}"


def _text(text: str) -> str:
    return _cell(clip(mask_secrets(text), _MAX_ANSWER_BYTES)) if text.strip() else ""


def _losses(result: PipelineResult) -> list[str]:
    sides = [("before", result.base.losses), ("after", result.head.losses)]
    curves = [
        f"{name:<7}{spark(losses)}  {losses[0]:.3f} → {losses[-1]:.3f}" for name, losses in sides if len(losses) > 1
    ]
    return ["", "Training loss:", "```", *curves, "```"] if curves else []


def spark(values: Sequence[float]) -> str:
    """A curve of at most 40 bars, each for the mean of some values."""
    size = max(1, -(-len(values) // _MAX_BARS))
    means = [sum(piece) / len(piece) for piece in (values[i : i + size] for i in range(0, len(values), size))]
    low, high = min(means), max(means)
    span = (high - low) or 1.0
    return "".join(_BARS[round((mean - low) / span * (len(_BARS) - 1))] for mean in means)


def _number(value: object, *, sign: bool = False) -> str:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return "" if value is None else str(value)
    return f"{value:+.4g}" if sign else f"{value:.4g}"
