"""Rows that only promotions look at: each look is counted, and every reader asks for what was found on them."""

from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from graftline.digest import of_bytes
from graftline.errors import PromotionError, StoreUnavailableError, UntrustedError
from graftline.registry import channel, reserve, rollout
from graftline.registry.overview import overview
from graftline.registry.policy import PromotionFacts, digest_of
from graftline.registry.promotion import (
    PromotionChecks,
    PromotionRequest,
    ReserveJudge,
    Rollback,
    promote,
    rollback,
)
from graftline.registry.releases import load_manifest
from graftline.registry.reserve import Looker, Outcome, ReserveVerdict, all_looks, count_look, looks
from graftline.registry.seals import Evidence, seal
from graftline.registry.store import Store, open_store
from graftline.registry.trust import EntryJudge, Trust
from graftline.release.manifest import GateVerdict, Manifest
from graftline.release.pages.registry_page import render_registry
from graftline.settings import Channel, Rollout
from tests.registry.people import NOW, People

POLICY = Channel(reserve=True, anchor=False)
ROWS = "a\nb\n"
HOUR = timedelta(hours=1)


@dataclass
class World:
    """A store, a promoter, and what the gates will say of rows that only promotions look at."""

    store: Store
    folder: Path
    people: People
    outcome: Outcome = "pass"
    asked: list[PromotionFacts] = field(default_factory=list)
    now: datetime = NOW

    @property
    def trust(self) -> Trust:
        return Trust(keys=self.people.keys, policies={"production": POLICY})

    def release(self, seed: str, *, against: Manifest | None = None, rows: str = ROWS) -> Manifest:
        held = {"against": against.version, "release": against.digest} if against else {"against": "base"}
        verdict = GateVerdict(outcome="pass", digest=of_bytes(b"v"), **held)  # type: ignore[arg-type]
        return self.people.release(self.store, self.folder / f"package-{seed}", seed, verdict=verdict, reserve=rows)

    def look(self, folder: Path, case: PromotionFacts) -> ReserveJudge:
        assert (folder / reserve.ROWS).read_text() == ROWS

        def judge() -> tuple[Outcome, str]:
            self.asked.append(case)
            return self.outcome, "300 rows; accuracy +0.01"

        return judge

    def promote(self, manifest: Manifest, policy: Channel = POLICY, **checks: Any) -> channel.Entry:
        self.now += HOUR
        values = {
            "policy": policy,
            "keys": self.people.keys,
            "smoke": lambda folder: None,
            "reserve": self.look,
            "trust": replace(self.trust, policies={"production": policy}),
            "key": self.people.private_key("pia"),
        }
        wish = PromotionRequest(
            pipeline="demo", channel="production", version=manifest.version, actor="ci", reason="nightly"
        )
        given = PromotionChecks(**(values | checks))
        return promote(self.store, wish, given, folder=self.folder / manifest.version, now=lambda: self.now)

    def manifest_of(self, entry: channel.Entry) -> Manifest:
        return load_manifest(self.store, "demo", entry.change.version)

    def read(self, policy: Channel = POLICY) -> channel.Log:
        trust = replace(self.trust, policies={"production": policy})
        return EntryJudge(self.store, "demo", trust, now=self.now).read("production").log

    def forge(self, entry: channel.Entry, found: ReserveVerdict | None) -> channel.Entry:
        """The promoter's key signs an entry that says something else of the reserve, in place of the one before it."""
        change = entry.change.model_copy(update={"reserve": found})
        evidence = Evidence(policy=digest_of(POLICY), builder="bob", compared_with="production")
        made = entry.model_copy(update={"change": change})
        key = self.people.private_key("pia")
        return seal(made, keys=self.people.keys, private_key=key, now=self.now, evidence=evidence)

    def put_in_place(self, entry: channel.Entry) -> None:
        self.store.put_bytes(f"channels/demo/production/{entry.number:010d}.json", entry.to_bytes())


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(open_store(str(tmp_path / "store")), tmp_path, People(tmp_path))


def test_a_promotion_counts_its_look_and_signs_what_it_found(world: World) -> None:
    first = world.promote(made := world.release("a"))
    second = world.promote(world.release("b", against=made))
    assert [entry.change.reserve and entry.change.reserve.look for entry in (first, second)] == [1, 2]
    found = second.change.reserve
    assert found is not None
    assert (found.against, found.release, found.outcome) == (made.version, made.digest, "pass")
    assert found.rows == of_bytes(ROWS.encode())
    assert "reserve: 'pass' in look 2 at " in " ".join(second.change.checks)
    assert [case.reference for case in world.asked] == ["base", made.version]
    assert world.read().head == second


