"""One self-contained HTML page for a run: no script, no network, charts inline."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from graftline.digest import Digest, write_text
from graftline.evaluate.engine_difference import EngineDifference
from graftline.evaluate.side_by_side import ShownRow
from graftline.evaluate.verdict import SliceResult
from graftline.plain_text import count

Outcome = Literal["pass", "fail", "inconclusive"]


@dataclass(frozen=True, kw_only=True)
class Gate:
    """A gate: the paired difference candidate − reference with its interval."""

    name: str
    metric: str
    better: Literal["higher", "lower"]
    candidate: float
    reference: float
    difference: float
    low: float
    high: float
    threshold: float
    """The interval must be beyond this difference (above it if higher is better)."""
    outcome: Outcome
    num_items: int
    detectable: float | None = None
    """The smallest difference that this sample can detect."""


@dataclass(frozen=True, kw_only=True)
class LossPoint:
    """Mean loss per supervised token (nats) at an optimizer step."""

    step: int
    training: float
    evaluation: float | None = None


@dataclass(frozen=True, kw_only=True)
class Confusion:
    """Counts by true label (row) and predicted label (column)."""

    labels: tuple[str, ...]
    counts: tuple[tuple[int, ...], ...]


@dataclass(frozen=True, kw_only=True)
class LayerError:
    """Relative error of a quantized weight: ‖W − Ŵ‖_F / ‖W‖_F."""

    name: str
    relative_error: float


@dataclass(frozen=True, kw_only=True)
class StageCost:
    """Time and memory of a stage."""

    name: str
    seconds: float
    peak_bytes: int
    """Largest resident memory, including child processes."""


@dataclass(frozen=True, kw_only=True)
class MemoryPart:
    """Memory of one part of training, as planned and as measured (None: not measured separately)."""

    name: str
    low_bytes: int
    expected_bytes: int
    high_bytes: int
    measured_bytes: int | None = None


@dataclass(frozen=True, kw_only=True)
class MetricRow:
    """A metric of base, production and candidate, with the candidate's 95 % interval."""

    name: str
    base: float | None
    production: float | None
    candidate: float
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True, kw_only=True)
class ReportData:
    """The content of a report; a run that stopped early lacks parts of it."""

    pipeline: str
    created: datetime
    outcome: Outcome | None
    """The gate's verdict; None if the run did not reach the gate."""
    reasons: tuple[str, ...] = ()
    """Why, in sentences."""
    facts: tuple[tuple[str, str], ...] = ()
    """The line under the title: base, method, rows, trained parameters…"""
    gates: tuple[Gate, ...] = ()
    metrics: tuple[MetricRow, ...] = ()
    slices: tuple[SliceResult, ...] = ()
    """The pipeline's metric on slices of the evaluation rows."""
    loss: tuple[LossPoint, ...] = ()
    confusion: Confusion | None = None
    sample: tuple[tuple[str, bool], ...] = ()
    """The first training row in pieces, each with whether it is learned; empty if texts are hidden."""
    worst_rows: tuple[ShownRow, ...] = ()
    """Held-out rows on which the candidate did worst."""
    engine: EngineDifference | None = None
    """The candidate on our own engine and on that of `evaluate.engine`, which the gates judged; None without one."""
    layer_errors: tuple[LayerError, ...] = ()
    stages: tuple[StageCost, ...] = ()
    memory: tuple[MemoryPart, ...] = ()
    lineage: tuple[tuple[str, str], ...] = ()
    """Name and digest or revision of everything that the result was made from."""


# Charts are inline SVG, a few kilobytes each, without scripts or fonts. The functions compute the positions; the
# template ``chart.svg`` draws and escapes. Colours come from the page's style sheet.

_LOW_RGB, _HIGH_RGB = (246, 248, 252), (36, 84, 190)


@dataclass(frozen=True)
class Shape:
    """An SVG element."""

    tag: str
    attributes: dict[str, float | str]
    """Integers and texts are written as they are, floats with one decimal."""
    title: str = ""
    """The tooltip."""
    text: str = ""


