"""A channel's anchor: it stands in the log, moves only with evidence, and verdicts must compare with it."""

from pathlib import Path

import pytest

from graftline.digest import of_bytes
from graftline.errors import PromotionError, StoreError
from graftline.registry import channel
from graftline.registry.channel import Anchor, ChannelChange, Entry, RolloutStep
from graftline.registry.cleanup import RetentionRules, plan_cleanup
from graftline.registry.store import open_store
from graftline.release.manifest import AnchorVerdict, GateVerdict, Manifest
from tests.registry.people import NOW
from tests.registry.test_promotion import Stage

EVIDENCE = "accuracy +0.031 on 1000 items, p of not better 0.0004, asked: at most 0.01"


@pytest.fixture
def stage(tmp_path: Path) -> Stage:
    """One store in a folder: what is asked here does not depend on its kind."""
    return Stage(open_store(str(tmp_path / "store")), tmp_path)


def enter(stage: Stage, seed: str, *, anchor: Manifest | None = None, better: bool = False) -> Manifest:
    """Promote a release whose verdict compares with what production holds, and with an anchor."""
    held = channel.head(stage.store, "demo", "production")
    shown = None
    if anchor is not None:
        shown = AnchorVerdict(version=anchor.version, release=anchor.digest, is_better=better, evidence=EVIDENCE)
    verdict = GateVerdict(
        outcome="pass", against=held.change.version if held else "base", digest=of_bytes(b"v"), anchor=shown
    )
    made = stage.people.release(stage.store, stage.folder / f"package-{seed}", seed, verdict=verdict)
    stage.promote(made, anchored=True)
    return made


def head(stage: Stage) -> Entry:
    found = channel.head(stage.store, "demo", "production")
    assert found is not None
    return found


def anchor_of(stage: Stage) -> str:
    return channel.anchor_of(head(stage)).version


def test_the_first_release_is_the_anchor_until_one_is_shown_to_be_better(stage: Stage) -> None:
    first = enter(stage, "a")
    assert anchor_of(stage) == first.version
    second = enter(stage, "b", anchor=first)
    assert (head(stage).change.version, anchor_of(stage)) == (second.version, first.version)
    assert f"anchor: {first.version} stays; {EVIDENCE}" in head(stage).change.checks

    third = enter(stage, "c", anchor=first, better=True)

    assert anchor_of(stage) == third.version
    assert f"anchor: moves here from {first.version}; {EVIDENCE}" in head(stage).change.checks
    assert head(stage).change.verdict == third.verdict  # the evidence lies in the entry
    assert anchor_of(stage) == channel.anchor_of(channel.read(stage.store, "demo", "production").entries[-1]).version


def test_a_verdict_with_another_anchor_or_none_enters_nothing(stage: Stage) -> None:
    first = enter(stage, "a")
    second = enter(stage, "b", anchor=first)
    with pytest.raises(PromotionError, match=rf"with no anchor, but the anchor is {first.version} now; evaluate"):
        enter(stage, "c")
    with pytest.raises(
        PromotionError, match=rf"with {second.version} as the anchor, but the anchor is {first.version}"
    ):
        enter(stage, "d", anchor=second, better=True)
    assert head(stage).change.version == second.version


def test_a_rollback_takes_back_the_move_of_the_anchor_that_came_with_what_is_left(stage: Stage) -> None:
    first = enter(stage, "a")
    second = enter(stage, "b", anchor=first)
    enter(stage, "c", anchor=first, better=True)
    stage.rollback()
    assert (head(stage).change.version, anchor_of(stage)) == (second.version, first.version)


def append(stage: Stage, anchor: Anchor | None, verdict: GateVerdict | None = None) -> None:
    """Write an entry without any check, as who may write to the bucket could."""
    log = channel.read(stage.store, "demo", "production")
    change = ChannelChange(
        action="promote",
        version="forged",
        release=of_bytes(b"forged"),
        verdict=verdict,
        actor="mallory",
        reason="forged",
        time=NOW,
        anchor=anchor,
    )
    channel.append(stage.store, channel.next_entry(log, change))


@pytest.mark.parametrize("is_better", [None, False, True])
def test_an_anchor_that_moves_without_evidence_against_the_one_before_breaks_the_history(
    stage: Stage, is_better: bool | None
) -> None:
    """Also evidence against another release than the anchor is none."""
    enter(stage, "b", anchor=enter(stage, "a"))
    verdict = None
    if is_better is not None:
        shown = AnchorVerdict(version="other", release=of_bytes(b"other"), is_better=is_better, evidence=EVIDENCE)
        verdict = GateVerdict(outcome="pass", against="base", digest=of_bytes(b"v"), anchor=shown)
    append(stage, Anchor(version="forged", release=of_bytes(b"forged")), verdict)
    with pytest.raises(StoreError, match="moves the anchor to forged without evidence that it is better than"):
        channel.head(stage.store, "demo", "production")


def test_a_rollout_does_not_move_the_anchor_to_the_incumbent_by_what_was_shown_of_the_candidate(stage: Stage) -> None:
    first = enter(stage, "a")
    second = enter(stage, "b", anchor=first)
    shown = AnchorVerdict(version=first.version, release=first.digest, is_better=True, evidence=EVIDENCE)
    verdict = GateVerdict(outcome="pass", against=second.version, digest=of_bytes(b"v"), anchor=shown)
    step = RolloutStep(step="start", version="c", release=of_bytes(b"c"), share=5, started=3, salt="0" * 32)
    moved = {"anchor": Anchor(version=second.version, release=second.digest), "verdict": verdict}
    change = head(stage).change.model_copy(update={"action": "rollout", "rollout": step, **moved})
    log = channel.read(stage.store, "demo", "production")
    channel.append(stage.store, channel.next_entry(log, change))
    with pytest.raises(StoreError, match=r"moves the anchor to .* without evidence"):
        channel.head(stage.store, "demo", "production")


def test_an_anchor_that_was_recorded_cannot_be_dropped(stage: Stage) -> None:
    enter(stage, "b", anchor=enter(stage, "a"))
    append(stage, None)
    with pytest.raises(StoreError, match="drops the channel's anchor"):
        channel.read(stage.store, "demo", "production")


def test_a_promotion_that_does_not_look_at_the_anchor_leaves_it_where_it_is(stage: Stage) -> None:
    first = enter(stage, "a")
    second = enter(stage, "b", anchor=first)
    stage.promote(stage.release("c", against=second.version))
    assert anchor_of(stage) == first.version


def test_a_channel_without_an_anchor_has_entries_as_they_were_before_there_were_anchors(stage: Stage) -> None:
    stage.promote(stage.release("a"))
    assert b"anchor" not in head(stage).to_bytes()
    assert Entry.parse(head(stage).to_bytes()) == head(stage)


def test_the_anchor_is_not_removed_however_long_ago_it_was_promoted(stage: Stage) -> None:
    first = enter(stage, "a")
    for seed in "bcd":
        enter(stage, seed, anchor=first)
    rules = RetentionRules(newest_entries=1)
    plan = plan_cleanup(stage.store, "demo", rules=rules, now=NOW)
    assert plan.keep[first.version] == "anchor in entry 4 of production"