def test_a_look_that_shows_a_worse_release_is_counted_and_lets_nothing_in(world: World) -> None:
    made, world.outcome = world.release("a"), "fail"
    for _ in range(3):
        with pytest.raises(PromotionError, match=r"may not enter production of demo:\n  reserve: 'fail' in look \d"):
            world.promote(made)
    assert channel.read(world.store, "demo", "production").entries == ()
    world.outcome = "pass"
    found = world.promote(made).change.reserve
    assert found is not None
    assert found.look == 4


def test_a_promoter_that_dies_while_it_looks_has_looked(world: World) -> None:
    def dies() -> tuple[Outcome, str]:
        raise MemoryError

    made = world.release("a")
    with pytest.raises(MemoryError):
        world.promote(made, reserve=lambda folder, case: dies)
    assert looks(world.store, "demo", of_bytes(ROWS.encode())) == 1


def test_a_promoter_that_lacks_a_model_to_compare_with_has_not_looked(world: World) -> None:
    def lacks(folder: Path, case: PromotionFacts) -> ReserveJudge:
        raise PromotionError("the promotion needs the base")

    with pytest.raises(PromotionError, match="needs the base"):
        world.promote(world.release("a"), reserve=lacks)
    assert all_looks(world.store, "demo") == {}


def test_no_look_is_spent_where_another_rule_or_the_smoke_run_refuses(world: World) -> None:
    def refuses(folder: Path) -> None:
        raise PromotionError("smoke")

    made, other = world.release("a"), world.release("b")
    with pytest.raises(PromotionError, match="smoke"):
        world.promote(made, smoke=refuses)
    with pytest.raises(PromotionError, match="verdict"):
        world.promote(made, verdict=made.verdict.model_copy(update={"outcome": "inconclusive"}))
    assert all_looks(world.store, "demo") == {}
    world.promote(made)
    with pytest.raises(PromotionError, match="reference"):
        world.promote(other)
    assert list(all_looks(world.store, "demo").values()) == [1]


def test_an_inconclusive_look_counts_as_the_policy_says(world: World) -> None:
    made, world.outcome = world.release("a"), "inconclusive"
    with pytest.raises(PromotionError, match="reserve: 'inconclusive'"):
        world.promote(made)
    lax = POLICY.replace(verdicts=("pass", "inconclusive"))
    assert world.promote(made, lax).number == 1


def test_where_the_policy_asks_and_nobody_can_look_nothing_enters(world: World) -> None:
    with pytest.raises(PromotionError, match="reserve: nobody looked at the rows"):
        world.promote(world.release("a"), reserve=None)
    with pytest.raises(PromotionError, match=r"brings no rows that only promotions look at.*data.reserve_rows"):
        world.promote(world.release("b", rows=""))
    assert channel.read(world.store, "demo", "production").entries == ()


def test_a_policy_that_asks_for_nothing_leaves_rows_and_entries_as_they_were(world: World) -> None:
    entry = world.promote(world.release("a"), Channel())
    assert entry.change.reserve is None
    assert b"reserve" not in entry.to_bytes()
    assert world.asked == []
    assert all_looks(world.store, "demo") == {}
    assert digest_of(Channel()) == digest_of(Channel(reserve=False)) != digest_of(POLICY)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (None, "nobody looked"),
        ({"outcome": "fail"}, "'fail' in look 2"),
        ({"outcome": "inconclusive"}, "'inconclusive' in look 2"),
        ({"against": "base", "release": None}, "compared with base, but there is"),
        ({"release": of_bytes(b"other")}, "but there is"),
        ({"look": 1}, "an earlier entry has look 1 at the same rows"),
    ],
)
def test_a_reader_asks_for_what_its_policy_asks_whatever_the_promoter_signed(
    world: World, change: dict[str, Any] | None, why: str
) -> None:
    world.promote(made := world.release("a"))
    entry = world.promote(world.release("b", against=made))
    found = entry.change.reserve
    assert found is not None
    world.put_in_place(world.forge(entry, found.model_copy(update=change) if change else None))
    world.store = open_store(str(world.folder / "store"))  # a reader who sees it for the first time
    with pytest.raises(UntrustedError, match=why):
        world.read()


def test_a_reader_whose_policy_asks_for_the_reserve_refuses_one_that_did_not(world: World) -> None:
    world.promote(world.release("a"), Channel(anchor=False))
    with pytest.raises(UntrustedError, match="names the policy"):
        world.read()
    assert world.read(POLICY.replace(earlier=(Channel(anchor=False),))).head  # judged by the policy that it names


def test_a_candidate_of_a_rollout_was_judged_by_the_reserve_when_it_began(world: World) -> None:
    policy = POLICY.replace(rollout=Rollout(shares=(5, 100)))
    world.promote(made := world.release("a"), policy)
    entry = world.promote(world.release("b", against=made), policy)
    assert entry.change.rollout is not None
    assert world.read(policy).head == entry
    world.now += HOUR
    hand = rollout.Hand(world.people.keys, world.people.private_key("pia"))
    for _ in range(2):
        given: dict[str, Any] = {"on": True, "reason": "no worse", "now": world.now, "hand": hand}
        ended = rollout.move(world.store, world.read(policy).entries[-1], Rollout(shares=(5, 50, 100)), **given)
    assert ended.change.action == "promote"
    assert ended.change.reserve == entry.change.reserve
    assert world.read(policy).head == ended
    assert [asked.reference for asked in world.asked] == ["base", made.version]
    following = world.promote(world.release("c", against=world.manifest_of(ended)), policy)
    assert following.change.reserve
    assert following.change.reserve.look == 3


