"""Promote a release into a channel, or roll a channel back: read, check everything, then write one log entry.

Nothing enters a channel unverified: signature, manifest, every digest, the policy, then a smoke run. A promoter that
dies leaves the channel either as it was or fully changed, and can be run again.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from itertools import islice
from pathlib import Path

from graftline.digest import Digest
from graftline.errors import PromotionError, ReleaseError
from graftline.logs import OnProgress, silent
from graftline.plain_text import check_text, one_line
from graftline.registry import channel, rollout
from graftline.registry.approval import ApprovalTarget, collect
from graftline.registry.binding import BASE, check_binding
from graftline.registry.channel import Anchor, ChannelChange, Entry, Log
from graftline.registry.keys import KeyRing
from graftline.registry.leases import Claim, holding
from graftline.registry.log_checkpoints import keep, recall
from graftline.registry.policy import (
    PromotionFacts,
    RuleResult,
    check,
    check_without_reserve,
    checked_now,
    counted_approvals,
    digest_of,
    entry_time,
)
from graftline.registry.releases import fetch, signer, verify_stored
from graftline.registry.reserve import Looker, Outcome, ReserveVerdict, count_look, rows_of
from graftline.registry.rollout import Hand
from graftline.registry.seals import Evidence, seal
from graftline.registry.seals import signer as entry_signer
from graftline.registry.store import Store
from graftline.registry.trust import EntryJudge, Trust
from graftline.release.manifest import GateVerdict
from graftline.settings.channels import Channel, ChannelPolicy

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
    left = rollout.candidate(before) or before.change.version
    minutes = max(0, int((now - head.change.time).total_seconds() // 60))
    raise PromotionError(
        f"{head.channel} of {head.pipeline} was rolled back {minutes} min ago by {one_line(head.change.actor)} (entry "
        f"{head.number}), from {one_line(left)} to {one_line(head.change.version)}: "
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


ReserveJudge = Callable[[], tuple[Outcome, str]]
"""Looks at the reserve: what the gates say, and why. What can be missing for that was found before it was made."""


@dataclass(frozen=True, kw_only=True)
class PromotionChecks:
    """What a promotion is checked with."""

    policy: Channel
    keys: KeyRing
    smoke: Callable[[Path], None]
    """Serves the release in a folder and compares its recorded answers; raises `PromotionError` on a difference."""
    reserve: Callable[[Path, PromotionFacts], ReserveJudge] | None = None
    """Prepares the look at the rows that only promotions look at, which lie in the release's folder. None: they cannot
    be scored here, and a policy that asks for it is not met."""
    production: str | None = "production"
    """The channel that verdicts compare with; None: always the base."""
    anchored: bool = False
    """Whether verdicts compare with the anchor of this channel too."""
    verdict: GateVerdict | None = None
    """A newer verdict than the manifest's, in case production has changed since."""
    trust: Trust | None = None
    """The keys and policies that judge the channels' histories; None: they are not checked."""
    key: Path | None = None
    """Private key that signs the entry; None: it stays unsigned, and readers with keys refuse it."""


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
    now = clock()
    read = _reader(store, wish.pipeline, checks.trust, now)
    log = read(wish.channel)
    if log.head and wish.version in (log.head.change.version, rollout.candidate(log.head)):
        return log.head
    rollout.refuse_another(log.head)
    started = entry_time(log.head, now)
    if checks.key:
        entry_signer(checks.keys, checks.key, "promote", now=started)
    manifest = fetch(store, wish.pipeline, wish.version, folder, on_progress=on_progress)
    verify_stored(store, wish.pipeline, wish.version, checks.keys, now=started, copy=folder)
    check_binding(manifest, lambda path: (folder / path).read_bytes())
    reference = _reference(read, log, checks.production)
    target = ApprovalTarget(wish.pipeline, wish.channel, wish.version, manifest.digest)
    case = PromotionFacts(
        target=target,
        builder=checks.keys.verify_release(folder, now=started),
        verdict=checks.verdict or manifest.verdict,
        reference=reference.version if reference else BASE,
        reference_release=reference.release if reference else None,
        log=log,
        earlier=read(checks.policy.after) if checks.policy.after else None,
        approvals=collect(store, target),
        keys=checks.keys,
        now=started,
        anchor=channel.anchor_of(log.head) if checks.anchored and log.head else None,
    )
    rules = check_without_reserve(checks.policy, case)
    _refuse_unmet(wish, rules)
    looked_at = rows_of(manifest) if checks.policy.reserve else None
    checks.smoke(folder)
    if looked_at and checks.reserve:
        claim.check()
        look = checks.reserve(folder, case)  # raises where nobody can look, before a look is counted
        case = replace(case, reserve=_look(store, wish, case, looked_at, look))
    # Readers evaluate the policy at the entry's own time, which is later than that of the first look.
    case = replace(case, now=entry_time(log.head, clock()))
    again = check(checks.policy, case)
    _refuse_unmet(wish, again)
    change = _promotion(wish, case, checks.policy, (*rules, *again[len(rules) :]))
    if checks.policy.rollout and log.head:
        change = rollout.first_step(change, log.head, checks.policy.rollout)
    entry = channel.next_entry(log, change)
    if checks.key:
        evidence = Evidence(policy=digest_of(checks.policy), builder=case.builder, compared_with=checks.production)
        entry = seal(entry, keys=checks.keys, private_key=checks.key, now=case.now, evidence=evidence)
    claim.check()
    _append(store, entry, checks.trust)
    keep(store, log)
    return entry


