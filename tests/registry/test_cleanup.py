import multiprocessing
import os
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from graftline.digest import write_json
from graftline.errors import ConflictError, HistoryLostError, ReleaseError, StoreError
from graftline.registry import channel, leases
from graftline.registry.approval import ApprovalTarget
from graftline.registry.cleanup import RetentionRules, clean_up, named_in_project, note_latest, plan_cleanup
from graftline.registry.leases import Lease, LeaseListing, hold, holding, removing
from graftline.registry.releases import list_versions, publish, release_key
from graftline.registry.store import Store
from graftline.release.manifest import Manifest
from tests.registry.entries import put_in
from tests.registry.people import People
from tests.release.packages import make_package

NOW = datetime.now(UTC) + timedelta(days=30)  # ages are those of the store, which lives now
MINUTE = timedelta(minutes=1)


@pytest.fixture
def releases(file_store: Store, tmp_path: Path) -> list[Manifest]:
    """Four releases, 30 days old."""
    made = [make_package(tmp_path / seed, seed) for seed in "abcd"]
    for seed in "abcd":
        publish(file_store, tmp_path / seed)
    return sorted(made, key=lambda manifest: manifest.version)


def needed(store: Store, now: datetime) -> dict[str, str]:
    return LeaseListing.take(store, "demo").needed(store, now=now)


def planned(store: Store, *, newest_entries: int = 10, now: datetime = NOW) -> tuple[str, ...]:
    return plan_cleanup(store, "demo", rules=RetentionRules(newest_entries=newest_entries), now=now).remove


def test_what_nobody_names_can_go(file_store: Store, releases: list[Manifest]) -> None:
    put_in(file_store, releases[1])
    plan = plan_cleanup(file_store, "demo", rules=RetentionRules(), now=NOW)
    assert plan.remove == tuple(manifest.version for manifest in (releases[0], *releases[2:]))
    assert plan.keep == {releases[1].version: "entry 1 of production"}


def test_planning_changes_nothing(file_store: Store, releases: list[Manifest]) -> None:
    before = file_store.list("releases")
    planned(file_store)
    assert file_store.list("releases") == before


def test_a_plan_removes_what_it_says_and_nothing_else(file_store: Store, releases: list[Manifest]) -> None:
    put_in(file_store, releases[3])
    plan = plan_cleanup(file_store, "demo", rules=RetentionRules(), now=NOW)
    assert clean_up(file_store, plan, rules=RetentionRules(), now=NOW) == plan.remove
    assert list_versions(file_store, "demo") == [releases[3].version]
    assert all(release_key("demo", releases[3].version) in key for key in file_store.list("releases"))
    assert len(channel.read(file_store, "demo", "production").entries) == 1


def test_every_channel_keeps_its_newest_entries(file_store: Store, releases: list[Manifest]) -> None:
    for manifest in releases[:3]:
        put_in(file_store, manifest)
    put_in(file_store, releases[3], "staging")
    assert planned(file_store, newest_entries=2) == (releases[0].version,)
    assert planned(file_store, newest_entries=3) == ()


def test_a_release_that_an_older_entry_and_a_newer_one_name_stays(file_store: Store, releases: list[Manifest]) -> None:
    for manifest in (releases[0], releases[1], releases[0]):
        put_in(file_store, manifest)
    assert releases[0].version not in planned(file_store, newest_entries=1)
    assert releases[1].version in planned(file_store, newest_entries=1)


def test_what_a_running_server_holds_stays(file_store: Store, releases: list[Manifest]) -> None:
    for number, hours in ((0, 1), (1, -1)):
        until = NOW + timedelta(hours=hours)
        hold(file_store, "demo", Lease(holder=f"host-{number}", version=releases[number].version, until=until))
    assert needed(file_store, NOW) == {releases[0].version: "served by host-0"}
    plan = plan_cleanup(file_store, "demo", rules=RetentionRules(), now=NOW)
    assert plan.keep == {releases[0].version: "served by host-0"}


def test_a_server_that_moves_on_gives_its_old_release_free(file_store: Store, releases: list[Manifest]) -> None:
    for manifest in releases[:2]:
        hold(file_store, "demo", Lease(holder="host", version=manifest.version, until=NOW + timedelta(hours=1)))
    assert needed(file_store, NOW) == {releases[1].version: "served by host"}


def test_a_damaged_lease_is_left_out_and_said(file_store: Store, caplog: pytest.LogCaptureFixture) -> None:
    file_store.put_bytes("leases/demo/host.json", b"{")
    assert needed(file_store, NOW) == {}
    assert "leases/demo/host.json is not a lease" in caplog.text


