from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from graftline.digest import of_bytes
from graftline.errors import PromotionError
from graftline.registry.channel import Anchor, Log
from graftline.registry.keys import KeyRing
from graftline.registry.policy import (
    PromotionFacts,
    RuleResult,
    check,
    checked_now,
    counted_approvals,
    digest_of,
    entry_time,
)
from graftline.registry.reserve import ReserveVerdict
from graftline.registry.store import Store, open_store
from graftline.release.manifest import AnchorVerdict, GateVerdict
from graftline.release.signing import create_key
from graftline.settings import Approvals, Channel, FreezeWindow
from graftline.settings.channels import ChannelPolicy
from tests.registry.people import NOW, People, log_of, target_of
from tests.release.packages import VERDICT, make_package


class Scene:
    """A release of bob's that nothing speaks against; tests change one fact."""

    def __init__(self, folder: Path) -> None:
        self.people = People(folder)
        self.store: Store = open_store(str(folder / "store"))
        self.target = target_of(make_package(folder / "package"))

    def case(self, **facts: object) -> PromotionFacts:
        values = {
            "target": self.target,
            "builder": "bob",
            "verdict": VERDICT,
            "reference": "base",
            "log": log_of(),
            "earlier": None,
            "approvals": (),
            "keys": self.people.keys,
            "now": NOW,
        }
        return PromotionFacts(**{**values, **facts})  # type: ignore[arg-type]

    def unmet(self, policy: Channel, **facts: object) -> dict[str, str]:
        rules = check(policy, self.case(**facts))
        assert all(isinstance(rule.met, bool) for rule in rules)
        return {rule.name: rule.reason for rule in rules if not rule.met}


@pytest.fixture
def scene(tmp_path: Path) -> Scene:
    return Scene(tmp_path)


def test_every_rule_is_reported_with_a_reason(scene: Scene) -> None:
    rules = check(Channel(), scene.case())
    assert [rule.name for rule in rules] == ["freeze", "verdict", "reference", "soak", "approvals"]
    assert all(rule.met and rule.reason for rule in rules)


@pytest.mark.parametrize(
    ("hours", "open_now"), [((-2, -1), False), ((-1, 1), True), ((0, 1), True), ((-1, 0), True), ((1, 2), False)]
)
def test_nothing_is_promoted_in_a_freeze_window(scene: Scene, hours: tuple[int, int], open_now: bool) -> None:
    window = FreezeWindow(
        starts=NOW + timedelta(hours=hours[0]), ends=NOW + timedelta(hours=hours[1]), reason="holidays"
    )
    unmet = scene.unmet(Channel(freeze_windows=(window,)))
    assert ("freeze" in unmet) == open_now
    assert not open_now or "holidays" in unmet["freeze"]


@pytest.mark.parametrize(
    ("outcome", "allowed", "met"),
    [
        ("pass", ("pass",), True),
        ("inconclusive", ("pass",), False),
        ("inconclusive", ("pass", "inconclusive"), True),
        ("fail", ("pass", "inconclusive"), False),
    ],
)
def test_a_verdict_has_to_be_one_that_may_enter(
    scene: Scene, outcome: str, allowed: tuple[str, ...], met: bool
) -> None:
    verdict = GateVerdict.model_validate({**dict(VERDICT), "outcome": outcome})
    assert ("verdict" not in scene.unmet(Channel(verdicts=allowed), verdict=verdict)) == met


def test_a_verdict_against_what_was_in_production_before_is_stale(scene: Scene) -> None:
    assert scene.unmet(Channel(), reference="v7") == {
        "reference": "compared with base, but production holds v7 now; evaluate and gate it again"
    }
    newer = GateVerdict(outcome="pass", against="v7", digest=VERDICT.digest)
    assert scene.unmet(Channel(), reference="v7", verdict=newer) == {}