@dataclass(frozen=True)
class Chart:
    """Shapes on a canvas, lengths in pixels; ``title`` is for screen readers."""

    width: float
    height: float
    title: str
    shapes: Sequence[Shape]


def shape(tag: str, style: str = "", *, title: str = "", text: str = "", **attributes: float | str) -> Shape:
    """An element with the class ``style``; ``text_anchor`` becomes ``text-anchor``."""
    named: dict[str, float | str] = {"class": style} if style else {}
    named |= {name.replace("_", "-"): value for name, value in attributes.items()}
    return Shape(tag, named, title, text)


def gate_strip(gate: Gate, *, width: int = 320, height: int = 46) -> Chart:
    """A gate's interval against its threshold and zero, on a separate scale."""
    values = [gate.low, gate.high, gate.threshold, 0.0]
    start, end = min(values), max(values)
    margin = (end - start) * 0.08 or 1.0
    start, end = start - margin, end + margin

    def x(value: float) -> float:
        return 8 + (value - start) / (end - start) * (width - 16)

    left, right = (8.0, x(gate.threshold)) if gate.better == "higher" else (x(gate.threshold), width - 8.0)
    parts = [
        shape("rect", "forbidden", x=left, y=3, width=max(0.0, right - left), height=24),
        shape("line", "axis", x1=8, x2=width - 8, y1=27, y2=27),
        shape("line", "zero", x1=x(0), x2=x(0), y1=3, y2=31),
        shape("line", "limit", x1=x(gate.threshold), x2=x(gate.threshold), y1=3, y2=27),
        shape("line", f"interval {gate.outcome}", x1=x(gate.low), x2=x(gate.high), y1=15, y2=15),
        shape("circle", f"estimate {gate.outcome}", cx=x(gate.difference), cy=15, r=5),
        _text(x(0), 42, "0", anchor="middle"),
    ]
    if abs(x(gate.threshold) - x(0)) > 60:
        middle_of_text = min(max(x(gate.threshold), 40), width - 40)
        parts.append(_text(middle_of_text, 42, f"limit {gate.threshold:+.3g}", anchor="middle"))
    interval = f"{gate.low:+.4g} to {gate.high:+.4g}"
    return Chart(width, height, f"{gate.name}: {gate.difference:+.4g}, {interval}, limit {gate.threshold:+.4g}", parts)


def loss_chart(points: Sequence[LossPoint], *, width: int = 640, height: int = 240) -> Chart:
    """Training loss as a thin line, its running mean as a bold one, evaluation loss as points."""
    values = [p.training for p in points] + [p.evaluation for p in points if p.evaluation is not None]
    ticks = round_ticks(min(0.0, *values), max(values))
    last_step = max(p.step for p in points)
    left, right, top, bottom = 46, width - 12, 10, height - 34

    def x(step: float) -> float:
        return left + step / max(last_step, 1) * (right - left)

    def y(value: float) -> float:
        return bottom - (value - ticks[0]) / (ticks[-1] - ticks[0]) * (bottom - top)

    parts: list[Shape] = []
    for tick in ticks:
        parts.append(shape("line", "grid", x1=left, x2=right, y1=y(tick), y2=y(tick)))
        parts.append(_text(left - 8, y(tick) + 4, f"{tick:g}", anchor="end"))
    steps = [step for step in round_ticks(0, last_step) if step <= last_step]
    parts += [_text(x(step), bottom + 18, f"{step:g}", anchor="middle") for step in steps]
    parts.append(_text((left + right) / 2, height - 2, "step", anchor="middle"))
    parts.append(_line("thin", [(x(p.step), y(p.training)) for p in points]))
    smooth = _running_mean([p.training for p in points])
    parts.append(_line("bold", [(x(p.step), y(value)) for p, value in zip(points, smooth, strict=True)]))
    for p in points:
        if p.evaluation is not None:
            title = f"step {p.step}: evaluation loss {p.evaluation:.4g}"
            parts.append(shape("circle", "evaluation", title=title, cx=x(p.step), cy=y(p.evaluation), r=4))
    first, last = points[0].training, points[-1].training
    return Chart(width, height, f"Loss, {first:.3g} at the first step and {last:.3g} at the last", parts)