def test_what_the_store_has_got_lately_stays_however_old_its_name_is(
    file_store: Store, releases: list[Manifest]
) -> None:
    stored = max(listed.modified for listed in file_store.listing("releases/demo"))
    assert planned(file_store, now=stored + timedelta(days=6, hours=23)) == ()
    assert len(planned(file_store, now=stored + timedelta(days=7))) == 4
    key = release_key("demo", releases[0].version, "README.md")
    path = Path(file_store.url.removeprefix("file://")) / key
    os.utime(path, (stored.timestamp() + 86400,) * 2)  # one file of it was written a day later
    assert len(planned(file_store, now=stored + timedelta(days=7))) == 3
    plan = plan_cleanup(file_store, "demo", rules=RetentionRules(), now=stored + timedelta(days=7))
    assert plan.keep[releases[0].version].endswith("UTC, less than 7 days ago")


def test_old_halves_of_releases_go_too(file_store: Store, releases: list[Manifest]) -> None:
    file_store.delete(release_key("demo", releases[0].version, "manifest.json"))
    assert releases[0].version in planned(file_store)


def test_a_folder_that_is_no_version_is_left_alone(file_store: Store) -> None:
    file_store.put_bytes("releases/demo/notes/readme.txt", b"")
    assert planned(file_store) == ()


def test_a_release_that_was_promoted_after_the_plan_stays(file_store: Store, releases: list[Manifest]) -> None:
    plan = plan_cleanup(file_store, "demo", rules=RetentionRules(), now=NOW)
    put_in(file_store, releases[2])
    assert releases[2].version not in clean_up(file_store, plan, rules=RetentionRules(), now=NOW)
    assert list_versions(file_store, "demo") == [releases[2].version]


def test_nothing_is_planned_on_a_broken_history(file_store: Store, releases: list[Manifest]) -> None:
    put_in(file_store, releases[0])
    file_store.put_bytes("channels/demo/production/0000000003.json", b"{}")
    with pytest.raises(StoreError, match="history was changed"):
        planned(file_store)


def test_the_last_run_s_release_stays_until_another_one_waits(file_store: Store, releases: list[Manifest]) -> None:
    note_latest(file_store, "demo", releases[0].version)
    assert releases[0].version not in planned(file_store)
    note_latest(file_store, "demo", releases[1].version)
    plan = plan_cleanup(file_store, "demo", rules=RetentionRules(), now=NOW)
    assert plan.keep == {releases[1].version: "released by the last run"}


def test_a_damaged_record_of_the_last_run_stops_the_cleaning(file_store: Store, releases: list[Manifest]) -> None:
    file_store.put_bytes("latest/demo.json", b"{")
    with pytest.raises(
        ReleaseError, match=r"store/latest/demo\.json names what the last run released and cannot be read"
    ):
        planned(file_store)


def test_an_approved_release_stays_until_its_channel_holds_a_newer_one(
    file_store: Store, releases: list[Manifest], tmp_path: Path
) -> None:
    people = People(tmp_path)
    people.approve(file_store, ApprovalTarget("demo", "production", releases[1].version, releases[1].digest), "eve")
    put_in(file_store, releases[0])
    plan = plan_cleanup(file_store, "demo", rules=RetentionRules(newest_entries=1), now=NOW)
    assert plan.keep == {releases[0].version: "entry 1 of production", releases[1].version: "approved for production"}
    put_in(file_store, releases[2])
    assert releases[1].version in planned(file_store, newest_entries=1)


def test_what_the_project_names_stays_and_is_looked_up_again_before_each_removal(
    file_store: Store, releases: list[Manifest], tmp_path: Path
) -> None:
    first, second, third, fourth = (manifest.version for manifest in releases)
    runs = tmp_path / "runs" / "demo"
    write_json(runs / ".work" / "last.json", {"version": second})
    write_json(runs / "resolved.json", {"champion": {"version": third}})
    write_json(runs / ".work" / "resolved.json", {"champion": None})
    named = named_in_project(tmp_path, "demo", (first,))
    assert named == {
        first: "named by evaluate.references",
        second: "named by runs/demo/.work/last.json",
        third: "named by runs/demo/resolved.json",
    }
    rules = RetentionRules(named=named)
    plan = plan_cleanup(file_store, "demo", rules=rules, now=NOW)
    assert plan.remove == (fourth,)
    note_latest(file_store, "demo", fourth)
    assert clean_up(file_store, plan, rules=rules, now=NOW) == ()


