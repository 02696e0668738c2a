"""A static HTML page of a sweep: every variant's numbers over its seeds, as points with an interval and as a table.

Made from plain values, so that it needs no sweep to be drawn.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from markupsafe import Markup, escape

from graftline.digest import Digest, write_text
from graftline.release.pages.charts import round_ticks
from graftline.release.pages.report import page_environment

_ROW_HEIGHT = 34


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A number's mean over seeds; without an interval for a single seed."""

    mean: float
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True, kw_only=True)
class VariantView:
    """One variant. ``values``: the chosen metric by seed; ``difference``: to the first variant, seed by seed."""

    name: str
    values: tuple[tuple[int, float], ...]
    metrics: dict[str, Estimate]
    difference: Estimate | None
    missing: int = 0
    """Cells that are not done."""


@dataclass(frozen=True, kw_only=True)
class SweepView:
    """A sweep as far as it is done."""

    pipeline: str
    metric: str
    """The number that is drawn and whose differences are shown."""
    columns: tuple[str, ...]
    """Numbers that the table shows."""
    seeds: tuple[int, ...]
    variants: tuple[VariantView, ...]
    revisions: tuple[str, ...]
    """Commits that the cells ran at; more than one may mean that they cannot be compared."""
    failures: tuple[tuple[str, str], ...] = ()
    """Cells that failed, and why."""


def render_sweep(view: SweepView) -> str:
    """The page's HTML."""
    return page_environment().get_template("sweep.html").render(view=view, chart=chart, number=_number)


def write_sweep(path: Path, view: SweepView) -> Digest:
    """Write the page; returns the file's digest."""
    return write_text(path, render_sweep(view))


def chart(view: SweepView, *, width: int = 1000) -> Markup:
    """A row for a variant: a point for a seed, and the mean with its interval."""
    shown = [variant for variant in view.variants if variant.values]
    if not shown:
        return Markup("")
    estimates = [variant.metrics[view.metric] for variant in shown]
    values = [value for variant in shown for _, value in variant.values]
    values += [bound for one in estimates for bound in (one.low, one.high) if bound is not None]
    scale = round_ticks(min(values), max(values))
    left, right = 24 + 6.6 * max(len(variant.name) for variant in shown), width - 24
    bottom = 10 + _ROW_HEIGHT * len(shown)

    def x(value: float) -> float:
        return left + (value - scale[0]) / (scale[-1] - scale[0]) * (right - left)

    parts: list[str] = []
    for tick in scale:
        parts.append(f'<line class="grid" x1="{x(tick):.1f}" x2="{x(tick):.1f}" y1="6" y2="{bottom}"/>')
        parts.append(f'<text x="{x(tick):.1f}" y="{bottom + 16}" text-anchor="middle">{tick:.6g}</text>')
    parts.append(
        f'<text class="muted" x="{(left + right) / 2:.1f}" y="{bottom + 34}" text-anchor="middle">{view.metric}</text>'
    )
    for row, (variant, estimate) in enumerate(zip(shown, estimates, strict=True)):
        y = 10 + _ROW_HEIGHT * (row + 0.5)
        parts.append(f'<text x="{left - 12:.1f}" y="{y + 4}" text-anchor="end">{escape(variant.name)}</text>')
        parts += _marks(variant, estimate, x, y)
    title = f"{view.metric} of {len(shown)} variants"
    height = bottom + 42
    return Markup(
        f'<svg role="img" viewBox="0 0 {width} {height}" width="{width}" height="{height}">'
        f"<title>{escape(title)}</title>{''.join(parts)}</svg>"
    )


def _marks(variant: VariantView, estimate: Estimate, x: Callable[[float], float], y: float) -> list[str]:
    title = f"{variant.name}: {_with_interval(estimate)}"
    parts = []
    if estimate.low is not None and estimate.high is not None:
        parts.append(
            f'<line class="interval seeds" x1="{x(estimate.low):.1f}" x2="{x(estimate.high):.1f}" y1="{y}" y2="{y}"/>'
        )
    parts.append(f'<circle class="estimate seeds" cx="{x(estimate.mean):.1f}" cy="{y}" r="5.5">')
    parts.append(f"<title>{escape(title)}</title></circle>")
    parts += [
        f'<circle class="seed" cx="{x(value):.1f}" cy="{y}" r="3.5"><title>seed {seed}: {value:.5g}</title></circle>'
        for seed, value in variant.values
    ]
    return parts


def _with_interval(estimate: Estimate, *, sign: bool = False) -> str:
    mean, low, high = (
        None if value is None else format(value, ("+" if sign else "") + (",.0f" if abs(value) >= 1000 else ".4g"))
        for value in (estimate.mean, estimate.low, estimate.high)
    )
    return f"{mean} [{low}, {high}]" if low is not None else f"{mean}"


def _number(estimate: Estimate | None, *, sign: bool = False) -> Markup:
    """A cell of the table: the mean, and the interval small below it."""
    if estimate is None:
        return Markup("–")
    mean, _, interval = _with_interval(estimate, sign=sign).partition(" ")
    return Markup(f"{mean}<small>{interval.strip('[]').replace(', ', ' to ')}</small>") if interval else Markup(mean)
