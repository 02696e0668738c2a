"""Have vLLM serve what channels hold: verify, rewrite, load on every replica, try, move the alias, drain, unload.

Every poll computes from the channels' entries which releases the replicas should have, and loads what is missing: a
replica that was restarted gets back what it lost. On any failure the alias stays where it is and `status` says why.
"""

import logging
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import uvicorn
from starlette.applications import Starlette

from graftline.adapters.peft_format import AdapterWeights
from graftline.digest import Digest
from graftline.errors import ExportError, GraftlineError, HistoryLostError, ServingError
from graftline.export.targets import export_adapter, shapes_of
from graftline.plain_text import one_line
from graftline.registry import channel as channels
from graftline.registry.channel import Entry
from graftline.registry.keys import KeyFile, KeyRing
from graftline.registry.store import Store
from graftline.registry.trust import UNSIGNED, JudgedLog, judged_head, trust_in
from graftline.serve import smoke
from graftline.serve.follower import ChannelRef, fetch_verified, split_of
from graftline.serve.replicas import UnreachableError, VllmClient
from graftline.serve.rollouts import Observed
from graftline.serve.router import Fleet, Replica, Router, create_app
from graftline.serve.server import KEEP_ALIVE_SECONDS
from graftline.settings.channels import Channel, RolloutJudge
from graftline.weights.identity import read_identity

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class VllmFollowing:
    """What is followed, and how."""

    channels: tuple[ChannelRef, ...]
    folder: Path
    """Where releases are fetched to, and adapters for vLLM written to; every replica sees it at the same path."""
    export: Callable[[Path, Path], object]
    """Writes a release's adapter folder for vLLM to a new folder; its errors say why vLLM cannot serve it."""
    keys: KeyFile | None = None
    """Whose signatures count; None: nothing is checked."""
    policies: Mapping[str, Channel] = field(default_factory=dict)
    """The channels' policies, by which entries are judged."""
    judges: Mapping[str, RolloutJudge]
    """By channel, how a candidate is judged."""
    token: str | None = None
    """vLLM's ``--api-key``."""
    poll_seconds: float = 3.0


@dataclass
class _State:
    entry: Entry | None = None
    judged: JudgedLog | None = None
    """The history whose newest entry it is; None: nothing is checked."""
    version: str | None = None
    before: str | None = None
    error: str | None = None
    history_lost: bool = False
    looked: datetime | None = None


