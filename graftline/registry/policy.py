"""A channel's policy, evaluated on facts: no store, no clock, no key file, so that every case can be tested.

The policy is the channel's section of pipelines.yaml. `check` returns one line per rule, in the order in which people
want to know: what is met, what is not and why.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta

from graftline.digest import Digest
from graftline.registry.approval import SignedApproval, Target, why_not
from graftline.registry.channel import Log
from graftline.registry.clock import TOLERANCE as CLOCK_TOLERANCE
from graftline.registry.keys import KeyRing
from graftline.release.manifest import GateVerdict
from graftline.settings.model import Channel


@dataclass(frozen=True, kw_only=True)
class Case:
    """The facts of one promotion."""

    target: Target
    builder: str
    """Name of the key that signed the release."""
    verdict: GateVerdict
    """What the gate says, evaluated again if production has moved on."""
    reference: str
    """Version that production holds now, ``base`` if none: what the verdict has to be against."""
    log: Log
    """The channel's history."""
    earlier: Log | None
    """History of the channel ``after``; None if the policy names none."""
    approvals: tuple[SignedApproval, ...]
    keys: KeyRing
    now: datetime
    reference_release: Digest | None = None
    """Digest of the release that production holds now."""


@dataclass(frozen=True)
class Rule:
    """One rule of a policy and whether it is met."""

    name: str
    met: bool
    reason: str


def check(policy: Channel, case: Case) -> tuple[Rule, ...]:
    """Evaluate every rule; the promotion is allowed if all are met."""
    return (
        _freeze(policy, case),
        _verdict(policy, case),
        _reference(case),
        _soak(policy, case),
        _approvals(policy, case),
    )


def counted_approvals(policy: Channel, case: Case) -> tuple[tuple[SignedApproval, ...], list[str]]:
    """Approvals that count, one for each key, and why the others do not."""
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


def _freeze(policy: Channel, case: Case) -> Rule:
    for window in policy.freeze_windows:
        if window.starts <= case.now <= window.ends:
            return Rule("freeze", False, f"nothing is promoted until {window.ends:%Y-%m-%d %H:%M %Z}: {window.reason}")
    return Rule("freeze", True, "no freeze window is open")


def _verdict(policy: Channel, case: Case) -> Rule:
    allowed = " or ".join(policy.verdicts)
    return Rule("verdict", case.verdict.outcome in policy.verdicts, f"{case.verdict.outcome!r}; {allowed} may enter")


def _reference(case: Case) -> Rule:
    against = case.verdict.release
    if case.verdict.against == case.reference and against in (None, case.reference_release):
        return Rule("reference", True, f"compared with {case.reference}, which is in production now")
    if case.verdict.against == case.reference:
        return Rule(
            "reference",
            False,
            f"compared with a {case.reference} of digest {against}, but production holds {case.reference_release} "
            "under that name; evaluate and gate it again",
        )
    return Rule(
        "reference",
        False,
        f"compared with {case.verdict.against}, but production holds {case.reference} now; evaluate and gate it again",
    )


def _soak(policy: Channel, case: Case) -> Rule:
    if policy.after is None or case.earlier is None:
        return Rule("soak", True, "no earlier channel is asked for")
    newest = case.earlier.head.change.time if case.earlier.head else case.now
    if newest > case.now + CLOCK_TOLERANCE:
        return Rule(
            "soak",
            False,
            f"the newest entry of {policy.after} was written at {newest:%Y-%m-%d %H:%M:%S} UTC, and it is "
            f"{case.now:%Y-%m-%d %H:%M:%S} UTC here; one of the two clocks is wrong",
        )
    stayed = _longest_stay(case.earlier, case.target.version, case.now)
    if stayed is None:
        return Rule("soak", False, f"was never in {policy.after}; promote it there first")
    hours = stayed.total_seconds() / 3600
    reason = f"stayed {hours:.1f} h in {policy.after}, {policy.soak_hours:g} h are asked for"
    return Rule("soak", hours >= policy.soak_hours, reason)


def _longest_stay(log: Log, version: str, now: datetime) -> timedelta | None:
    """Longest time for which a channel held a version without a break; None if it never did.

    An entry that is dated before the one before it (written on a wrong clock, by a version that let it pass) is taken
    to be as late as that one: no stay becomes longer by it.
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


def _approvals(policy: Channel, case: Case) -> Rule:
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
        return Rule("approvals", True, have)
    return Rule("approvals", False, "; ".join([f"{have}; needs {_join(missing)}", *rejected]))


def _join(words: Sequence[str]) -> str:
    return ", ".join(words) if words else "nobody"
