"""Promote a release into a channel, or roll a channel back: read, check everything, then write one log entry.

Nothing enters a channel unverified: signature, manifest, every digest, the policy, then a smoke run. A promoter that
dies leaves the channel either as it was or fully changed, and can be run again.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from itertools import islice
from pathlib import Path

from graftline.errors import PromotionError, ReleaseError
from graftline.logs import OnProgress, silent
from graftline.plain_text import check_text, one_line
from graftline.registry import channel
from graftline.registry.approval import ApprovalTarget, collect
from graftline.registry.binding import BASE, check_binding
from graftline.registry.channel import ChannelChange, Entry, Log
from graftline.registry.keys import KeyRing
from graftline.registry.leases import Claim, holding
from graftline.registry.log_checkpoints import keep, recall
from graftline.registry.policy import PromotionFacts, RuleResult, check, checked_now, counted_approvals, entry_time
from graftline.registry.releases import fetch, signer, verify_stored
from graftline.registry.store import Store
from graftline.release.manifest import GateVerdict
from graftline.settings.model import Channel

# Which release a channel goes back to: by default the newest that it held before and that nobody has rolled back from.
# So two people who roll back the same bad release do not undo each other, and a second rollback goes further back.

RECENT = timedelta(hours=1)
"""Within this time after a rollback, another one is assumed to be an accident, by the same person or a colleague."""
_SHOWN = 3


class CachedEntries:
    """Entries that are read when first needed, and can be iterated over again."""

    def __init__(self, entries: Iterator[Entry]) -> None:
        self._entries, self._read = entries, list[Entry]()

    def __iter__(self) -> Iterator[Entry]:
        number = 0
        while number < len(self._read) or self._read_another():
            yield self._read[number]
            number += 1

    def _read_another(self) -> bool:
        entry = next(self._entries, None)
        if entry is not None:
            self._read.append(entry)
        return entry is not None


@dataclass(frozen=True)
class PastEntry:
    """The newest entry with a release, and the rollback that ended it, if one did."""

    entry: Entry
    left_by: Entry | None


def held(entries: Iterable[Entry]) -> Iterator[PastEntry]:
    """Each release once, by the newest entry that holds it; ``entries`` come newest first."""
    known, following = set[str](), None
    for entry in entries:
        if entry.change.version not in known:
            known.add(entry.change.version)
            is_left = following is not None and following.change.action == "rollback"
            yield PastEntry(entry, following if is_left else None)
        following = entry


def choose(entries: Iterable[Entry], version: str | None) -> tuple[Entry, PastEntry]:
    """The channel's newest entry, and the one to go back to; the same one if it holds ``version`` already.

    ``entries`` come newest first and are read as far as needed; ``version`` None: the newest good one.

    Raises:
        PromotionError: there is none to go back to.
    """
    releases = held(entries)
    head, passed = next(releases).entry, list[PastEntry]()
    if head.change.version == version:
        return head, PastEntry(head, None)
    for one in releases:
        if one.entry.change.version == version or (version is None and one.left_by is None):
            return head, one
        passed.append(one)
    name, now = f"channel {head.channel!r} of {head.pipeline!r}", one_line(head.change.version)
    if version:
        known = ", ".join([now, *(one_line(one.entry.change.version) for one in passed)])
        raise PromotionError(f"{name} never held release {version!r}; it held {known}")
    if not passed:
        raise PromotionError(f"{name} never held any other release; it held {now}")
    raise PromotionError(
        f"{name} holds {now}, and every other release that it held was gone back from: {_list(passed)}; name one with "
        "--to VERSION if it is wanted all the same, or promote a new one"
    )


def refuse_second(entries: Iterable[Entry], now: datetime) -> None:
    """Raise PromotionError if the newest entry is a rollback within the last hour, and say what that did."""
    newest = tuple(islice(entries, 2))
    if len(newest) < 2 or newest[0].change.action != "rollback" or now - newest[0].change.time >= RECENT:
        return
    head, before = newest
    minutes = max(0, int((now - head.change.time).total_seconds() // 60))
    raise PromotionError(
        f"{head.channel} of {head.pipeline} was rolled back {minutes} min ago by {one_line(head.change.actor)} (entry "
        f"{head.number}), from {one_line(before.change.version)} to {one_line(head.change.version)}: "
        f"{one_line(head.change.reason)}. It holds {one_line(head.change.version)} now and nothing more was done. If "
        "that release is bad as well, go back further with --again, or to another with --to VERSION"
    )


def others(entries: Iterable[Entry], than: Entry) -> str:
    """What else can be named with ``--to``, in words; empty if nothing can."""
    releases = islice(held(entries), 1, 20)
    found = [one for one in releases if one.entry.change.version != than.change.version]
    return _list(found[:_SHOWN])


def _list(found: list[PastEntry]) -> str:
    return ", ".join(
        f"{one_line(one.entry.change.version)} (entry {one.entry.number}"
        + (f", gone back from in entry {one.left_by.number})" if one.left_by else ")")
        for one in found
    )


@dataclass(frozen=True, kw_only=True)
class PromotionRequest:
    """What to promote, into which channel, who and why."""

    pipeline: str
    channel: str
    version: str
    actor: str
    reason: str


@dataclass(frozen=True, kw_only=True)
class PromotionChecks:
    """What a promotion is checked with."""

    policy: Channel
    keys: KeyRing
    smoke: Callable[[Path], None]
    """Serves the release in a folder and compares its recorded answers; raises `PromotionError` on a difference."""
    production: str | None = "production"
    """The channel that verdicts compare with; None: always the base."""
    verdict: GateVerdict | None = None
    """A newer verdict than the manifest's, in case production has changed since."""