class VllmFollower:
    """Keeps replicas and aliases in step with the channels, on a separate thread."""

    def __init__(self, store: Store, fleet: Fleet, observed: Observed, following: VllmFollowing) -> None:
        self._store, self._fleet, self._observed, self._following = store, fleet, observed, following
        self._states = {one: _State() for one in following.channels}
        self._clients = {replica: VllmClient(replica.url, following.token) for replica in fleet.replicas}
        self._verified: dict[Path, Digest] = {}
        """Folders whose releases were verified, and with which digest."""
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="vllm-follower", daemon=True)

    def start(self) -> None:
        """Poll once, then in the background."""
        if self.is_unsigned:
            logger.warning("%s: %s", self._store.url, UNSIGNED)
        self._poll_safely()
        self._thread.start()

    def stop(self) -> None:
        """Stop polling."""
        self._stopped.set()
        if self._thread.is_alive():
            self._thread.join(10.0)

    @property
    def is_unsigned(self) -> bool:
        """Whether nothing is checked: whoever can write to the store decides what is served."""
        return self._following.keys is None or self._following.keys.is_unsigned

    def status(self) -> dict[str, dict[str, Any]]:
        """By channel: the version that is served, and what is wrong."""
        keys_problem = self._following.keys.problem if self._following.keys else None
        return {
            one.name: {
                "version": state.version,
                "entry": state.entry.number if state.entry else None,
                "candidate": split.candidate if (split := self._observed.split(one.name)) else None,
                "share": split.share if split else None,
                "error": "; ".join(filter(None, (state.error, keys_problem))) or None,
                "history_lost": state.history_lost,
                "looked": state.looked.isoformat(timespec="seconds") if state.looked else None,
            }
            for one, state in self._states.items()
        }

    def poll(self) -> None:
        """Look at every channel and every replica once."""
        if self._following.keys:
            self._following.keys.refresh()
        wanted: dict[str, Path] = {}
        problems: dict[ChannelRef, str | None] = {}
        for one, state in self._states.items():
            problem, state.history_lost = None, False
            try:
                state.entry, state.judged = self._newest(one)
            except GraftlineError as error:  # the last entry counts until the store answers again
                problem, state.history_lost = str(error), isinstance(error, HistoryLostError)
            for held, since in _served(state):
                try:
                    wanted[f"{one.pipeline}@{held.change.version}"] = self._prepared(held, since)
                except (GraftlineError, OSError) as error:
                    problem = problem or str(error)
            problems[one] = problem
            state.looked = datetime.now(UTC)
        kept = {f"{one.pipeline}@{v}" for one, s in self._states.items() for v in (s.version, s.before) if v}
        refused = self._bring_all(wanted, kept)
        for one, state in self._states.items():
            missing = self._move(one, state, state.entry, refused) if state.entry else "nothing was ever promoted"
            self._tell(one, state, problems[one] or missing)
        self._unload(wanted)

    def _ring(self) -> KeyRing | None:
        ring = self._following.keys.ring if self._following.keys else None
        return None if ring is None or ring.unsigned else ring

    def _newest(self, one: ChannelRef) -> tuple[Entry | None, JudgedLog | None]:
        """A channel's newest entry, if it counts."""
        trust = trust_in(self._ring(), self._following.policies)
        return judged_head(self._store, one.pipeline, one.channel, trust)

    def _run(self) -> None:
        while not self._stopped.wait(self._following.poll_seconds):
            self._poll_safely()

    def _poll_safely(self) -> None:
        try:
            self.poll()
        except Exception:
            logger.exception("following the channels failed")  # a bug must not end the thread

    def _tell(self, one: ChannelRef, state: _State, problem: str | None) -> None:
        problem = one_line(problem) if problem else None
        if problem and problem != state.error:
            logger.error("%s stays at %s: %s", one.name, state.version, problem)
        state.error = problem

    def _prepared(self, entry: Entry, since: datetime | None) -> Path:
        """The verified and rewritten adapter folder of the release that an entry holds."""
        folder = self._following.folder
        out = folder / "vllm" / entry.pipeline / entry.change.version
        if self._verified.get(out) != entry.change.release or not out.is_dir():
            prepare(self._store, entry, folder, self._following.export, self._ring(), at=since)
            self._verified[out] = entry.change.release
        return out

    def _bring_all(self, wanted: Mapping[str, Path], kept: set[str]) -> dict[str, str]:
        """Load and try what is wanted wherever it is missing; problems by name."""
        problems, away = dict[str, str](), list[str]()
        for replica, client in self._clients.items():
            try:
                listed = client.models()
                ready = replica.models & listed  # what was tried there and is still loaded
                for name, folder in wanted.items():
                    if name not in ready and (problem := self._bring(client, name, folder)):
                        problems[name] = problem
                    elif name not in ready:
                        ready.add(name)
                self._fleet.note(replica, reachable=True, models=ready & (wanted.keys() | kept))
            except ServingError as error:  # away, or it refuses even to list its models
                self._note_away(replica, error)
                away.append(one_line(str(error)))
        if len(away) == len(self._clients):
            problems |= dict.fromkeys(wanted.keys() - problems.keys(), "no replica can be used: " + "; ".join(away))
        return problems

    def _bring(self, client: VllmClient, name: str, folder: Path) -> str | None:
        """Load a release on one replica and try it there; returns why it cannot be served, or None."""
        pipeline, _, version = name.partition("@")
        try:
            client.load(name, folder)
            client.check(name, smoke.read(self._following.folder / "releases" / pipeline / version))
        except UnreachableError:
            raise
        except GraftlineError as error:
            self._unload_one(client, name)
            return str(error)
        logger.info("%s has %s", client.url, name)
        return None

    def _unload_one(self, client: VllmClient, name: str) -> None:
        try:
            client.unload(name)
        except UnreachableError:
            raise
        except ServingError as error:  # it stays there, and no request is sent to it
            logger.warning("%s", error)

    def _note_away(self, replica: Replica, error: ServingError) -> None:
        if replica.reachable:
            logger.error("%s", error)
        self._fleet.note(replica, reachable=False, models=set())

    def _move(self, one: ChannelRef, state: _State, entry: Entry, refused: Mapping[str, str]) -> str | None:
        """Point the alias at what the channel holds and split its traffic, if the replicas that answer have it.

        Returns what is missing, if anything is.
        """
        version = entry.change.version
        if entry.change.action == "rollback":
            self._observed.set(one.name, None)
        name = f"{one.pipeline}@{version}"
        if not self._has(name):
            return refused.get(name) or f"no replica has {name} yet"
        if version != state.version:
            self._fleet.point(one.name, name)
            state.before, state.version = state.version, version
            logger.info("%s is now %s", one.name, version)
        split, missing = split_of(one, entry, self._following.judges), None
        if split is not None and not self._has(split.candidate):
            missing = refused.get(split.candidate) or f"no replica has {split.candidate} yet"
            split = None
        self._observed.set(one.name, split)
        return missing

    def _has(self, name: str) -> bool:
        """Whether at least one replica answers, and all that answer have a release."""
        answering = [replica for replica in self._fleet.replicas if replica.reachable]
        return bool(answering) and all(name in replica.models for replica in answering)

    def _unload(self, wanted: Mapping[str, Path]) -> None:
        """Unload releases of followed pipelines that are no longer wanted and that no request uses."""
        kept = set(wanted) | {
            f"{one.pipeline}@{version}"
            for one, s in self._states.items()
            for version in (s.version, s.before)
            if version
        }
        pipelines = {one.pipeline for one in self._states}
        if any(state.entry is None or state.history_lost for state in self._states.values()):
            return  # what is wanted is not known
        for replica, client in self._clients.items():
            if not replica.reachable:
                continue
            try:
                for name in client.models() - kept:
                    if name.partition("@")[0] in pipelines and "@" in name and not self._fleet.running(name):
                        client.unload(name)
                        logger.info("%s no longer has %s", client.url, name)
            except ServingError as error:
                logger.warning("%s", error)