def test_reasons_are_told_in_these_words(scene: Scene) -> None:
    told = {rule.name: rule.reason for rule in check(Channel(verdicts=("pass", "inconclusive")), scene.case())}
    assert told["freeze"] == "no freeze window is open"
    assert told["verdict"] == "'pass'; pass or inconclusive may enter"
    assert told["soak"] == "no earlier channel is asked for"
    # An earlier channel's history counts only where the policy asks for one.
    assert "soak" not in scene.unmet(Channel(), earlier=log_of(channel="staging"))


def test_a_release_of_the_same_name_but_other_bytes_is_another_reference(scene: Scene) -> None:
    held, other = of_bytes(b"held"), of_bytes(b"other")
    verdict = VERDICT.model_copy(update={"against": "v7", "release": other})
    (rule,) = [
        rule
        for rule in check(Channel(), scene.case(reference="v7", reference_release=held, verdict=verdict))
        if rule.name == "reference"
    ]
    reason = f"compared with a v7 of digest {other}, but production holds {held} under that name; evaluate and gate it "
    assert rule == RuleResult("reference", False, f"{reason}again")


def test_the_key_of_a_machine_is_told_why_it_approves_nothing(scene: Scene) -> None:
    given = tuple(scene.people.approve(scene.store, scene.target, name) for name in ("pia", "bob"))
    machine = (
        "approval of {!r}: its key is a machine's ({}); such a key approves only if the policy names its role under "
    )
    pia, bob = machine.format("pia", "promoter, timestamp"), machine.format("bob", "builder")
    policy = Channel(approvals=Approvals(count=1))
    counted, rejected = counted_approvals(policy, scene.case(approvals=given))
    assert (counted, rejected) == ((), [f"{pia}approvals.roles", f"{bob}approvals.roles"])
    unmet = scene.unmet(policy, approvals=given)["approvals"]
    assert unmet.startswith("approved by nobody; needs 1 more")
    assert unmet.endswith(f"; {pia}approvals.roles; {bob}approvals.roles")


class Clock:
    """A store that only knows what time it is."""

    url = "s3://store"

    def __init__(self, ahead: timedelta | None) -> None:
        self._ahead = ahead

    def now(self) -> datetime | None:
        return None if self._ahead is None else datetime.now(UTC) + self._ahead


def test_the_time_is_the_store_s_where_the_clocks_agree_to_minutes() -> None:
    here = datetime.now(UTC)
    for ahead in (timedelta(minutes=4), timedelta(minutes=-4)):
        assert abs(checked_now(Clock(ahead)) - here - ahead) < timedelta(seconds=30)  # type: ignore[arg-type]
    assert abs(checked_now(Clock(None)) - here) < timedelta(seconds=30)  # type: ignore[arg-type]
    for ahead in (timedelta(minutes=6), timedelta(minutes=-6)):
        with pytest.raises(PromotionError, match=r"that of s3://store .* set the clock that is wrong"):
            checked_now(Clock(ahead))  # type: ignore[arg-type]


def test_an_entry_s_time_is_in_whole_seconds_and_never_before_the_entry_before() -> None:
    (head,) = log_of(("v1", 0)).entries
    now = NOW + timedelta(seconds=7, microseconds=5)
    assert entry_time(None, now) == entry_time(head, now) == NOW + timedelta(seconds=7)
    assert entry_time(head, NOW - timedelta(minutes=4)) == NOW
    with pytest.raises(PromotionError, match="one of the two clocks is wrong"):
        entry_time(head, NOW - timedelta(minutes=6))


