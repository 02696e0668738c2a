import os
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from graftline.digest import of_bytes
from graftline.errors import ConfigError, ConflictError, HistoryLostError, PromotionError, ReleaseError, StoreError
from graftline.registry import channel, releases
from graftline.registry.cleanup import RetentionRules, clean_up, plan_cleanup
from graftline.registry.keys import KeyRing
from graftline.registry.policy import entry_time
from graftline.registry.promotion import PromotionChecks, PromotionRequest, Rollback, promote, rollback
from graftline.registry.releases import release_key
from graftline.registry.store import Store, open_store
from graftline.release.manifest import GateVerdict, Manifest
from graftline.settings import Approvals, Channel, FreezeWindow
from tests.registry.people import NOW, People, forged, target_of


class Stage:
    """A store, people, and a promoter that works in a folder of its own."""

    def __init__(self, store: Store, folder: Path) -> None:
        self.store, self.folder, self.people = store, folder, People(folder)
        self.smoked: list[Path] = []
        self.announced: list[tuple[str, str]] = []

    def release(
        self, seed: str, *, against: str = "base", outcome: str = "pass", builder: str | None = "bob"
    ) -> Manifest:
        verdict = GateVerdict.model_validate({"outcome": outcome, "against": against, "digest": of_bytes(b"v")})
        return self.people.release(self.store, self.folder / f"package-{seed}", seed, builder=builder, verdict=verdict)

    def promote(
        self,
        manifest: Manifest,
        to: str = "production",
        policy: Channel | None = None,
        now: datetime = NOW,
        **checks: object,
    ) -> channel.Entry:
        values = {"policy": policy or Channel(), "keys": self.people.keys, "smoke": self.smoked.append}
        return promote(
            self.store,
            PromotionRequest(pipeline="demo", channel=to, version=manifest.version, actor="ci", reason="nightly"),
            PromotionChecks(**{**values, **checks}),  # type: ignore[arg-type]
            folder=self.folder / f"fetched-{manifest.version}",
            now=lambda: now,
        )

    def rollback(
        self, version: str | None = None, *, again: bool = False, now: datetime = NOW, keys: bool = True
    ) -> channel.Entry:
        return rollback(
            self.store,
            pipeline="demo",
            to_channel="production",
            version=version,
            actor="ada",
            reason="errors rose",
            how=Rollback(
                keys=self.people.keys if keys else None,
                again=again,
                now=lambda: now,
                announce=lambda head, past: self.announced.append((head.change.version, past.entry.change.version)),
            ),
        )

    def hold(self, seeds: str) -> list[Manifest]:
        """Releases that production held one after the other."""
        made = []
        for seed in seeds:
            made.append(self.release(seed))
            self.promote(made[-1], production=None)
        return made

    def versions(self, name: str = "production") -> list[str]:
        return [entry.change.version for entry in channel.read(self.store, "demo", name).entries]


@pytest.fixture
def stage(file_store: Store, tmp_path: Path) -> Stage:
    return Stage(file_store, tmp_path)


@pytest.fixture
def every_stage(store: Store, tmp_path: Path) -> Stage:
    """On every kind of store: what depends on what a store promises."""
    return Stage(store, tmp_path)


def test_a_release_that_meets_every_rule_enters_the_channel(every_stage: Stage) -> None:
    manifest = every_stage.release("a")
    every_stage.people.approve(every_stage.store, target_of(manifest), "eve")

    entry = every_stage.promote(manifest, policy=Channel(approvals=Approvals(count=1, other_than_builder=True)))

    assert channel.head(every_stage.store, "demo", "production") == entry
    assert entry.change.release == manifest.digest
    assert entry.change.verdict == manifest.verdict
    assert [approval.statement.approver for approval in entry.change.approvals] == ["eve"]
    assert entry.change.checks[0] == "signature: by bob"
    assert entry.change.checks[-1] == "smoke: matched"
    assert every_stage.smoked == [every_stage.folder / f"fetched-{manifest.version}"]


