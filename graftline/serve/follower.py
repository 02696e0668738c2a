"""Serve what a channel holds: poll the store, verify a new release, then point the channel's name at it.

The checks, in order: the entry's signature and policy (graftline.registry.trust), manifest and every file's digest,
the release's signature, base and template digest, a probe of the adapter, the recorded answers. Only then does
``pipeline@channel`` mean the new release. On any failure the old one stays and `status` says why; other channels are
not affected.
"""

import logging
import os
import re
import secrets
import socket
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
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
from graftline.registry.seals import why_not_signed
from graftline.registry.store import Store
from graftline.registry.trust import UNSIGNED, EntryJudge, JudgedLog, trust_in
from graftline.serve.catalog import Catalog, ServedModel
from graftline.serve.rollouts import Observed, Split
from graftline.serve.served_folder import ServedFolder
from graftline.settings.channels import Channel, RolloutJudge, as_time

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
    candidate: str | None = None
    share: float | None = None
    """Of the candidate; None: there is none."""
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
    proved: datetime | None = None
    """When the served release is known to have been in the channel."""
    stale: str | None = None
    """Why the channel may hold another release now."""


class Follower:
    """Keeps ``pipeline@channel`` names in a catalog up to date, on its own thread.

    Args:
        store: where releases and channels are.
        followed: the channels.
        catalog: where the names are.
        folder: where releases are fetched to.
        keys: whose signatures count, or a key file, read again when it changes; None: nothing is checked.
        policies: the channels' policies by this server's own configuration.
        smoke: raises an error unless the model gives the release's recorded answers.
        poll_seconds: time between two polls.
    """

    def __init__(  # noqa: PLR0913  # what it follows, where to, and what it checks
        self,
        store: Store,
        followed: tuple[ChannelRef, ...],
        catalog: Catalog,
        folder: Path,
        *,
        keys: KeyRing | KeyFile | None,
        policies: Mapping[str, Channel] | None = None,
        smoke: Callable[[ServedModel, Path], None],
        poll_seconds: float = 3.0,
    ) -> None:
        self.observed = Observed()
        self.judges: Mapping[str, RolloutJudge] = {}
        """By channel, how a candidate is judged; the default where a channel is not among them."""
        self._store, self._followed, self._catalog = store, followed, catalog
        self._folder, self._keys, self._policies = ServedFolder(folder), keys, policies or {}
        self._smoke, self._poll_seconds = smoke, poll_seconds
        self._states = {one: _FollowState() for one in followed}
        self._names: set[str] = set()
        """The catalog's ``pipeline@version`` names that belong to channels."""
        self._stopped, self._polled = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._run, name="follower", daemon=True)

    def start(self) -> None:
        """Poll in the background; waits for the first poll unless the store takes too long."""
        if self.is_unsigned:
            logger.warning("%s: %s", self._store.url, UNSIGNED)
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
                "error": "; ".join(
                    filter(None, (state.error, _silence(state), state.unsigned, state.stale, keys_problem))
                )
                or None,
                "history_lost": state.history_lost,
                "candidate": state.candidate,
                "share": state.share,
                "looked": state.looked.isoformat(timespec="seconds") if state.looked else None,
            }
            for one, state in self._states.items()
        }

    @property
    def is_unsigned(self) -> bool:
        """Whether nothing is checked: whoever can write to the store decides what is served."""
        if isinstance(self._keys, KeyFile):
            return self._keys.is_unsigned
        return self._keys is None or self._keys.unsigned

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
        judged = self._judged(one)
        if judged and judged.log.head:
            state.entry = entry = judged.log.head
        version = entry.change.version
        if entry.change.action == "rollback":
            self._split(one, state, None)  # first, because the rest may fail
        if version != state.version:
            model = self._verified(one, entry, judged.proved if judged else None)
            # Name, version and number change together: nothing in between can fail.
            self._names.add(model.name)
            self._catalog.point(model.name, model)
            self._catalog.point(one.name, model)
            state.before, state.version, state.held = state.version, version, None
            state.unsigned = None
            logger.info("%s is now %s", one.name, version)
        self._try(one, state, entry, judged)
        state.number = entry.number
        state.proved, state.stale = (judged.proved, judged.stale) if judged else (None, None)

    def _judge(self, one: ChannelRef) -> EntryJudge | None:
        trust = trust_in(self._ring, self._policies)
        return EntryJudge(self._store, one.pipeline, trust, now=datetime.now(UTC)) if trust else None

    def _judged(self, one: ChannelRef) -> JudgedLog | None:
        judge = self._judge(one)
        return judge.read(one.channel) if judge else None

    def _try(self, one: ChannelRef, state: _FollowState, entry: Entry, judged: JudgedLog | None) -> None:
        """Split the channel's traffic as its entry says; a candidate that cannot be served gets none of it."""
        candidate = channels.candidate_of(entry)
        if candidate is None:
            self._split(one, state, None)
            return
        if candidate.change.version != state.candidate:
            self._split(one, state, None)
            model = self._verified(one, candidate, judged.tried if judged else None)
            self._names.add(model.name)
            self._catalog.point(model.name, model)
            state.candidate = candidate.change.version
        split = split_of(one, entry, self.judges)
        self._split(one, state, split)

    def _split(self, one: ChannelRef, state: _FollowState, split: Split | None) -> None:
        self.observed.set(one.name, split)
        if split is None:
            state.candidate, state.share = None, None
        else:
            state.share = split.share

    def _newest_entry(self, one: ChannelRef, state: _FollowState) -> Entry | None:
        """What the channel holds: two requests a poll; every twentieth, and the one after an error, lists again."""
        if state.entry is None or state.error is not None or state.polls % _POLLS_PER_LISTING == 0:
            if state.polls and state.entry and (judge := self._judge(one)):
                state.stale = judge.stale(state.entry)
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
            for version in (state.version, state.before, state.candidate)
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
        wanted |= {
            (one.pipeline, s.entry.change.rollout.version)
            for one, s in self._states.items()
            if s.entry and s.entry.change.rollout
        }
        unsettled = {one.pipeline for one, s in self._states.items() if s.version is None or s.error}
        self._folder.keep(wanted, {one.pipeline for one in self._followed} - unsettled)

    def _verified(self, one: ChannelRef, entry: Entry, at: datetime | None) -> ServedModel:
        """The model of a release, fully checked, by the keys of ``at`` (None: now); no name points at it yet."""
        folder = self._folder.use(one.pipeline, entry.change.version)
        fetch_verified(self._store, entry, self._folder.root, None if self.is_unsigned else self._ring, at=at)
        name = f"{one.pipeline}@{entry.change.version}"
        model = replace(self._catalog.make_adapter(name, folder / "adapter", release=name), digest=entry.change.release)
        self._smoke(model, folder)
        return model

    @property
    def _ring(self) -> KeyRing | None:
        return self._keys.ring if isinstance(self._keys, KeyFile) else self._keys

    def _why_unsigned(self, one: ChannelRef, state: _FollowState) -> str | None:
        """Why the served release's signature, or its entry's, does not count with today's keys; None if it does."""
        ring = self._ring
        if state.version is None or ring is None or ring.unsigned:
            return None
        at = state.proved or datetime.now(UTC)
        problem: str | None = None
        try:
            ring.verify_release(self._folder.use(one.pipeline, state.version), now=at)
        except GraftlineError as error:
            problem = str(error)
        entry = state.entry
        if problem is None and entry and entry.number == state.number and entry.digest not in ring.accepted:
            not_signed = why_not_signed(entry, ring, at)
            problem = f"entry {entry.number} {not_signed}" if not_signed else None
        if problem is None:
            return None
        logger.error(
            "%s: %s", one.name, problem := f"{state.version} is still served, and would not be accepted now: {problem}"
        )
        return problem


