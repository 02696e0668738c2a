"""A channel's policy, evaluated on facts: no store, no clock, no key file, so that every case can be tested.

The policy is the channel's section of pipelines.yaml. `check` gives one result a rule: whether it is met, and why.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from graftline.digest import Digest
from graftline.errors import PromotionError
from graftline.registry.approval import ApprovalTarget, SignedApproval, why_not
from graftline.registry.channel import Entry, Log
from graftline.registry.keys import KeyRing
from graftline.registry.store import Store
from graftline.release.manifest import GateVerdict
from graftline.settings.model import Channel

TOLERANCE = timedelta(minutes=5)
"""By how much two clocks may differ: with NTP it is seconds, without it may be hours."""


def checked_now(store: Store) -> datetime:
    """The time by the store's clock, if this machine's clock agrees with it.

    Times of entries from several machines are compared: written on a clock that is a day behind, an entry would have a
    day of soak at once. The store's clock is the one that all machines can see.

    Raises:
        PromotionError: they differ by more than minutes; both times are given.
        StoreError: the store cannot be asked.
    """
    own, there = datetime.now(UTC), store.now()
    if there is None:
        return own
    if abs(own - there) > TOLERANCE:
        raise PromotionError(
            f"this machine's clock says {own:%Y-%m-%d %H:%M:%S} UTC, that of {store.url} {there:%Y-%m-%d %H:%M:%S} "
            "UTC; what is entered on a wrong clock cannot be compared: set the clock that is wrong (NTP) and try again"
        )
    return there


def entry_time(head: Entry | None, now: datetime) -> datetime:
    """The time of a new entry, in whole seconds, not before that of the previous entry ``head``.

    Raises:
        PromotionError: the previous entry is dated minutes into the future; both times are given.
    """
    if head is None:
        return now.replace(microsecond=0)
    before = head.change.time
    if now + TOLERANCE < before:
        raise PromotionError(
            f"it is {now:%Y-%m-%d %H:%M:%S} UTC here, and entry {head.number} of {head.channel} was written at "
            f"{before:%Y-%m-%d %H:%M:%S} UTC; one of the two clocks is wrong: set it (NTP), or wait until then"
        )
    return max(now.replace(microsecond=0), before)


@dataclass(frozen=True, kw_only=True)
class PromotionFacts:
    """The facts that a policy is evaluated on."""

    target: ApprovalTarget
    builder: str
    """Name of the key that signed the release."""
    verdict: GateVerdict
    """The gate's verdict, evaluated again if production has changed since."""
    reference: str
    """The version that production holds now, or ``base``: what the verdict must compare with."""
    log: Log
    """The channel's history."""
    earlier: Log | None
    """History of the policy's channel ``after``, if it names one."""
    approvals: tuple[SignedApproval, ...]
    keys: KeyRing
    now: datetime
    reference_release: Digest | None = None
    """Digest of the release that production holds now."""


@dataclass(frozen=True)
class RuleResult:
    """One rule of a policy and whether it is met."""

    name: str
    met: bool
    reason: str


def check(policy: Channel, case: PromotionFacts) -> tuple[RuleResult, ...]:
    """Evaluate every rule; the promotion is allowed if all are met."""
    return (
        _freeze(policy, case),
        _verdict(policy, case),
        _reference(case),
        _soak(policy, case),
        _approvals(policy, case),
    )


def counted_approvals(policy: Channel, case: PromotionFacts) -> tuple[tuple[SignedApproval, ...], list[str]]:
    """Approvals that count, one a key, and why the others do not."""
    used: set[Digest] = {a.statement.digest for entry in case.log.entries for a in entry.change.approvals}
    counted: dict[str, SignedApproval] = {}
    rejected: list[str] = []
    for approval in case.approvals:
        reason = why_not(
            approval,
            case.target,
            keys=case.keys,
            valid=timedelta(hours=policy.approvals.valid_hours),
            used=used,
            now=case.now,
        )
        if reason:
            rejected.append(reason)
        else:
            counted.setdefault(approval.statement.approver, approval)
    return tuple(counted.values()), rejected


