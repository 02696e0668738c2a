"""Remove releases that nobody needs: plan first, look at the plan, then carry it out.

Kept are what a channel's newest entries name (for rollback), what a server holds a lease on, what waits for its
promotion or is named by the project (`graftline.registry.named`), and everything younger than a limit. Half releases
(no manifest) that old are removed too. Channels' histories are never touched.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from itertools import chain

from graftline.registry import channel
from graftline.registry.leases import held_versions
from graftline.registry.log_checkpoints import recall
from graftline.registry.named import named_in_store
from graftline.registry.objects import check_name
from graftline.registry.releases import remove
from graftline.registry.store import Store


@dataclass(frozen=True)
class Rules:
    """What is kept."""

    newest_entries: int = 10
    """Entries of each channel, from its newest on, whose releases stay."""
    min_age: timedelta = timedelta(days=7)
    """Younger releases stay, whatever names them or not."""
    named: Mapping[str, str] = field(default_factory=dict)
    """Versions that the project names, and where; they stay."""


@dataclass(frozen=True)
class Plan:
    """What would be done."""

    pipeline: str
    remove: tuple[str, ...]
    """Versions, oldest first."""
    keep: Mapping[str, str]
    """Version and why it stays."""


def plan_cleanup(store: Store, pipeline: str, *, rules: Rules, now: datetime) -> Plan:
    """Decide what can go. Nothing is changed.

    Raises:
        StoreError: a channel's history cannot be read or verified; then nothing is known to be unneeded.
    """
    for name in channel.names(store, pipeline):
        recall(store, pipeline, name)
    named = _named(store, pipeline, rules, now)
    keep: dict[str, str] = {}
    go: list[str] = []
    for version in _versions(store, pipeline):
        made = _time_of(version)
        if version in named:
            keep[version] = named[version]
        elif made is None:
            keep[version] = "its name is no version of ours"
        elif now - made < rules.min_age:
            keep[version] = f"made {made:%Y-%m-%d %H:%M} UTC, younger than {rules.min_age.days} days"
        else:
            go.append(version)
    return Plan(pipeline, tuple(go), keep)


def clean_up(store: Store, plan: Plan, *, rules: Rules, now: datetime) -> tuple[str, ...]:
    """Carry out a plan; returns the versions removed. Each is looked up again first: somebody may have promoted it."""
    removed: list[str] = []
    for version in plan.remove:
        if version in _named(store, plan.pipeline, rules, now):
            continue
        remove(store, plan.pipeline, version)
        removed.append(version)
    return tuple(removed)


def _named(store: Store, pipeline: str, rules: Rules, now: datetime) -> dict[str, str]:
    """Versions that somebody needs, and who."""
    named = {version: f"served by {holder}" for version, holder in held_versions(store, pipeline, now=now).items()}
    for name in channel.names(store, pipeline):
        # Asked again before each removal: the whole log each time would grow with the square of the releases.
        for entry in channel.newest(store, pipeline, name, rules.newest_entries):
            named.setdefault(entry.change.version, f"entry {entry.number} of {name}")
    for version, reason in chain(named_in_store(store, pipeline).items(), rules.named.items()):
        named.setdefault(version, reason)
    return named


def _versions(store: Store, pipeline: str) -> list[str]:
    """Every release folder, whole or not, oldest first."""
    folder = f"releases/{check_name('pipeline', pipeline)}"
    return sorted({key.removeprefix(f"{folder}/").partition("/")[0] for key in store.list(folder)})


def _time_of(version: str) -> datetime | None:
    try:
        return datetime.strptime(version.partition("-")[0], "%Y%m%dT%H%M%SZ").replace(tzinfo=UTC)
    except ValueError:
        return None