def _look(
    store: Store,
    wish: PromotionRequest,
    case: PromotionFacts,
    rows: Digest,
    judge: ReserveJudge,
) -> ReserveVerdict:
    """Look at the reserve: the look is counted first, so that none is forgotten."""
    by = Looker(pipeline=wish.pipeline, rows=rows, version=wish.version, channel=wish.channel, actor=wish.actor)
    number = count_look(store, by, known=[entry.change.reserve for entry in case.log.entries], now=case.now)
    outcome, evidence = judge()
    return ReserveVerdict(
        outcome=outcome,
        rows=rows,
        look=number,
        against=case.reference,
        release=case.reference_release,
        anchor=case.anchor.release if case.anchor else None,
        evidence=evidence,
    )


@dataclass(frozen=True, kw_only=True)
class Rollback:
    """How a channel goes back."""

    keys: KeyRing | None = None
    """Whose signatures servers accept; None: they accept unsigned releases."""
    trust: Trust | None = None
    """The keys and policies that judge the history; None: it is not checked."""
    key: Path | None = None
    """Private key that signs the entry; None: it stays unsigned, and readers with keys refuse it."""
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

    ``version`` None: the newest that nobody has rolled back from; during a rollout, the incumbent, and the rollout
    ends. Without ``how.trust`` the history is read only as far back as needed.

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
    now = how.now() if how.now else store.now() or datetime.now(UTC)
    judge = (
        EntryJudge(store, pipeline, how.trust, now=how.now() if how.now else datetime.now(UTC)) if how.trust else None
    )
    log = judge.read(to_channel).log if judge else None
    entries = CachedEntries(reversed(log.entries) if log else channel.backwards(store, pipeline, to_channel))
    if next(iter(entries), None) is None:
        raise PromotionError(f"channel {to_channel!r} of {pipeline!r} is empty; there is nothing to go back to")
    if how.key and how.keys:
        entry_signer(how.keys, how.key, "rollback", now=now)
    newest = next(iter(entries))
    if newest.change.rollout and version in (None, newest.change.version):
        how.announce(newest, PastEntry(newest, None))
        return rollout.go_back(store, newest, reason=reason, actor=actor, now=now, hand=Hand(how.keys, how.key))
    if version is None and not how.again:
        refuse_second(entries, now)
    head, past = choose(entries, version)
    if past.entry is head:
        return head
    how.announce(head, past)
    with holding(store, pipeline, past.entry.change.version, doing="rollback") as claim:
        since = judge.held_since(log, past.entry) if judge and log else now
        signed = _refuse_what_servers_would(store, past.entry, entries, how.keys, since)
        change = _return_to(past.entry, head, now).model_copy(update={"actor": actor, "reason": reason})
        change = change.model_copy(update={"checks": (*change.checks, signed)})
        entry = channel.next_entry(Log(pipeline, to_channel, (head,)), change)
        if how.key and how.keys:
            entry = seal(entry, keys=how.keys, private_key=how.key, now=now)
        claim.check()
        _append(store, entry, how.trust)
    return entry


