"""Remove releases that nobody needs: make a plan, look at it, then carry it out.

A release is kept if one of a channel's newest entries names it (for rollback), a server has a lease on it, somebody is
publishing or promoting it, it waits for its promotion, the project names it, or it is younger than a limit. Incomplete
releases (no manifest) beyond that age are removed too, and so are the unfinished files and uploads of publishers that
were killed. Channels' histories and foreign objects are never touched.

If anything that may hold a release cannot be read, the cleanup stops before it removes anything.
"""

import json
import logging
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from itertools import chain
from pathlib import Path
from typing import Any, ClassVar, Literal

from graftline.errors import ReleaseError, StoreError
from graftline.plain_text import count
from graftline.registry import channel
from graftline.registry.leases import LENGTH, LeaseListing, removing, sweep
from graftline.registry.log_checkpoints import recall
from graftline.registry.objects import ListedObject, UnfinishedWrite, check_name, is_name
from graftline.registry.releases import load_manifest, remove
from graftline.registry.store import Store
from graftline.release.manifest import MANIFEST_NAME, SIGNATURE_NAME, Record

_LOG = logging.getLogger(__name__)


class LatestRelease(Record):
    """``latest/<pipeline>.json``: the release of a pipeline's last run, which may be waiting for its promotion."""

    kind: ClassVar[str] = "record of the latest release"
    format: Literal[1] = 1
    version: str


def note_latest(store: Store, pipeline: str, version: str) -> None:
    """Record the version that a pipeline's last run released."""
    data = LatestRelease(version=version).to_bytes()
    if store.get(_key(pipeline)) != data:
        store.put_bytes(_key(pipeline), data)


def named_in_store(store: Store, pipeline: str) -> dict[str, str]:
    """Versions that wait for their promotion, and why they are kept.

    Raises:
        ReleaseError: the record of the latest release is damaged, so it is not known which one must stay.
        StoreError: the store cannot be read.
    """
    named = dict(_approved(store, pipeline))
    if (data := store.get(_key(pipeline))) is not None:
        try:
            named[LatestRelease.parse(data).version] = "released by the last run"
        except ReleaseError as error:
            raise ReleaseError(
                f"{store.url}/{_key(pipeline)} names what the last run released and cannot be read ({error}); release "
                "again, or remove it if nothing waits for its promotion"
            ) from error
    return named


def named_in_project(root: Path, pipeline: str, references: tuple[str, ...]) -> dict[str, str]:
    """Versions that a project names, and where: its ``evaluate.references`` and the records of its last run.

    Raises:
        StoreError: a record below ``root``, the folder of pipelines.yaml, cannot be read.
    """
    named = {version: "named by evaluate.references" for version in references}
    for name, path in _RECORDS:
        version = _read(root / "runs" / pipeline / name, path)
        if version is not None:
            named.setdefault(version, f"named by runs/{pipeline}/{name}")
    return named


_RECORDS: tuple[tuple[str, tuple[str, ...]], ...] = (
    (".work/last.json", ("version",)),
    (".work/resolved.json", ("champion", "version")),
    (".work/resolved.json", ("champion", "anchor", "version")),
    ("resolved.json", ("champion", "version")),
    ("resolved.json", ("champion", "anchor", "version")),
    ("release/release.json", ("version",)),
)
"""Records of the last run and of a running one, below ``runs/<pipeline>``: the keys that lead to a version."""


def _version_in(record: Any, keys: tuple[str, ...]) -> str | None:
    """The version that a record names, if any."""
    for key in keys:
        if not isinstance(record, dict):
            raise ValueError(f"{record!r} instead of an object with {key}")
        record = record.get(key)
        if record is None:
            return None
    if not isinstance(record, str):
        raise ValueError(f"{record!r} instead of a version")
    return record


def _read(path: Path, keys: tuple[str, ...]) -> str | None:
    try:
        return _version_in(json.loads(path.read_text(encoding="utf-8")), keys)
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise StoreError(
            f"cannot read {path} ({error}), so which releases it names is not known; remove the file if nobody needs it"
        ) from error


