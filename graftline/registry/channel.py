"""A channel: an append-only log of numbered entries, each holding the digest of the one before it.

``channels/<pipeline>/<channel>/0000000042.json`` says what is in production, since when, who put it there and why.
Entry N+1 is created only if it is absent, so exactly one of several promoters wins. History is never edited; a
rollback is a new entry that points back.

```python
log = read(store, "demo", "production")       # every entry verified
entry = next_entry(log, change)
append(store, entry)                          # ConflictError if somebody else was first
```

A log never gets shorter. Its end is compared with its checkpoints and with what this machine has seen of it (`marks`),
so that a loss of the newest entries, or of the whole store, is noticed before anything is written over it.
"""

import logging
import re
import secrets
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from itertools import islice
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, SerializerFunctionWrapHandler, model_serializer, model_validator

from graftline.digest import Digest
from graftline.errors import (
    ConflictError,
    GraftlineError,
    HistoryLostError,
    ReleaseError,
    StoreError,
    StoreUnavailableError,
)
from graftline.plain_text import one_line
from graftline.registry.approval import SignedApproval
from graftline.registry.objects import KnownEntry, check_name, is_name
from graftline.registry.reserve import ReserveVerdict
from graftline.registry.store import Store
from graftline.release.manifest import DigestText, GateVerdict, Part, Record

_CHECKPOINT = re.compile(r"([0-9]{10})\.json")
_LOG = logging.getLogger(__name__)


def checkpoint_folder(pipeline: str, channel: str) -> str:
    """Where a channel's checkpoints are."""
    return f"checkpoints/{check_name('pipeline', pipeline)}/{check_name('channel', channel)}"


def marks(store: Store, pipeline: str, channel: str) -> Iterator[KnownEntry]:
    """Entries that a channel's log is known to have: the newest this machine has seen, and the newest checkpoint's.

    Raises:
        StoreError: what this machine has seen cannot be read, or the store does not answer.
    """
    if seen := store.seen.mark(pipeline, channel):
        yield seen
    folder = checkpoint_folder(pipeline, channel)
    try:
        names = [key.removeprefix(f"{folder}/") for key in store.list(folder)]
    except StoreUnavailableError:
        raise  # the checkpoints may exist all the same, and show that the log went back
    except GraftlineError as error:
        # S3 roles from before there were checkpoints do not allow to list them.
        _LOG.warning("the history of %s/%s is not compared with its checkpoints: %s", pipeline, channel, error)
        return
    if matches := [match for name in names if (match := _CHECKPOINT.fullmatch(name))]:
        last = max(matches, key=lambda match: match[1])
        yield KnownEntry(int(last[1]), None, f"{folder}/{last[0]} holds it; if that is wrong, remove it")


_ENTRY_NAME = re.compile(r"[0-9]{10}\.json")


class Anchor(Part):
    """The release that a channel's candidates are compared with besides what the channel holds."""

    version: str
    release: DigestText
    """Digest of that release's manifest."""


class RolloutStep(Part):
    """A candidate that answers a part of the channel's traffic."""

    step: Literal["start", "share", "hold"]
    """``share``: the candidate gets another share; ``hold``: the share stays, and the reason says why."""
    version: str
    release: DigestText
    """Digest of the candidate's manifest."""
    share: Annotated[int, Field(ge=1, le=99)]
    """Percent of keys that the candidate answers."""
    mirror: Annotated[int, Field(ge=0, le=100)] = 0
    """Percent of the incumbent's keys whose requests the candidate answers too, unseen."""
    started: Annotated[int, Field(ge=1)]
    """Number of the entry that started the rollout; it holds the approvals."""
    salt: Annotated[str, Field(pattern=r"^[0-9a-f]{32}$")]
    """Random, the same in all steps, so that nobody knows beforehand which keys the candidate gets."""