def promote(
    store: Store,
    wish: PromotionRequest,
    checks: PromotionChecks,
    *,
    folder: Path,
    now: Callable[[], datetime] | None = None,
    on_progress: OnProgress = silent,
) -> Entry:
    """Put a release into a channel.

    Args:
        store: where releases and channels are.
        wish: what, where to, who and why.
        checks: policy, keys, smoke run.
        folder: where the release is fetched to, to be verified and served; kept for the next time.
        now: the clock; None: the store's, which this machine's must agree with.
        on_progress: called with the bytes fetched and the total.

    Returns:
        The new entry; the channel's newest one if it holds this release already.

    Raises:
        ReleaseError: unsigned, signed by an unknown key, or damaged.
        PromotionError: the policy or the smoke run forbids it (every unmet rule is named), or clocks differ.
        ConflictError: somebody else was first; the channel is as that one left it.
        HistoryLostError: the channel's history went back.
        UnsafeStoreError: the store cannot guarantee that only one promoter wins.
    """
    check_text("the name", wish.actor)
    check_text("the reason", wish.reason)
    with holding(store, wish.pipeline, wish.version, doing="promote") as claim:
        return _promote(store, wish, checks, claim, folder, now or (lambda: checked_now(store)), on_progress)


def _promote(
    store: Store,
    wish: PromotionRequest,
    checks: PromotionChecks,
    claim: Claim,
    folder: Path,
    clock: Callable[[], datetime],
    on_progress: OnProgress,
) -> Entry:
    log = recall(store, wish.pipeline, wish.channel)
    if log.head and log.head.change.version == wish.version:
        return log.head
    started = entry_time(log.head, clock())
    manifest = fetch(store, wish.pipeline, wish.version, folder, on_progress=on_progress)
    verify_stored(store, wish.pipeline, wish.version, checks.keys, now=started, copy=folder)
    check_binding(manifest, lambda path: (folder / path).read_bytes())
    reference = _reference(store, log, checks.production)
    target = ApprovalTarget(wish.pipeline, wish.channel, wish.version, manifest.digest)
    case = PromotionFacts(
        target=target,
        builder=checks.keys.verify_release(folder, now=started),
        verdict=checks.verdict or manifest.verdict,
        reference=reference.version if reference else BASE,
        reference_release=reference.release if reference else None,
        log=log,
        earlier=recall(store, wish.pipeline, checks.policy.after) if checks.policy.after else None,
        approvals=collect(store, target),
        keys=checks.keys,
        now=started,
    )
    rules = check(checks.policy, case)
    _refuse_unmet(wish, rules)
    checks.smoke(folder)
    entry = channel.next_entry(log, _promotion(wish, case, checks.policy, rules, time=entry_time(log.head, clock())))
    claim.check()
    channel.append(store, entry)
    keep(store, log)
    return entry