def _served(state: _State) -> Iterator[tuple[Entry, datetime | None]]:
    """What the channel holds, and its candidate as if it did; with since when, where that is known."""
    if state.entry is None:
        return
    yield state.entry, state.judged.proved if state.judged else None
    if candidate := channels.candidate_of(state.entry):
        yield candidate, state.judged.tried if state.judged else None


def prepare(
    store: Store,
    entry: Entry,
    folder: Path,
    export: Callable[[Path, Path], object],
    keys: KeyRing | None,
    *,
    at: datetime | None = None,
) -> Path:
    """Fetch and verify the release that an entry holds, and write its adapter for vLLM; returns that folder.

    ``at``: when the release is known to have been in the channel, as `fetch_verified`.

    Raises:
        ServingError: vLLM cannot serve it; the message suggests what to do.
        GraftlineError: it is damaged, for another base, or its signature does not count.
    """
    out = folder / "vllm" / entry.pipeline / entry.change.version
    release = fetch_verified(store, entry, folder / "releases", keys, at=at)
    if not out.is_dir():
        try:
            export(release / "adapter", out)
        except ExportError as error:
            way_out = "its merged/ folder" if (release / "merged").is_dir() else "a release with package.merged: true"
            raise ServingError(f"{error}; vLLM can serve {way_out} as a model under the version's name") from error
    return out


def exporter(base: Path) -> Callable[[Path, Path], object]:
    """Writes adapters for a vLLM that serves ``base``.

    The returned function raises BaseMismatchError for an adapter of another base, and ExportError for one that vLLM
    cannot serve.
    """
    identity, shapes = read_identity(base), shapes_of(base)

    def export(adapter: Path, out: Path) -> object:
        AdapterWeights.open(adapter).check_base(identity)
        return export_adapter(adapter, out, target="vllm", shape_of=shapes)

    return export


def assemble(
    store: Store, urls: Sequence[str], following: VllmFollowing, *, admin_tokens: Sequence[str] = ()
) -> tuple[Starlette, VllmFollower]:
    """The router with its follower, which starts and stops with it."""
    fleet, observed = Fleet(urls), Observed()
    follower = VllmFollower(store, fleet, observed, following)
    router = Router(fleet, observed, follower.status, is_unsigned=lambda: follower.is_unsigned)
    app = create_app(router, admin_tokens=admin_tokens, on_start=follower.start, on_stop=follower.stop)
    return app, follower


def serve(
    store: Store,
    urls: Sequence[str],
    following: VllmFollowing,
    *,
    admin_tokens: Sequence[str],
    address: tuple[str, int],
) -> None:
    """Route and follow until SIGTERM or SIGINT; running requests are finished first."""
    host, port = address
    app, _ = assemble(store, urls, following, admin_tokens=admin_tokens)
    uvicorn.run(
        app,
        host=host,
        port=port,
        log_level="warning",
        timeout_keep_alive=KEEP_ALIVE_SECONDS,
        timeout_graceful_shutdown=60,
    )