class ChannelChange(Part):
    """What a promotion, a step of a rollout or a rollback changes."""

    action: Literal["promote", "rollback", "rollout"]
    version: str
    """The release that the channel holds from now on; during a rollout the incumbent."""
    release: DigestText
    """Digest of that release's manifest."""
    verdict: GateVerdict | None
    """The verdict that the promotion relied on."""
    actor: str
    reason: str
    """Why, in a sentence for people."""
    time: datetime
    """UTC, whole seconds."""
    approvals: tuple[SignedApproval, ...] = ()
    """The approvals that counted, so that a reader of the log can check them."""
    checks: tuple[str, ...] = ()
    """The rules that were met, with their reasons."""
    rollout: RolloutStep | None = Field(default=None, exclude_if=lambda step: step is None)
    """The candidate, for action ``rollout``. Left out otherwise, so that other entries keep their bytes."""
    anchor: Anchor | None = Field(default=None, exclude_if=lambda anchor: anchor is None)
    """The channel's anchor from now on; None, and left out, as long as none was recorded. ``verdict`` has the evidence
    for a move."""
    reserve: ReserveVerdict | None = Field(default=None, exclude_if=lambda reserve: reserve is None)
    """What the promotion found on rows that only promotions look at; None, and left out, where the policy does not ask
    for it."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.time.utcoffset() != timedelta(0) or self.time.microsecond:
            raise ValueError(f"time is {self.time.isoformat()}; expected UTC in whole seconds")
        if (self.action == "rollout") != (self.rollout is not None):
            raise ValueError(f"action is {self.action}; expected `rollout` with a candidate, and with it only")
        return self

    @property
    def holds(self) -> str:
        """What the channel holds, in words: the release, and the candidate with its share."""
        step = self.rollout
        return f"{self.version} ({step.share} % of keys: {step.version})" if step else self.version


class Seal(Part):
    """Who vouches for an entry, and what a reader needs to judge it again (graftline.registry.trust)."""

    signer: str
    """Name of the key that signed the entry."""
    policy: DigestText | None = None
    """The policy that the release met; None: none was asked, as for a rollback."""
    builder: str | None = None
    """Name of the key that signed the release."""
    compared_with: str | None = None
    """The channel whose release the verdict had to be against; None: the base."""
    signature: str
    """Signature of the entry's bytes with this field empty."""


