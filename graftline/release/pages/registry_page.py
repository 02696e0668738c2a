"""Pages about more than one run: the registry's channels and releases, and a sweep's variants.

They are made from plain values; `graftline.registry.overview` reads the registry's from a store.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import Literal

from markupsafe import Markup

from graftline.digest import Digest, write_text
from graftline.release.pages.report import Chart, Shape, page_environment, round_ticks, shape

State = Literal["verified", "damaged", "unsigned", "not checked"]


@dataclass(frozen=True, kw_only=True)
class EntryView:
    """One entry of a channel's history."""

    number: int
    time: datetime
    action: str
    version: str
    actor: str
    reason: str
    approvers: tuple[str, ...] = ()
    checks: tuple[str, ...] = ()
    signer: str | None = None
    """Name of the key that signed it."""
    problem: str | None = None
    """Why it does not count."""


@dataclass(frozen=True, kw_only=True)
class ChannelView:
    """A channel. ``problem``: why its history cannot be trusted; then there are no entries."""

    name: str
    entries: tuple[EntryView, ...] = ()
    """Oldest first."""
    problem: str | None = None


@dataclass(frozen=True, kw_only=True)
class ReleaseView:
    """A release and its state."""

    version: str
    state: State
    detail: str
    """Who signed it, or what is wrong."""
    created: datetime | None = None
    num_bytes: int = 0
    num_files: int = 0
    outcome: str | None = None
    against: str = ""
    channels: tuple[str, ...] = ()
    """Channels that hold it now."""
    lineage: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True, kw_only=True)
class PipelineView:
    """A pipeline's channels and releases, newest release first."""

    name: str
    channels: tuple[ChannelView, ...]
    releases: tuple[ReleaseView, ...]
    looks: tuple[str, ...] = ()
    """How often promotions looked at the rows that are kept back for them, in sentences."""


@dataclass(frozen=True, kw_only=True)
class RegistryView:
    """A store at one point in time."""

    store: str
    time: datetime
    pipelines: tuple[PipelineView, ...]
    warning: str | None = None
    """What was not checked."""


def render_registry(view: RegistryView) -> str:
    """The page's HTML."""
    template = page_environment().get_template("registry.html")
    return template.render(view=view, timeline=timeline, short=short_version)


def write_registry(path: Path, view: RegistryView) -> Digest:
    """Write the page; returns the file's digest."""
    return write_text(path, render_registry(view))


def short_version(version: str) -> str:
    """``20261124T061800Z-0123456789ab`` → ``24 Nov 06:18 · 0123456``."""
    stamp, _, digest = version.partition("-")
    try:
        made = datetime.strptime(stamp, "%Y%m%dT%H%M%SZ")
    except ValueError:
        return version
    return f"{made:%-d %b %H:%M} · {digest[:7]}"


def timeline(channels: Sequence[ChannelView], now: datetime, *, width: int = 1000) -> Chart | None:
    """What each channel held when: a row a channel, a bar a stay, a colour a release; None if nothing was held."""
    lanes = [channel for channel in channels if channel.entries]
    if not lanes:
        return None
    left, right, row_height = 110, width - 12, 40
    start = min(lane.entries[0].time for lane in lanes)
    span = max(now - start, timedelta(minutes=1))
    versions = list(dict.fromkeys(entry.version for lane in lanes for entry in lane.entries))

    def x(moment: datetime) -> float:
        return left + (moment - start) / span * (right - left)

    parts: list[Shape] = []
    for row, lane in enumerate(lanes):
        y = 6 + row * row_height
        parts.append(shape("text", text=lane.name, x=left - 10, y=y + 20, text_anchor="end"))
        ends = [entry.time for entry in lane.entries[1:]] + [now]
        for entry, end in zip(lane.entries, ends, strict=True):
            hue = versions.index(entry.version) * 137 % 360  # the golden angle keeps neighbours distinct
            length = max(x(end) - x(entry.time), 2)
            title = f"{entry.version}: {entry.action} by {entry.actor}, {entry.time:%Y-%m-%d %H:%M} UTC"
            fill, stroke = f"hsl({hue} 55% 86%)", f"hsl({hue} 40% 62%)"
            at = x(entry.time)
            parts.append(shape("rect", title=title, x=at, y=y, width=length, height=30, rx=4, fill=fill, stroke=stroke))
            if length > 165:
                parts.append(shape("text", text=short_version(entry.version), x=at + 8, y=y + 20))
    bottom = 6 + len(lanes) * row_height
    parts.append(shape("text", "muted", text=f"{start:%Y-%m-%d %H:%M}", x=left, y=bottom + 12))
    until = f"{now:%Y-%m-%d %H:%M} UTC"
    parts.append(shape("text", "muted", text=until, x=right, y=bottom + 12, text_anchor="end"))
    return Chart(width, bottom + 18, "What each channel held when", parts)


_ROW_HEIGHT = 34


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A mean over seeds; a single seed has no interval."""

    mean: float
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True, kw_only=True)
class VariantView:
    """A variant. ``values``: the chosen metric by seed; ``difference``: from the first variant, paired by seed."""

    name: str
    values: tuple[tuple[int, float], ...]
    metrics: dict[str, Estimate]
    difference: Estimate | None
    missing: int = 0
    """Cells that are not finished."""


@dataclass(frozen=True, kw_only=True)
class SweepView:
    """A sweep, as far as it is finished."""

    pipeline: str
    metric: str
    """The metric that is drawn and compared."""
    columns: tuple[str, ...]
    """The metrics in the table."""
    seeds: tuple[int, ...]
    variants: tuple[VariantView, ...]
    revisions: tuple[str, ...]
    """Commits that the cells ran at; if there are several they may not be comparable."""
    failures: tuple[tuple[str, str], ...] = ()
    """Cells that failed, and why."""


def few_seeds(view: SweepView) -> str:
    """What to say of a sweep with two seeds; empty if there are more, or if there is no interval."""
    if len(view.seeds) != 2:
        return ""
    return (
        "Two seeds tell little: their interval is six times as wide as their distance. Five or more show a difference."
    )


def render_sweep(view: SweepView) -> str:
    """The page's HTML."""
    template = page_environment().get_template("sweep.html")
    return template.render(view=view, chart=chart, number=_number, few_seeds=few_seeds(view))


def write_sweep(path: Path, view: SweepView) -> Digest:
    """Write the page; returns the file's digest."""
    return write_text(path, render_sweep(view))


def chart(view: SweepView, *, width: int = 1000) -> Chart | None:
    """A row a variant: a point a seed, and the mean with its interval; None before the first result."""
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
    """A table cell: the mean with the interval below it."""
    if estimate is None:
        return Markup("–")
    mean, _, interval = _with_interval(estimate, sign=sign).partition(" ")
    return Markup(f"{mean}<small>{interval.strip('[]').replace(', ', ' to ')}</small>") if interval else Markup(mean)  # noqa: S704  # figures