def test_a_verdict_without_or_against_another_anchor_is_stale(scene: Scene) -> None:
    anchor = Anchor(version="v1", release=of_bytes(b"v1"))

    def reference(shown: AnchorVerdict | None) -> RuleResult:
        verdict = VERDICT.model_copy(update={"anchor": shown})
        (rule,) = [
            rule for rule in check(Channel(), scene.case(verdict=verdict, anchor=anchor)) if rule.name == "reference"
        ]
        return rule

    same, other = (
        AnchorVerdict(version="v1", release=of_bytes(of), is_better=False, evidence="") for of in (b"v1", b"other")
    )
    assert reference(same) == RuleResult(
        "reference", True, "compared with base, which is in production now, and with the anchor v1"
    )
    for shown, instead in ((other, "with v1 as the anchor"), (None, "with no anchor")):
        why = "but the anchor is v1 now; evaluate and gate it again"
        reason = f"compared with base, which is in production now, and {instead}, {why}"
        assert reference(shown) == RuleResult("reference", False, reason)


def soaked(scene: Scene, *changes: tuple[str, float]) -> dict[str, str]:
    version = scene.target.version
    earlier = log_of(*((version if name == "this" else name, hours) for name, hours in changes), channel="staging")
    return scene.unmet(Channel(after="staging", soak_hours=24), earlier=earlier)


def test_a_release_has_to_stay_in_the_earlier_channel_first(scene: Scene) -> None:
    assert "never in staging" in soaked(scene)["soak"]
    assert "never in staging" in soaked(scene, ("other", 100))["soak"]
    assert "stayed 23.0 h in staging, 24 h are asked for" in soaked(scene, ("this", 23))["soak"]
    assert soaked(scene, ("this", 24)) == {}


def test_a_stay_that_ended_counts_as_long_as_it_lasted(scene: Scene) -> None:
    assert soaked(scene, ("this", 100), ("other", 70)) == {}
    assert "stayed 10.0 h" in soaked(scene, ("this", 100), ("other", 90))["soak"]


def test_two_short_stays_are_not_one_long_one(scene: Scene) -> None:
    assert "stayed 20.0 h" in soaked(scene, ("this", 60), ("other", 40), ("this", 20))["soak"]


def test_promoting_again_does_not_break_a_stay(scene: Scene) -> None:
    assert soaked(scene, ("this", 25), ("this", 1)) == {}


def approved(scene: Scene, policy: Channel, *names: str, **facts: object) -> dict[str, str]:
    approvals = tuple(scene.people.approve(scene.store, scene.target, name) for name in names)
    return scene.unmet(policy, approvals=approvals, **facts)


def test_as_many_people_as_the_policy_says_have_to_approve(scene: Scene) -> None:
    policy = Channel(approvals=Approvals(count=2))
    assert "approved by nobody; needs 2 more" in approved(scene, policy)["approvals"]
    assert "approved by eve; needs 1 more" in approved(scene, policy, "eve")["approvals"]
    assert approved(scene, policy, "eve", "mia") == {}


def test_one_person_counts_once(scene: Scene) -> None:
    assert (
        "approved by eve; needs 1 more"
        in approved(scene, Channel(approvals=Approvals(count=2)), "eve", "eve")["approvals"]
    )


def test_every_role_has_to_be_among_the_approvers(scene: Scene) -> None:
    policy = Channel(approvals=Approvals(roles=("reviewer", "security")))
    assert "one by a reviewer, one by a security" in approved(scene, policy)["approvals"]
    assert "needs one by a security" in approved(scene, policy, "eve")["approvals"]
    assert approved(scene, policy, "mia") == {}  # has both


def test_who_built_it_cannot_be_its_only_approver_if_the_policy_says_so(scene: Scene) -> None:
    policy = Channel(approvals=Approvals(count=1, other_than_builder=True))
    assert "somebody other than bob" in approved(scene, policy, "bob")["approvals"]
    assert approved(scene, policy, "bob", "eve") == {}
    assert approved(scene, policy, "mia", builder="ada") == {}
    policy = Channel(approvals=Approvals(count=1, roles=("builder",)))
    assert approved(scene, policy, "bob") == {}


