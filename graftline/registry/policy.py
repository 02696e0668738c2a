"""A channel's policy, evaluated on facts: no store, no clock, no key file, so that every case can be tested.

The policy is the channel's section of pipelines.yaml. `check` gives one result a rule: whether it is met, and why.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from graftline.digest import Digest, of_json
from graftline.errors import PromotionError
from graftline.registry.approval import ApprovalTarget, SignedApproval, why_not
from graftline.registry.channel import Anchor, Entry, Log
from graftline.registry.keys import KeyRing
from graftline.registry.reserve import ReserveVerdict
from graftline.registry.store import Store
from graftline.release.manifest import GateVerdict
from graftline.settings.channels import ChannelPolicy

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


def digest_of(policy: ChannelPolicy) -> Digest:
    """Names a policy: equal for equal policies, and unchanged by settings that later versions add."""
    values = policy.model_dump(mode="json", include=set(ChannelPolicy.model_fields), exclude_defaults=True)
    return of_json(values)


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
    anchor: Anchor | None = None
    """The channel's anchor, which the verdict must also compare with; None: it need not."""
    reserve: ReserveVerdict | None = None
    """What was found on the rows that only promotions look at; None: nobody looked."""


@dataclass(frozen=True)
class RuleResult:
    """One rule of a policy and whether it is met."""

    name: str
    met: bool
    reason: str


def check(policy: ChannelPolicy, case: PromotionFacts) -> tuple[RuleResult, ...]:
    """Evaluate every rule; the promotion is allowed if all are met."""
    return (*check_without_reserve(policy, case), *([_reserve(policy, case)] if policy.reserve else []))


def check_without_reserve(policy: ChannelPolicy, case: PromotionFacts) -> tuple[RuleResult, ...]:
    """Every rule but that of the reserve: it is looked at once these are met, because looks use it up."""
    return (
        _freeze(policy, case),
        _verdict(policy, case),
        _reference(case),
        _soak(policy, case),
        _approvals(policy, case),
    )


def counted_approvals(policy: ChannelPolicy, case: PromotionFacts) -> tuple[tuple[SignedApproval, ...], list[str]]:
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
        name = approval.statement.approver
        if reason is None and not case.keys.keys[name].may_approve(policy.approvals.roles):
            roles = ", ".join(case.keys.keys[name].roles)
            reason = (
                f"approval of {name!r}: its key is a machine's ({roles}); such a key approves only if the policy names "
                "its role under approvals.roles"
            )
        if reason:
            rejected.append(reason)
        else:
            counted.setdefault(approval.statement.approver, approval)
    return tuple(counted.values()), rejected


def _freeze(policy: ChannelPolicy, case: PromotionFacts) -> RuleResult:
    for window in policy.freeze_windows:
        if window.starts <= case.now <= window.ends:
            return RuleResult(
                "freeze", False, f"nothing is promoted until {window.ends:%Y-%m-%d %H:%M %Z}: {window.reason}"
            )
    return RuleResult("freeze", True, "no freeze window is open")


def _verdict(policy: ChannelPolicy, case: PromotionFacts) -> RuleResult:
    allowed = " or ".join(policy.verdicts)
    return RuleResult(
        "verdict", case.verdict.outcome in policy.verdicts, f"{case.verdict.outcome!r}; {allowed} may enter"
    )


def _reference(case: PromotionFacts) -> RuleResult:
    against = case.verdict.release
    if case.verdict.against == case.reference and against in (None, case.reference_release):
        return _anchor(case, f"compared with {case.reference}, which is in production now")
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


def _anchor(case: PromotionFacts, compared: str) -> RuleResult:
    """The reference rule's second half, where there is an anchor."""
    anchor, shown = case.anchor, case.verdict.anchor
    if anchor is None:
        return RuleResult("reference", True, compared)
    if shown is not None and shown.release == anchor.release:
        return RuleResult("reference", True, f"{compared}, and with the anchor {anchor.version}")
    instead = f"with {shown.version} as the anchor" if shown else "with no anchor"
    again = "evaluate and gate it again"
    return RuleResult("reference", False, f"{compared}, and {instead}, but the anchor is {anchor.version} now; {again}")


def _reserve(policy: ChannelPolicy, case: PromotionFacts) -> RuleResult:
    """The gates, on rows that no run has looked at, against what production and the anchor are now."""
    found = case.reserve
    if found is None:
        return RuleResult("reserve", False, "nobody looked at the rows that are kept back for promotions")
    about = f"{found.outcome!r} in look {found.look} at {found.rows.short}: {found.evidence}"
    if (found.against, found.release) != (case.reference, case.reference_release):
        return RuleResult(
            "reserve", False, f"{about}; compared with {found.against}, but there is {case.reference} now"
        )
    if case.anchor and found.anchor != case.anchor.release:
        return RuleResult("reserve", False, f"{about}; not compared with {case.anchor.version}, the anchor")
    earlier = [entry.change.reserve for entry in case.log.entries]
    last = max((one.look for one in earlier if one and one.rows == found.rows), default=0)
    if found.look <= last:
        return RuleResult("reserve", False, f"{about}; an earlier entry has look {last} at the same rows")
    return RuleResult("reserve", found.outcome in policy.verdicts, about)


def _soak(policy: ChannelPolicy, case: PromotionFacts) -> RuleResult:
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


def _approvals(policy: ChannelPolicy, case: PromotionFacts) -> RuleResult:
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
