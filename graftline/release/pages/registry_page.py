"""A static HTML page of a store: what every channel holds and held, every release with its state and origin.

Made from plain values (`graftline.registry.overview` reads them from a store), so that it needs no store to be drawn.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import Literal

from graftline.digest import Digest, write_text
from graftline.release.pages.charts import Chart, Shape, shape
from graftline.release.pages.report import page_environment

State = Literal["verified", "damaged", "not checked"]


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


@dataclass(frozen=True, kw_only=True)
class ChannelView:
    """A channel. ``problem``: why its history cannot be trusted; the entries are empty then."""

    name: str
    entries: tuple[EntryView, ...] = ()
    """Oldest first."""
    problem: str | None = None


@dataclass(frozen=True, kw_only=True)
class ReleaseView:
    """A release and what was found when it was checked."""

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


@dataclass(frozen=True, kw_only=True)
class RegistryView:
    """A store as it was at a moment."""

    store: str
    time: datetime
    pipelines: tuple[PipelineView, ...]


def render_registry(view: RegistryView) -> str:
    """The page's HTML."""
    template = page_environment().get_template("registry.html")
    return template.render(view=view, timeline=timeline, short=short_version)


def write_registry(path: Path, view: RegistryView) -> Digest:
    """Write the page; returns the file's digest."""
    return write_text(path, render_registry(view))


def short_version(version: str) -> str:
    """``20261124T061800Z-0123456789ab`` → ``24 Nov 06:18 · 0123456``: what people tell releases apart by."""
    stamp, _, digest = version.partition("-")
    try:
        made = datetime.strptime(stamp, "%Y%m%dT%H%M%SZ")
    except ValueError:
        return version
    return f"{made:%-d %b %H:%M} · {digest[:7]}"


def timeline(channels: Sequence[ChannelView], now: datetime, *, width: int = 1000) -> Chart | None:
    """What each channel held when: a lane for a channel, a bar for a stay, a colour for a release; None: nothing."""
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
            hue = versions.index(entry.version) * 137 % 360  # the golden angle: neighbours never look alike
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