def _approved(store: Store, pipeline: str) -> Iterator[tuple[str, str]]:
    """Versions approved for a channel that are newer than what it holds."""
    folder = f"approvals/{check_name('pipeline', pipeline)}"
    for key in store.list(folder):
        name, _, rest = key.removeprefix(f"{folder}/").partition("/")
        version, is_folder, _ = rest.partition("/")
        if not (is_folder and is_name(name) and is_name(version)):
            _LOG.warning("%s/%s is not an approval; it is left alone", store.url, key)
            continue
        head = channel.head(store, pipeline, name)
        if head is None or version > head.change.version:
            yield version, f"approved for {name}"


def _key(pipeline: str) -> str:
    return f"latest/{check_name('pipeline', pipeline)}.json"


_VERSION = re.compile(r"[0-9]{8}T[0-9]{6}Z-[0-9a-f]{12}")
_FOLDERS = ("releases", "channels", "checkpoints", "approvals", "leases", "heads")


@dataclass(frozen=True)
class RetentionRules:
    """What is kept."""

    newest_entries: int = 10
    """Releases named by this many of each channel's newest entries are kept."""
    min_age: timedelta = timedelta(days=7)
    """Releases that were written more recently are kept in any case."""
    named: Mapping[str, str] = field(default_factory=dict)
    """Versions that the project names, and where."""


@dataclass(frozen=True)
class CleanupPlan:
    """What a cleanup would remove and keep."""

    pipeline: str
    remove: tuple[str, ...]
    """Versions, oldest first."""
    keep: Mapping[str, str]
    """Versions that are kept, and why."""
    unfinished: tuple[UnfinishedWrite, ...] = ()
    """What killed writers left, to be removed too."""
    written: Mapping[str, datetime] = field(default_factory=dict)
    """When each version in ``remove`` was last written, by the store's clock."""


def plan_cleanup(store: Store, pipeline: str, *, rules: RetentionRules, now: datetime) -> CleanupPlan:
    """Decide what can be removed; changes nothing.

    Raises:
        StoreError: something that may hold a release cannot be listed, read or verified.
    """
    survey = LeaseListing.take(store, pipeline)
    for name in _channels(store, pipeline):
        recall(store, pipeline, name)
    needed = _needed(store, pipeline, rules, survey.needed(store, now=now))
    keep: dict[str, str] = {}
    written: dict[str, datetime] = {}
    for version, files in _versions(store, pipeline).items():
        newest = max(listed.modified for listed in files)
        if version in needed:
            keep[version] = needed[version]
        elif not _VERSION.fullmatch(version):
            keep[version] = "its name is not that of a version"
        elif now - newest < rules.min_age:
            age = count(rules.min_age.days, "day") if rules.min_age.days else str(rules.min_age)
            keep[version] = f"last written {newest:%Y-%m-%d %H:%M} UTC, less than {age} ago"
        elif others := _others(store, pipeline, version, files):
            keep[version] = f"holds {others[0]}, which does not belong to this release: move it away"
        else:
            written[version] = newest
    old = (one for one in _unfinished(store, pipeline) if now - one.modified >= rules.min_age)
    unfinished = tuple(one for one in old if _is_left(one, pipeline, survey, now))
    return CleanupPlan(pipeline, tuple(written), keep, unfinished, written)


def clean_up(store: Store, plan: CleanupPlan, *, rules: RetentionRules, now: datetime) -> tuple[str, ...]:
    """Carry out a plan; returns the versions removed, and the handles of unfinished writes.

    Each version is checked again after its removal was announced, because somebody may need it since the plan.

    Raises:
        StoreError: something that may hold a release cannot be read now, or the store refuses.
    """
    removed = [version for version in plan.remove if _remove(store, plan, version, rules, now)]
    if plan.unfinished:
        with removing(store, plan.pipeline, "nothing") as (claim, survey):
            store_now = survey.time_of(claim)
        there = {one.handle: one for one in _unfinished(store, plan.pipeline)}
        for one in plan.unfinished:
            # One that changed since the plan belongs to somebody who is writing now.
            if there.get(one.handle) == one and _is_left(one, plan.pipeline, survey, store_now):
                store.discard(one)
                removed.append(one.handle)
    sweep(store, plan.pipeline, now=now)
    return tuple(removed)


