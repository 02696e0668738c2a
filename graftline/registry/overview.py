"""A whole store for people: the registry page's values, every history verified; and what differs between releases."""

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from graftline.errors import ReleaseError, StoreError
from graftline.plain_text import one_line
from graftline.registry import channel
from graftline.registry.keys import KeyRing
from graftline.registry.objects import is_name
from graftline.registry.releases import fetch, list_versions, load_manifest
from graftline.registry.reserve import all_looks, looks_in_words
from graftline.registry.store import Store
from graftline.registry.trust import UNSIGNED, EntryJudge, Trust
from graftline.release.manifest import SIGNATURE_NAME, Manifest
from graftline.release.pages.registry_page import ChannelView, EntryView, PipelineView, RegistryView, ReleaseView, State


def overview(store: Store, *, keys: KeyRing | None, now: datetime, trust: Trust | None = None) -> RegistryView:
    """Everything in a store.

    With ``keys`` every release is fetched and verified, byte by byte; with ``trust`` every entry is judged.
    """
    names = {
        key.split("/")[1] for folder in ("releases", "channels") for key in store.list(folder) if key.count("/") > 1
    }
    # A pipeline that was seen before and is gone is shown too: its history was lost.
    pipelines = sorted({name for name in names if is_name(name)} | store.seen.pipelines())
    views = []
    for name in pipelines:
        judge = EntryJudge(store, name, trust, now=now) if trust else None
        channels = tuple(_channel(store, name, one, judge) for one in channel.names(store, name))
        views.append(_pipeline(store, name, channels, keys, now))
    return RegistryView(
        store=store.url, time=now, pipelines=tuple(views), warning=None if trust else f"Entries are {UNSIGNED}."
    )


def _pipeline(
    store: Store, name: str, channels: tuple[ChannelView, ...], keys: KeyRing | None, now: datetime
) -> PipelineView:
    held: dict[str, list[str]] = {}
    for view in channels:
        if view.entries:
            held.setdefault(view.entries[-1].version, []).append(view.name)
    releases = [
        _release(store, name, version, tuple(held.get(version, ())), keys, now)
        for version in reversed(list_versions(store, name))
    ]
    return PipelineView(name=name, channels=channels, releases=tuple(releases), looks=_looks(store, name))


def _looks(store: Store, pipeline: str) -> tuple[str, ...]:
    try:
        return tuple(looks_in_words(rows, number) for rows, number in all_looks(store, pipeline).items())
    except StoreError as error:  # roles from before there were looks may not list them
        return (f"how often rows for promotions were looked at is not known: {error}",)


def _channel(store: Store, pipeline: str, name: str, judge: EntryJudge | None) -> ChannelView:
    try:
        log = channel.read(store, pipeline, name)
        if judge:
            judge.read(name)
        problems = judge.problems(log) if judge else (None,) * len(log.entries)
    except StoreError as error:
        return ChannelView(name=name, problem=str(error))
    return ChannelView(name=name, entries=tuple(map(_entry, log.entries, problems)))


def _entry(entry: channel.Entry, problem: str | None) -> EntryView:
    change = entry.change
    return EntryView(
        number=entry.number,
        time=change.time,
        action=change.action,
        version=one_line(change.version),
        actor=one_line(change.actor),
        reason=one_line(change.reason),
        approvers=tuple(approval.statement.approver for approval in change.approvals),
        checks=tuple(one_line(check) for check in change.checks),
        signer=one_line(entry.seal.signer) if entry.seal else None,
        problem=one_line(problem) if problem else None,
    )


def _release(
    store: Store, pipeline: str, version: str, channels: tuple[str, ...], keys: KeyRing | None, now: datetime
) -> ReleaseView:
    try:
        manifest = load_manifest(store, pipeline, version)
    except (ReleaseError, StoreError) as error:
        return ReleaseView(version=version, state="damaged", detail=str(error), channels=channels)
    state, detail = _check(store, pipeline, version, keys, now)
    if state == "unsigned" and channels:
        state, detail = "damaged", f"a channel holds it, and it has no {SIGNATURE_NAME}"
    return ReleaseView(
        version=version,
        state=state,
        detail=detail,
        created=manifest.created,
        num_bytes=manifest.num_bytes,
        num_files=len(manifest.files),
        outcome=manifest.verdict.outcome,
        against=manifest.verdict.against,
        channels=channels,
        lineage=tuple(_in_words(dict(manifest.lineage)).items()),
    )


def _check(store: Store, pipeline: str, version: str, keys: KeyRing | None, now: datetime) -> tuple[State, str]:
    if keys is None:
        return "not checked", "signature and files were not read"
    with tempfile.TemporaryDirectory() as work:
        folder = Path(work) / "release"
        try:
            fetch(store, pipeline, version, folder)
            if not (folder / SIGNATURE_NAME).is_file():
                return "unsigned", "every byte; nobody has signed it, so it cannot be promoted"
            return "verified", f"every byte; signed by {keys.verify_release(folder, now=now)}"
        except (ReleaseError, StoreError) as error:
            return "damaged", str(error).replace(f"{folder}", "the release")


@dataclass(frozen=True)
class ReleaseDiff:
    """What differs between two releases: files by digest, and everything that they were made from."""

    added: tuple[str, ...]
    removed: tuple[str, ...]
    changed: tuple[str, ...]
    origin: Mapping[str, tuple[str, str]]
    """Fields of lineage and verdict that differ: name to (before, after)."""


def diff(first: Manifest, second: Manifest) -> ReleaseDiff:
    """Compare two releases by their manifests."""
    before = {entry.path: entry.digest for entry in first.files}
    after = {entry.path: entry.digest for entry in second.files}
    return ReleaseDiff(
        added=tuple(sorted(after.keys() - before.keys())),
        removed=tuple(sorted(before.keys() - after.keys())),
        changed=tuple(path for path in sorted(before.keys() & after.keys()) if before[path] != after[path]),
        origin={
            name: (old, new)
            for (name, old), new in zip(_origin(first).items(), _origin(second).values(), strict=True)
            if old != new
        },
    )


def _origin(manifest: Manifest) -> dict[str, str]:
    verdict = {f"verdict_{name}": value for name, value in dict(manifest.verdict).items()}
    return _in_words({"pipeline": manifest.pipeline, **dict(manifest.lineage), **verdict})


def _in_words(fields: Mapping[str, object]) -> dict[str, str]:
    return {name: "none" if value is None else str(value) for name, value in fields.items()}
