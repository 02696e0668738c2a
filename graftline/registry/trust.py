"""The keys and policies that a reader of channels trusts, and how it judges their entries.

Keys and policies come from the reader's own keys.yaml and pipelines.yaml, never from the store. An entry counts if it
was signed by a key whose role allows what the entry does, and if its policy, evaluated again on the evidence in the
entry, admits the release. Whoever can only write to the store can therefore put nothing into a channel.

```python
trust = open_trust(root, loaded.channels, unsigned=False)      # None: the user said that nothing is to be checked
judge = EntryJudge(store, "demo", trust, now=now)
log = judge.read("production").log                             # UntrustedError if its newest entry does not count
```

An expired or revoked key counts for what it signed before. The entry's own date does not prove when that was, because
the holder of the key writes it; what others signed after it does: a later entry, or a statement of `heads`.
"""

import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

from graftline.digest import Digest
from graftline.errors import ConfigError, HistoryLostError, UntrustedError
from graftline.plain_text import one_line
from graftline.registry import channel as channels
from graftline.registry import heads
from graftline.registry.approval import ApprovalTarget
from graftline.registry.binding import BASE
from graftline.registry.channel import Entry, Log, anchor_of, candidate_of
from graftline.registry.keys import KEY_FILE, PROMOTER, KeyRing
from graftline.registry.log_checkpoints import recall
from graftline.registry.policy import TOLERANCE, PromotionFacts, check, digest_of
from graftline.registry.seals import why_not_signed
from graftline.registry.store import Store
from graftline.settings.channels import Channel, ChannelPolicy

CHANNEL_KEY = "GRAFTLINE_CHANNEL_KEY"
"""Environment variable with the path of the private key that signs entries of channels."""
UNSIGNED = "unsigned: whoever can write to the store decides what it holds"
"""Shown wherever nothing is checked."""
_LOG = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Trust:
    """Whose signatures count and which policies hold, by a reader's own configuration."""

    keys: KeyRing
    policies: Mapping[str, Channel]
    """By channel."""


def open_trust(root: Path, policies: Mapping[str, Channel], *, unsigned: bool = False) -> Trust | None:
    """What the project in ``root`` trusts; None where the user said that nothing is to be checked.

    Raises:
        ConfigError: there is no keys.yaml and ``unsigned`` is not set, or there are keys and it is.
        PromotionError: keys.yaml cannot be used.
    """
    path = root / KEY_FILE
    ring = KeyRing.load(path) if os.path.lexists(path) else None
    if ring is None and not unsigned:
        raise ConfigError(
            f"there is no {path}, so no signature can be checked: list the keys that count there (docs/security.md), "
            f"or say that nothing is to be checked: --unsigned, or `unsigned: true` in {KEY_FILE}"
        )
    if ring and ring.keys and unsigned:
        raise ConfigError(f"{path} lists keys, and --unsigned would ignore them; leave it out")
    return None if unsigned else trust_in(ring, policies)


def trust_in(ring: KeyRing | None, policies: Mapping[str, Channel]) -> Trust | None:
    """Trust in a key ring; None where there is none, or it says that nothing is to be checked."""
    return None if ring is None or ring.unsigned else Trust(keys=ring, policies=policies)


@dataclass(frozen=True)
class JudgedLog:
    """A channel's history whose newest entry counts."""

    log: Log
    proved: datetime
    """When the release that it holds is known to have been in it: a builder's key that had not ended then counts."""
    stale: str | None = None
    """Why its newest entry may no longer be the channel's newest."""
    tried: datetime | None = None
    """As ``proved``, of a rollout's candidate; None if no rollout is under way."""


