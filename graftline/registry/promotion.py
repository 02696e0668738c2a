"""Promote a release into a channel, or roll a channel back: read, check everything, then write one log entry.

Nothing enters a channel that was not verified: signature, then manifest, then every digest, then the policy, then a
smoke run. A promoter that dies at any step leaves the channel as it was or fully changed, and may be run again.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from graftline.errors import PromotionError, ReleaseError
from graftline.plain_text import check_text, one_line
from graftline.progress import OnProgress, silent
from graftline.registry import channel
from graftline.registry.approval import Target, collect
from graftline.registry.binding import BASE, check_binding
from graftline.registry.channel import Change, Entry, Log
from graftline.registry.clock import checked_now, entry_time
from graftline.registry.going_back import Held, Replayed, choose, others, refuse_second
from graftline.registry.keys import KeyRing
from graftline.registry.leases import Claim, holding
from graftline.registry.log_checkpoints import keep, recall
from graftline.registry.policy import Case, Rule, check, counted_approvals
from graftline.registry.releases import fetch, signer, verify_stored
from graftline.registry.store import Store
from graftline.release.manifest import GateVerdict
from graftline.settings.model import Channel


@dataclass(frozen=True, kw_only=True)
class Wish:
    """What somebody wants to promote, where to and why."""

    pipeline: str
    channel: str
    version: str
    actor: str
    reason: str


@dataclass(frozen=True, kw_only=True)
class Checks:
    """What a promotion is held against."""

    policy: Channel
    keys: KeyRing
    smoke: Callable[[Path], None]
    """Serve the release in this folder, compare with its recorded answers; raises `PromotionError` if they differ."""
    production: str | None = "production"
    """Channel that verdicts are against; None: always the base."""
    verdict: GateVerdict | None = None
    """A newer verdict than the manifest's, for when production has moved on since."""


def promote(
    store: Store,
    wish: Wish,
    checks: Checks,
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
        now: the clock; None: the store's, which this machine's has to agree with.
        on_progress: called with the bytes fetched and the total.

    Returns:
        The new entry; the channel's newest one if it holds this release already.

    Raises:
        ReleaseError: unsigned, signed by nobody on the list, or damaged.
        PromotionError: the policy or the smoke run forbids it; every rule that is not met is named. Or two
            clocks differ.
        ConflictError: somebody else was first; the channel is as that one left it.
        HistoryLostError: the channel's history went back.
        UnsafeStoreError: the store cannot promise that only one promoter wins.
    """
    check_text("the name", wish.actor)
    check_text("the reason", wish.reason)
    with holding(store, wish.pipeline, wish.version, doing="promote") as claim:
        return _promote(store, wish, checks, claim, folder=folder, now=now, on_progress=on_progress)


def _promote(
    store: Store,
    wish: Wish,
    checks: Checks,
    claim: Claim,
    *,
    folder: Path,
    now: Callable[[], datetime] | None,
    on_progress: OnProgress,
) -> Entry:
    log = recall(store, wish.pipeline, wish.channel)
    if log.head and log.head.change.version == wish.version:
        return log.head
    clock = now or (lambda: checked_now(store))
    started = entry_time(log.head, clock())
    manifest = fetch(store, wish.pipeline, wish.version, folder, on_progress=on_progress)
    verify_stored(store, wish.pipeline, wish.version, checks.keys, now=started, copy=folder)
    check_binding(manifest, lambda path: (folder / path).read_bytes())
    reference = _reference(store, log, checks.production)
    target = Target(wish.pipeline, wish.channel, wish.version, manifest.digest)
    case = Case(
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
class GoingBack:
    """How a channel goes back."""

    keys: KeyRing | None = None
    """Whose signatures servers accept; None: they accept unsigned releases."""
    again: bool = False
    """Go back further by default, though somebody has gone back within the hour."""
    now: Callable[[], datetime] | None = None
    """The clock; None: the store's, or this machine's where the store has none."""
    announce: Callable[[Entry, Held], None] = lambda head, past: None
    """Called with the newest entry and the one that is returned to, before anything is written."""


def rollback(
    store: Store,
    *,
    pipeline: str,
    to_channel: str,
    version: str | None = None,
    actor: str,
    reason: str,
    how: GoingBack = GoingBack(),
) -> Entry:
    """Point a channel back at a release it held before. Nothing is uploaded; freezes and approvals do not apply.

    Args:
        store: where the channel is; its history is read back to the entry that held the release, and no further.
        pipeline: its pipeline.
        to_channel: the channel.
        version: one the channel held; None: the newest that nobody has gone back from (graftline.registry.going_back).
        actor: who.
        reason: why.
        how: keys, clock, and what to say before it is done.

    Returns:
        The new entry; the channel's newest one if it holds ``version`` already.

    Raises:
        PromotionError: there is none to go back to, or somebody went back within the hour.
        ReleaseError: servers would refuse it; other releases are named.
        ConflictError: somebody else changed the channel at the same time.
        HistoryLostError: the channel's history went back.
    """
    check_text("the name", actor)
    check_text("the reason", reason)
    entries = Replayed(channel.backwards(store, pipeline, to_channel))
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
        change = Change(
            action="rollback",
            version=past.entry.change.version,
            release=past.entry.change.release,
            verdict=past.entry.change.verdict,
            actor=actor,
            reason=reason,
            # However wrong the clock of the entry before was: going back has to be possible, and time does not.
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
    """Look at a release in the store as a server does before it serves it; returns whose signature it has, in words."""
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


def _promotion(wish: Wish, case: Case, policy: Channel, rules: tuple[Rule, ...], *, time: datetime) -> Change:
    """The change that a promotion writes: with everything it was held against."""
    met = [f"{rule.name}: {rule.reason}" for rule in rules]
    return Change(
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


def _reference(store: Store, log: Log, production: str | None) -> Change | None:
    """What verdicts have to be against: the change that put it into production; None for the base."""
    if production is None:
        return None
    head = log.head if production == log.channel else channel.head(store, log.pipeline, production)
    return head.change if head else None


def _refuse_unmet(wish: Wish, rules: tuple[Rule, ...]) -> None:
    unmet = [rule for rule in rules if not rule.met]
    if unmet:
        lines = "\n".join(f"  {rule.name}: {one_line(rule.reason)}" for rule in unmet)
        raise PromotionError(f"{wish.version} may not enter {wish.channel} of {wish.pipeline}:\n{lines}")