def confusion_chart(confusion: Confusion, *, cell: int = 40) -> Chart:
    """True labels down, predicted labels across; a cell's colour is its share of the row."""
    labels = confusion.labels
    left = 16 + 7 * max(len(label) for label in labels)
    top = 22
    parts: list[Shape] = []
    for row, (label, counts) in enumerate(zip(labels, confusion.counts, strict=True)):
        total = sum(counts) or 1
        y = top + row * cell
        parts.append(_text(left - 8, y + cell / 2 + 4, label, anchor="end"))
        for column, answers in enumerate(counts):
            x = left + column * cell
            title = f"{label} → {labels[column]}: {answers} of {total}"
            parts.append(_cell(x, y, cell - 2, cell - 2, answers / total, title))
            if answers:
                style = "on-dark" if answers / total > 0.55 else "value"
                parts.append(_text(x + cell / 2 - 1, y + cell / 2 + 4, str(answers), anchor="middle", style=style))
    bottom = top + len(labels) * cell
    parts.append(_text(left, 12, "predicted →", style="muted"))
    parts += [_slanted(left + (i + 0.5) * cell, bottom + 12, label) for i, label in enumerate(labels)]
    return Chart(left + len(labels) * cell + 8, bottom + left - 10, "Confusion matrix", parts)