def test_promoting_what_is_there_already_changes_nothing(stage: Stage) -> None:
    manifest = stage.release("a")
    first = stage.promote(manifest)
    assert stage.promote(manifest) == first
    assert stage.versions() == [manifest.version]


def test_a_policy_that_is_not_met_changes_nothing_and_says_all_of_it(stage: Stage) -> None:
    manifest = stage.release("a", outcome="fail")
    policy = Channel(
        approvals=Approvals(count=1),
        after="staging",
        freeze_windows=(FreezeWindow(starts=NOW, ends=NOW, reason="audit"),),
    )
    with pytest.raises(PromotionError) as caught:
        stage.promote(manifest, policy=policy)
    for part in (f"{manifest.version} may not enter production of demo", "freeze:", "verdict:", "soak:", "approvals:"):
        assert part in str(caught.value)
    assert stage.versions() == []
    assert stage.smoked == []


def test_a_verdict_has_to_be_against_what_is_in_production_now(stage: Stage) -> None:
    first, second = stage.release("a"), stage.release("b")
    stage.promote(first)
    with pytest.raises(PromotionError, match=f"compared with base, but production holds {first.version} now"):
        stage.promote(second)
    stage.promote(second, to="staging", production=None)  # a channel whose verdicts are against the base
    newer = GateVerdict(outcome="pass", against=first.version, digest=of_bytes(b"again"))
    assert stage.promote(second, verdict=newer).change.verdict == newer


def test_a_verdict_names_the_release_in_production_by_its_digest_too(stage: Stage) -> None:
    first, second = stage.release("a"), stage.release("b")
    stage.promote(first)
    newer = GateVerdict(outcome="pass", against=first.version, release=of_bytes(b"another"), digest=of_bytes(b"again"))
    with pytest.raises(PromotionError, match=f"production holds {first.digest} under that name"):
        stage.promote(second, verdict=newer)
    newer = newer.model_copy(update={"release": first.digest})
    assert stage.promote(second, verdict=newer).change.verdict == newer
    assert channel.read(stage.store, "demo", "production").entries[-1].change.verdict == newer


def test_staging_is_held_against_production_too(stage: Stage) -> None:
    first, second = stage.release("a"), stage.release("b")
    stage.promote(first)
    with pytest.raises(PromotionError, match="reference"):
        stage.promote(second, to="staging")


def test_the_earlier_channel_is_read_from_the_store(stage: Stage) -> None:
    manifest = stage.release("a")
    with pytest.raises(PromotionError, match="was never in staging"):
        stage.promote(manifest, policy=Channel(after="staging"))
    stage.promote(manifest, to="staging")
    stage.promote(manifest, policy=Channel(after="staging"))


@pytest.mark.parametrize("builder", [None, "eve", "mallory"])
def test_a_release_that_no_builder_signed_is_not_promoted(stage: Stage, builder: str | None) -> None:
    manifest = stage.release("a", builder=builder)
    with pytest.raises(ReleaseError, match=r"model\.sig|the role 'builder'"):
        stage.promote(manifest)
    assert stage.versions() == []


def test_a_release_that_was_changed_in_the_store_is_not_promoted(stage: Stage) -> None:
    manifest = stage.release("a")
    stage.store.put_bytes(release_key("demo", manifest.version, "README.md"), b"# b\n")
    with pytest.raises(ReleaseError, match=r"README\.md has digest"):
        stage.promote(manifest)
    assert stage.versions() == []


def test_a_signature_of_another_release_is_not_accepted(stage: Stage) -> None:
    first, second = stage.release("a"), stage.release("b")
    signature = stage.store.get(release_key("demo", second.version, "model.sig"))
    stage.store.put_bytes(release_key("demo", first.version, "model.sig"), signature or b"")
    with pytest.raises(ReleaseError, match="does not verify"):
        stage.promote(first)


def test_a_smoke_run_that_differs_stops_the_promotion(stage: Stage) -> None:
    def differs(folder: Path) -> None:
        raise PromotionError(f"answer 3 of {folder.name} differs")

    manifest = stage.release("a")
    with pytest.raises(PromotionError, match="answer 3"):
        stage.promote(manifest, smoke=differs)
    assert stage.versions() == []