class Entry(Record):
    """One change of a channel. Format 1 is not signed."""

    kind: ClassVar[str] = "channel entry"
    format: Literal[1, 2] = 1
    pipeline: str
    channel: str
    number: Annotated[int, Field(ge=1, lt=10**10)]
    previous: DigestText | None
    """Digest of the entry before; None for number 1."""
    change: ChannelChange
    nonce: str
    """Random, so that two promoters never write equal bytes: a lost answer can be told from a lost race."""
    seal: Seal | None = None

    @model_validator(mode="after")
    def _check(self) -> Self:
        if (self.format == 1) != (self.seal is None):
            raise ValueError(f"format {self.format} {'has no' if self.seal else 'needs a'} seal")
        return self

    @model_serializer(mode="wrap")
    def _as_written(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        # Entries from before there were seals must keep their bytes.
        values: dict[str, Any] = handler(self)
        if self.seal is None:
            del values["seal"]
        return values


def candidate_of(entry: Entry) -> Entry | None:
    """An entry of a rollout as if the channel held the candidate; None if no rollout is under way."""
    if (step := entry.change.rollout) is None:
        return None
    held = {"action": "promote", "version": step.version, "release": step.release, "rollout": None}
    return entry.model_copy(update={"change": entry.change.model_copy(update=held)})


def anchor_of(entry: Entry) -> Anchor:
    """The anchor that is in force after an entry: what the channel holds then, if none was recorded yet."""
    return entry.change.anchor or Anchor(version=entry.change.version, release=entry.change.release)


def _anchor_problem(entry: Entry, before: Entry | None) -> str | None:
    """Why the anchor of an entry does not follow from the entry before and the entry's own evidence; None if it does.

    A rollback takes the anchor that was in force with the release to which it goes back.
    """
    change, anchor = entry.change, entry.change.anchor
    if anchor is None:
        return "drops the channel's anchor" if before and before.change.anchor else None
    if before is None or change.action == "rollback" or anchor == anchor_of(before):
        return None
    shown = change.verdict.anchor if change.verdict else None
    # During a rollout the verdict is the candidate's, and says nothing of the release that the channel holds.
    is_own = not change.rollout and (anchor.version, anchor.release) == (change.version, change.release)
    if is_own and shown and shown.is_better and shown.release == anchor_of(before).release:
        return None
    return f"moves the anchor to {anchor.version} without evidence that it is better than {anchor_of(before).version}"


@dataclass(frozen=True)
class Log:
    """A channel's verified history, oldest first."""

    pipeline: str
    channel: str
    entries: tuple[Entry, ...]

    @property
    def head(self) -> Entry | None:
        """The newest entry: what the channel holds now."""
        return self.entries[-1] if self.entries else None


def read(store: Store, pipeline: str, channel: str, *, known: Sequence[Entry] = ()) -> Log:
    """Read and verify a channel's whole history. A channel without entries has an empty log.

    ``known`` are its first entries, already a verified chain (graftline.registry.log_checkpoints). Only the entries
    after them are read, one request each; at least the newest entry of the log is always read, so that the chain's end
    is compared with the log.

    Raises:
        StoreError: a gap, a broken chain, an entry that was edited, renamed or copied, or a foreign object.
        HistoryLostError: entries that were there before are gone, or others are in their place.
    """
    known_before = list(marks(store, pipeline, channel))  # first: others append while the log is read
    listed = _listed(store, pipeline, channel)
    newest = max(listed, default=0)
    entries = list(known[: max(0, newest - 1)])
    if not listed.issuperset(range(1, len(entries) + 1)):
        entries = []
    while True:
        number = len(entries) + 1
        # Also the one after the last listed: a store's listing may lag behind.
        data = store.get(_key(pipeline, channel, number))
        if data is None:
            break
        entry = _parse(store, data, pipeline, channel, number)
        _check_follows(store, entry, entries[-1] if entries else None)
        entries.append(entry)
    if len(entries) < newest:
        raise _broken(store, pipeline, channel, len(entries) + 1, "is missing, and later ones are there")
    log = Log(pipeline, channel, tuple(entries))
    _check_end(store, log, known_before, len(entries), lambda number: entries[number - 1].digest)
    _note(store, log.head)
    return log


def backwards(store: Store, pipeline: str, channel: str) -> Iterator[Entry]:
    """Entries from the newest backwards, each checked against the one before it; only what is consumed is read.

    Raises:
        StoreError, HistoryLostError: as `read`, for these entries.
    """
    known_before = list(marks(store, pipeline, channel))  # see `read`
    number = max(_listed(store, pipeline, channel), default=0)
    entry: Entry | None = None
    while (data := store.get(_key(pipeline, channel, number + 1))) is not None:
        number += 1
        entry = _parse(store, data, pipeline, channel, number)
    newest = entry = entry or (_load(store, pipeline, channel, number) if number else None)

    def digest_of(wanted: int) -> Digest:
        is_newest = newest is not None and wanted == newest.number
        return newest.digest if newest and is_newest else _load(store, pipeline, channel, wanted).digest

    _check_end(store, Log(pipeline, channel, ()), known_before, number, digest_of)
    while entry:
        before = _load(store, pipeline, channel, entry.number - 1) if entry.number > 1 else None
        _check_follows(store, entry, before)
        if entry is newest:
            _note(store, entry)
        yield entry
        entry = before


def head(store: Store, pipeline: str, channel: str) -> Entry | None:
    """The newest entry, checked against the one before it; None if there is none. Quick, for frequent callers."""
    return next(backwards(store, pipeline, channel), None)


def newer(store: Store, entry: Entry) -> Entry:
    """The newest entry of a channel, from one that was read before: two requests when nothing was added.

    Raises:
        StoreError: a later entry was edited, or does not follow.
        HistoryLostError: the entry that was read before is gone, or another is in its place.
    """
    known = entry
    while (data := store.get(_key(entry.pipeline, entry.channel, entry.number + 1))) is not None:
        following = _parse(store, data, entry.pipeline, entry.channel, entry.number + 1)
        _check_follows(store, following, entry)
        entry = following
    if entry is not known:
        _note(store, entry)
    elif store.get(_key(entry.pipeline, entry.channel, entry.number)) != entry.to_bytes():
        raise _lost(store, entry.pipeline, entry.channel, f"entry {entry.number} was read before and is not there now")
    return entry


def newest(store: Store, pipeline: str, channel: str, count: int) -> tuple[Entry, ...]:
    """The ``count`` newest entries, oldest first; checked and read as in `backwards`."""
    return tuple(islice(backwards(store, pipeline, channel), count))[::-1]


def names(store: Store, pipeline: str) -> list[str]:
    """Channels of a pipeline that have entries, or had some when this machine last looked; sorted."""
    folder = f"channels/{check_name('pipeline', pipeline)}"
    parts = [key.removeprefix(f"{folder}/").partition("/") for key in store.list(folder)]
    listed = {name for name, is_folder, _ in parts if is_folder and is_name(name)}
    return sorted(listed | store.seen.channels(pipeline))


def next_entry(log: Log, change: ChannelChange) -> Entry:
    """The entry that follows a log."""
    return Entry(
        pipeline=check_name("pipeline", log.pipeline),
        channel=check_name("channel", log.channel),
        number=log.head.number + 1 if log.head else 1,
        previous=log.head.digest if log.head else None,
        change=change,
        nonce=secrets.token_hex(8),
    )


def append(store: Store, entry: Entry) -> None:
    """Write an entry, unless its number is taken.

    Raises:
        ConflictError: somebody else was first; the message says who and what.
        HistoryLostError: the number was taken before, and its entry is gone.
        UnsafeStoreError: the store cannot guarantee that only one writer wins.
    """
    key = _key(entry.pipeline, entry.channel, entry.number)
    for mark in marks(store, entry.pipeline, entry.channel):
        if mark.number >= entry.number and mark.digest != entry.digest and store.get(key) is None:
            raise _lost(store, entry.pipeline, entry.channel, f"entry {mark.number} was there ({mark.where})")
    try:
        store.create(key, entry.to_bytes())
    except ConflictError as error:
        winner = _load(store, entry.pipeline, entry.channel, entry.number).change
        raise ConflictError(
            f"channel {entry.channel!r} of {entry.pipeline!r}: entry {entry.number} was written first by "
            f"{one_line(winner.actor)} at {winner.time:%Y-%m-%d %H:%M:%S} UTC ({winner.action} "
            f"{one_line(winner.version)}); look at `graftline history` and try again if the change is still wanted"
        ) from error
    _note(store, entry)


def _key(pipeline: str, channel: str, number: int) -> str:
    return f"{_folder(pipeline, channel)}/{number:010d}.json"


def _folder(pipeline: str, channel: str) -> str:
    return f"channels/{check_name('pipeline', pipeline)}/{check_name('channel', channel)}"


def _listed(store: Store, pipeline: str, channel: str) -> set[int]:
    folder = _folder(pipeline, channel)
    names = [key.removeprefix(f"{folder}/") for key in store.list(folder)]
    foreign = [name for name in names if not _ENTRY_NAME.fullmatch(name) or int(name[:10]) == 0]
    if foreign:
        raise StoreError(
            f"{store.url}/{folder} holds {foreign[0]!r}, which is no entry (0000000001.json and so on); find out who "
            "put it there, then move it away"
        )
    return {int(name[:10]) for name in names}


def _load(store: Store, pipeline: str, channel: str, number: int) -> Entry:
    data = store.get(_key(pipeline, channel, number))
    if data is None:
        raise _broken(store, pipeline, channel, number, "is missing, and later ones are there")
    return _parse(store, data, pipeline, channel, number)


def _parse(store: Store, data: bytes, pipeline: str, channel: str, number: int) -> Entry:
    try:
        entry = Entry.parse(data)
    except ReleaseError as error:
        raise _broken(store, pipeline, channel, number, f"cannot be read ({error})") from error
    if (entry.pipeline, entry.channel, entry.number) != (pipeline, channel, number):
        found = f"{entry.pipeline}/{entry.channel} number {entry.number}"
        raise _broken(store, pipeline, channel, number, f"says that it is {found}")
    return entry


def _check_follows(store: Store, entry: Entry, before: Entry | None) -> None:
    expected = before.digest if before else None
    if entry.previous != expected:
        problem = f"names {entry.previous} as the entry before, expected {expected}"
        raise _broken(store, entry.pipeline, entry.channel, entry.number, problem)
    if anchor_problem := _anchor_problem(entry, before):
        raise _broken(store, entry.pipeline, entry.channel, entry.number, anchor_problem)


def _check_end(
    store: Store, log: Log, known: Sequence[KnownEntry], num_entries: int, digest_of: Callable[[int], Digest]
) -> None:
    """Raise HistoryLostError where a log ends before an entry that is known, or has another in its place."""
    for mark in known:
        if mark.number > num_entries:
            end = f"ends at entry {num_entries}" if num_entries else "is empty"
            problem = f"it {end}, and entry {mark.number} was there ({mark.where})"
            raise _lost(store, log.pipeline, log.channel, problem)
        if mark.digest and digest_of(mark.number) != mark.digest:
            problem = f"entry {mark.number} is another than it was ({mark.where})"
            raise _lost(store, log.pipeline, log.channel, problem)


def _note(store: Store, entry: Entry | None) -> None:
    if entry:
        store.seen.note(entry.pipeline, entry.channel, entry.number, entry.digest)


def _lost(store: Store, pipeline: str, channel: str, problem: str) -> HistoryLostError:
    return HistoryLostError(
        f"{store.url}/{_folder(pipeline, channel)}: the history went back: {problem}; nothing is promoted on it. Look "
        "whether the store is mounted and its address right, then restore the entries from the store's versions or a "
        "copy (docs/runbooks.md, restore a lost channel)"
    )


def _broken(store: Store, pipeline: str, channel: str, number: int, problem: str) -> StoreError:
    return StoreError(
        f"{store.url}/{_key(pipeline, channel, number)} {problem}: the history was changed after the fact, nothing is "
        "promoted on it; restore the entry from the store's versions or a copy"
    )