class EntryJudge:
    """Judges the entries of one pipeline's channels.

    Args:
        store: where they are.
        pipeline: whose channels.
        trust: keys and policies.
        now: the time by this machine's clock; the store's clock can be set by its owner.
    """

    def __init__(self, store: Store, pipeline: str, trust: Trust, *, now: datetime) -> None:
        self._store, self._pipeline, self.trust, self._now = store, pipeline, trust, now
        self._others: dict[str, Log] = {}
        self._times: dict[tuple[str, Digest], Sequence[datetime]] = {}
        self._has_ended_keys = any(key.has_expired(now) for key in trust.keys.keys.values())

    def read(self, channel: str, *, newest: int | None = None, may_be_stale: bool = False) -> JudgedLog:
        """A channel's history, if its newest entry counts and is not too old.

        ``newest``: the number of its newest entry, where that is known from elsewhere than the store. ``may_be_stale``:
        the caller can use an old state of the channel.

        Raises:
            StoreError: as `graftline.registry.channel.read`.
            HistoryLostError: it is shorter than was seen or stated, or another.
            UntrustedError: its newest entry does not count, or may have been replaced long ago.
        """
        seen = self._store.seen.mark(self._pipeline, channel)  # first: reading notes what is there
        log = recall(self._store, self._pipeline, channel)
        stated = heads.newest(self._store, self._pipeline, channel, keys=self.trust.keys, now=self._now)
        self._check_stated(log, stated)
        if log.head is None:
            return JudgedLog(log, self._now)
        if problem := self.why_not(log, len(log.entries) - 1):
            raise UntrustedError(f"{self._name(log.head)} {problem}; nothing is served or promoted on it")
        stale = self._stale(log.head, stated)
        if newest is not None and newest != log.head.number:
            raise UntrustedError(f"{self._name(log.head)} is the newest there, and {newest} was said to be")
        if stale and newest is None and not may_be_stale and not (seen and seen.is_trusted):
            raise UntrustedError(f"{self._name(log.head)} {stale}")
        if stale:
            _LOG.warning("%s %s", self._name(log.head), stale)
        if not (may_be_stale and stale):
            self._store.seen.note(self._pipeline, channel, log.head.number, log.head.digest, is_trusted=True)
        candidate = candidate_of(log.head)
        tried = self.held_since(log, candidate) if candidate else None
        return JudgedLog(log, self.held_since(log, log.head), stale, tried)

    def held_since(self, log: Log, held: Entry) -> datetime:
        """When the release of an entry is known to have been in the channel, or tried there."""
        same = (held.change.version, held.change.release)
        return min(time for time, entry in zip(self._proved(log), log.entries, strict=True) if same in _there(entry))

    def stale(self, newest: Entry) -> str | None:
        """Why an entry that was read before may not be its channel's newest any more: one request."""
        stated = heads.newest(self._store, newest.pipeline, newest.channel, keys=self.trust.keys, now=self._now)
        return self._stale(newest, stated)

    def problems(self, log: Log) -> tuple[str | None, ...]:
        """Why each entry of a history does not count; None for those that do."""
        return tuple(self.why_not(log, index) for index in range(len(log.entries)))

    def why_not(self, log: Log, index: int, *, before: int | None = None) -> str | None:
        """Why an entry does not count; ``before``: only entries before this index may vouch for an unsigned one."""
        entry = log.entries[index]
        if self._is_unsealed(entry):
            return self._why_not_vouched(log, index, before=before)
        if problem := self._why_unsealed(log, index):
            return problem
        if entry.change.action == "rollback":
            return self._why_no_return(log, index)
        if entry.change.rollout:
            return self._why_not_tried(log, index) or self._why_not_held(log, index)
        tried = log.entries[index - 1].change.rollout if index else None
        if tried and (tried.version, tried.release) == (entry.change.version, entry.change.release):
            return self._why_not_tried(log, index - 1)  # the policy was met when its rollout started
        return self._why_no_promotion(log, index)

    def _is_unsealed(self, entry: Entry) -> bool:
        """Whether an entry's seal is not looked at: it has none, or is accepted as it is."""
        return entry.seal is None or entry.digest in self.trust.keys.accepted

    def _why_not_vouched(self, log: Log, index: int, *, before: int | None = None) -> str | None:
        """Why nobody vouches for an unsigned entry: neither keys.yaml nor a later entry."""
        entry = log.entries[index]
        if entry.digest in self.trust.keys.accepted:
            return None
        # After the first entry that is signed or accepted, all are signed. Could a promoter's key vouch for one that is
        # not, a rollback to that one would put a release into production that no approver has seen.
        is_old = not any(one.seal or one.digest in self.trust.keys.accepted for one in log.entries[:index])
        later = range((len(log.entries) if before is None else before) - 1, index, -1)
        for at in later:
            is_accepted = log.entries[at].digest in self.trust.keys.accepted
            if is_accepted or (is_old and self._vouches(log, at)):
                return None
        return (
            f"is not signed; if it is from before entries were signed, and right, list its digest {entry.digest} "
            f"under `accepted` in {KEY_FILE}"
        )

    def _name(self, entry: Entry) -> str:
        return f"{self._store.url}: entry {entry.number} of {entry.pipeline}/{entry.channel}"

    def _check_stated(self, log: Log, stated: heads.Head | None) -> None:
        if stated is None:
            return
        there = log.entries[stated.number - 1] if stated.number <= len(log.entries) else None
        if there is None or there.digest != stated.entry:
            found = "is another now" if there else f"is gone: the log ends at {len(log.entries)}"
            raise HistoryLostError(
                f"{self._store.url}: {stated.signer} stated at {stated.time:%Y-%m-%d %H:%M:%S} UTC that entry "
                f"{stated.number} is the newest of {log.pipeline}/{log.channel}, and it {found}; nothing is promoted "
                "on it, restore the entries (docs/runbooks.md, restore a lost channel)"
            )

    def _stale(self, head: Entry, stated: heads.Head | None) -> str | None:
        policy = self.trust.policies.get(head.channel)
        hours = policy.head_hours if policy else Channel().head_hours
        times = [head.change.time] if head.seal else []
        if stated and stated.number == head.number and self._now < stated.expires:
            times.append(stated.time)
        known = max(times, default=None)
        if known is not None and self._now - known <= timedelta(hours=hours):
            return None
        when = (
            f"known to be the newest only as of {known:%Y-%m-%d %H:%M} UTC" if known else "not stated to be the newest"
        )
        return (
            f"is {when}, and channels.{head.channel}.head_hours is {hours:g}: what came after it may be held back; "
            f"run `graftline refresh {head.pipeline} --channel {head.channel}` on a machine that has seen it before"
        )

    def _proved(self, log: Log) -> Sequence[datetime]:
        """When each entry is known to have existed, by what others signed after it, or by now."""
        if not self._has_ended_keys or log.head is None:
            return [self._now] * len(log.entries)
        if (name := (log.channel, log.head.digest)) not in self._times:
            self._times[name] = self._proved_anew(log)
        return self._times[name]

    def _proved_anew(self, log: Log) -> Sequence[datetime]:
        times, later = list[datetime](), self._now
        for entry in reversed(log.entries):
            if any(key.has_expired(self._now) for name in _named(entry) if (key := self.trust.keys.keys.get(name))):
                stated = heads.proved(self._store, entry, keys=self.trust.keys, now=self._now)
                later = min(later, stated or later)
            times.append(later)
            if why_not_signed(entry, self.trust.keys, later) is None:
                later = min(later, entry.change.time)
        return times[::-1]

    def _vouches(self, log: Log, index: int) -> bool:
        """Whether an entry vouches for those before it, all of which its signature covers."""
        entry = log.entries[index]
        if entry.digest in self.trust.keys.accepted:
            return True
        signer = self.trust.keys.keys.get(entry.seal.signer) if entry.seal else None
        is_promoter = signer is not None and PROMOTER in signer.roles
        return is_promoter and self._why_unsealed(log, index) is None

    def _why_unsealed(self, log: Log, index: int) -> str | None:
        entry, proved = log.entries[index], self._proved(log)[index]
        if problem := why_not_signed(entry, self.trust.keys, proved):
            return problem
        if entry.change.time > proved + TOLERANCE:
            return f"is dated {entry.change.time:%Y-%m-%d %H:%M:%S} UTC and existed at {proved:%Y-%m-%d %H:%M:%S} UTC"
        if index and entry.change.time < log.entries[index - 1].change.time:
            return "is dated before the entry before it"
        return None

    def _why_no_return(self, log: Log, index: int) -> str | None:
        """A rollback goes to what the channel held before, by an entry that counts and put it there."""
        change, problems = log.entries[index].change, list[str]()
        for before in range(index - 1, -1, -1):
            past = log.entries[before]
            if (past.change.version, past.change.release) != (change.version, change.release):
                continue
            if past.change.action != "promote" and not self._is_unsealed(past):
                continue
            if change.anchor not in (None, anchor_of(past)):
                problems.append(f"takes the anchor {one_line(change.anchor.version)}, which was not in force then")
                continue
            problem = self.why_not(log, before, before=index)
            if problem is None:
                return None
            problems.append(f"goes back to entry {past.number}, which {problem}")
        return problems[0] if problems else f"goes back to {one_line(change.version)}, which the channel never held"

    def _why_not_tried(self, log: Log, index: int) -> str | None:
        """Why the steps of a rollout up to an entry do not count, back to the start, in which the policy was met."""
        while True:
            entry = log.entries[index]
            if self._is_unsealed(entry):
                return self._why_not_vouched(log, index)
            if problem := self._why_unsealed(log, index):
                return problem
            assert entry.change.rollout is not None
            if entry.change.rollout.step == "start":
                return self._why_no_promotion(log, index)
            if problem := _why_no_next_step(log, index):
                return problem
            index -= 1

    def _why_not_held(self, log: Log, index: int) -> str | None:
        """Why a rollout's incumbent is not in the channel: by the entry before the rollout."""
        while index and log.entries[index].change.rollout:
            if log.entries[index].digest in self.trust.keys.accepted:
                return None
            index -= 1
        problem = self.why_not(log, index)
        return f"holds what entry {log.entries[index].number} put there, which {problem}" if problem else None

    def _why_no_promotion(self, log: Log, index: int) -> str | None:
        entry = log.entries[index]
        assert entry.seal is not None
        if entry.change.rollout and (problem := _why_no_start(log, index)):
            return problem
        enters = entry.change.rollout or entry.change
        known = self._policies(entry.channel)
        policy = known.get(entry.seal.policy) if entry.seal.policy else None
        if policy is None:
            names = ", ".join(map(str, known)) or "none"
            return (
                f"names the policy {entry.seal.policy}, and pipelines.yaml knows {names} for {entry.channel}; list the "
                f"policy of that time under channels.{entry.channel}.earlier"
            )
        if entry.change.verdict is None or entry.seal.builder is None:
            return "holds no verdict or no builder"
        proved = self._proved(log)[index]
        ring = {name: key for name, key in self.trust.keys.keys.items() if not key.has_expired(proved)}
        before = Log(log.pipeline, log.channel, log.entries[:index])
        reference = self._reference(entry, before)
        facts = PromotionFacts(
            target=ApprovalTarget(entry.pipeline, entry.channel, enters.version, enters.release),
            builder=entry.seal.builder,
            verdict=entry.change.verdict,
            reference=reference.change.version if reference else BASE,
            reference_release=reference.change.release if reference else None,
            log=before,
            earlier=_until(self._other(policy.after), entry.change.time) if policy.after else None,
            approvals=entry.change.approvals,
            keys=replace(self.trust.keys, keys=ring),
            now=entry.change.time,
            anchor=anchor_of(before.head) if before.head and entry.change.verdict.anchor else None,
            reserve=entry.change.reserve,
        )
        unmet = [f"{rule.name}: {one_line(rule.reason)}" for rule in check(policy, facts) if not rule.met]
        return f"does not meet its policy: {'; '.join(unmet)}" if unmet else None

    def _policies(self, channel: str) -> dict[object, ChannelPolicy]:
        section = self.trust.policies.get(channel)
        return {digest_of(policy): policy for policy in (section, *section.earlier)} if section else {}

    def _reference(self, entry: Entry, before: Log) -> Entry | None:
        """What the verdict had to be against; None: the base."""
        assert entry.seal is not None
        assert entry.change.verdict is not None
        name = entry.seal.compared_with
        if name is None:
            return None
        if name == entry.channel:
            return before.head
        held = _until(self._other(name), entry.change.time)
        # Another channel may have moved between the comparison and this entry.
        against = [one for one in held.entries if one.change.version == entry.change.verdict.against]
        return against[-1] if against else held.head

    def _other(self, channel: str) -> Log:
        """Another channel's history, if its newest entries are signed, back to one that vouches for the rest."""
        if channel not in self._others:
            log = recall(self._store, self._pipeline, channel)
            for index in range(len(log.entries) - 1, -1, -1):
                if self._vouches(log, index):
                    break
                if problem := self._why_unsealed(log, index):
                    raise UntrustedError(f"{self._name(log.entries[index])} {problem}")
            self._others[channel] = log
        return self._others[channel]