def test_an_approval_is_used_up_by_its_promotion(stage: Stage) -> None:
    first = stage.release("a")
    second = stage.release("b", against=first.version)
    policy = Channel(approvals=Approvals(count=1))
    for manifest in (first, second):
        stage.people.approve(stage.store, target_of(manifest), "eve")
        stage.promote(manifest, policy=policy)
    stage.rollback(first.version)
    newer = GateVerdict(outcome="pass", against=first.version, digest=of_bytes(b"again"))
    with pytest.raises(PromotionError, match="was used for an earlier entry"):
        stage.promote(second, policy=policy, verdict=newer)


def test_of_two_promoters_at_once_one_is_told_that_it_lost(every_stage: Stage) -> None:
    first, second = every_stage.release("a"), every_stage.release("b")

    def somebody_else_first(_: Path) -> None:
        every_stage.promote(first)

    with pytest.raises(ConflictError, match=f"entry 1 was written first by ci .*{first.version}"):
        every_stage.promote(second, smoke=somebody_else_first)
    assert every_stage.versions() == [first.version]


def test_a_broken_history_is_not_continued(stage: Stage) -> None:
    first = stage.release("a")
    stage.promote(first)
    key = "channels/demo/production/0000000001.json"
    stage.store.put_bytes(key, (stage.store.get(key) or b"").replace(b'"ci"', b'"xx"') + b" ")
    with pytest.raises(StoreError, match="history was changed"):
        stage.promote(stage.release("b"))
    with pytest.raises(StoreError, match="history was changed"):
        stage.rollback()


def test_rollback_returns_to_the_release_before(every_stage: Stage) -> None:
    first = every_stage.release("a")
    second = every_stage.release("b", against=first.version)
    every_stage.promote(first)
    every_stage.promote(second)
    entry = every_stage.rollback()
    assert (entry.change.action, entry.change.version, entry.change.release) == (
        "rollback",
        first.version,
        first.digest,
    )
    assert every_stage.versions() == [first.version, second.version, first.version]
    assert every_stage.announced == [(second.version, first.version)]
    assert entry.change.checks == ("held before: entry 1", "signature: by bob")


def test_rollback_to_a_release_the_channel_never_held_is_refused(stage: Stage) -> None:
    with pytest.raises(PromotionError, match="is empty; there is nothing to go back to"):
        stage.rollback()
    first, second = stage.release("a"), stage.release("b")
    stage.promote(first)
    with pytest.raises(PromotionError, match=f"never held any other release; it held {first.version}"):
        stage.rollback()
    with pytest.raises(PromotionError, match=f"never held release '{second.version}'"):
        stage.rollback(second.version)


def test_rollback_to_a_release_that_is_no_longer_whole_is_refused(stage: Stage) -> None:
    first = stage.release("a")
    second = stage.release("b", against=first.version)
    stage.promote(first)
    stage.promote(second)
    stage.store.delete(release_key("demo", first.version, "README.md"))
    with pytest.raises(ReleaseError, match=r"missing: README\.md"):
        stage.rollback()
    releases.remove(stage.store, "demo", first.version)
    with pytest.raises(ReleaseError, match="no release"):
        stage.rollback()


def test_rollback_ignores_freezes(stage: Stage) -> None:
    first = stage.release("a")
    second = stage.release("b", against=first.version)
    stage.promote(first)
    stage.promote(second)
    frozen = Channel(
        freeze_windows=(FreezeWindow(starts=NOW - timedelta(1), ends=NOW + timedelta(1), reason="holidays"),)
    )
    with pytest.raises(PromotionError, match="holidays"):
        stage.promote(stage.release("c", against=second.version), policy=frozen)
    assert stage.rollback().change.version == first.version


HOUR = timedelta(hours=1)