def _remove(store: Store, plan: CleanupPlan, version: str, rules: RetentionRules, now: datetime) -> bool:
    """Remove one version unless somebody needs it; returns whether it was removed."""
    with removing(store, plan.pipeline, version) as (claim, survey):
        in_use = survey.needed(store, now=now, store_now=survey.time_of(claim))
        # Holds before channels: a promoter writes its entry before it releases its hold.
        if version in _needed(store, plan.pipeline, rules, in_use):
            return False
        files = _versions(store, plan.pipeline).get(version, [])
        if max((listed.modified for listed in files), default=None) != plan.written[version]:
            return False  # removed or published again since the plan
        remove(store, plan.pipeline, version, before_each=claim.check)
    return True


def _needed(store: Store, pipeline: str, rules: RetentionRules, in_use: Mapping[str, str]) -> dict[str, str]:
    """Versions that are needed, and why: in use, in a channel, waiting for a promotion or named by the project."""
    needed = dict(in_use)
    for name in _channels(store, pipeline):
        # Only the newest entries: this is asked again before each removal, and whole logs would cost quadratic time.
        for entry in channel.newest(store, pipeline, name, rules.newest_entries):
            needed.setdefault(entry.change.version, f"entry {entry.number} of {name}")
            if entry.change.rollout:
                needed.setdefault(entry.change.rollout.version, f"candidate in entry {entry.number} of {name}")
            if entry.change.anchor:  # a rollback to the entry brings it back
                needed.setdefault(entry.change.anchor.version, f"anchor in entry {entry.number} of {name}")
    for version, reason in chain(named_in_store(store, pipeline).items(), rules.named.items()):
        needed.setdefault(version, reason)
    return needed


def _channels(store: Store, pipeline: str) -> list[str]:
    """Channels that have entries or checkpoints, or that this machine has seen entries of."""
    check_name("pipeline", pipeline)
    found = set(channel.names(store, pipeline))
    for folder in (f"channels/{pipeline}", f"checkpoints/{pipeline}"):
        parts = (key.removeprefix(f"{folder}/").partition("/") for key in store.list(folder))
        # A file without an ending may be where a channel's folder was: a folder store says so when it is read.
        found |= {name for name, is_folder, _ in parts if is_name(name) and (is_folder or "." not in name)}
    return sorted(found)


def _versions(store: Store, pipeline: str) -> dict[str, list[ListedObject]]:
    """Every release folder, complete or not, oldest first, with its files."""
    folder = f"releases/{check_name('pipeline', pipeline)}"
    found: dict[str, list[ListedObject]] = {}
    for listed in store.listing(folder):
        version, is_folder, _ = listed.key.removeprefix(f"{folder}/").partition("/")
        found.setdefault(version if is_folder else f"{version} (a file)", []).append(listed)
    return dict(sorted(found.items()))


def _others(store: Store, pipeline: str, version: str, files: list[ListedObject]) -> list[str]:
    """Files in a release's folder that its manifest does not name; none where there is no usable manifest."""
    names = [listed.key.partition(f"/{version}/")[2] for listed in files]
    if MANIFEST_NAME not in names:
        return []
    try:
        manifest = load_manifest(store, pipeline, version)
    except ReleaseError:
        return []  # damaged: as good as an incomplete release
    known = {entry.path for entry in manifest.files} | {MANIFEST_NAME, SIGNATURE_NAME}
    return [name for name in names if name not in known]


def _unfinished(store: Store, pipeline: str) -> Iterator[UnfinishedWrite]:
    for folder in _FOLDERS:
        yield from store.unfinished(f"{folder}/{pipeline}")


def _is_left(one: UnfinishedWrite, pipeline: str, survey: LeaseListing, now: datetime | None) -> bool:
    """Whether an unfinished write was abandoned; ``now`` by the store's clock."""
    folder = f"releases/{pipeline}/"
    if one.key.startswith(folder):
        return one.key.removeprefix(folder).partition("/")[0] not in survey.at_work(now)
    # An entry, an approval or a lease is written within moments, and without a hold.
    return now is not None and now - one.modified > LENGTH