def layer_chart(errors: Sequence[LayerError], *, width: int = 760) -> Chart:
    """Relative error of each quantized weight: a row a kind of layer, a column a block."""
    table: dict[str, dict[int, LayerError]] = {}
    for error in errors:
        kind, block = _kind_and_block(error.name)
        table.setdefault(kind, {})[block] = error
    num_blocks = 1 + max(block for row in table.values() for block in row)
    low, high = min(e.relative_error for e in errors), max(e.relative_error for e in errors)
    left, row_height = 16 + 7 * max(len(kind) for kind in table), 22
    cell = (width - left - 10) / num_blocks
    parts: list[Shape] = []
    for row, (kind, blocks) in enumerate(table.items()):
        y = 4 + row * row_height
        parts.append(_text(left - 8, y + 14, kind, anchor="end"))
        for block, error in blocks.items():
            share = (error.relative_error - low) / (high - low) if high > low else 0.5
            title = f"{error.name}: {error.relative_error:.4f}"
            parts.append(_cell(left + block * cell, y, max(cell - 1.5, 0.5), row_height - 2, share, title))
    bottom = 4 + len(table) * row_height
    step = max(1, num_blocks // 10)
    parts += [_text(left + (b + 0.5) * cell, bottom + 14, str(b), anchor="middle") for b in range(0, num_blocks, step)]
    parts.append(_text(left - 8, bottom + 14, "block", anchor="end", style="muted"))
    return Chart(width, bottom + 20, f"Relative quantization error, {low:.4f} to {high:.4f}", parts)


def memory_chart(memory: Sequence[MemoryPart], *, width: int = 760) -> Chart:
    """Planned memory as a bar from low to high with a tick at the expected value; measured memory as a point."""
    most = max(max(part.high_bytes, part.measured_bytes or 0) for part in memory)
    left, right, row_height = 16 + 7 * max(len(part.name) for part in memory), width - 90, 26

    def x(num_bytes: float) -> float:
        return left + num_bytes / max(most, 1) * (right - left)

    parts: list[Shape] = []
    for row, part in enumerate(memory):
        y = 4 + row * row_height
        parts.append(_text(left - 8, y + 15, part.name, anchor="end"))
        parts.append(shape("rect", "track", x=left, y=y + 4, width=right - left, height=14, rx=3))
        span = max(x(part.high_bytes) - x(part.low_bytes), 2)
        parts.append(shape("rect", "range", x=x(part.low_bytes), y=y + 4, width=span, height=14, rx=3))
        expected = x(part.expected_bytes)
        parts.append(shape("line", "expected", x1=expected, x2=expected, y1=y + 2, y2=y + 20))
        if part.measured_bytes is not None:
            parts.append(shape("circle", "measured", cx=x(part.measured_bytes), cy=y + 11, r=5))
        shown = part.expected_bytes if part.measured_bytes is None else part.measured_bytes
        parts.append(_text(right + 8, y + 15, megabytes(shown)))
    return Chart(width, 8 + len(memory) * row_height, "Memory, planned and measured", parts)


def megabytes(num_bytes: float) -> str:
    """``512 MB``, ``1.6 GB`` (powers of ten)."""
    return f"{num_bytes / 1e9:.1f} GB" if num_bytes >= 1e9 else f"{num_bytes / 1e6:.0f} MB"


def _kind_and_block(name: str) -> tuple[str, int]:
    """``model.layers.3.self_attn.q_proj`` → (``self_attn.q_proj``, 3); a name without a number is in block 0."""
    parts = name.split(".")
    numbers = [i for i, part in enumerate(parts) if part.isdigit()]
    if not numbers:
        return name, 0
    return ".".join(parts[numbers[0] + 1 :]) or name, int(parts[numbers[0]])


def round_ticks(low: float, high: float) -> list[float]:
    """Four to eight round values that enclose the range."""
    span = (high - low) or 1.0
    step = 10 ** math.floor(math.log10(span / 4))
    step *= next(factor for factor in (1, 2, 5, 10) if span / (step * factor) <= 6)
    first, last = math.floor(low / step), math.ceil(high / step)
    return [index * step for index in range(first, max(last, first + 1) + 1)]


def _running_mean(values: Sequence[float]) -> list[float]:
    window = max(1, len(values) // 10)
    return [sum(part) / len(part) for part in (values[max(0, i - window + 1) : i + 1] for i in range(len(values)))]


def _cell(x: float, y: float, width: float, height: float, share: float, title: str) -> Shape:
    rgb = ",".join(f"{low + (high - low) * share:.0f}" for low, high in zip(_LOW_RGB, _HIGH_RGB, strict=True))
    x, y, width, height = float(x), float(y), float(width), float(height)
    return shape("rect", title=title, x=x, y=y, width=width, height=height, rx=2, fill=f"rgb({rgb})")


def _line(style: str, points: Sequence[tuple[float, float]]) -> Shape:
    return shape("polyline", style, points=" ".join(f"{x:.1f},{y:.1f}" for x, y in points))


def _text(x: float, y: float, text: str, *, anchor: str = "start", style: str = "label") -> Shape:
    return shape("text", style, text=text, x=float(x), y=float(y), text_anchor=anchor)


def _slanted(x: float, y: float, text: str) -> Shape:
    place = f"translate({x:.1f} {y:.1f}) rotate(-50)"
    return shape("text", "label", text=text, transform=place, text_anchor="end")


def page_environment() -> Environment:
    """Jinja over the templates: everything is escaped, unknown names are errors; ``draw`` draws a chart, if any."""
    environment = Environment(
        loader=PackageLoader("graftline.release"), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    environment.globals["style"] = Markup(  # noqa: S704  # our own stylesheet
        (files("graftline.release") / "templates" / "page.css").read_text(encoding="utf-8")
    )
    environment.globals |= {"megabytes": megabytes, "count": count}
    macros: Any = environment.get_template("chart.svg").module
    environment.globals["draw"] = macros.draw
    return environment


def render_report(data: ReportData) -> str:
    """The page's HTML."""
    errors = [error.relative_error for error in data.layer_errors]
    return (
        page_environment()
        .get_template("report.html")
        .render(
            data=data,
            gate_strip=gate_strip,
            loss_chart=loss_chart,
            confusion_chart=confusion_chart,
            layer_chart=layer_chart,
            memory_chart=memory_chart,
            layer_range=(min(errors), max(errors)) if errors else None,
            longest=max((stage.seconds for stage in data.stages), default=0.0) or 1.0,
            duration=_duration,
            number=_number,
        )
    )


def write_report(path: Path, data: ReportData) -> Digest:
    """Write the page; returns the file's digest."""
    return write_text(path, render_report(data))


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    return f"{seconds // 60:.0f} min {seconds % 60:02.0f} s"


def _number(value: float | None) -> str:
    if value is None:
        return "–"
    # Bytes and perplexities: 9,824,262 rather than 9.824e+06.
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