def test_a_second_rollback_of_the_same_release_does_not_put_it_back(stage: Stage) -> None:
    a, b, c = stage.hold("abc")
    assert stage.rollback().change.version == b.version
    with pytest.raises(PromotionError) as caught:
        stage.rollback(now=NOW + timedelta(minutes=7))
    for part in ("rolled back 7 min ago by ada (entry 4)", f"from {c.version} to {b.version}: errors rose", "--again"):
        assert part in str(caught.value)
    assert stage.versions()[3:] == [b.version]
    assert stage.rollback(again=True, now=NOW + timedelta(minutes=7)).change.version == a.version
    with pytest.raises(PromotionError, match=r"every other release that it held was gone back from.*--to VERSION"):
        stage.rollback(again=True, now=NOW + timedelta(minutes=8))


def test_an_hour_later_a_rollback_goes_further_back_by_itself(stage: Stage) -> None:
    a, b, _ = stage.hold("abc")
    stage.rollback()
    with pytest.raises(PromotionError, match="rolled back 59 min ago"):
        stage.rollback(now=NOW + HOUR - timedelta(seconds=1))
    assert stage.rollback(now=NOW + HOUR).change.version == a.version
    assert stage.versions()[3:] == [b.version, a.version]


def test_a_release_that_was_promoted_again_after_a_rollback_is_good_again(stage: Stage) -> None:
    a, b = stage.hold("ab")
    stage.rollback()
    stage.promote(b, production=None, now=NOW + HOUR)
    c = stage.release("c")
    stage.promote(c, production=None, now=NOW + HOUR)
    assert stage.rollback(now=NOW + 2 * HOUR).change.version == b.version
    assert a.version in stage.versions()


def test_what_the_channel_holds_already_is_not_entered_again(stage: Stage) -> None:
    a, b = stage.hold("ab")
    assert stage.rollback(b.version).number == 2
    assert stage.announced == []
    stage.rollback()
    assert stage.rollback(a.version, now=NOW + timedelta(minutes=1)).number == 3
    assert stage.versions() == [a.version, b.version, a.version]


def test_a_release_that_was_gone_back_from_is_returned_to_if_it_is_named(stage: Stage) -> None:
    _, b = stage.hold("ab")
    stage.rollback()
    assert stage.rollback(b.version, now=NOW + timedelta(minutes=1)).change.version == b.version


def test_another_target_is_named_when_the_default_one_is_gone(stage: Stage) -> None:
    a, b, _ = stage.hold("abc")
    releases.remove(stage.store, "demo", b.version)
    with pytest.raises(ReleaseError, match=rf"no release .*; name another with --to: {a.version} \(entry 1\)"):
        stage.rollback()
    assert len(stage.versions()) == 3
    assert stage.rollback(a.version).change.version == a.version


@pytest.mark.parametrize("data", [b"", b"x", None])
def test_rollback_refuses_a_release_whose_bytes_servers_would_refuse(stage: Stage, data: bytes | None) -> None:
    a, _ = stage.hold("ab")
    file = release_key("demo", a.version, "adapter/adapter_model.safetensors")
    whole = stage.store.get(file) or b""
    stage.store.put_bytes(file, whole[:-1] + b"!" if data is None else data)
    with pytest.raises(ReleaseError, match=r"servers would refuse .*changed: adapter/adapter_model\.safetensors"):
        stage.rollback()
    assert len(stage.versions()) == 2


def test_rollback_refuses_a_release_whose_builder_no_longer_counts(stage: Stage) -> None:
    first = stage.release("a", builder="bob")
    second = stage.release("b", against=first.version, builder="ada")
    stage.promote(first)
    stage.promote(second)
    stage.people.keys = KeyRing({name: key for name, key in stage.people.keys.keys.items() if name != "bob"})
    with pytest.raises(ReleaseError, match=r"servers would refuse .* role 'builder' now \(ada\)"):
        stage.rollback()
    assert len(stage.versions()) == 2
    stage.rollback(keys=False)  # a project without keys.yaml, whose servers accept unsigned releases


