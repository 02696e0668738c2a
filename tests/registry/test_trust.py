"""docs/security.md's table: who can do what with which key or access. Each row of the table names its test here."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from graftline.digest import Digest
from graftline.errors import GraftlineError, HistoryLostError, PromotionError, ReleaseError, UntrustedError
from graftline.registry.channel import (
    Anchor,
    Entry,
    append,
    next_entry,
    read,
)
from graftline.registry.policy import digest_of
from graftline.registry.promotion import Rollback, rollback
from graftline.registry.seals import Evidence, seal
from graftline.registry.store import open_store
from graftline.registry.trust import EntryJudge, judged_head, open_trust
from graftline.release.manifest import AnchorVerdict
from graftline.serve.follower import fetch_verified
from graftline.settings import Approvals, Channel
from tests.registry.judged_world import DAY, HOUR, POLICY, World, began, promoted, unsigned_history, world
from tests.registry.people import NOW

__all__ = ["began", "world"]


def test_what_was_promoted_by_the_rules_is_read(world: World) -> None:
    assert world.holds("v2")
    assert EntryJudge(world.store, "demo", world.trust, now=NOW).problems(world.log()) == (None, None)


STOLEN = ("nobody's", "mallory", "bob", "eve", "rob")


@pytest.mark.parametrize("key", STOLEN)
@pytest.mark.parametrize("approver", ["", "eve"])
def test_bucket_write_puts_nothing_into_production_without_a_promoters_key(
    world: World, key: str, approver: str
) -> None:
    """Not with an unlisted, a builder's, an approver's or a rollback key, not even with an approval."""
    world.enter(world.change("v3", approver=approver), None if key == "nobody's" else key)
    with pytest.raises(UntrustedError, match=r"is not signed|does not list|who has not the role"):
        world.read()


def test_a_promoters_key_alone_does_not_replace_approvals(world: World) -> None:
    world.enter(world.change("v3"), "pia")
    with pytest.raises(UntrustedError, match="does not meet its policy: approvals: approved by nobody; needs 1 more"):
        world.read()


@pytest.mark.parametrize("approver", ["bob", "pia", "rob"])
def test_the_keys_of_machines_approve_nothing(world: World, approver: str) -> None:
    policy = Channel(approvals=Approvals(count=1))
    world.policies = {"production": policy}
    entry = world.enter(world.change("v3", approver=approver), "pia", policy=policy)
    with pytest.raises(UntrustedError, match="its key is a machine's"):
        world.read()
    said = Channel(approvals=Approvals(count=1, roles=world.people.keys.keys[approver].roles[:1]))
    world.policies = {"production": said}
    world.truncate(entry.number - 1)
    world.enter(world.change("v3", approver=approver), "pia", policy=said)
    assert world.holds("v3")


def test_an_approval_counts_once_and_for_its_own_release(world: World) -> None:
    used = world.log().entries[0].change.approvals
    for version in ("v1", "v3"):
        entry = world.enter(world.change(version).model_copy(update={"approvals": used}), "pia")
        with pytest.raises(UntrustedError, match=r"was used for an earlier entry|is for demo/"):
            world.read()
        world.truncate(entry.number - 1)


def test_a_policy_of_the_thief_s_own_is_not_one_the_reader_knows(world: World) -> None:
    lax = Channel(verdicts=("pass", "inconclusive"))
    world.enter(world.change("v3"), "pia", policy=lax)
    with pytest.raises(UntrustedError, match=f"names the policy {digest_of(lax)}, and pipelines.yaml knows"):
        world.read()


def test_an_old_entry_is_judged_by_the_policy_that_it_names(world: World) -> None:
    world.policies = {"production": Channel(approvals=Approvals(count=2))}
    with pytest.raises(UntrustedError, match=r"list the policy of that time under channels.production.earlier"):
        world.read()
    world.policies = {"production": Channel(approvals=Approvals(count=2), earlier=(POLICY,))}
    assert world.holds("v2")


def test_a_policy_s_name_does_not_hang_on_what_readers_are_told(world: World) -> None:
    assert digest_of(POLICY) == digest_of(POLICY.model_copy(update={"head_hours": 1.0, "earlier": (Channel(),)}))
    assert digest_of(POLICY) != digest_of(Channel())


@pytest.mark.parametrize(
    ("key", "version"), [("rob", "v1"), ("pia", "v1"), ("rob", "v3"), ("pia", "v3"), ("bob", "v1")]
)
def test_a_rollback_key_goes_back_to_what_was_in_production_and_nowhere_else(
    world: World, key: str, version: str
) -> None:
    world.enter(world.change(version, "rollback"), key)
    if version == "v1" and key != "bob":
        assert world.holds("v1")
    else:
        with pytest.raises(UntrustedError, match=r"which the channel never held|who has not the role"):
            world.read()


def test_a_rollback_key_and_bucket_write_do_not_vouch_for_a_forged_promotion(world: World) -> None:
    world.enter(world.change("v3", approver="eve"), None)
    world.enter(world.change("v1"), None)
    world.enter(world.change("v3", "rollback"), "rob")
    with pytest.raises(UntrustedError, match="goes back to entry 3, which is not signed"):
        world.read()


def copied(entry: Entry, **changes: object) -> Entry:
    return entry.model_copy(update=changes)


EDITS: dict[str, Callable[[Entry], Entry]] = {
    "reason": lambda entry: copied(entry, change=entry.change.model_copy(update={"reason": "other"})),
    "time": lambda entry: copied(entry, change=entry.change.model_copy(update={"time": NOW})),
    "nonce": lambda entry: copied(entry, nonce="0"),
    "signer": lambda entry: copied(entry, seal=entry.seal and entry.seal.model_copy(update={"signer": "rob"})),
    "builder": lambda entry: copied(entry, seal=entry.seal and entry.seal.model_copy(update={"builder": "ada"})),
    "compared": lambda entry: copied(
        entry, seal=entry.seal and entry.seal.model_copy(update={"compared_with": "staging"})
    ),
    "unsealed": lambda entry: copied(entry, format=1, seal=None),
}


@pytest.mark.parametrize("edit", EDITS)
def test_a_signed_entry_cannot_be_edited(world: World, edit: str) -> None:
    entry = world.log().entries[-1]
    world.store.put_bytes("channels/demo/production/0000000002.json", EDITS[edit](entry).to_bytes())
    with pytest.raises(UntrustedError):
        world.read()


def test_a_signed_entry_counts_at_its_own_place_in_its_own_channel_only(world: World) -> None:
    world.truncate(1)
    first = world.log().entries[0]
    moved = copied(first, number=2, previous=first.digest)
    append(world.store, moved)
    with pytest.raises(UntrustedError, match="has a signature that is not from the key of 'pia'"):
        world.read()


def test_a_log_that_was_cut_is_noticed_by_whoever_saw_it(world: World) -> None:
    store = world.store
    world.read(store)
    world.truncate(1)
    with pytest.raises(HistoryLostError, match="entry 2 was there"):
        world.read(store)


def test_a_log_that_was_cut_is_noticed_by_what_was_stated_of_it(world: World) -> None:
    world.state()
    (world.folder / "channels/demo/production/0000000002.json").unlink()
    with pytest.raises(HistoryLostError, match=r"pia stated at .* that entry 2 is the newest .* and it is gone"):
        world.read()


def test_a_fork_is_noticed(world: World) -> None:
    store = world.store
    world.read(store)
    world.truncate(1)
    world.enter(world.change("v3", approver="eve"), "pia")
    with pytest.raises(HistoryLostError, match="entry 2 is another than it was"):
        world.read(store)
    assert world.holds("v3")  # with the promoter's and an approver's key


@pytest.mark.parametrize("keeps_heads", [True, False])
def test_an_old_log_cannot_be_replayed_to_a_new_reader(world: World, keeps_heads: bool) -> None:
    """Nor is it taken at the second try, after the first has noted what is there."""
    newest = (world.folder / "heads/demo/production/newest.json").read_bytes()  # as it was before v2
    world.truncate(1)
    if keeps_heads:
        world.store.put_bytes("heads/demo/production/newest.json", newest)
    seen = world.folder.parent / "seen"
    for _ in range(2):
        with pytest.raises(UntrustedError, match="head_hours is 24: what came after it may be held back"):
            world.read(open_store(str(world.folder), seen=seen))


def test_a_channel_in_which_nothing_moves_is_refreshed(world: World) -> None:
    store = world.store
    world.read(store)
    world.now = NOW + 2 * DAY
    assert "may be held back" in str(world.read(store).stale)  # a reader who saw it keeps it and says so
    with pytest.raises(UntrustedError, match="graftline refresh demo --channel production"):
        world.read()
    world.state(hours_ago=1)
    assert world.read().stale is None
    world.now += DAY  # the statement has expired
    with pytest.raises(UntrustedError, match="may be held back"):
        world.read()


@pytest.mark.parametrize("by", ["bob", "eve", "rob"])
def test_only_a_key_with_the_role_states_what_is_newest(world: World, by: str) -> None:
    with pytest.raises(PromotionError, match="it needs 'timestamp'"):
        world.state(by)
    world.now = NOW + 2 * DAY
    ring = world.people.keys
    world.with_key(by, roles=("timestamp",))
    world.state(by)
    world.people.keys = ring  # the readers' own
    with pytest.raises(UntrustedError, match="may be held back"):
        world.read()


@pytest.mark.parametrize("end", ["expires", "revoked"])
def test_an_ended_key_counts_for_what_is_proved_to_be_older(world: World, end: str) -> None:
    world.with_key("rob", roles=("timestamp",))
    world.with_key("pia", **{end: NOW + HOUR})
    assert world.holds("v2")
    world.now = NOW + 2 * HOUR
    with pytest.raises(UntrustedError, match="that it was there before is not proved"):
        world.read()
    world.state("rob", hours_ago=1.5)
    assert world.holds("v2")


def test_a_stolen_key_cannot_date_an_entry_before_it_was_revoked(world: World) -> None:
    world.with_key("rob", roles=("timestamp",))
    world.state("rob")
    world.with_key("pia", revoked=NOW + HOUR)
    world.now = NOW + 2 * HOUR
    assert world.holds("v2")
    world.enter(world.change("v1", "rollback", hours_ago=1.5), "pia")
    with pytest.raises(UntrustedError, match=r"whose key was revoked as of .* is not proved"):
        world.read()
    shutil.rmtree(world.folder / "heads")
    with pytest.raises(UntrustedError, match="is not proved"):
        world.read()


@pytest.mark.parametrize("name", ["eve", "bob"])
def test_an_approver_or_builder_who_left_does_not_undo_what_was_promoted(world: World, name: str) -> None:
    world.state()
    world.with_key(name, revoked=NOW + HOUR)
    world.now = NOW + 2 * HOUR
    judged = world.read()
    assert judged.log.head
    assert judged.proved == NOW
    release = fetch_verified(
        world.store, judged.log.head, world.folder.parent / "served", world.people.keys, at=judged.proved
    )
    assert release.is_dir()


def test_entries_from_before_they_were_signed_count_up_to_one_that_the_reader_lists(world: World) -> None:
    unsigned_history(world)
    head = world.log().entries[-1]
    with pytest.raises(UntrustedError, match=f"list its digest {head.digest} under `accepted` in keys.yaml"):
        world.read()
    world.people.keys = replace(world.people.keys, accepted=frozenset({head.digest}))
    world.state()
    assert world.holds("v2")
    world.enter(world.change("v3"), None)
    with pytest.raises(UntrustedError, match="is not signed"):
        world.read()


def test_a_signed_entry_vouches_for_the_unsigned_ones_before_it_and_none_after(world: World) -> None:
    unsigned_history(world)
    world.enter(world.change("v3", approver="eve"), "pia")
    assert world.holds("v3")
    world.enter(world.change("v1", "rollback"), "rob")
    assert world.holds("v1")
    world.enter(world.change("v2"), None)
    problems = EntryJudge(world.store, "demo", world.trust, now=NOW).problems(world.log())
    assert [problem is None for problem in problems] == [True, True, True, True, False]


def test_promotion_and_rollback_sign_and_refuse_a_channel_that_was_forged(world: World) -> None:
    how = Rollback(keys=world.people.keys, trust=world.trust, key=world.people.private_key("rob"), now=lambda: NOW)
    back = rollback(world.store, pipeline="demo", to_channel="production", actor="ada", reason="errors", how=how)
    assert (back.seal and back.seal.signer, world.holds("v1")) == ("rob", True)
    entry = promoted(world, world.store, "v3", hours_ago=0)
    assert (entry.seal and entry.seal.builder, world.holds("v3")) == ("bob", True)
    world.enter(world.change("v1"), None)
    for again in (
        lambda: promoted(world, world.store, "v2", hours_ago=0),
        lambda: rollback(
            world.store,
            pipeline="demo",
            to_channel="production",
            actor="ada",
            reason="errors",
            how=replace(how, again=True),
        ),
    ):
        with pytest.raises(UntrustedError, match="entry 5 of demo/production is not signed"):
            again()


@pytest.mark.parametrize(
    ("key", "doing"), [("bob", "promote"), ("eve", "promote"), ("rob", "promote"), ("bob", "rollback")]
)
def test_the_tool_refuses_a_key_without_the_role_before_anything_is_done(world: World, key: str, doing: str) -> None:
    entry = next_entry(world.log(), world.change("v1", doing))
    with pytest.raises(PromotionError, match=f"to {doing} it needs 'promoter'"):
        seal(entry, keys=world.people.keys, private_key=world.people.private_key(key), now=NOW)


@pytest.mark.parametrize("name", ["adapter/adapter_model.safetensors", "manifest.json", "model.sig", "README.md"])
def test_bucket_write_gives_a_reader_no_bytes_that_a_builder_did_not_sign(world: World, name: str) -> None:
    """So nothing in the store can make a reader run code."""
    head = world.read().log.head
    assert head
    world.store.put_bytes(f"releases/demo/{head.change.version}/{name}", b"cos\nsystem\n(S'id'\ntR.")
    with pytest.raises(GraftlineError):
        fetch_verified(world.store, head, world.folder.parent / "served", world.people.keys)


def test_a_builder_s_key_and_bucket_write_do_not_exchange_what_was_promoted(world: World, tmp_path: Path) -> None:
    head = world.read().log.head
    assert head
    other = world.people.release(open_store(str(tmp_path / "other")), tmp_path / "package", "evil")
    place = world.folder / "releases" / "demo" / head.change.version
    shutil.rmtree(place)
    shutil.copytree(tmp_path / "other" / "releases" / "demo" / other.version, place)
    with pytest.raises(ReleaseError, match="it was changed or moved, do not use this release"):
        fetch_verified(world.store, head, tmp_path / "served", world.people.keys)


def test_whoever_writes_the_key_file_decides_who_promotes(world: World) -> None:
    """Git write is the root of it all: keys.yaml and pipelines.yaml are reviewed as code is."""
    world.enter(world.change("v3", approver="eve"), "mallory")
    public = world.people.private_key("mallory").with_name("mallory.pub").read_text()
    listed = world.people.keys.keys["pia"].model_copy(update={"name": "mallory", "public_key": public})
    world.people.keys = replace(world.people.keys, keys={**world.people.keys.keys, "mallory": listed})
    assert world.holds("v3")


def test_a_reader_without_keys_is_shown_what_the_channel_holds_and_no_judgement_of_it(world: World) -> None:
    world.enter(world.change("v3"), None)
    assert judged_head(world.store, "demo", "production", None) == (world.log().entries[-1], None)


def test_old_stores_are_read_with_their_weaker_guarantee_said(tmp_path: Path) -> None:
    old = Path(__file__).parents[1] / "old_artifacts" / "format-1"
    store, trust = open_store(str(old / "store")), open_trust(old, {"production": POLICY})
    assert trust
    judge = EntryJudge(store, "demo", trust, now=NOW)
    with pytest.raises(UntrustedError, match="if it is from before entries were signed, and right, list its digest"):
        judge.read("production")
    log = read(store, "demo", "production")
    accepted = frozenset[Digest]({log.entries[-1].digest})
    judge = EntryJudge(store, "demo", replace(trust, keys=replace(trust.keys, accepted=accepted)), now=NOW)
    assert judge.problems(log) == (None, None, None)
    assert judge.read("production", newest=3).log == log


@pytest.mark.parametrize(("shown", "is_in_force"), [("v2", True), ("v1", False)])
def test_evidence_against_an_anchor_counts_if_it_was_in_force(world: World, shown: str, is_in_force: bool) -> None:
    made = world.made[shown]
    change = world.change("v3", approver="eve")
    assert change.verdict
    anchor = AnchorVerdict(version=made.version, release=made.digest, is_better=False, evidence="as good")
    verdict = change.verdict.model_copy(update={"anchor": anchor})
    kept = Anchor(version=world.made["v2"].version, release=world.made["v2"].digest)
    world.enter(change.model_copy(update={"verdict": verdict, "anchor": kept}), "pia")
    world.state()
    if is_in_force:
        assert world.holds("v3")
    else:
        with pytest.raises(UntrustedError, match=r"with .* as the anchor, but the anchor is"):
            world.read()


@pytest.mark.parametrize(("against", "counts"), [("v1", True), ("v2", False)])
def test_a_verdict_counts_against_what_the_channel_that_it_names_held(world: World, against: str, counts: bool) -> None:
    policy = Channel(head_hours=24)
    world.policies = {**world.policies, "staging": policy}
    log = read(world.store, "demo", "staging")
    append(world.store, world.sign(next_entry(log, world.change("v1", hours_ago=0.5)), "pia", policy=policy))
    change = world.change("v3", approver="eve")
    assert change.verdict
    verdict = change.verdict.model_copy(update={"against": world.made[against].version})
    entry = next_entry(world.log(), change.model_copy(update={"verdict": verdict}))
    evidence = Evidence(policy=digest_of(POLICY), builder="bob", compared_with="staging")
    key = world.people.private_key("pia")
    append(world.store, seal(entry, keys=world.people.keys, private_key=key, now=world.now, evidence=evidence))
    world.state()
    if counts:
        assert world.holds("v3")
    else:
        with pytest.raises(UntrustedError, match="reference: compared with"):
            world.read()


def test_a_rollback_takes_the_anchor_that_was_in_force_with_what_it_goes_back_to(world: World) -> None:
    number = len(world.log().entries)
    for version, problem in (("v3", "takes the anchor .*, which was not in force then"), ("v1", None)):
        made = world.made[version]
        anchor = Anchor(version=made.version, release=made.digest)
        world.enter(world.change("v1", "rollback").model_copy(update={"anchor": anchor}), "rob")
        if problem is None:
            assert world.holds("v1")
            break
        with pytest.raises(UntrustedError, match=problem):
            world.read()
        world.truncate(number)


@pytest.mark.parametrize("accepts", [False, True])
def test_a_promoter_vouches_for_no_unsigned_entry_that_came_after_a_signed_or_accepted_one(
    world: World, accepts: bool
) -> None:
    if accepts:
        unsigned_history(world)
        world.people.keys = replace(world.people.keys, accepted=frozenset({world.log().entries[-1].digest}))
    world.enter(world.change("v3"), None)
    world.enter(world.change("v1"), "pia")
    world.enter(world.change("v3", "rollback"), "pia")
    with pytest.raises(UntrustedError, match="goes back to entry 3, which is not signed"):
        world.read()