def test_a_rollout_does_not_begin_by_an_entry_that_hides_the_reserve(world: World) -> None:
    policy = POLICY.replace(rollout=Rollout(shares=(5, 100)))
    world.promote(made := world.release("a"), policy)
    entry = world.promote(world.release("b", against=made), policy)
    world.put_in_place(world.forge(entry, None))
    world.store = open_store(str(world.folder / "store"))
    with pytest.raises(UntrustedError, match="nobody looked"):
        world.read(policy)


def test_a_rollback_looks_at_nothing(world: World) -> None:
    world.promote(made := world.release("a"))
    world.promote(world.release("b", against=made))
    how = Rollback(
        keys=world.people.keys, trust=world.trust, key=world.people.private_key("rob"), now=lambda: world.now + HOUR
    )
    rollback(world.store, pipeline="demo", to_channel="production", actor="ada", reason="errors", how=how)
    world.now += HOUR
    head = world.read().head
    assert head is not None
    assert (head.change.version, head.change.reserve) == (made.version, None)
    assert len(world.asked) == 2


def looker(version: str = "v", rows: str = ROWS) -> Looker:
    return Looker(pipeline="demo", rows=of_bytes(rows.encode()), version=version, channel="production", actor="ci")


def test_two_promoters_get_two_numbers_and_other_rows_are_counted_apart(world: World) -> None:
    class Late:
        """A promoter that lists before the other one has written."""

        def __getattr__(self, name: str) -> Any:
            return getattr(world.store, name)

        def list(self, prefix: str) -> list[str]:
            return []

    late: Any = Late()
    assert count_look(world.store, looker("v1"), known=[], now=NOW) == 1
    assert count_look(late, looker("v2"), known=[], now=NOW) == 2
    assert count_look(late, looker("v2"), known=[], now=NOW) == 3  # the same command twice within a second
    assert count_look(world.store, looker("v1", "other"), known=[], now=NOW) == 1
    assert all_looks(world.store, "demo") == {looker().rows.hex: 3, looker(rows="other").rows.hex: 1}


def test_looks_that_somebody_removed_are_still_counted_by_what_was_signed(world: World) -> None:
    world.promote(made := world.release("a"))
    world.promote(second := world.release("b", against=made))
    for key in world.store.list("looks/demo"):
        world.store.delete(key)
    found = world.promote(world.release("c", against=second)).change.reserve
    assert found is not None
    assert found.look == 3


def test_looks_that_somebody_made_up_raise_the_count_and_neither_let_in_nor_keep_out(world: World) -> None:
    world.promote(made := world.release("a"))
    folder = f"looks/demo/{looker().rows.hex}"
    for name in ("0000000041.json", "9" * 240 + ".json", "\u0663.json", "99.json", "notes"):
        world.store.put_bytes(f"{folder}/{name}", b"not a look")
    assert looks(world.store, "demo", looker().rows) == 41
    entry = world.promote(second := world.release("b", against=made))
    assert entry.change.reserve
    assert entry.change.reserve.look == 42
    assert world.read().head == entry
    world.store.put_bytes(f"{folder}/{9_999_999_999}.json", b"not a look")
    assert world.promote(third := world.release("c", against=second)).change.reserve
    assert world.promote(world.release("d", against=third)).change.reserve
    assert world.read().head


def test_the_page_says_how_often_a_reserve_was_looked_at_and_from_when_on_that_is_much(world: World) -> None:
    world.release("a")
    for _ in range(reserve.MANY_LOOKS - 1):
        count_look(world.store, looker(), known=[], now=NOW)
    page = render_registry(overview(world.store, keys=None, now=NOW))
    assert "which only promotions look at: looked at 9 times" in page
    assert "flatter" not in page
    count_look(world.store, looker(), known=[], now=NOW)
    page = render_registry(overview(world.store, keys=None, now=NOW))
    assert "looked at 10 times; by so many looks they have come to flatter what they let in" in page


def test_the_page_says_where_looks_cannot_be_counted(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    world.promote(world.release("a"))
    listed = type(world.store).list

    def refuses(self: Any, prefix: str) -> list[str]:
        if prefix.startswith("looks"):
            raise StoreUnavailableError("403")
        return listed(self, prefix)

    monkeypatch.setattr(type(world.store), "list", refuses)
    page = render_registry(overview(world.store, keys=None, now=NOW))
    assert "how often rows for promotions were looked at is not known: 403" in page