def split_of(one: ChannelRef, entry: Entry, judges: Mapping[str, RolloutJudge]) -> Split | None:
    """How a channel's entry splits its traffic; None: it does not."""
    step = entry.change.rollout
    if step is None:
        return None
    judge = judges.get(one.channel, RolloutJudge())
    return Split(
        channel=one.name,
        salt=step.salt,
        incumbent=f"{one.pipeline}@{entry.change.version}",
        candidate=f"{one.pipeline}@{step.version}",
        share=step.share / 100,
        mirror=step.mirror / 100,
        window_seconds=as_time(judge.window).total_seconds(),
        refusals=judge.refusals,
    )


def _silence(state: _FollowState) -> str | None:
    """A message if the running poll has taken long."""
    began = state.began
    seconds = time.monotonic() - began if began is not None else 0.0
    return f"the store has not answered for {seconds:.0f} s" if seconds > _SILENCE_SECONDS else None


def fetch_verified(
    store: Store, entry: Entry, folder: Path, keys: KeyRing | None, *, at: datetime | None = None
) -> Path:
    """Fetch the release that a channel's entry names; returns its folder, ``folder/pipeline/version``.

    ``at``: when the release is known to have been in the channel; None: now. A builder's key must not have ended then.

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
        builder = keys.verify_release(release, now=at or datetime.now(UTC))
        # A rollout's entry names the candidate's builder, not that of the incumbent, which it holds.
        said = entry.seal.builder if entry.seal and not entry.change.rollout else None
        if said and keys.person(builder) != keys.person(said):
            raise PromotionError(
                f"release {version} is signed by {builder}, the channel's entry {entry.number} says {said}; promote it "
                "again"
            )
    return release