@pytest.mark.parametrize(
    "text", ["{", "", "null", "[]", '"20260101"', '{"champion": "x"}', '{"champion": {"version": 5}}', "\xff"]
)
def test_a_record_of_the_project_that_cannot_be_read_stops_the_cleaning(tmp_path: Path, text: str) -> None:
    (tmp_path / "runs" / "demo").mkdir(parents=True)
    (tmp_path / "runs" / "demo" / "resolved.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(StoreError, match="which releases it names is not known"):
        named_in_project(tmp_path, "demo", ())


def test_a_hold_keeps_what_somebody_is_at_work_on_and_ends_with_it(file_store: Store, releases: list[Manifest]) -> None:
    with holding(file_store, "demo", releases[0].version, doing="promote"):
        plan = plan_cleanup(file_store, "demo", rules=RetentionRules(), now=datetime.now(UTC) + 10 * MINUTE)
        assert plan.keep[releases[0].version].startswith("held by promote-")
        planned_before = plan_cleanup(file_store, "demo", rules=RetentionRules(), now=NOW)
        assert releases[0].version in planned_before.remove, "by a clock that is a month ahead the hold has ended"
        removed = clean_up(file_store, planned_before, rules=RetentionRules(), now=NOW)
        assert removed == tuple(manifest.version for manifest in releases[1:]), "the store's clock counts"
        assert len(file_store.list("leases/demo/holds")) == 1
    assert file_store.list("leases") == []


def test_a_release_that_is_being_removed_cannot_be_held(file_store: Store, releases: list[Manifest]) -> None:
    with removing(file_store, "demo", releases[0].version):
        hold_it = holding(file_store, "demo", releases[0].version, doing="promote")
        with pytest.raises(ConflictError, match="is being cleaned away by gc-"):
            hold_it.__enter__()
        with holding(file_store, "demo", releases[1].version, doing="promote"):
            pass
    assert file_store.list("leases") == []


def test_a_hold_that_was_not_renewed_for_long_no_longer_counts(
    file_store: Store, releases: list[Manifest], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [0.0]
    monkeypatch.setattr(leases.time, "monotonic", lambda: now[0])
    with holding(file_store, "demo", releases[0].version, doing="promote") as claim:
        now[0] = 19 * 60
        claim.check()
        now[0] = 21 * 60
        with pytest.raises(StoreError, match="was not renewed for 20 minutes"):
            claim.check()
        claim.renew()
        claim.check()


def test_a_hold_is_renewed_while_its_holder_works(
    file_store: Store, releases: list[Manifest], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(leases, "_RENEWED_AFTER", timedelta(milliseconds=1))
    with holding(file_store, "demo", releases[0].version, doing="promote") as claim:
        first = file_store.listing("leases")[0].modified
        while file_store.listing("leases")[0].modified == first:
            pass
        claim.check()
    assert file_store.list("leases") == []


def test_a_hold_of_a_process_of_this_machine_that_was_killed_does_not_count(
    file_store: Store, releases: list[Manifest]
) -> None:
    context = multiprocessing.get_context("fork")

    def die() -> None:
        with holding(file_store, "demo", releases[0].version, doing="publish"):
            os.kill(os.getpid(), 9)

    process = context.Process(target=die)
    process.start()
    process.join(60)
    assert len(file_store.list("leases/demo/holds")) == 1
    plan = plan_cleanup(file_store, "demo", rules=RetentionRules(), now=NOW)
    assert releases[0].version in clean_up(file_store, plan, rules=RetentionRules(), now=NOW)
    assert file_store.list("leases") == [], "what the killed one left is removed too"


def test_a_lease_counts_some_minutes_longer_than_it_says(file_store: Store, releases: list[Manifest]) -> None:
    hold(file_store, "demo", Lease(holder="host", version=releases[0].version, until=NOW))
    assert needed(file_store, NOW + 9 * MINUTE) == {releases[0].version: "served by host"}
    assert needed(file_store, NOW + 11 * MINUTE) == {}


def test_leases_that_are_long_past_are_removed(file_store: Store) -> None:
    for name, until in (("old", datetime.now(UTC) - timedelta(days=2)), ("new", datetime.now(UTC))):
        hold(file_store, "demo", Lease(holder=name, version="v1", until=until))
    clean_up(
        file_store, plan_cleanup(file_store, "demo", rules=RetentionRules(), now=NOW), rules=RetentionRules(), now=NOW
    )
    assert file_store.list("leases") == ["leases/demo/new.json"]


def test_a_lease_that_cannot_be_read_and_may_be_of_a_running_server_ends_the_cleaning(
    file_store: Store, releases: list[Manifest]
) -> None:
    plan = plan_cleanup(file_store, "demo", rules=RetentionRules(), now=NOW)
    file_store.put_bytes("leases/demo/host.json", b'{"format": 2}')
    now = datetime.now(UTC)
    for act in (
        lambda: plan_cleanup(file_store, "demo", rules=RetentionRules(), now=now),
        lambda: clean_up(file_store, plan, rules=RetentionRules(), now=now),
    ):
        with pytest.raises(StoreError, match=r"leases/demo/host\.json is no lease that can be read.*remove it and run"):
            act()
    assert len(list_versions(file_store, "demo")) == 4


def test_what_killed_publishers_left_is_in_the_plan_and_removed(file_store: Store, releases: list[Manifest]) -> None:
    put_in(file_store, releases[0])
    root = Path(file_store.url.removeprefix("file://"))
    part = root / release_key("demo", releases[0].version, ".weights.bin.abcd1234.part")
    part.write_bytes(bytes(1000))
    young = plan_cleanup(file_store, "demo", rules=RetentionRules(), now=datetime.now(UTC))
    assert young.unfinished == ()
    plan = plan_cleanup(file_store, "demo", rules=RetentionRules(), now=NOW)
    assert [(one.key, one.num_bytes) for one in plan.unfinished] == [
        (release_key("demo", releases[0].version, "weights.bin"), 1000)
    ]
    assert part.relative_to(root).as_posix() in clean_up(file_store, plan, rules=RetentionRules(), now=NOW)
    assert not part.exists()
    assert list_versions(file_store, "demo") == [releases[0].version]


def test_what_somebody_is_sending_is_not_taken_for_left(file_store: Store, releases: list[Manifest]) -> None:
    put_in(file_store, releases[0])
    root = Path(file_store.url.removeprefix("file://"))
    part = root / release_key("demo", releases[0].version, ".weights.bin.abcd1234.part")
    part.write_bytes(bytes(1000))
    rules, now = RetentionRules(min_age=timedelta(0)), datetime.now(UTC) + MINUTE
    plan = plan_cleanup(file_store, "demo", rules=rules, now=now)
    with holding(file_store, "demo", releases[0].version, doing="publish"):
        assert plan_cleanup(file_store, "demo", rules=rules, now=now).unfinished == ()
        clean_up(file_store, plan, rules=rules, now=now)
        clean_up(file_store, plan, rules=rules, now=NOW)  # by a clock that is a month ahead
    assert part.exists()


def test_a_release_that_was_sent_again_since_the_plan_stays(file_store: Store, releases: list[Manifest]) -> None:
    key = release_key("demo", releases[0].version, "manifest.json")
    file_store.delete(key)
    plan = plan_cleanup(file_store, "demo", rules=RetentionRules(), now=NOW)
    file_store.put_bytes(key, releases[0].to_bytes())
    clean_up(file_store, plan, rules=RetentionRules(), now=NOW)
    assert list_versions(file_store, "demo") == [releases[0].version]


def test_somebodys_file_in_a_release_or_beside_it_is_named_and_left_alone(
    file_store: Store, releases: list[Manifest]
) -> None:
    inside, beside = release_key("demo", releases[0].version, "notes.txt"), "releases/demo/notes for me.txt"
    for key in (inside, beside):
        file_store.put_bytes(key, b"mine")
    plan = plan_cleanup(file_store, "demo", rules=RetentionRules(), now=NOW)
    assert plan.keep[releases[0].version] == "holds notes.txt, which does not belong to this release: move it away"
    assert "notes for me.txt (a file)" in plan.keep
    clean_up(file_store, plan, rules=RetentionRules(), now=NOW)
    assert file_store.get(inside) == file_store.get(beside) == b"mine"


@pytest.mark.parametrize("name", ["notes for me.txt", "production/notes for me.txt", "a channel/v1/x.json"])
def test_somebodys_file_among_the_approvals_stops_nothing(
    file_store: Store, releases: list[Manifest], caplog: pytest.LogCaptureFixture, name: str
) -> None:
    file_store.put_bytes(f"approvals/demo/{name}", b"mine")
    assert planned(file_store) == tuple(manifest.version for manifest in releases)
    assert f"approvals/demo/{name} is not an approval; it is left alone" in caplog.text


def test_a_channel_of_which_only_the_checkpoints_are_left_ends_the_cleaning(
    file_store: Store, releases: list[Manifest]
) -> None:
    file_store.put_bytes("checkpoints/demo/production/0000000100.json", b"{}")
    with pytest.raises(HistoryLostError, match="is empty, and entry 100 was there"):
        planned(file_store)


@pytest.mark.parametrize("until", [datetime.min, datetime.max])
def test_a_lease_to_the_end_of_time_is_a_lease(file_store: Store, releases: list[Manifest], until: datetime) -> None:
    lease = Lease(holder="server-1", version=releases[0].version, until=until.replace(tzinfo=UTC))
    hold(file_store, "demo", lease)
    assert (releases[0].version not in planned(file_store)) == (until == datetime.max)
    assert bool(needed(file_store, NOW)) == (until == datetime.max)
    leases.sweep(file_store, "demo", now=NOW)