def _freeze(policy: Channel, case: PromotionFacts) -> RuleResult:
    for window in policy.freeze_windows:
        if window.starts <= case.now <= window.ends:
            return RuleResult(
                "freeze", False, f"nothing is promoted until {window.ends:%Y-%m-%d %H:%M %Z}: {window.reason}"
            )
    return RuleResult("freeze", True, "no freeze window is open")


def _verdict(policy: Channel, case: PromotionFacts) -> RuleResult:
    allowed = " or ".join(policy.verdicts)
    return RuleResult(
        "verdict", case.verdict.outcome in policy.verdicts, f"{case.verdict.outcome!r}; {allowed} may enter"
    )


def _reference(case: PromotionFacts) -> RuleResult:
    against = case.verdict.release
    if case.verdict.against == case.reference and against in (None, case.reference_release):
        return RuleResult("reference", True, f"compared with {case.reference}, which is in production now")
    if case.verdict.against == case.reference:
        return RuleResult(
            "reference",
            False,
            f"compared with a {case.reference} of digest {against}, but production holds {case.reference_release} "
            "under that name; evaluate and gate it again",
        )
    return RuleResult(
        "reference",
        False,
        f"compared with {case.verdict.against}, but production holds {case.reference} now; evaluate and gate it again",
    )


def _soak(policy: Channel, case: PromotionFacts) -> RuleResult:
    if policy.after is None or case.earlier is None:
        return RuleResult("soak", True, "no earlier channel is asked for")
    newest = case.earlier.head.change.time if case.earlier.head else case.now
    if newest > case.now + TOLERANCE:
        return RuleResult(
            "soak",
            False,
            f"the newest entry of {policy.after} was written at {newest:%Y-%m-%d %H:%M:%S} UTC, and it is "
            f"{case.now:%Y-%m-%d %H:%M:%S} UTC here; one of the two clocks is wrong",
        )
    stayed = _longest_stay(case.earlier, case.target.version, case.now)
    if stayed is None:
        return RuleResult("soak", False, f"was never in {policy.after}; promote it there first")
    hours = stayed.total_seconds() / 3600
    reason = f"stayed {hours:.1f} h in {policy.after}, {policy.soak_hours:g} h are asked for"
    return RuleResult("soak", hours >= policy.soak_hours, reason)


def _longest_stay(log: Log, version: str, now: datetime) -> timedelta | None:
    """The longest time for which a channel held a version without a break; None if it never did.

    An entry dated before its predecessor (older versions allowed that) counts as of the predecessor's time, so that a
    wrong clock makes no stay longer.
    """
    stays: list[timedelta] = []
    since: datetime | None = None
    time = log.entries[0].change.time if log.entries else now
    for entry in log.entries:
        time = max(time, entry.change.time)
        if entry.change.version == version:
            since = since or time
        elif since is not None:
            stays.append(time - since)
            since = None
    if since is not None:
        stays.append(max(now - since, timedelta(0)))
    return max(stays, default=None)


def _approvals(policy: Channel, case: PromotionFacts) -> RuleResult:
    asked = policy.approvals
    counted, rejected = counted_approvals(policy, case)
    keys = [approval.statement.approver for approval in counted]
    names = list(dict.fromkeys(case.keys.person(key) for key in keys))
    roles = {role for key in keys for role in case.keys.keys[key].roles}
    missing = [f"{asked.count - len(names)} more"] if len(names) < asked.count else []
    missing += [f"one by a {role}" for role in asked.roles if role not in roles]
    builder = case.keys.person(case.builder)
    if asked.other_than_builder and not set(names) - {builder}:
        missing.append(f"one by somebody other than {builder}, who built it")
    have = f"approved by {_join(names)}"
    if not missing:
        return RuleResult("approvals", True, have)
    return RuleResult("approvals", False, "; ".join([f"{have}; needs {_join(missing)}", *rejected]))


def _join(words: Sequence[str]) -> str:
    return ", ".join(words) if words else "nobody"
