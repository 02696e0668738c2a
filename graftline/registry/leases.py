"""Leases, holds and removals: who needs a release right now, and who is removing one.

``leases/<pipeline>/<holder>.json``                      a lease: a server says which release it serves, and until when
``leases/<pipeline>/holds/<version>/<holder>.json``      a hold: somebody publishes, promotes or rolls back to it
``leases/<pipeline>/removals/<version>/<holder>.json``   a removal: somebody is cleaning it away

Both sides announce themselves before they look. Whoever needs a release writes a hold *before* reading it, and then
looks for removals; whoever removes one writes a removal, and then looks for holds and entries. On a store with
read-after-write consistency (folders, and Amazon S3 since 2020) at least one of the two sees the other, in every order
of their steps (``tests/registry/test_interleavings.py``).

Holds and removals are renewed while their holder lives. Their age is measured by the store's clock alone, so that the
clocks of two machines are never compared. A lease holds a time by its server's clock, and so counts for some minutes
longer than it says.
"""

import contextlib
import hashlib
import logging
import os
import re
import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import ClassVar, Literal

from pydantic import AwareDatetime

from graftline.errors import ConflictError, GraftlineError, ReleaseError, StoreError, UnsafeStoreError
from graftline.registry.objects import ListedObject, check_name, is_name
from graftline.registry.store import Store
from graftline.release.manifest import Record

MARGIN = timedelta(minutes=10)
"""How much longer everything counts than it says, because clocks differ and requests take time."""
LENGTH = timedelta(minutes=20)
"""How long a hold or a removal counts after it was last renewed, without the margin."""
_RENEWED_AFTER = timedelta(minutes=5)
_LONG_PAST = timedelta(days=1)
_LOG = logging.getLogger(__name__)


class Lease(Record):
    """A server's use of a release; holds and removals have the same form."""

    kind: ClassVar[str] = "lease"
    format: Literal[1] = 1
    holder: str
    version: str
    until: AwareDatetime


def hold(store: Store, pipeline: str, lease: Lease) -> None:
    """Record that ``lease.holder`` uses a release; its previous lease is replaced."""
    store.put_bytes(f"{_folder(pipeline)}/{check_name('holder', lease.holder)}.json", lease.to_bytes())


class Claim:
    """A hold or a removal in force, which its holder renews."""

    def __init__(self, store: Store, key: str, version: str) -> None:
        self._store, self.key, self._version = store, key, version
        self._renewed = time.monotonic()

    def check(self) -> None:
        """Raise StoreError if it may have expired: it could not be renewed, or this machine slept."""
        if time.monotonic() - self._renewed > LENGTH.total_seconds():
            raise StoreError(
                f"{self._store.url}/{self.key} was not renewed for {LENGTH.total_seconds() / 60:.0f} minutes: this "
                "machine slept or the store could not be reached, and the release may have been removed meanwhile; "
                "run the same command again"
            )

    def create(self) -> None:
        """Write it for the first time. Its name is random, so a store without conditional writes will do."""
        try:
            self._store.create(self.key, self._to_bytes())
        except UnsafeStoreError:
            self.renew()

    def renew(self) -> None:
        """Write it again, which gives it a new date in the store."""
        started = time.monotonic()
        self._store.put_bytes(self.key, self._to_bytes())
        self._renewed = started

    def _to_bytes(self) -> bytes:
        holder = self.key.rpartition("/")[2].removesuffix(".json")
        return Lease(holder=holder, version=self._version, until=datetime.now(UTC) + LENGTH).to_bytes()


@contextlib.contextmanager
def holding(store: Store, pipeline: str, version: str, *, doing: str) -> Iterator[Claim]:
    """Keep a release from being cleaned away while inside; enter before the release is first looked at.

    ``doing`` is one word for messages, such as ``promote``.

    Raises:
        ConflictError: somebody is cleaning it away just now.
        StoreError: the hold cannot be written.
    """
    with _claim(store, pipeline, "holds", version, doing, write=Claim.create) as claim:
        found = LeaseListing.take(store, pipeline)
        for one in found.removals:
            if one.version == version and is_in_force(one, found.time_of(claim)):
                raise ConflictError(
                    f"release {version} of {pipeline!r} is being cleaned away by {one.holder} ({store.url}/{one.key}); "
                    "look whether it is still there (`graftline verify`), then run the same command again"
                )
        yield claim


@contextlib.contextmanager
def removing(store: Store, pipeline: str, version: str) -> Iterator[tuple[Claim, "LeaseListing"]]:
    """Announce that a release is about to be removed, and list who needs it now.

    If the listing has a hold or a lease on it, or a channel that is read afterwards names it, it has to stay.
    """
    with _claim(store, pipeline, "removals", version, "gc", write=Claim.renew) as claim:
        yield claim, LeaseListing.take(store, pipeline)


def sweep(store: Store, pipeline: str, *, now: datetime) -> None:
    """Remove holds and removals of processes that are gone, and leases that ended long ago."""
    if LeaseListing.take(store, pipeline).outdated(store, now):
        with removing(store, pipeline, "nothing") as (claim, survey):  # to learn the store's time
            store_now = survey.time_of(claim)
            for key in survey.outdated(store, min(now, store_now)) if store_now else []:
                store.delete(key)


@dataclass(frozen=True)
class StoredLease:
    """A hold or a removal in the store."""

    key: str
    version: str
    holder: str
    modified: datetime
    """When it was last renewed, by the store's clock."""


