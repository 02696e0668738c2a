"""A static HTML page of a sweep: every variant's numbers over its seeds, as points with an interval and as a table.

Made from plain values, so that it needs no sweep to be drawn.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from markupsafe import Markup

from graftline.digest import Digest, write_text
from graftline.release.pages.charts import Chart, Shape, round_ticks, shape
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


def chart(view: SweepView, *, width: int = 1000) -> Chart | None:
    """A row for a variant: a point for a seed, and the mean with its interval; None before the first result."""
    shown = [variant for variant in view.variants if variant.values]
    if not shown:
        return None
    estimates = [variant.metrics[view.metric] for variant in shown]
    values = [value for variant in shown for _, value in variant.values]
    values += [bound for one in estimates for bound in (one.low, one.high) if bound is not None]
    scale = round_ticks(min(values), max(values))
    left, right = 24 + 6.6 * max(len(variant.name) for variant in shown), width - 24
    bottom = 10 + _ROW_HEIGHT * len(shown)

    def x(value: float) -> float:
        return left + (value - scale[0]) / (scale[-1] - scale[0]) * (right - left)

    parts: list[Shape] = []
    for tick in scale:
        parts.append(shape("line", "grid", x1=x(tick), x2=x(tick), y1=6, y2=bottom))
        parts.append(shape("text", text=f"{tick:.6g}", x=x(tick), y=bottom + 16, text_anchor="middle"))
    middle = (left + right) / 2
    parts.append(shape("text", "muted", text=view.metric, x=middle, y=bottom + 34, text_anchor="middle"))
    for row, (variant, estimate) in enumerate(zip(shown, estimates, strict=True)):
        y = 10 + _ROW_HEIGHT * (row + 0.5)
        parts.append(shape("text", text=variant.name, x=left - 12, y=y + 4, text_anchor="end"))
        parts += _marks(variant, estimate, x, y)
    return Chart(width, bottom + 42, f"{view.metric} of {len(shown)} variants", parts)


def _marks(variant: VariantView, estimate: Estimate, x: Callable[[float], float], y: float) -> list[Shape]:
    title = f"{variant.name}: {_with_interval(estimate)}"
    parts = []
    if estimate.low is not None and estimate.high is not None:
        parts.append(shape("line", "interval seeds", x1=x(estimate.low), x2=x(estimate.high), y1=y, y2=y))
    parts.append(shape("circle", "estimate seeds", title=title, cx=x(estimate.mean), cy=y, r=5.5))
    for seed, value in variant.values:
        parts.append(shape("circle", "seed", title=f"seed {seed}: {value:.5g}", cx=x(value), cy=y, r=3.5))
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
