"""In every order of the steps of several people: nothing that was reported done is lost, nothing named is missing."""

from collections.abc import Sequence
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from graftline.errors import ConflictError, ReleaseError
from graftline.registry import channel
from graftline.registry.cleanup import CleanupPlan, RetentionRules, clean_up, plan_cleanup
from graftline.registry.leases import holding
from graftline.registry.releases import list_versions, load_manifest, publish, release_key, verify_stored
from graftline.registry.store import Store
from graftline.release.manifest import Manifest, describe, write_manifest
from tests.registry.entries import put_in
from tests.registry.memory import START, MemoryStore
from tests.registry.scheduler import Work, orders
from tests.release.packages import CREATED, LINEAGE, VERDICT

LATER = START + timedelta(days=30)
RULES = RetentionRules(newest_entries=1)


@pytest.fixture
def package(tmp_path: Path) -> Path:
    folder = tmp_path / "package"
    folder.mkdir()
    (folder / "weights.bin").write_bytes(b"weights")
    write_manifest(folder, describe(folder, pipeline="demo", created=CREATED, lineage=LINEAGE, verdict=VERDICT))
    return folder


def plan(store: Store) -> CleanupPlan:
    return plan_cleanup(store, "demo", rules=RULES, now=LATER)


def gc(store: Store, planned: CleanupPlan) -> None:
    clean_up(store, planned, rules=RULES, now=LATER)


def enter(store: Store, manifest: Manifest, name: str = "production") -> None:
    """What promotion and rollback do, as far as others can see it: hold, look, write the entry, let go."""
    with holding(store, "demo", manifest.version, doing="promote"):
        put_in(store, verify_stored(store, "demo", manifest.version, None, now=LATER), name)


def complete(package: Path) -> tuple[MemoryStore, Manifest]:
    """A store with a release that nobody names, long ago."""
    store = MemoryStore()
    return store, publish(store, package)


def check(store: Store, *, allow: tuple[type[Exception], ...], errors: list[Exception | None]) -> None:
    """What channels name is whole; who was told anything else than "somebody was first" is a fault."""
    for name in channel.names(store, "demo"):
        for entry in channel.read(store, "demo", name).entries[-1:]:
            verify_stored(store, "demo", entry.change.version, None, now=LATER)
    assert all(error is None or isinstance(error, allow) for error in errors), errors
    for version in list_versions(store, "demo"):
        verify_stored(store, "demo", version, None, now=LATER)
    assert [key for key in store.list("leases") if "/holds/" in key or "/removals/" in key] == []


def test_a_release_is_promoted_or_removed_never_both(package: Path) -> None:
    outcomes = set()

    def prepare() -> tuple[Store, Sequence[Work]]:
        store, manifest = complete(package)
        return store, [partial(enter, manifest=manifest), partial(gc, planned=plan(store))]

    for store, (promoter, cleaner), _ in orders(prepare, max_switches=3):
        check(store, allow=(ReleaseError, ConflictError), errors=[promoter.error])
        assert cleaner.error is None
        is_there, was_promoted = bool(list_versions(store, "demo")), promoter.error is None
        assert is_there or not was_promoted
        outcomes.add((is_there, was_promoted))
    assert outcomes >= {(True, True), (False, False)}, "both of them come first in some order"


def test_a_release_that_was_sent_is_there_whatever_gc_had_planned(package: Path) -> None:
    outcomes = set()

    def prepare() -> tuple[Store, Sequence[Work]]:
        store, manifest = complete(package)
        store.delete(release_key("demo", manifest.version, "manifest.json"))  # somebody was killed long ago
        planned = plan(store)
        assert planned.remove == (manifest.version,)
        return store, [lambda seen: publish(seen, package), partial(gc, planned=planned)]

    for store, (publisher, cleaner), _ in orders(prepare, max_switches=3):
        check(store, allow=(ConflictError,), errors=[publisher.error])
        assert cleaner.error is None
        assert publisher.error is not None or list_versions(store, "demo")
        outcomes.add(publisher.error is None)
    assert outcomes == {True, False}


@pytest.mark.long
@pytest.mark.slow
def test_two_cleaners_and_a_publisher_do_not_undo_each_other(package: Path) -> None:
    def prepare() -> tuple[Store, Sequence[Work]]:
        store, manifest = complete(package)
        store.delete(release_key("demo", manifest.version, "manifest.json"))
        planned = plan(store)
        clean = partial(gc, planned=planned)
        return store, [lambda seen: publish(seen, package), clean, clean]

    for store, (publisher, *cleaners), _ in orders(prepare, max_switches=2):
        check(store, allow=(ConflictError,), errors=[publisher.error])
        assert [cleaner.error for cleaner in cleaners] == [None, None]
        assert publisher.error is not None or list_versions(store, "demo")


@pytest.mark.slow
@pytest.mark.long
def test_a_channel_that_goes_back_and_one_that_goes_on_keep_what_they_name(package: Path) -> None:
    """One promotes a second release, one returns to the first, and gc had planned to remove the first."""
    other = package.with_name("other")
    other.mkdir()
    (other / "weights.bin").write_bytes(b"others")
    manifest = describe(other, pipeline="demo", created=CREATED, lineage=LINEAGE, verdict=VERDICT)
    write_manifest(other, manifest)

    def prepare() -> tuple[Store, Sequence[Work]]:
        store, first = complete(package)
        second = publish(store, other)
        enter(store, first)
        enter(store, second)
        assert plan(store).remove == (first.version,)
        works: list[Any] = [partial(enter, manifest=first), partial(enter, manifest=second, name="staging")]
        return store, [*works, partial(gc, planned=plan(store))]

    num_orders = 0
    for store, (back, on, cleaner), _ in orders(prepare, max_switches=2):
        check(store, allow=(ReleaseError, ConflictError), errors=[back.error])
        assert (on.error, cleaner.error) == (None, None)
        num_orders += 1
    assert num_orders > 300


def test_a_hold_whose_holder_was_killed_ends_by_the_stores_clock(package: Path) -> None:
    store, manifest = complete(package)
    key = f"leases/demo/holds/{manifest.version}/promote-elsewhere-0123-7-89.json"
    planned = plan(store)
    store.put_bytes(key, b"killed")
    gc(store, planned)
    assert list_versions(store, "demo") == [manifest.version], "the cleaner's own clock is a month ahead"
    for minute in range(1801):  # half an hour by the store's clock: each write takes a second
        store.put_bytes("tick", bytes(minute))
    gc(store, planned)
    assert list_versions(store, "demo") == []
    assert store.list("leases") == []


def test_load_manifest_of_what_gc_has_removed_says_that_there_is_none(package: Path) -> None:
    store, manifest = complete(package)
    gc(store, plan(store))
    with pytest.raises(ReleaseError, match="has no release"):
        load_manifest(store, "demo", manifest.version)