def test_rollback_refuses_another_release_under_the_name_of_the_one_that_was_promoted(stage: Stage) -> None:
    first, second = stage.hold("ab")
    entry = channel.read(stage.store, "demo", "production").entries[0]
    other = entry.change.model_copy(update={"release": second.digest})
    store = open_store(str(stage.folder / "other"))
    log = channel.Log("demo", "production", ())
    for change in (other, channel.read(stage.store, "demo", "production").entries[1].change):
        channel.append(store, channel.next_entry(log, change))
        log = channel.read(store, "demo", "production")
    for key in stage.store.list("releases"):
        store.put_bytes(key, stage.store.get(key) or b"")
    with pytest.raises(ReleaseError, match=f"has digest {first.digest}, the history says {second.digest}"):
        rollback(store, pipeline="demo", to_channel="production", actor="ada", reason="errors rose")


def test_a_promoter_whose_clock_is_behind_the_entry_before_is_told_both_times(stage: Stage) -> None:
    first, second = stage.release("a"), stage.release("b")
    stage.promote(first, to="staging", production=None)
    with pytest.raises(PromotionError, match=r"it is 2026-11-23 11:00:00 UTC here, .* at 2026-11-24 12:00:00 UTC"):
        stage.promote(second, to="staging", production=None, now=NOW - timedelta(hours=25))
    assert stage.versions("staging") == [first.version]


def test_an_entry_is_never_dated_before_the_one_before_it(stage: Stage) -> None:
    first, second = stage.release("a"), stage.release("b")
    stage.promote(first, production=None)
    assert stage.promote(second, production=None, now=NOW - timedelta(minutes=4)).change.time == NOW
    assert stage.rollback(now=NOW - timedelta(days=3)).change.time == NOW  # going back is always possible


class ClockedStore:
    """A store whose clock differs from this machine's."""

    def __init__(self, store: Store, ahead: timedelta) -> None:
        self._store, self._ahead = store, ahead

    def __getattr__(self, name: str) -> object:
        return getattr(self._store, name)

    def now(self) -> datetime:
        return datetime.now(UTC) + self._ahead


@pytest.mark.parametrize("hours", [25, -25, 0.2, -0.2])
def test_a_promoter_whose_clock_differs_from_the_store_s_is_told_both_times(stage: Stage, hours: float) -> None:
    manifest = stage.release("a")
    store = ClockedStore(stage.store, timedelta(hours=hours))
    checks = PromotionChecks(policy=Channel(), keys=stage.people.keys, smoke=lambda folder: None)
    wish = PromotionRequest(
        pipeline="demo", channel="production", version=manifest.version, actor="ci", reason="nightly"
    )
    with pytest.raises(PromotionError, match=r"this machine's clock says 20.* UTC, that of file://.* 20.* UTC"):
        promote(store, wish, checks, folder=stage.folder / "f")  # type: ignore[arg-type]
    assert stage.versions() == []


def test_every_store_has_a_clock_that_entries_are_dated_by(every_stage: Stage) -> None:
    manifest = every_stage.release("a")
    checks = PromotionChecks(policy=Channel(), keys=every_stage.people.keys, smoke=lambda folder: None)
    wish = PromotionRequest(
        pipeline="demo", channel="production", version=manifest.version, actor="ci", reason="nightly"
    )
    time = promote(every_stage.store, wish, checks, folder=every_stage.folder / "f").change.time
    there = every_stage.store.now()
    assert there is not None
    assert timedelta(0) <= there - time < HOUR


def test_a_number_that_was_written_is_not_written_again(stage: Stage) -> None:
    first, second, third = (stage.release(seed) for seed in "abc")
    for manifest in (first, second):
        stage.promote(manifest, production=None)
    stage.store.delete("channels/demo/production/0000000002.json")
    with pytest.raises(HistoryLostError, match="entry 2 was there"):
        stage.promote(third, production=None)
    with pytest.raises(HistoryLostError, match="entry 2 was there"):
        stage.rollback()
    assert stage.store.list("channels") == ["channels/demo/production/0000000001.json"]


