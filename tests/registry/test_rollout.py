"""A release that enters by shares: every step is an entry, exactly one decider wins, going back is always possible."""

from datetime import timedelta

import pytest

from graftline.digest import of_bytes
from graftline.errors import ConflictError, PromotionError, ReleaseError
from graftline.registry import channel
from graftline.registry.channel import ChannelChange, Entry, next_entry
from graftline.registry.cleanup import RetentionRules, plan_cleanup
from graftline.registry.policy import TOLERANCE
from graftline.registry.rollout import ACTOR, go_back, move
from graftline.release.manifest import AnchorVerdict, Manifest
from graftline.settings import Approvals, Channel, Rollout
from tests.registry.people import NOW, VERDICT, target_of
from tests.registry.test_promotion import Stage, every_stage, stage

__all__ = ["every_stage", "stage"]

ROLLOUT = Rollout(shares=(5, 25, 100), mirror=10)
POLICY = Channel(rollout=ROLLOUT)


def started(stage: Stage) -> tuple[Manifest, Manifest, Entry]:
    """Incumbent, candidate, and the entry that starts its rollout."""
    (incumbent,) = stage.hold("a")
    candidate = stage.release("b", against=incumbent.version)
    return incumbent, candidate, stage.promote(candidate, policy=POLICY)


def moved(stage: Stage, head: Entry, *, on: bool = True) -> Entry:
    return move(stage.store, head, ROLLOUT, on=on, reason="not worse than allowed", now=NOW)


def test_a_release_enters_by_shares_and_the_channel_holds_the_incumbent_until_the_last(every_stage: Stage) -> None:
    incumbent, candidate, first = started(every_stage)
    entries = [first]
    for on in (False, True, True):
        entries.append(moved(every_stage, entries[-1], on=on))
    steps = [entry.change.rollout for entry in entries]
    assert [step and (step.step, step.share, step.mirror, step.started) for step in steps] == [
        ("start", 5, 10, 2),
        ("hold", 5, 10, 2),
        ("share", 25, 10, 2),
        None,
    ]
    assert [entry.change.action for entry in entries] == ["rollout", "rollout", "rollout", "promote"]
    assert every_stage.versions() == [incumbent.version] * 4 + [candidate.version]
    assert entries[-1].change.release == candidate.digest
    assert entries[-1].change.actor == ACTOR
    assert entries[-1].change.checks[-1] == "rollout: entries 2 to 4"
    assert channel.read(every_stage.store, "demo", "production").entries[1:] == tuple(entries)


def test_after_the_last_share_of_a_policy_comes_the_promotion(stage: Stage) -> None:
    _, candidate, first = started(stage)
    lowered = Rollout(shares=(3, 5))  # the channel was given other shares meanwhile
    entry = move(stage.store, first, lowered, on=True, reason="not worse than allowed", now=NOW)
    assert (entry.change.action, entry.change.version, entry.change.rollout) == ("promote", candidate.version, None)


def test_the_promotion_at_the_end_shows_the_approvals_and_the_verdict_of_the_start(stage: Stage) -> None:
    (incumbent,) = stage.hold("a")
    candidate = stage.release("b", against=incumbent.version)
    stage.people.approve(stage.store, target_of(candidate), "eve")
    head = stage.promote(candidate, policy=Channel(approvals=Approvals(count=1), rollout=ROLLOUT))
    last = moved(stage, moved(stage, head))
    assert [one.statement.approver for one in last.change.approvals] == ["eve"]
    assert last.change.verdict == candidate.verdict
    assert last.change.checks[: len(head.change.checks)] == head.change.checks


def test_the_first_release_of_a_channel_enters_at_once(stage: Stage) -> None:
    manifest = stage.release("a")
    assert stage.promote(manifest, policy=POLICY).change.action == "promote"


def test_a_rollback_by_the_judge_says_why_and_the_incumbent_stays(every_stage: Stage) -> None:
    incumbent, candidate, first = started(every_stage)
    entry = go_back(every_stage.store, first, reason="errors: 0.3 against 0.01", now=NOW)
    assert (entry.change.action, entry.change.version, entry.change.actor) == ("rollback", incumbent.version, ACTOR)
    assert entry.change.rollout is None
    assert entry.change.reason == "errors: 0.3 against 0.01"
    assert entry.change.checks == (f"rollout: candidate {candidate.version}, entries 2 to 2",)
    with pytest.raises(PromotionError, match="no rollout is under way"):
        moved(every_stage, entry)


def test_a_person_ends_a_rollout_by_rolling_back_and_the_channel_does_not_go_further(stage: Stage) -> None:
    older, incumbent = stage.hold("ab")
    candidate = stage.release("c", against=incumbent.version)
    stage.promote(candidate, policy=POLICY)
    entry = stage.rollback()
    assert (entry.change.action, entry.change.version) == ("rollback", incumbent.version)
    assert entry.change.actor == "ada"
    assert stage.announced == [(incumbent.version, incumbent.version)]
    with pytest.raises(PromotionError, match=f"from {candidate.version} to {incumbent.version}"):
        stage.rollback()
    assert stage.rollback(again=True).change.version == older.version


