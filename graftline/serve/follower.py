"""Serve what a channel holds: poll the store, verify a new release, then point the channel's name at it.

The checks, in order: manifest and every file's digest, signature, base and template digest, a probe of the adapter,
the recorded answers. Only then does ``pipeline@channel`` mean the new release. On any failure the old one stays and
`status` says why; other channels are not affected.
"""

import logging
import os
import re
import secrets
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from graftline.errors import GraftlineError, HistoryLostError, PromotionError
from graftline.plain_text import one_line
from graftline.registry import channel as channels
from graftline.registry.channel import Entry
from graftline.registry.keys import KeyFile, KeyRing
from graftline.registry.leases import Lease, hold
from graftline.registry.releases import fetch
from graftline.registry.store import Store
from graftline.serve.catalog import Catalog, ServedModel
from graftline.serve.served_folder import ServedFolder

_LEASE = timedelta(hours=2)
_LEASE_RETRY = timedelta(minutes=5)
_POLLS_PER_LISTING = 20
_FIRST_POLL_SECONDS = 10.0
"""How long the start waits for the first poll; after that serving begins without it."""
_STOP_SECONDS = 10.0
_SILENCE_SECONDS = 30.0
"""A poll that takes longer is reported: the store may not answer at all."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ChannelRef:
    """A channel of a pipeline."""

    pipeline: str
    channel: str

    @property
    def name(self) -> str:
        """The model name that clients send."""
        return f"{self.pipeline}@{self.channel}"


@dataclass
class _FollowState:
    version: str | None = None
    before: str | None = None
    held: datetime | None = None
    token: str = field(default_factory=lambda: secrets.token_hex(4))
    """Part of its lease's name: containers that share a host name would otherwise have the same one."""
    number: int = -1
    entry: Entry | None = None
    """The newest one at the last poll."""
    polls: int = 0
    error: str | None = None
    history_lost: bool = False
    looked: datetime | None = None
    began: float | None = None
    """When the running poll began, by the monotonic clock."""
    unsigned: str | None = None
    """Why the served release would not be accepted with the keys of now."""


