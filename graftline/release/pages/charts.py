"""Charts as inline SVG, drawn by hand: crisp at any size, no script, no font, a few kilobytes each.

Colours come from the page's style sheet by class, so that a chart looks like the page around it.
"""

import math
from collections.abc import Sequence

from markupsafe import Markup, escape

from graftline.release.pages.report_data import Confusion, Gate, LayerError, LossPoint, MemoryPart

_LOW_RGB, _HIGH_RGB = (246, 248, 252), (36, 84, 190)


def gate_strip(gate: Gate, *, width: int = 320, height: int = 46) -> Markup:
    """A gate's interval against its threshold and zero, on a scale of its own."""
    values = [gate.low, gate.high, gate.threshold, 0.0]
    start, end = min(values), max(values)
    margin = (end - start) * 0.08 or 1.0
    start, end = start - margin, end + margin

    def x(value: float) -> float:
        return 8 + (value - start) / (end - start) * (width - 16)

    left, right = (8.0, x(gate.threshold)) if gate.better == "higher" else (x(gate.threshold), width - 8.0)
    parts = [
        f'<rect class="forbidden" x="{left:.1f}" y="3" width="{max(0.0, right - left):.1f}" height="24"/>',
        f'<line class="axis" x1="8" x2="{width - 8}" y1="27" y2="27"/>',
        f'<line class="zero" x1="{x(0):.1f}" x2="{x(0):.1f}" y1="3" y2="31"/>',
        f'<line class="limit" x1="{x(gate.threshold):.1f}" x2="{x(gate.threshold):.1f}" y1="3" y2="27"/>',
        f'<line class="interval {gate.outcome}" x1="{x(gate.low):.1f}" x2="{x(gate.high):.1f}" y1="15" y2="15"/>',
        f'<circle class="estimate {gate.outcome}" cx="{x(gate.difference):.1f}" cy="15" r="5"/>',
        _text(x(0), 42, "0", anchor="middle"),
    ]
    if abs(x(gate.threshold) - x(0)) > 60:
        middle_of_text = min(max(x(gate.threshold), 40), width - 40)
        parts.append(_text(middle_of_text, 42, f"limit {gate.threshold:+.3g}", anchor="middle"))
    interval = f"{gate.low:+.4g} to {gate.high:+.4g}"
    return _svg(width, height, f"{gate.name}: {gate.difference:+.4g}, {interval}, limit {gate.threshold:+.4g}", parts)


def loss_chart(points: Sequence[LossPoint], *, width: int = 640, height: int = 240) -> Markup:
    """Training loss as a thin line with its running mean, evaluation loss as points."""
    values = [p.training for p in points] + [p.evaluation for p in points if p.evaluation is not None]
    ticks = round_ticks(min(0.0, *values), max(values))
    last_step = max(p.step for p in points)
    left, right, top, bottom = 46, width - 12, 10, height - 34

    def x(step: float) -> float:
        return left + step / max(last_step, 1) * (right - left)

    def y(value: float) -> float:
        return bottom - (value - ticks[0]) / (ticks[-1] - ticks[0]) * (bottom - top)

    parts: list[str] = []
    for tick in ticks:
        parts.append(f'<line class="grid" x1="{left}" x2="{right}" y1="{y(tick):.1f}" y2="{y(tick):.1f}"/>')
        parts.append(_text(left - 8, y(tick) + 4, f"{tick:g}", anchor="end"))
    steps = [step for step in round_ticks(0, last_step) if step <= last_step]
    parts += [_text(x(step), bottom + 18, f"{step:g}", anchor="middle") for step in steps]
    parts.append(_text((left + right) / 2, height - 2, "step", anchor="middle"))
    parts.append(_line("thin", [(x(p.step), y(p.training)) for p in points]))
    smooth = _running_mean([p.training for p in points])
    parts.append(_line("bold", [(x(p.step), y(value)) for p, value in zip(points, smooth, strict=True)]))
    parts += [
        f'<circle class="evaluation" cx="{x(p.step):.1f}" cy="{y(p.evaluation):.1f}" r="4">'
        f"<title>step {p.step}: evaluation loss {p.evaluation:.4g}</title></circle>"
        for p in points
        if p.evaluation is not None
    ]
    return _svg(
        width,
        height,
        f"Loss, {points[0].training:.3g} at the first step and {points[-1].training:.3g} at the last",
        parts,
    )


def confusion_chart(confusion: Confusion, *, cell: int = 40) -> Markup:
    """True labels down, predicted labels across; a cell's colour is its share of the row."""
    labels = confusion.labels
    left = 16 + 7 * max(len(label) for label in labels)
    top = 22
    parts: list[str] = []
    for row, (label, counts) in enumerate(zip(labels, confusion.counts, strict=True)):
        total = sum(counts) or 1
        y = top + row * cell
        parts.append(_text(left - 8, y + cell / 2 + 4, label, anchor="end"))
        for column, count in enumerate(counts):
            x = left + column * cell
            title = f"{label} → {labels[column]}: {count} of {total}"
            parts.append(_cell(x, y, cell - 2, cell - 2, count / total, title))
            if count:
                style = "on-dark" if count / total > 0.55 else "value"
                parts.append(_text(x + cell / 2 - 1, y + cell / 2 + 4, str(count), anchor="middle", style=style))
    bottom = top + len(labels) * cell
    parts.append(_text(left, 12, "predicted →", style="muted"))
    parts += [_slanted(left + (i + 0.5) * cell, bottom + 12, label) for i, label in enumerate(labels)]
    return _svg(left + len(labels) * cell + 8, bottom + left - 10, "Confusion matrix", parts)


