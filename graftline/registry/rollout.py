"""A release enters a channel by shares: each step is an entry, and nothing changes between two entries.

    rollout start   the incumbent stays, the candidate answers the first share of keys
    rollout share   the candidate answers a larger share
    rollout hold    the time at a share is over and the evidence does not decide yet
    promote         the channel holds the candidate
    rollback        the incumbent stays; the reason says why

`promotion.promote` writes the first entry after all its checks. The functions here write the others, each directly
after the entry that the decision was made on: if two decide at once, one wins and the other gets a `ConflictError`.
"""

import secrets
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from graftline.errors import PromotionError
from graftline.plain_text import check_text
from graftline.registry import channel
from graftline.registry.channel import Anchor, ChannelChange, Entry, Log, RolloutStep
from graftline.registry.keys import KeyRing
from graftline.registry.policy import entry_time
from graftline.registry.seals import Evidence, seal
from graftline.registry.store import Store
from graftline.settings.channels import Rollout

ACTOR = "rollout"
"""Named as the author where the judge decides, not a person."""


@dataclass(frozen=True)
class Hand:
    """Who signs a rollout's entries; without a key they are unsigned, and readers with keys refuse them."""

    keys: KeyRing | None = None
    key: Path | None = None
    """A private key: moving on needs the role `promoter`, going back that or `rollback`."""


def first_step(promotion: ChannelChange, head: Entry, rollout: Rollout) -> ChannelChange:
    """The change that starts a rollout instead of ``promotion``, whose checks and approvals it keeps."""
    step = RolloutStep(
        step="start",
        version=promotion.version,
        release=promotion.release,
        share=rollout.shares[0],
        mirror=rollout.mirror,
        started=head.number + 1,
        salt=secrets.token_hex(16),
    )
    kept: dict[str, Any] = {"version": head.change.version, "release": head.change.release}
    if promotion.anchor:  # it moves when the candidate is promoted
        kept |= {"anchor": channel.anchor_of(head)}
    return promotion.model_copy(update=kept | {"action": "rollout", "rollout": step})


def candidate(entry: Entry) -> str | None:
    """The version that is being tried, if any."""
    return entry.change.rollout.version if entry.change.rollout else None


def refuse_another(head: Entry | None) -> None:
    """Raise PromotionError while a rollout is under way."""
    if head is not None and (step := head.change.rollout):
        raise PromotionError(
            f"{head.channel} of {head.pipeline} is trying {step.version} on {step.share} % of its keys (entry "
            f"{head.number}); wait until flows/rollout.py has decided, or end it: `graftline rollback {head.pipeline}`"
        )


def move(
    store: Store,
    head: Entry,
    rollout: Rollout,
    *,
    on: bool,
    reason: str,
    now: datetime | None = None,
    hand: Hand = Hand(),
) -> Entry:
    """Write the next share (``on``; after the last one the promotion), or a note that the share stays.

    Args:
        store: where the channel is.
        head: the entry that was judged; a rollout is under way in it.
        rollout: the channel's policy.
        on: whether the candidate was shown not to be worse.
        reason: the judge's reason.
        now: the time; None: the store's, or this machine's where the store has none.
        hand: who signs the entry.

    Raises:
        PromotionError: no rollout is under way, a clock is wrong, or the key may not sign this.
        ConflictError: somebody else changed the channel since ``head``.
    """
    step = _under_way(head)
    share = next((share for share in rollout.shares if share > step.share), 100) if on else step.share
    start = _start(store, head, step)
    if share == 100:
        change = ChannelChange(
            action="promote",
            version=step.version,
            release=step.release,
            verdict=start.change.verdict,
            actor=ACTOR,
            reason=check_text("the reason", reason),
            time=_time(store, head, now),
            approvals=start.change.approvals,
            checks=(*start.change.checks, f"rollout: entries {start.number} to {head.number}"),
            anchor=_anchor_after(head, start, step),
            reserve=start.change.reserve,
        )
    else:
        kind = "share" if on else "hold"
        update: dict[str, Any] = {
            "actor": ACTOR,
            "reason": check_text("the reason", reason),
            "approvals": (),
            "checks": (),
        }
        update |= {"time": _time(store, head, now), "rollout": step.model_copy(update={"step": kind, "share": share})}
        change = head.change.model_copy(update=update)
    sealed = start.seal
    evidence = (
        Evidence(policy=sealed.policy, builder=sealed.builder, compared_with=sealed.compared_with)
        if sealed
        else Evidence()
    )
    return _append(store, head, change, hand, evidence)


def go_back(
    store: Store,
    head: Entry,
    *,
    reason: str,
    actor: str = ACTOR,
    now: datetime | None = None,
    hand: Hand = Hand(),
) -> Entry:
    """End a rollout: the incumbent answers everything again. Raises as `move`."""
    step = _under_way(head)
    checks = (f"rollout: candidate {step.version}, entries {step.started} to {head.number}",)
    time = max((now or store.now() or datetime.now(UTC)).replace(microsecond=0), head.change.time)
    change = ChannelChange(
        action="rollback",
        version=head.change.version,
        release=head.change.release,
        verdict=None,
        actor=actor,
        reason=check_text("the reason", reason),
        # Possible even if the entry before is dated in the future; times never decrease.
        time=time,
        checks=checks,
        anchor=head.change.anchor,
    )
    return _append(store, head, change, hand)


def _anchor_after(head: Entry, start: Entry, step: RolloutStep) -> Anchor | None:
    """The channel's anchor once the candidate is promoted, by the evidence with which its rollout started."""
    shown = start.change.verdict.anchor if start.change.verdict else None
    moves = head.change.anchor is not None and shown is not None and shown.is_better
    return Anchor(version=step.version, release=step.release) if moves else head.change.anchor


def _under_way(head: Entry) -> RolloutStep:
    if head.change.rollout is None:
        raise PromotionError(
            f"no rollout is under way in {head.channel} of {head.pipeline}: it holds {head.change.version}"
        )
    return head.change.rollout


def _start(store: Store, head: Entry, step: RolloutStep) -> Entry:
    """The entry that started the rollout, read along the chain of digests, so that it cannot be exchanged."""
    for entry in channel.backwards(store, head.pipeline, head.channel):
        if entry.number == step.started:
            break
    else:
        raise PromotionError(f"entry {step.started}, which started the rollout, is not in the channel's history")
    started = entry.change.rollout
    if started is None or (started.step, started.version, started.release) != ("start", step.version, step.release):
        raise PromotionError(
            f"entry {entry.number} did not start the rollout of {step.version}; nothing is promoted on this history: "
            f"end it with `graftline rollback {head.pipeline}` and look who wrote entry {head.number}"
        )
    return entry


def _time(store: Store, head: Entry, now: datetime | None) -> datetime:
    return entry_time(head, now or store.now() or datetime.now(UTC))


def _append(store: Store, head: Entry, change: ChannelChange, hand: Hand, evidence: Evidence = Evidence()) -> Entry:
    entry = channel.next_entry(Log(head.pipeline, head.channel, (head,)), change)
    if hand.key and hand.keys:
        entry = seal(entry, keys=hand.keys, private_key=hand.key, now=change.time, evidence=evidence)
    channel.append(store, entry)
    return entry