@dataclass(frozen=True, kw_only=True)
class Rollback:
    """How a channel goes back."""

    keys: KeyRing | None = None
    """Whose signatures servers accept; None: they accept unsigned releases."""
    again: bool = False
    """Go back further even if there was a rollback within the hour."""
    now: Callable[[], datetime] | None = None
    """The clock; None: the store's, or this machine's where the store has none."""
    announce: Callable[[Entry, PastEntry], None] = lambda head, past: None
    """Called with the newest entry and the one to return to, before anything is written."""


def rollback(
    store: Store,
    *,
    pipeline: str,
    to_channel: str,
    version: str | None = None,
    actor: str,
    reason: str,
    how: Rollback = Rollback(),
) -> Entry:
    """Point a channel back at a release that it held before. Nothing is uploaded; freezes and approvals do not apply.

    ``version`` None: the newest that nobody has rolled back from. The history is read only as far back as needed.

    Returns:
        The new entry; the channel's newest one if it holds ``version`` already.

    Raises:
        PromotionError: there is none to go back to, or there was a rollback within the hour.
        ReleaseError: servers would refuse it; other releases are named.
        ConflictError: somebody else changed the channel at the same time.
        HistoryLostError: the channel's history went back.
    """
    check_text("the name", actor)
    check_text("the reason", reason)
    entries = CachedEntries(channel.backwards(store, pipeline, to_channel))
    if next(iter(entries), None) is None:
        raise PromotionError(f"channel {to_channel!r} of {pipeline!r} is empty; there is nothing to go back to")
    now = how.now() if how.now else store.now() or datetime.now(UTC)
    if version is None and not how.again:
        refuse_second(entries, now)
    head, past = choose(entries, version)
    if past.entry is head:
        return head
    how.announce(head, past)
    with holding(store, pipeline, past.entry.change.version, doing="rollback") as claim:
        signed = _refuse_what_servers_would(store, past.entry, entries, how.keys, now)
        change = ChannelChange(
            action="rollback",
            version=past.entry.change.version,
            release=past.entry.change.release,
            verdict=past.entry.change.verdict,
            actor=actor,
            reason=reason,
            # A rollback must be possible even if the previous entry is dated in the future; times never decrease.
            time=max(now.replace(microsecond=0), head.change.time),
            checks=(f"held before: entry {past.entry.number}", signed),
        )
        entry = channel.next_entry(Log(pipeline, to_channel, (head,)), change)
        claim.check()
        channel.append(store, entry)
    return entry


def _refuse_what_servers_would(
    store: Store, past: Entry, entries: Iterable[Entry], keys: KeyRing | None, now: datetime
) -> str:
    """Check a release in the store as a server does before it serves it; returns whose signature it has, in words."""
    version = past.change.version
    try:
        manifest = verify_stored(store, past.pipeline, version, None, now=now)
        if manifest.digest != past.change.release:
            raise ReleaseError(
                f"release {version} has digest {manifest.digest}, the history says {past.change.release}: it was "
                "changed after it was promoted"
            )
        by = signer(store, manifest, keys, now=now) if keys else None
    except ReleaseError as error:
        known = others(entries, past)
        remedy = f"name another with --to: {known}" if known else "promote a new one"
        raise ReleaseError(f"servers would refuse {version}: {error}; {remedy}") from error
    return f"signature: by {by}" if by else "signature: not looked at, there is no key file"


def _promotion(
    wish: PromotionRequest, case: PromotionFacts, policy: Channel, rules: tuple[RuleResult, ...], *, time: datetime
) -> ChannelChange:
    met = [f"{rule.name}: {rule.reason}" for rule in rules]
    return ChannelChange(
        action="promote",
        version=wish.version,
        release=case.target.release,
        verdict=case.verdict,
        actor=wish.actor,
        reason=wish.reason,
        time=time,
        approvals=counted_approvals(policy, case)[0],
        checks=(f"signature: by {case.builder}", *met, "smoke: matched"),
    )


def _reference(store: Store, log: Log, production: str | None) -> ChannelChange | None:
    """The change that put the present release into production; None: verdicts compare with the base."""
    if production is None:
        return None
    head = log.head if production == log.channel else channel.head(store, log.pipeline, production)
    return head.change if head else None


def _refuse_unmet(wish: PromotionRequest, rules: tuple[RuleResult, ...]) -> None:
    unmet = [rule for rule in rules if not rule.met]
    if unmet:
        lines = "\n".join(f"  {rule.name}: {one_line(rule.reason)}" for rule in unmet)
        raise PromotionError(f"{wish.version} may not enter {wish.channel} of {wish.pipeline}:\n{lines}")