def _why_no_start(log: Log, index: int) -> str | None:
    """A rollout starts beside what the channel holds."""
    entry, before = log.entries[index], log.entries[index - 1].change if index else None
    step = entry.change.rollout
    assert step is not None
    if (
        before is None
        or before.rollout
        or (before.version, before.release) != (entry.change.version, entry.change.release)
    ):
        return "starts a rollout beside a release that the channel did not hold then"
    return None if step.started == entry.number else "starts a rollout that another entry is said to have started"


def _why_no_next_step(log: Log, index: int) -> str | None:
    """A step of a rollout gives the same candidate the same share or a larger one."""
    change, before = log.entries[index].change, log.entries[index - 1].change if index else None
    kept = {"step", "share"}
    if (
        before is None
        or before.rollout is None
        or change.rollout is None
        or (before.version, before.release) != (change.version, change.release)
        or before.rollout.model_dump(exclude=kept) != change.rollout.model_dump(exclude=kept)
        or before.rollout.share > change.rollout.share
    ):
        return "is a step of a rollout, and the entry before it is not the step before"
    return None


def _there(entry: Entry) -> list[tuple[str, Digest]]:
    """Version and digest of the release that a channel holds with an entry, and of its candidate."""
    change, step = entry.change, entry.change.rollout
    return [(change.version, change.release), *([(step.version, step.release)] if step else [])]


def judged_head(store: Store, pipeline: str, name: str, trust: Trust | None) -> tuple[Entry | None, JudgedLog | None]:
    """A channel's newest entry, and the history that it ends, judged where there is anything to judge it by.

    Raises:
        StoreError, HistoryLostError, UntrustedError: as `EntryJudge.read`.
    """
    if trust is None:
        return channels.head(store, pipeline, name), None
    judged = EntryJudge(store, pipeline, trust, now=datetime.now(UTC)).read(name)
    return judged.log.head, judged


def _named(entry: Entry) -> set[str]:
    """Names of the keys that an entry rests on."""
    sealed = {entry.seal.signer, entry.seal.builder} if entry.seal else set()
    return {name for name in (*sealed, *(one.statement.approver for one in entry.change.approvals)) if name}


def _until(log: Log, time: datetime) -> Log:
    return Log(log.pipeline, log.channel, tuple(entry for entry in log.entries if entry.change.time <= time))