class Follower:
    """Keeps ``pipeline@channel`` names in a catalog up to date, on its own thread.

    Args:
        store: where releases and channels are.
        followed: the channels.
        catalog: where the names are.
        folder: where releases are fetched to.
        keys: whose signatures count, or a key file, read again when it changes; None: unsigned releases are accepted.
        smoke: raises an error unless the model gives the release's recorded answers.
        poll_seconds: time between two polls.
    """

    def __init__(
        self,
        store: Store,
        followed: tuple[ChannelRef, ...],
        catalog: Catalog,
        folder: Path,
        *,
        keys: KeyRing | KeyFile | None,
        smoke: Callable[[ServedModel, Path], None],
        poll_seconds: float = 3.0,
    ) -> None:
        self._store, self._followed, self._catalog = store, followed, catalog
        self._folder, self._keys = ServedFolder(folder), keys
        self._smoke, self._poll_seconds = smoke, poll_seconds
        self._states = {one: _FollowState() for one in followed}
        self._names: set[str] = set()
        """The catalog's ``pipeline@version`` names that belong to channels."""
        self._stopped, self._polled = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._run, name="follower", daemon=True)

    def start(self) -> None:
        """Poll in the background; waits for the first poll unless the store takes too long."""
        self._thread.start()
        if not self._polled.wait(_FIRST_POLL_SECONDS):
            logger.warning("%s has not answered yet; serving begins without it", self._store.url)

    def stop(self) -> None:
        """Stop polling."""
        self._stopped.set()
        if self._thread.is_alive():
            self._thread.join(_STOP_SECONDS)

    def poll(self) -> None:
        """Poll every channel once."""
        ring_changed = isinstance(self._keys, KeyFile) and self._keys.refresh()
        for one, state in self._states.items():
            state.began = time.monotonic()
            try:
                if ring_changed:  # first, because a change is reported once and the store may fail
                    state.unsigned = self._why_unsigned(one, state)
                self._update(one, state)
                self._tell(one, state, None)
                state.history_lost = False
            except Exception as error:
                # The old version stays, and the other channels are polled as usual.
                if not isinstance(error, GraftlineError):
                    logger.exception("polling %s failed", one.name)
                state.history_lost = isinstance(error, HistoryLostError)
                self._tell(one, state, str(error) if isinstance(error, GraftlineError) else repr(error))
            state.looked, state.began = datetime.now(UTC), None
            self._hold(one, state)
        self._polled.set()
        self._forget()

    def status(self) -> dict[str, dict[str, Any]]:
        """By channel: the version that is served, the entry's number, and what is wrong.

        ``error`` says why a newer release is not served, or what else needs an operator; ``history_lost`` is true while
        the channel's history is shorter than it was, or differs from it.
        """
        keys_problem = self._keys.problem if isinstance(self._keys, KeyFile) else None
        return {
            one.name: {
                "version": state.version,
                "entry": state.number if state.number >= 0 else None,
                "error": "; ".join(filter(None, (state.error, _silence(state), state.unsigned, keys_problem))) or None,
                "history_lost": state.history_lost,
                "looked": state.looked.isoformat(timespec="seconds") if state.looked else None,
            }
            for one, state in self._states.items()
        }

    def _run(self) -> None:
        while True:
            try:
                self.poll()
            except Exception:
                # A bug must not end the thread: the old versions stay.
                logger.exception("polling the channels failed")
            if self._stopped.wait(self._poll_seconds):
                return

    def _tell(self, one: ChannelRef, state: _FollowState, error: str | None) -> None:
        error = one_line(error) if error else None
        if error and state.error != error:
            logger.error("%s stays at %s: %s", one.name, state.version, error)
        state.error = error

    def _update(self, one: ChannelRef, state: _FollowState) -> None:
        entry = self._newest_entry(one, state)
        if entry is None or (entry.number == state.number and state.error is None):
            return
        version = entry.change.version
        if version != state.version:
            model = self._verified(one, entry)
            # Name, version and number change together: nothing in between can fail.
            self._names.add(model.name)
            self._catalog.point(model.name, model)
            self._catalog.point(one.name, model)
            state.before, state.version, state.held = state.version, version, None
            state.unsigned = None
            logger.info("%s is now %s", one.name, version)
        state.number = entry.number

    def _newest_entry(self, one: ChannelRef, state: _FollowState) -> Entry | None:
        """What the channel holds: two requests a poll; every twentieth, and the one after an error, lists again."""
        if state.entry is None or state.error is not None or state.polls % _POLLS_PER_LISTING == 0:
            state.entry = channels.head(self._store, one.pipeline, one.channel)
        else:
            state.entry = channels.newer(self._store, state.entry)
        state.polls += 1
        return state.entry

    def _hold(self, one: ChannelRef, state: _FollowState) -> None:
        """Keep a lease on the served version in the store, so that it is not cleaned away."""
        now = datetime.now(UTC)
        if state.version is None or (state.held is not None and now - state.held < _LEASE / 2):
            return
        host = re.sub(r"[^A-Za-z0-9.-]", "-", socket.gethostname())[:30]
        holder = f"{host}-{os.getpid()}-{state.token}-{one.channel[:40]}"
        try:
            hold(self._store, one.pipeline, Lease(holder=holder, version=state.version, until=now + _LEASE))
            state.held = now
        except (GraftlineError, OSError) as error:
            # A read-only store can still be served from. Tried again well before the lease ends.
            logger.warning("no lease on %s@%s: %s", one.pipeline, state.version, error)
            state.held = now - _LEASE / 2 + _LEASE_RETRY

    def _forget(self) -> None:
        """Remove the names and files of releases that no channel holds now or held just before."""
        wanted = {
            (one.pipeline, version)
            for one, state in self._states.items()
            for version in (state.version, state.before)
            if version
        }
        for name in self._names - {f"{pipeline}@{version}" for pipeline, version in wanted}:
            self._names.discard(name)
            try:
                self._catalog.unload(name)
            except GraftlineError as error:
                logger.warning("%s was unloaded by somebody else: %s", name, error)
        # A release that a channel names but that could not be served yet is kept, so that it is fetched only once.
        wanted |= {(one.pipeline, s.entry.change.version) for one, s in self._states.items() if s.entry}
        unsettled = {one.pipeline for one, s in self._states.items() if s.version is None or s.error}
        self._folder.keep(wanted, {one.pipeline for one in self._followed} - unsettled)

    def _verified(self, one: ChannelRef, entry: Entry) -> ServedModel:
        """The model of a release, fully checked; no name points at it yet."""
        folder = self._folder.use(one.pipeline, entry.change.version)
        fetch_verified(self._store, entry, self._folder.root, self._ring)
        name = f"{one.pipeline}@{entry.change.version}"
        model = self._catalog.make_adapter(name, folder / "adapter", release=name)
        self._smoke(model, folder)
        return model

    @property
    def _ring(self) -> KeyRing | None:
        return self._keys.ring if isinstance(self._keys, KeyFile) else self._keys

    def _why_unsigned(self, one: ChannelRef, state: _FollowState) -> str | None:
        """Why the served release's signature does not count with the keys of now; None if it does."""
        if state.version is None or self._ring is None:
            return None
        try:
            self._ring.verify_release(self._folder.use(one.pipeline, state.version), now=datetime.now(UTC))
        except GraftlineError as error:
            problem = f"{state.version} is still served, and would not be accepted now: {error}"
            logger.error("%s: %s", one.name, problem)
            return problem
        return None


def _silence(state: _FollowState) -> str | None:
    """A message if the running poll has taken long."""
    began = state.began
    seconds = time.monotonic() - began if began is not None else 0.0
    return f"the store has not answered for {seconds:.0f} s" if seconds > _SILENCE_SECONDS else None


def fetch_verified(store: Store, entry: Entry, folder: Path, keys: KeyRing | None) -> Path:
    """Fetch the release that a channel's entry names; returns its folder, ``folder/pipeline/version``.

    Raises:
        ReleaseError, StoreError: it is incomplete or damaged.
        PromotionError: it is not the release that was promoted, or its signature does not count.
    """
    version = entry.change.version
    release = folder / entry.pipeline / version
    release.parent.mkdir(parents=True, exist_ok=True)
    manifest = fetch(store, entry.pipeline, version, release)
    if manifest.digest != entry.change.release:
        raise PromotionError(
            f"release {version} has digest {manifest.digest}, the channel's entry {entry.number} says "
            f"{entry.change.release}; it was changed after it was promoted, promote another"
        )
    if keys is not None:
        keys.verify_release(release, now=datetime.now(UTC))
    return release