def test_approvals_that_do_not_count_are_named_with_the_reason(scene: Scene) -> None:
    old = scene.people.approve(scene.store, scene.target, "eve", hours_ago=200)
    other = scene.people.approve(scene.store, target_of(make_package(Path(scene.store.url[7:]) / "x", "b")), "mia")
    unmet = scene.unmet(Channel(approvals=Approvals(count=1, valid_hours=48)), approvals=(old, other))
    assert "'eve' is of" in unmet["approvals"]
    assert "good for 48 hours" in unmet["approvals"]
    assert "'mia' is for demo/" in unmet["approvals"]


def test_an_approval_cannot_be_replayed_after_a_rollback(scene: Scene) -> None:
    approval = scene.people.approve(scene.store, scene.target, "eve")
    policy = Channel(approvals=Approvals(count=1))
    assert scene.unmet(policy, approvals=(approval,)) == {}
    history = log_of((scene.target.version, 3), approvals=(approval,))
    assert "used for an earlier entry" in scene.unmet(policy, approvals=(approval,), log=history)["approvals"]


def test_all_unmet_rules_are_reported_at_once(scene: Scene) -> None:
    window = FreezeWindow(starts=NOW, ends=NOW, reason="audit")
    policy = Channel(approvals=Approvals(count=1), freeze_windows=(window,), after="staging")
    verdict = GateVerdict(outcome="fail", against="v1", digest=VERDICT.digest)
    unmet = scene.unmet(policy, verdict=verdict, earlier=log_of(channel="staging"))
    assert list(unmet) == ["freeze", "verdict", "reference", "soak", "approvals"]


def test_a_promoter_whose_clock_was_behind_meets_no_soak_by_it(scene: Scene) -> None:
    # The release entered now, by a clock that was 25 h behind the one of the entry before.
    assert "stayed 0.0 h in staging" in soaked(scene, ("other", 0), ("this", 25))["soak"]
    assert "stayed 1.0 h in staging" in soaked(scene, ("other", 1), ("this", 26))["soak"]


def test_a_stay_ends_no_earlier_than_it_began(scene: Scene) -> None:
    assert "stayed 0.0 h" in soaked(scene, ("this", 10), ("other", 30))["soak"]


@pytest.mark.parametrize("hours_ago", [-2, -0.1])
def test_an_earlier_channel_that_is_dated_in_the_future_is_told_with_both_times(scene: Scene, hours_ago: float) -> None:
    reason = soaked(scene, ("this", 100), ("other", hours_ago))["soak"]
    assert f"{NOW - timedelta(hours=hours_ago):%H:%M:%S} UTC, and it is 2026-11-24 12:00:00 UTC here" in reason


def test_a_few_minutes_between_two_clocks_are_no_time(scene: Scene) -> None:
    assert "stayed 0.0 h" in soaked(scene, ("this", -0.05))["soak"]


def with_second_key(scene: Scene, of: str, *, roles: str = "reviewer", person: str | None = None) -> str:
    """A second key in the key file, as while keys are rotated, both with their person; returns its name."""
    name, people = f"{of}-2027", scene.people
    public = create_key(people.private_key(name)).read_text()
    said = f"  person: {person or of}\n"
    first = f"- name: {of}\n"
    indented = "".join(f"    {line}\n" for line in public.splitlines())
    added = f"- name: {name}\n  roles: [{roles}]\n{said}  public_key: |\n{indented}"
    people.text = people.text.replace(first, first + said.lower()) + added
    people.keys = KeyRing.parse(people.text, origin="keys.yaml")
    return name


def test_a_person_with_two_keys_is_one_approver(scene: Scene) -> None:
    new = with_second_key(scene, "eve")
    policy = Channel(approvals=Approvals(count=2))
    assert "approved by eve; needs 1 more" in approved(scene, policy, "eve", new)["approvals"]
    assert approved(scene, policy, "eve", new, "mia") == {}