def test_a_reason_that_is_not_utf_8_is_refused_before_anything_is_done(stage: Stage) -> None:
    (a,) = stage.hold("a")
    bad = os.fsdecode(b"caf\xe9")
    with pytest.raises(ConfigError, match=r"the reason 'caf.*' holds bytes that are not UTF-8, from position 3 on"):
        rollback(stage.store, pipeline="demo", to_channel="production", actor="ada", reason=bad)
    wish = PromotionRequest(pipeline="demo", channel="staging", version=a.version, actor=bad, reason="x")
    checks = PromotionChecks(policy=Channel(), keys=stage.people.keys, smoke=lambda folder: None)
    with pytest.raises(ConfigError, match="the name"):
        promote(stage.store, wish, checks, folder=stage.folder / "f")


def test_a_release_is_held_from_the_first_look_to_the_entry(every_stage: Stage) -> None:
    manifest = every_stage.release("a")
    rules, later = RetentionRules(), datetime.now(UTC) + timedelta(days=30)

    def clean(_: Path) -> None:
        plan = plan_cleanup(every_stage.store, "demo", rules=rules, now=later)
        assert clean_up(every_stage.store, plan, rules=rules, now=later) == ()

    every_stage.promote(manifest, smoke=clean)
    assert releases.verify(every_stage.store, "demo", manifest.version) == manifest
    assert every_stage.store.list("leases") == []


def test_what_the_store_has_lost_is_not_promoted_from_a_copy(every_stage: Stage) -> None:
    manifest = every_stage.release("a")
    every_stage.promote(manifest, to="staging")
    for name, problem in (
        ("adapter/adapter_model.safetensors", r"missing: adapter/adapter_model\.safetensors"),
        ("model.sig", "model.sig"),
    ):
        key = release_key("demo", manifest.version, name)
        data = every_stage.store.get(key)
        assert data is not None
        every_stage.store.delete(key)
        with pytest.raises(ReleaseError, match=problem):
            every_stage.promote(manifest)
        every_stage.store.put_bytes(key, data)
    every_stage.promote(manifest)


def test_rollback_to_what_was_damaged_in_the_store_is_refused_and_gc_keeps_away(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = stage.release("a")
    second = stage.release("b", against=first.version)
    stage.promote(first)
    stage.promote(second)
    key = release_key("demo", first.version, "README.md")
    good = stage.store.get(key)
    assert good is not None
    stage.store.put_bytes(key, b"!" + good[1:])
    with pytest.raises((ReleaseError, PromotionError), match=r"changed: README\.md"):
        stage.rollback(first.version)
    stage.store.put_bytes(key, good)
    rules, later = RetentionRules(newest_entries=1), datetime.now(UTC) + timedelta(days=30)
    original = channel.append

    def clean_and_append(store: Store, entry: channel.Entry) -> None:
        plan = plan_cleanup(store, "demo", rules=rules, now=later)
        assert clean_up(store, plan, rules=rules, now=later) == ()
        original(store, entry)

    monkeypatch.setattr(channel, "append", clean_and_append)
    assert stage.rollback(first.version).change.version == first.version
    assert releases.verify(stage.store, "demo", first.version) == first


def test_somebodys_approval_writes_no_line_into_what_is_refused(file_store: Store, tmp_path: Path) -> None:
    stage = Stage(file_store, tmp_path)
    made = stage.release("a")
    signed = forged(
        stage.people.approve(file_store, target_of(made), "eve"), channel="staging\n  approvals: met\x1b[2K"
    )
    file_store.put_bytes(f"approvals/demo/production/{made.version}/a.json", signed.to_bytes())
    with pytest.raises(PromotionError) as caught:
        stage.promote(made, policy=Channel(approvals=Approvals(count=2)))
    lines = str(caught.value).splitlines()
    assert len(lines) == 2
    assert r"in staging\n  approvals: met\x1b[2K" in lines[1]


def test_a_head_from_the_beginning_of_time_is_no_reason_to_stop(file_store: Store, tmp_path: Path) -> None:
    assert entry_time(None, NOW) == NOW
    stage = Stage(file_store, tmp_path)
    head = stage.promote(stage.release("a"))
    change = head.change.model_copy(update={"time": datetime.min.replace(tzinfo=UTC)})
    assert entry_time(head.model_copy(update={"change": change}), NOW) == NOW
