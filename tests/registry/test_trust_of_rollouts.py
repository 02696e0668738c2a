"""docs/security.md's table, of rollouts: who can begin one, move it on or end it."""

from pathlib import Path

import pytest

from graftline.errors import PromotionError, UntrustedError
from graftline.registry.channel import (
    ChannelChange,
    Entry,
    RolloutStep,
    candidate_of,
)
from graftline.registry.rollout import Hand, go_back, move
from graftline.registry.trust import EntryJudge
from graftline.serve.follower import fetch_verified
from graftline.settings import Rollout
from tests.registry.judged_world import HOUR, POLICY, World, began, promoted, world
from tests.registry.people import NOW

__all__ = ["began", "world"]

SHARES = Rollout(shares=(5, 25, 100))


@pytest.fixture
def tried(world: World) -> tuple[World, Entry]:
    """A rollout of v3 that has begun, by the rules."""
    store = world.store
    return world, promoted(world, store, "v3", hours_ago=0.0, policy=POLICY.replace(rollout=SHARES))


def step_on(world: World, head: Entry, by: str, *, on: bool = True) -> Entry:
    hand = Hand(world.people.keys, world.people.private_key(by))
    return move(world.store, head, SHARES, on=on, reason="not worse than allowed", now=world.now, hand=hand)


def test_each_step_of_a_rollout_counts_up_to_the_promotion(tried: tuple[World, Entry]) -> None:
    world, head = tried
    for on in (False, True, True):
        assert world.read().log.head == head
        assert world.holds("v2")
        head = step_on(world, head, "pia", on=on)
    assert world.holds("v3")
    assert EntryJudge(world.store, "demo", world.trust, now=NOW).problems(world.log()) == (None,) * 6


def test_a_rollback_key_ends_a_rollout_and_moves_none_on(tried: tuple[World, Entry]) -> None:
    world, head = tried
    with pytest.raises(PromotionError, match="the key rob has the roles rollback; to rollout it needs 'promoter'"):
        step_on(world, head, "rob")
    hand = Hand(world.people.keys, world.people.private_key("rob"))
    go_back(world.store, head, reason="errors: 0.3 against 0.01", now=world.now, hand=hand)
    assert world.holds("v2")


@pytest.mark.parametrize("by", [None, "rob", "bob"])
def test_a_thief_gives_a_candidate_no_share(tried: tuple[World, Entry], by: str | None) -> None:
    world, head = tried
    assert head.change.rollout
    larger = head.change.rollout.model_copy(update={"step": "share", "share": 99})
    world.enter(head.change.model_copy(update={"rollout": larger}), by)
    with pytest.raises(UntrustedError, match=r"is not signed|who has not the role 'promoter'"):
        world.read()


@pytest.mark.parametrize("change", [{"share": 1}, {"salt": "0" * 32}, {"version": "v1"}, {"mirror": 50}])
def test_a_step_follows_from_the_step_before(tried: tuple[World, Entry], change: dict[str, object]) -> None:
    world, head = tried
    assert head.change.rollout
    other = head.change.rollout.model_copy(update={"step": "share", **change})
    world.enter(head.change.model_copy(update={"rollout": other}), "pia")
    with pytest.raises(UntrustedError, match="the entry before it is not the step before"):
        world.read()


def test_a_rollout_begins_by_the_channel_s_policy_beside_what_it_holds(world: World) -> None:
    made = world.made["v3"]
    number = len(world.log().entries) + 1
    step = RolloutStep(step="start", version=made.version, release=made.digest, share=5, started=number, salt="0" * 32)
    for incumbent, problem in (("v2", "does not meet its policy: approvals"), ("v1", "did not hold then")):
        begun = world.change(incumbent).model_copy(update={"action": "rollout", "rollout": step})
        world.enter(begun, "pia")
        with pytest.raises(UntrustedError, match=problem):
            world.read()
        world.truncate(number - 1)


def begun(world: World, incumbent: str, candidate: str) -> ChannelChange:
    """The start of a rollout, approved by eve, as a thief's own software would write it."""
    made, number = world.made[candidate], len(world.log().entries) + 1
    step = RolloutStep(step="start", version=made.version, release=made.digest, share=5, started=number, salt="0" * 32)
    approved = world.change(candidate, approver="eve")
    held = {"version": world.made[incumbent].version, "release": world.made[incumbent].digest}
    return approved.model_copy(update={**held, "action": "rollout", "rollout": step})


def test_a_rollout_beside_a_forged_promotion_does_not_make_it_count(world: World) -> None:
    """With a promoter's key alone, an approved candidate would otherwise bring in an incumbent that nobody approved."""
    world.enter(world.change("v3"), "pia")
    start = world.enter(begun(world, "v3", "v1"), "pia")
    for _ in range(2):
        with pytest.raises(UntrustedError, match="holds what entry 3 put there, which does not meet its policy: appr"):
            world.read()
        assert start.change.rollout
        step = start.change.rollout.model_copy(update={"step": "hold"})
        world.enter(start.change.model_copy(update={"rollout": step, "approvals": ()}), "pia")
    world.enter(world.change("v3", "rollback"), "pia")
    with pytest.raises(UntrustedError, match="goes back to entry 3, which does not meet its policy"):
        world.read()


def test_after_a_rollout_that_was_ended_the_next_one_counts(tried: tuple[World, Entry]) -> None:
    world, head = tried
    go_back(world.store, head, reason="slow", now=NOW, hand=Hand(world.people.keys, world.people.private_key("rob")))
    promoted(world, world.store, "v1", hours_ago=0.0, policy=POLICY.replace(rollout=SHARES))
    assert world.holds("v2")
    assert EntryJudge(world.store, "demo", world.trust, now=NOW).problems(world.log()) == (None,) * 5


def test_a_server_takes_incumbent_and_candidate_of_other_builders_and_the_candidate_s_is_the_one_named(
    world: World, tmp_path: Path
) -> None:
    world.made = {**world.made, "v4": world.people.release(world.store, tmp_path / "package", "4", builder="ada")}
    head = promoted(world, world.store, "v4", hours_ago=0.0, policy=POLICY.replace(rollout=SHARES))
    tried = candidate_of(head)
    assert head.seal
    assert tried
    for entry in (head, tried):
        assert fetch_verified(world.store, entry, tmp_path / "served", world.people.keys).name == entry.change.version
    other = tried.model_copy(update={"seal": head.seal.model_copy(update={"builder": "bob"})})
    with pytest.raises(PromotionError, match="is signed by ada, the channel's entry 3 says bob; promote it again"):
        fetch_verified(world.store, other, tmp_path / "served", world.people.keys)


def test_a_candidate_whose_builder_s_key_ends_during_its_rollout_is_served_and_promoted(
    tried: tuple[World, Entry], tmp_path: Path
) -> None:
    world, head = tried
    world.state()
    world.with_key("bob", expires=NOW + HOUR)
    world.now = NOW + 2 * HOUR
    candidate, judged = candidate_of(head), world.read()
    assert candidate
    assert judged.tried == NOW
    assert fetch_verified(world.store, candidate, tmp_path / "served", world.people.keys, at=judged.tried).is_dir()
    for _ in range(2):
        head = step_on(world, head, "pia")
    world.state()
    assert world.holds("v3")
    assert world.read().proved == NOW