def layer_chart(errors: Sequence[LayerError], *, width: int = 760) -> Markup:
    """Relative error of each quantized weight: one row for a kind of layer, one column for a block."""
    table: dict[str, dict[int, LayerError]] = {}
    for error in errors:
        kind, block = _kind_and_block(error.name)
        table.setdefault(kind, {})[block] = error
    num_blocks = 1 + max(block for row in table.values() for block in row)
    low, high = min(e.relative_error for e in errors), max(e.relative_error for e in errors)
    left, row_height = 16 + 7 * max(len(kind) for kind in table), 22
    cell = (width - left - 10) / num_blocks
    parts: list[str] = []
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
    return _svg(width, bottom + 20, f"Relative quantization error, {low:.4f} to {high:.4f}", parts)


def memory_chart(memory: Sequence[MemoryPart], *, width: int = 760) -> Markup:
    """Planned memory as a bar from low to high with a tick at the expected value; measured as a point."""
    most = max(max(part.high_bytes, part.measured_bytes or 0) for part in memory)
    left, right, row_height = 16 + 7 * max(len(part.name) for part in memory), width - 90, 26

    def x(num_bytes: float) -> float:
        return left + num_bytes / max(most, 1) * (right - left)

    parts: list[str] = []
    for row, part in enumerate(memory):
        y = 4 + row * row_height
        parts.append(_text(left - 8, y + 15, part.name, anchor="end"))
        parts.append(f'<rect class="track" x="{left}" y="{y + 4}" width="{right - left}" height="14" rx="3"/>')
        span = max(x(part.high_bytes) - x(part.low_bytes), 2)
        parts.append(
            f'<rect class="range" x="{x(part.low_bytes):.1f}" y="{y + 4}" width="{span:.1f}" height="14" rx="3"/>'
        )
        expected = x(part.expected_bytes)
        parts.append(f'<line class="expected" x1="{expected:.1f}" x2="{expected:.1f}" y1="{y + 2}" y2="{y + 20}"/>')
        if part.measured_bytes is not None:
            parts.append(f'<circle class="measured" cx="{x(part.measured_bytes):.1f}" cy="{y + 11}" r="5"/>')
        shown = part.expected_bytes if part.measured_bytes is None else part.measured_bytes
        parts.append(_text(right + 8, y + 15, megabytes(shown)))
    return _svg(width, 8 + len(memory) * row_height, "Memory, planned and measured", parts)


def megabytes(num_bytes: float) -> str:
    """A size for people: ``512 MB``, ``1.6 GB`` (powers of ten)."""
    return f"{num_bytes / 1e9:.1f} GB" if num_bytes >= 1e9 else f"{num_bytes / 1e6:.0f} MB"


def _kind_and_block(name: str) -> tuple[str, int]:
    """``model.layers.3.self_attn.q_proj`` → (``self_attn.q_proj``, 3); what has no number is block 0 of its name."""
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


def _running_mean(values: Sequence[float], *, share: float = 0.1) -> list[float]:
    window = max(1, int(len(values) * share))
    return [sum(part) / len(part) for part in (values[max(0, i - window + 1) : i + 1] for i in range(len(values)))]


def _cell(x: float, y: float, width: float, height: float, share: float, title: str) -> str:
    rgb = ",".join(f"{low + (high - low) * share:.0f}" for low, high in zip(_LOW_RGB, _HIGH_RGB, strict=True))
    return (
        f'<rect x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}" rx="2" fill="rgb({rgb})">'
        f"<title>{escape(title)}</title></rect>"
    )


def _line(style: str, points: Sequence[tuple[float, float]]) -> str:
    return f'<polyline class="{style}" points="{" ".join(f"{x:.1f},{y:.1f}" for x, y in points)}"/>'


def _text(x: float, y: float, text: str, *, anchor: str = "start", style: str = "label") -> str:
    return f'<text class="{style}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def _slanted(x: float, y: float, text: str) -> str:
    place = f"translate({x:.1f} {y:.1f}) rotate(-50)"
    return f'<text class="label" transform="{place}" text-anchor="end">{escape(text)}</text>'


def _svg(width: float, height: float, title: str, parts: Sequence[str]) -> Markup:
    body = "".join(parts)
    return Markup(
        f'<svg role="img" viewBox="0 0 {width:.0f} {height:.0f}" width="{width:.0f}" height="{height:.0f}">'
        f"<title>{escape(title)}</title>{body}</svg>"
    )