@dataclass(frozen=True)
class LeaseListing:
    """A pipeline's leases, holds and removals, from one listing."""

    leases: tuple[ListedObject, ...]
    holds: tuple[StoredLease, ...]
    removals: tuple[StoredLease, ...]

    @classmethod
    def take(cls, store: Store, pipeline: str) -> "LeaseListing":
        """Raises StoreError where a part cannot be listed: then it is not known what is in use."""
        folder = _folder(pipeline)
        leases, held = list[ListedObject](), dict[str, list[StoredLease]]({"holds": [], "removals": []})
        for listed in store.listing(folder):
            match listed.key.removeprefix(f"{folder}/").split("/"):
                case [name] if name.endswith(".json"):
                    leases.append(listed)
                case [("holds" | "removals") as kind, version, name] if is_name(version) and name.endswith(".json"):
                    held[kind].append(StoredLease(listed.key, version, name.removesuffix(".json"), listed.modified))
                case _:
                    _LOG.warning("%s/%s is not a lease; it is left alone", store.url, listed.key)
        return cls(tuple(leases), tuple(held["holds"]), tuple(held["removals"]))

    def time_of(self, claim: Claim) -> datetime | None:
        """The store's clock: the date of a claim that was written just now. None: the listing lags behind."""
        return next((one.modified for one in (*self.holds, *self.removals) if one.key == claim.key), None)

    def needed(self, store: Store, *, now: datetime, store_now: datetime | None = None) -> dict[str, str]:
        """Versions in use, and by whom.

        ``now`` is this machine's time, ``store_now`` the store's (`time_of`); None: ``now`` is good enough.

        Raises:
            StoreError: a lease cannot be read, and may be a running server's.
        """
        needed = {one.version: f"held by {one.holder}" for one in self.holds if is_in_force(one, store_now or now)}
        earliest = min(now, store_now or now)
        for lease in filter(None, (_read_lease(store, listed, earliest) for listed in self.leases)):
            if lease.until > earliest - MARGIN:
                needed[lease.version] = f"served by {lease.holder}"
        return needed

    def at_work(self, now: datetime | None) -> set[str]:
        """Versions that are being published, promoted or rolled back to; ``now`` as in `is_in_force`."""
        return {one.version for one in self.holds if is_in_force(one, now)}

    def outdated(self, store: Store, now: datetime) -> list[str]:
        """Keys of what expired long ago, or whose holder has died; ``now`` by the store's clock."""
        claims = [one.key for one in (*self.holds, *self.removals) if not is_in_force(one, now)]
        read = ((listed.key, _read_lease(store, listed, now)) for listed in self.leases)
        return claims + [key for key, lease in read if lease and lease.until < now - _LONG_PAST]


def is_in_force(one: StoredLease, now: datetime | None) -> bool:
    """Whether a hold or a removal counts; ``now`` by the store's clock, None: unknown, so it counts."""
    return (now is None or now - one.modified <= LENGTH + MARGIN) and not _is_dead(one.holder)


@contextlib.contextmanager
def _claim(
    store: Store, pipeline: str, kind: str, version: str, doing: str, *, write: Callable[[Claim], None]
) -> Iterator[Claim]:
    """Write a claim, renew it on a thread while inside, and take it back."""
    key = f"{_folder(pipeline)}/{kind}/{check_name('version', version)}/{_holder(doing)}.json"
    claim, over = Claim(store, key, version), threading.Event()
    thread = threading.Thread(target=_keep_renewing, args=(claim, over), name=f"{doing} {version}", daemon=True)
    try:
        write(claim)
        thread.start()
        yield claim
    finally:
        over.set()
        if thread.ident is not None:
            thread.join()
        try:
            store.delete(key)
        except GraftlineError as error:
            _LOG.warning("%s/%s ends by itself in %s: %s", store.url, key, LENGTH + MARGIN, error)


def _keep_renewing(claim: Claim, over: threading.Event) -> None:
    while not over.wait(_RENEWED_AFTER.total_seconds()):
        try:
            claim.renew()
        except GraftlineError as error:
            _LOG.warning("%s could not be renewed: %s", claim.key, error)


def _read_lease(store: Store, listed: ListedObject, now: datetime) -> Lease | None:
    """A server's lease; None if it is gone, or unreadable and old.

    Raises:
        StoreError: it cannot be read, and may be a running server's.
    """
    data = store.get(listed.key)
    if data is None:
        return None
    try:
        return Lease.parse(data)
    except ReleaseError as error:
        if now - listed.modified < _LONG_PAST:
            raise StoreError(
                f"{store.url}/{listed.key} is no lease that can be read, so it is not known which release it keeps "
                f"({error}); if the server that wrote it no longer runs, remove it and run the same command again"
            ) from error
        _LOG.warning("%s/%s is not a lease: %s", store.url, listed.key, error)
        return None


def _holder(doing: str) -> str:
    """A unique name for a claim of this process: ``promote-<host>-<machine>-<pid>-<random>``."""
    host = re.sub(r"[^A-Za-z0-9.-]", "-", socket.gethostname())[:40]
    return f"{doing}-{host}-{_machine()}-{os.getpid()}-{secrets.token_hex(4)}"


def _is_dead(holder: str) -> bool:
    """Whether the holder was a process of this machine that is gone; of other machines' this is not known."""
    parts = holder.split("-")
    if len(parts) < 4 or parts[-3] != _machine() or not parts[-2].isdigit():
        return False
    try:
        os.kill(int(parts[-2]), 0)
    except ProcessLookupError:
        return True
    except (OSError, OverflowError):  # another user's process, or an impossible number
        pass
    return False


def _machine() -> str:
    """A name for this machine since its last boot and, in a container, for its process namespace; ``0…``: unknown."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        processes = Path("/proc/self/ns/pid").stat().st_ino
    except OSError:
        return f"0{secrets.token_hex(4)}"
    return hashlib.sha256(f"{boot}/{processes}".encode()).hexdigest()[:9]


def _folder(pipeline: str) -> str:
    return f"leases/{check_name('pipeline', pipeline)}"