def _return_to(past: Entry, head: Entry, now: datetime) -> ChannelChange:
    return ChannelChange(
        action="rollback",
        version=past.change.version,
        release=past.change.release,
        verdict=past.change.verdict,
        actor="",
        reason="",
        # A rollback must be possible even if the previous entry is dated in the future; times never decrease.
        time=max(now.replace(microsecond=0), head.change.time),
        checks=(f"held before: entry {past.number}",),
        # The release that is left is not trusted any more, nor is the move of the anchor that came with it.
        anchor=channel.anchor_of(past) if head.change.anchor else None,
    )


def _append(store: Store, entry: Entry, trust: Trust | None) -> None:
    channel.append(store, entry)
    if trust and entry.seal:
        store.seen.note(entry.pipeline, entry.channel, entry.number, entry.digest, is_trusted=True)


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
    wish: PromotionRequest, case: PromotionFacts, policy: ChannelPolicy, rules: tuple[RuleResult, ...]
) -> ChannelChange:
    met = [f"{rule.name}: {rule.reason}" for rule in rules]
    anchor, moved = _next_anchor(wish, case)
    return ChannelChange(
        action="promote",
        version=wish.version,
        release=case.target.release,
        verdict=case.verdict,
        actor=wish.actor,
        reason=wish.reason,
        time=case.now,
        approvals=counted_approvals(policy, case)[0],
        checks=(f"signature: by {case.builder}", *met, *moved, "smoke: matched"),
        anchor=anchor,
        reserve=case.reserve,
    )


def _next_anchor(wish: PromotionRequest, case: PromotionFacts) -> tuple[Anchor | None, tuple[str, ...]]:
    """The channel's anchor after a promotion, and why, for the entry's checks.

    Where verdicts do not compare with it, it stays; a channel that never had one gets none.
    """
    before, shown = case.log.head, case.verdict.anchor
    if case.anchor is None or shown is None:
        return before.change.anchor if before else None, ()
    if not shown.is_better:
        return case.anchor, (f"anchor: {case.anchor.version} stays; {one_line(shown.evidence)}",)
    moved = f"anchor: moves here from {case.anchor.version}; {one_line(shown.evidence)}"
    return Anchor(version=wish.version, release=case.target.release), (moved,)


def _reader(store: Store, pipeline: str, trust: Trust | None, now: datetime) -> Callable[[str], Log]:
    """Reads a channel's history, and judges it if there are keys and policies."""
    if trust is None:
        return lambda name: recall(store, pipeline, name)
    judge = EntryJudge(store, pipeline, trust, now=now)
    return lambda name: judge.read(name).log


def _reference(read: Callable[[str], Log], log: Log, production: str | None) -> ChannelChange | None:
    """The change that put the present release into production; None: verdicts compare with the base."""
    if production is None:
        return None
    head = log.head if production == log.channel else read(production).head
    return head.change if head else None


def _refuse_unmet(wish: PromotionRequest, rules: tuple[RuleResult, ...]) -> None:
    unmet = [rule for rule in rules if not rule.met]
    if unmet:
        lines = "\n".join(f"  {rule.name}: {one_line(rule.reason)}" for rule in unmet)
        raise PromotionError(f"{wish.version} may not enter {wish.channel} of {wish.pipeline}:\n{lines}")
