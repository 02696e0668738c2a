from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from graftline.digest import of_bytes
from graftline.errors import ConflictError, PromotionError, ReleaseError, StoreError
from graftline.registry import channel, releases
from graftline.registry.cleanup import Rules, clean_up, plan_cleanup
from graftline.registry.policy import FreezeWindow, Policy
from graftline.registry.promotion import Checks, Wish, promote, rollback
from graftline.registry.releases import release_key
from graftline.registry.store import Store
from graftline.release.manifest import GateVerdict, Manifest
from tests.registry.people import NOW, People, target_of


class Stage:
    """A store, people, and a promoter that works in a folder of its own."""

    def __init__(self, store: Store, folder: Path) -> None:
        self.store, self.folder, self.people = store, folder, People(folder)
        self.smoked: list[Path] = []

    def release(
        self, seed: str, *, against: str = "base", outcome: str = "pass", builder: str | None = "bob"
    ) -> Manifest:
        verdict = GateVerdict.model_validate({"outcome": outcome, "against": against, "digest": of_bytes(b"v")})
        return self.people.release(self.store, self.folder / f"package-{seed}", seed, builder=builder, verdict=verdict)

    def promote(
        self, manifest: Manifest, to: str = "production", policy: Policy | None = None, **checks: object
    ) -> channel.Entry:
        values = {"policy": policy or Policy(), "keys": self.people.keys, "smoke": self.smoked.append}
        return promote(
            self.store,
            Wish(pipeline="demo", channel=to, version=manifest.version, actor="ci", reason="nightly"),
            Checks(**{**values, **checks}),  # type: ignore[arg-type]
            folder=self.folder / f"fetched-{manifest.version}",
            now=lambda: NOW,
        )

    def rollback(self, version: str | None = None) -> channel.Entry:
        return rollback(
            self.store, pipeline="demo", to_channel="production", version=version, actor="ada", reason="errors rose"
        )

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

    entry = every_stage.promote(manifest, policy=Policy(approvals_count=1, other_than_builder=True))

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
    policy = Policy(approvals_count=1, after="staging", freeze_windows=(FreezeWindow(NOW, NOW, "audit"),))
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


def test_staging_is_held_against_production_too(stage: Stage) -> None:
    first, second = stage.release("a"), stage.release("b")
    stage.promote(first)
    with pytest.raises(PromotionError, match="reference"):
        stage.promote(second, to="staging")


def test_the_earlier_channel_is_read_from_the_store(stage: Stage) -> None:
    manifest = stage.release("a")
    with pytest.raises(PromotionError, match="was never in staging"):
        stage.promote(manifest, policy=Policy(after="staging"))
    stage.promote(manifest, to="staging")
    stage.promote(manifest, policy=Policy(after="staging"))


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
    policy = Policy(approvals_count=1)
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
    every_stage.rollback()
    assert every_stage.versions()[-1] == second.version


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
    with pytest.raises(PromotionError, match=r"misses README\.md in the store"):
        stage.rollback()
    releases.remove(stage.store, "demo", first.version)
    with pytest.raises(ReleaseError, match="no release"):
        stage.rollback()


def test_rollback_ignores_freezes(stage: Stage) -> None:
    first = stage.release("a")
    second = stage.release("b", against=first.version)
    stage.promote(first)
    stage.promote(second)
    frozen = Policy(freeze_windows=(FreezeWindow(NOW - timedelta(1), NOW + timedelta(1), "holidays"),))
    with pytest.raises(PromotionError, match="holidays"):
        stage.promote(stage.release("c", against=second.version), policy=frozen)
    assert stage.rollback().change.version == first.version


def test_a_release_is_held_from_the_first_look_to_the_entry(every_stage: Stage) -> None:
    manifest = every_stage.release("a")
    rules, later = Rules(), datetime.now(UTC) + timedelta(days=30)

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
    with pytest.raises(ReleaseError, match=r"changed: README\.md"):
        stage.rollback(first.version)
    stage.store.put_bytes(key, good)
    rules, later = Rules(newest_entries=1), datetime.now(UTC) + timedelta(days=30)
    original = channel.append

    def clean_and_append(store: Store, entry: channel.Entry) -> None:
        plan = plan_cleanup(store, "demo", rules=rules, now=later)
        assert clean_up(store, plan, rules=rules, now=later) == ()
        original(store, entry)

    monkeypatch.setattr(channel, "append", clean_and_append)
    assert stage.rollback(first.version).change.version == first.version
    assert releases.verify(stage.store, "demo", first.version) == first
