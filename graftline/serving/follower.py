"""Serve what a channel holds: look at the store every few seconds, verify what is new, then let the name mean it.

Order: manifest and every file's digest, signature, base and template digest, a probe of the adapter, the recorded
answers. Only then does ``pipeline@channel`` mean the new release; on any failure the old one stays and `status` says
why.
"""

import logging
import os
import socket
import threading
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from graftline.errors import GraftlineError, PromotionError
from graftline.registry import channel as channels
from graftline.registry.channel import Entry
from graftline.registry.keys import KeyRing
from graftline.registry.leases import Lease, hold
from graftline.registry.releases import fetch
from graftline.registry.store import Store
from graftline.serving.catalog import Catalog, ServedModel

_LEASE = timedelta(hours=2)
_LOOKS_A_LISTING = 20

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Followed:
    """A channel of a pipeline."""

    pipeline: str
    channel: str

    @property
    def name(self) -> str:
        """The name that clients ask for."""
        return f"{self.pipeline}@{self.channel}"


@dataclass
class _State:
    version: str | None = None
    before: str | None = None
    held: datetime | None = None
    number: int = -1
    entry: Entry | None = None
    """The newest one at the last look."""
    looks: int = 0
    error: str | None = None
    looked: datetime | None = None


class Follower:
    """Keeps ``pipeline@channel`` names in a catalog up to date, on a thread of its own.

    Args:
        store: where releases and channels are.
        followed: which channels.
        catalog: where the names are.
        folder: where releases are fetched to.
        keys: whose signatures count; None accepts unsigned releases.
        smoke: raises an error unless the model gives the release's recorded answers.
        poll_seconds: time between two looks.
    """

    def __init__(
        self,
        store: Store,
        followed: tuple[Followed, ...],
        catalog: Catalog,
        folder: Path,
        *,
        keys: KeyRing | None,
        smoke: Callable[[ServedModel, Path], None],
        poll_seconds: float = 3.0,
    ) -> None:
        self._store, self._followed, self._catalog, self._folder = store, followed, catalog, folder
        self._keys, self._smoke, self._poll_seconds = keys, smoke, poll_seconds
        self._states = {one: _State() for one in followed}
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="follower", daemon=True)

    def start(self) -> None:
        """Look once, then go on in the background."""
        self.look()
        self._thread.start()

    def stop(self) -> None:
        """Stop looking."""
        self._stopped.set()
        if self._thread.is_alive():
            self._thread.join(self._poll_seconds + 60)

    def look(self) -> None:
        """Bring every channel up to date once."""
        for one, state in self._states.items():
            try:
                self._update(one, state)
                state.error = None
            except GraftlineError as error:
                if state.error != str(error):
                    logger.error("%s stays at %s: %s", one.name, state.version, error)
                state.error = str(error)
            state.looked = datetime.now(UTC)
            self._hold(one, state)

    def status(self) -> dict[str, dict[str, Any]]:
        """By channel: the version that is served, the entry's number, and why a newer one is not."""
        return {
            one.name: {
                "version": state.version,
                "entry": state.number if state.number >= 0 else None,
                "error": state.error,
                "looked": state.looked.isoformat(timespec="seconds") if state.looked else None,
            }
            for one, state in self._states.items()
        }

    def _run(self) -> None:
        while not self._stopped.wait(self._poll_seconds):
            try:
                self.look()
            except Exception:
                # A fault of ours must not end the following: it is logged, and the old versions stay.
                logger.exception("looking at the channels failed")

    def _update(self, one: Followed, state: _State) -> None:
        entry = self._newest_entry(one, state)
        if entry is None or (entry.number == state.number and state.error is None):
            return
        version = entry.change.version
        if version != state.version:
            model = self._verified(one, entry)
            self._catalog.point(one.name, model)
            logger.info("%s is now %s", one.name, version)
            # The release before stays loadable by name, for a look at both; those before it are forgotten.
            if state.before not in (None, version):
                self._catalog.unload(f"{one.pipeline}@{state.before}")
            state.before, state.held = state.version, None
        state.version, state.number = version, entry.number

    def _newest_entry(self, one: Followed, state: _State) -> Entry | None:
        """What the channel holds: a look costs one request, and every twentieth begins at the store's listing again."""
        if state.entry is None or state.error is not None or state.looks % _LOOKS_A_LISTING == 0:
            state.entry = channels.head(self._store, one.pipeline, one.channel)
        else:
            state.entry = channels.newer(self._store, state.entry)
        state.looks += 1
        return state.entry

    def _hold(self, one: Followed, state: _State) -> None:
        """Say in the store that this version is in use, so that nobody cleans it away."""
        now = datetime.now(UTC)
        if state.version is None or (state.held is not None and now - state.held < _LEASE / 2):
            return
        holder = f"{socket.gethostname()}-{os.getpid()}-{one.channel}"
        try:
            hold(self._store, one.pipeline, Lease(holder=holder, version=state.version, until=now + _LEASE))
        except GraftlineError as error:
            # A store that may only be read is no reason not to serve.
            logger.warning("no lease on %s@%s: %s", one.pipeline, state.version, error)
        state.held = now

    def _verified(self, one: Followed, entry: Entry) -> ServedModel:
        """The model of a release, after everything about it was checked."""
        folder = fetch_verified(self._store, entry, self._folder, self._keys)
        name = f"{one.pipeline}@{entry.change.version}"
        model = self._catalog.load_adapter(name, folder / "adapter", release=name, replace=True)
        try:
            self._smoke(model, folder)
        except GraftlineError:
            self._catalog.unload(name)
            raise
        return model


def fetch_verified(store: Store, entry: Entry, folder: Path, keys: KeyRing | None) -> Path:
    """Fetch the release that a channel's entry names; returns its folder, ``folder/pipeline/version``.

    Raises:
        ReleaseError, StoreError: it is not whole, or a file is not what its manifest says.
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