def test_a_builder_s_second_key_is_not_somebody_else(scene: Scene) -> None:
    new = with_second_key(scene, "bob", roles="builder")
    policy = Channel(approvals=Approvals(count=1, other_than_builder=True))
    for builder, approver in (("bob", new), (new, "bob"), (new, new)):
        unmet = approved(scene, policy, approver, builder=builder)
        assert "somebody other than bob, who built it" in unmet["approvals"]
    assert approved(scene, policy, new, "eve", builder="bob") == {}


def test_a_person_is_the_same_however_the_name_is_spelled(scene: Scene) -> None:
    new = with_second_key(scene, "eve", person="EVE ")
    assert (
        "approved by eve; needs 1 more"
        in approved(scene, Channel(approvals=Approvals(count=2)), "eve", new)["approvals"]
    )


def test_the_roles_of_both_keys_of_a_person_count(scene: Scene) -> None:
    new = with_second_key(scene, "eve", roles="security")
    policy = Channel(approvals=Approvals(count=1, roles=("reviewer", "security")))
    assert approved(scene, policy, "eve", new) == {}
    assert "one by a security" in approved(scene, policy, "eve")["approvals"]


def test_every_approval_that_counted_is_used_up(scene: Scene) -> None:
    new = with_second_key(scene, "eve")
    approvals = tuple(scene.people.approve(scene.store, scene.target, name) for name in ("eve", new))
    counted, rejected = counted_approvals(Channel(), scene.case(approvals=approvals))
    assert (counted, rejected) == (approvals, [])


def test_a_policy_s_name_leaves_out_what_is_at_its_default_and_does_not_change_with_the_version() -> None:
    assert digest_of(ChannelPolicy()) == digest_of(Channel(head_hours=1)) == of_bytes(b"{}")
    window = FreezeWindow(starts=NOW, ends=NOW + timedelta(hours=1), reason="holidays")
    policy = ChannelPolicy(verdicts=("pass", "inconclusive"), freeze_windows=(window,), after="staging", soak_hours=24)
    assert digest_of(policy) == of_bytes(
        b'{"after":"staging","freeze_windows":[{"ends":"2026-11-24T13:00:00Z","reason":"holidays","starts":"2026-11-24T12:00:00Z"}],'
        b'"soak_hours":24.0,"verdicts":["pass","inconclusive"]}'
    )


def test_the_reserve_is_asked_for_against_the_anchor_and_by_a_look_that_is_new(scene: Scene) -> None:
    policy, rows, anchor = Channel(reserve=True), of_bytes(b"rows"), Anchor(version="v1", release=of_bytes(b"v1"))
    found = ReserveVerdict(
        outcome="pass", rows=rows, look=3, against="base", release=None, anchor=anchor.release, evidence="300 rows"
    )
    verdict = VERDICT.model_copy(
        update={"anchor": AnchorVerdict(version="v1", release=anchor.release, is_better=False, evidence="")}
    )

    def why(look: int = 3, **facts: object) -> str:
        entry = log_of(("v0", 2)).entries[0]
        before = entry.model_copy(update={"change": entry.change.model_copy(update={"reserve": found})})
        log = Log("demo", "production", (before,))
        given = found.model_copy(update={"look": look, **facts})
        return scene.unmet(policy, log=log, reserve=given, verdict=verdict, anchor=anchor).get("reserve", "")

    assert why(look=4) == ""
    assert "an earlier entry has look 3 at the same rows" in why(look=3)
    assert why(look=1, rows=of_bytes(b"others")) == ""
    assert "not compared with v1, the anchor" in why(look=4, anchor=None)
    assert "not compared with v1, the anchor" in why(look=4, anchor=of_bytes(b"v0"))
    assert "'inconclusive' in look 4" in why(look=4, outcome="inconclusive")
    assert "compared with v9, but there is base now" in why(look=4, against="v9")
    assert "compared with base, but there is base now" in why(look=4, release=of_bytes(b"a release called base"))
    assert scene.unmet(policy)["reserve"] == "nobody looked at the rows that are kept back for promotions"
    assert "reserve" not in scene.unmet(Channel())