def test_a_rollback_to_a_named_release_ends_a_rollout_too(stage: Stage) -> None:
    older, incumbent = stage.hold("ab")
    stage.promote(stage.release("c", against=incumbent.version), policy=POLICY)
    entry = stage.rollback(older.version)
    assert (entry.change.version, entry.change.rollout) == (older.version, None)


def test_nothing_else_is_promoted_during_a_rollout_and_the_same_changes_nothing(stage: Stage) -> None:
    incumbent, candidate, first = started(stage)
    assert stage.promote(candidate, policy=POLICY) == first
    other = stage.release("c", against=incumbent.version)
    for policy in (POLICY, Channel()):
        with pytest.raises(PromotionError, match=f"is trying {candidate.version} on 5 % of its keys"):
            stage.promote(other, policy=policy)
    assert stage.versions() == [incumbent.version] * 2


def test_of_two_that_decide_on_the_same_entry_one_wins(every_stage: Stage) -> None:
    _, _, first = started(every_stage)
    moved(every_stage, first)
    for decide in (
        lambda: go_back(every_stage.store, first, reason="late", now=NOW),
        lambda: moved(every_stage, first),
    ):
        with pytest.raises(ConflictError, match="entry 3 was written first by rollout"):
            decide()
    assert len(channel.read(every_stage.store, "demo", "production").entries) == 3


def test_a_candidate_is_not_cleaned_away(stage: Stage) -> None:
    _, candidate, _ = started(stage)
    plan = plan_cleanup(stage.store, "demo", rules=RetentionRules(1, timedelta(0), {}), now=NOW + timedelta(days=100))
    assert "candidate in entry 2 of production" in plan.keep[candidate.version]


def test_an_entry_that_names_a_start_that_was_none_promotes_nothing(stage: Stage) -> None:
    """Who can only write entries, but passed no checks, cannot end as a promotion."""
    incumbent, candidate, first = started(stage)
    go_back(stage.store, first, reason="bad", now=NOW)
    log = channel.read(stage.store, "demo", "production")
    step = first.change.rollout
    assert step is not None
    for started_by, version in ((3, candidate.version), (2, incumbent.version), (9, candidate.version)):
        forged_step = step.model_copy(update={"share": 25, "started": started_by, "version": version})
        head = next_entry(log, first.change.model_copy(update={"rollout": forged_step, "time": NOW}))
        with pytest.raises(PromotionError, match=r"did not start|is not in the channel's history"):
            moved(stage, head)


def test_a_clock_that_is_behind_stops_a_promotion_but_no_rollback(stage: Stage) -> None:
    _, _, first = started(stage)
    early = NOW - TOLERANCE - timedelta(minutes=1)
    with pytest.raises(PromotionError, match="one of the two clocks is wrong"):
        move(stage.store, first, ROLLOUT, on=True, reason="fine", now=early)
    assert go_back(stage.store, first, reason="bad", now=early).change.time == first.change.time


def test_an_action_and_its_candidate_belong_together(stage: Stage) -> None:
    _, _, first = started(stage)
    for old, new in ((b'"action": "rollout"', b'"action": "promote"'), (b'"share": 5', b'"share": 100')):
        with pytest.raises(ReleaseError, match=r"rollout|share"):
            Entry.parse(first.to_bytes().replace(old, new))
    with pytest.raises(ValueError, match="expected `rollout` with a candidate"):
        ChannelChange(
            action="rollout", version="v", release=of_bytes(b""), verdict=VERDICT, actor="a", reason="b", time=NOW
        )


def test_entries_without_a_rollout_keep_their_bytes(stage: Stage) -> None:
    stage.hold("a")
    assert b"rollout" not in (stage.store.get("channels/demo/production/0000000001.json") or b"")


@pytest.mark.parametrize("is_better", [True, False])
def test_the_anchor_moves_with_the_promotion_and_not_while_shares_are_tried(stage: Stage, is_better: bool) -> None:
    (incumbent,) = stage.hold("a")
    own = AnchorVerdict(version=incumbent.version, release=incumbent.digest, is_better=is_better, evidence="accuracy")
    verdict = VERDICT.model_copy(update={"against": incumbent.version, "anchor": own})
    candidate = stage.people.release(stage.store, stage.folder / "package-b", "b", verdict=verdict)
    entries = [stage.promote(candidate, policy=POLICY, anchored=True)]
    for _ in range(2):
        entries.append(moved(stage, entries[-1]))
    last = candidate if is_better else incumbent
    assert [channel.anchor_of(entry).version for entry in entries] == [incumbent.version] * 2 + [last.version]
    assert channel.read(stage.store, "demo", "production").entries[1:] == tuple(entries)


def test_a_rollout_that_is_ended_leaves_the_anchor_where_it_was(stage: Stage) -> None:
    (incumbent,) = stage.hold("a")
    own = AnchorVerdict(version=incumbent.version, release=incumbent.digest, is_better=True, evidence="accuracy")
    verdict = VERDICT.model_copy(update={"against": incumbent.version, "anchor": own})
    candidate = stage.people.release(stage.store, stage.folder / "package-b", "b", verdict=verdict)
    entry = go_back(stage.store, stage.promote(candidate, policy=POLICY, anchored=True), reason="errors", now=NOW)
    assert entry.change.anchor == channel.anchor_of(entry)
    assert channel.anchor_of(entry).version == incumbent.version
    assert len(channel.read(stage.store, "demo", "production").entries) == 3
