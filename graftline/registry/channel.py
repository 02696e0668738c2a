"""A channel: an append-only log of numbered entries, each holding the digest of the one before it.

``channels/<pipeline>/<channel>/0000000042.json`` says what is in production since when, who put it there and why.
Entry N+1 is created only if it is absent: of several promoters exactly one wins. History is never edited; a rollback
is a new entry that points back.

```python
log = read(store, "demo", "production")       # every entry verified
entry = next_entry(log, change)
append(store, entry)                          # ConflictError if somebody else was first
```
"""

import re
import secrets
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from itertools import islice
from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, model_validator

from graftline.errors import ConflictError, ReleaseError, StoreError
from graftline.registry.approval import SignedApproval
from graftline.registry.objects import check_name, is_name
from graftline.registry.store import Store
from graftline.release.manifest import GateVerdict
from graftline.release.record import DigestText, Part, Record

_ENTRY_NAME = re.compile(r"[0-9]{10}\.json")


class Change(Part):
    """What a promoter wants to enter."""

    action: Literal["promote", "rollback"]
    version: str
    """Release that the channel holds from now on."""
    release: DigestText
    """Digest of that release's manifest."""
    verdict: GateVerdict | None
    """The verdict it was promoted on; None for a rollback."""
    actor: str
    """Who."""
    reason: str
    """Why, in a sentence for people."""
    time: datetime
    """UTC, whole seconds."""
    approvals: tuple[SignedApproval, ...] = ()
    """The approvals it was made with: whoever reads the log can check them."""
    checks: tuple[str, ...] = ()
    """Rules that were met, with their reasons."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.time.utcoffset() != timedelta(0) or self.time.microsecond:
            raise ValueError(f"time is {self.time.isoformat()}; expected UTC in whole seconds")
        return self


class Entry(Record):
    """One change of a channel."""

    kind: ClassVar[str] = "channel entry"
    format: Literal[1] = 1
    pipeline: str
    channel: str
    number: Annotated[int, Field(ge=1, lt=10**10)]
    previous: DigestText | None
    """Digest of the entry before; None for number 1."""
    change: Change
    nonce: str
    """Random: two promoters never write equal bytes, so a lost answer can be told from a lost race."""


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
    """Read and verify a channel's whole history. A channel that nobody has written to is empty.

    Args:
        store: where the channel is.
        pipeline: pipeline of the channel.
        channel: the channel.
        known: its first entries, a chain, if somebody has kept them (graftline.registry.log_checkpoints). Only those
            after them are read, one request each; the first that is read must name the last of these, so the newest
            entry of the log is always read.

    Raises:
        StoreError: a gap, a broken chain, an entry that was edited, renamed or copied, or something else among them.
    """
    listed = _listed(store, pipeline, channel)
    newest = max(listed, default=0)
    entries = list(known[: max(0, newest - 1)])
    if not listed.issuperset(range(1, len(entries) + 1)):
        entries = []
    while True:
        number = len(entries) + 1
        # One more than was listed is asked for: a store may list late.
        data = store.get(_key(pipeline, channel, number))
        if data is None:
            break
        entry = _parse(store, data, pipeline, channel, number)
        _check_follows(store, entry, entries[-1] if entries else None)
        entries.append(entry)
    if len(entries) < newest:
        raise _broken(store, pipeline, channel, len(entries) + 1, "is missing, and later ones are there")
    return Log(pipeline, channel, tuple(entries))


def backwards(store: Store, pipeline: str, channel: str) -> Iterator[Entry]:
    """Entries from the newest on, each checked against the one before it; what is not asked for is not read.

    Raises:
        StoreError: as `read`, for these entries.
    """
    number = max(_listed(store, pipeline, channel), default=0)
    entry: Entry | None = None
    while (data := store.get(_key(pipeline, channel, number + 1))) is not None:
        number += 1
        entry = _parse(store, data, pipeline, channel, number)
    entry = entry or (_load(store, pipeline, channel, number) if number else None)
    while entry:
        before = _load(store, pipeline, channel, entry.number - 1) if entry.number > 1 else None
        _check_follows(store, entry, before)
        yield entry
        entry = before


def head(store: Store, pipeline: str, channel: str) -> Entry | None:
    """The newest entry, checked against the one before it: quick, for what asks often what is in production."""
    return next(backwards(store, pipeline, channel), None)


def newer(store: Store, entry: Entry) -> Entry:
    """The newest entry of a channel, from one that was read before: a single request where nothing was added.

    Raises:
        StoreError: an entry after it was edited, or does not follow.
    """
    while (data := store.get(_key(entry.pipeline, entry.channel, entry.number + 1))) is not None:
        following = _parse(store, data, entry.pipeline, entry.channel, entry.number + 1)
        _check_follows(store, following, entry)
        entry = following
    return entry


def newest(store: Store, pipeline: str, channel: str, count: int) -> tuple[Entry, ...]:
    """The newest entries, oldest first, each checked against the one before it; their cost does not grow with the log.

    Raises:
        StoreError: as `read`, for these entries.
    """
    return tuple(islice(backwards(store, pipeline, channel), count))[::-1]


def names(store: Store, pipeline: str) -> list[str]:
    """Channels of a pipeline that have entries, sorted."""
    folder = f"channels/{check_name('pipeline', pipeline)}"
    parts = [key.removeprefix(f"{folder}/").partition("/") for key in store.list(folder)]
    return sorted({name for name, is_folder, _ in parts if is_folder and is_name(name)})


def next_entry(log: Log, change: Change) -> Entry:
    """The entry that would follow what was read."""
    return Entry(
        pipeline=check_name("pipeline", log.pipeline),
        channel=check_name("channel", log.channel),
        number=log.head.number + 1 if log.head else 1,
        previous=log.head.digest if log.head else None,
        change=change,
        nonce=secrets.token_hex(8),
    )


def append(store: Store, entry: Entry) -> None:
    """Write an entry, if nobody has written that number.

    Raises:
        ConflictError: somebody was first; says who and what. The channel is as that one left it.
        UnsafeStoreError: the store cannot promise that only one wins.
    """
    key = _key(entry.pipeline, entry.channel, entry.number)
    try:
        store.create(key, entry.to_bytes())
    except ConflictError as error:
        winner = _load(store, entry.pipeline, entry.channel, entry.number).change
        raise ConflictError(
            f"channel {entry.channel!r} of {entry.pipeline!r}: entry {entry.number} was written first by "
            f"{winner.actor} at {winner.time:%Y-%m-%d %H:%M:%S} UTC ({winner.action} {winner.version}); look at "
            "`graftline history` and try again if the change is still wanted"
        ) from error


def _key(pipeline: str, channel: str, number: int) -> str:
    return f"{_folder(pipeline, channel)}/{number:010d}.json"


def _folder(pipeline: str, channel: str) -> str:
    return f"channels/{check_name('pipeline', pipeline)}/{check_name('channel', channel)}"


def _listed(store: Store, pipeline: str, channel: str) -> set[int]:
    """The numbers in the store's listing."""
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


def _broken(store: Store, pipeline: str, channel: str, number: int, problem: str) -> StoreError:
    return StoreError(
        f"{store.url}/{_key(pipeline, channel, number)} {problem}: the history was changed after the fact, nothing is "
        "promoted on it; restore the entry from the store's versions or a copy"
    )
