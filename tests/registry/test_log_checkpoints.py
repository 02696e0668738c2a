import logging
from pathlib import Path

import pytest

from graftline.digest import of_bytes
from graftline.errors import ConflictError, HistoryLostError, StoreError, StoreUnavailableError
from graftline.registry import channel, log_checkpoints
from graftline.registry.channel import Log, append, next_entry, read
from graftline.registry.log_checkpoints import Checkpoint, keep, recall
from graftline.registry.promotion import rollback
from graftline.registry.releases import publish
from graftline.registry.store import Store, open_store
from tests.registry.test_channel import change
from tests.release.packages import make_package

SIZE = 3


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Checkpoints of three entries."""
    monkeypatch.setattr(log_checkpoints, "ENTRIES", SIZE)


def extend(store: Store, count: int) -> Log:
    """Promotions one after another, each as `promote` reads and writes."""
    for _ in range(count):
        log = recall(store, "demo", "production")
        append(store, next_entry(log, change(f"v{len(log.entries) + 1}")))
        keep(store, log)
    return read(store, "demo", "production")


def key(last: int) -> str:
    return f"checkpoints/demo/production/{last:010d}.json"


class Watched:
    """A store that counts requests, and can be killed before a write."""

    def __init__(self, store: Store, num_writes: int = 99) -> None:
        self._store, self._left = store, num_writes
        self.asked: list[str] = []

    def __getattr__(self, name: str) -> object:
        return getattr(self._store, name)

    def get(self, key: str) -> bytes | None:
        self.asked.append(key)
        return self._store.get(key)

    def list(self, prefix: str) -> list[str]:
        self.asked.append(prefix)
        return self._store.list(prefix)

    def create(self, key: str, data: bytes) -> None:
        if self._left == 0:
            raise KeyboardInterrupt
        self._left -= 1
        self._store.create(key, data)


def test_what_is_recalled_is_what_is_read(store: Store) -> None:
    for count in range(2 * SIZE + 2):
        assert recall(store, "demo", "production") == (log := read(store, "demo", "production"))
        assert len(log.entries) == count
        extend(store, 1)


def test_a_checkpoint_follows_the_entry_after_its_last(store: Store) -> None:
    extend(store, SIZE)
    assert store.list("checkpoints") == []  # nothing in the log names its last entry yet
    extend(store, 1)
    assert store.list("checkpoints") == [key(3)]
    extend(store, 2 * SIZE)
    assert store.list("checkpoints") == [key(3), key(6), key(9)]


def test_entries_that_lie_in_checkpoints_are_not_asked_for(store: Store) -> None:
    log = extend(store, 3 * SIZE + 1)
    watched = Watched(store)
    assert recall(watched, "demo", "production") == log
    # Three checkpoints and none after them; the listing, the tenth entry and none after it; the checkpoints' listing.
    assert len(watched.asked) == 8


def test_the_newest_entry_is_read_from_the_log_even_if_a_checkpoint_has_it(store: Store) -> None:
    log = extend(store, SIZE)
    keep(store, log)
    watched = Watched(store)
    assert recall(watched, "demo", "production") == log
    assert watched.asked[-2:] == [f"channels/demo/production/{n:010d}.json" for n in (SIZE, SIZE + 1)]


def test_a_reader_that_knows_no_checkpoints_sees_the_log_as_ever(store: Store) -> None:
    log = extend(store, SIZE + 1)
    assert channel.names(store, "demo") == ["production"]
    assert store.list("channels") == [f"channels/demo/production/{n:010d}.json" for n in range(1, SIZE + 2)]
    append(store, next_entry(read(store, "demo", "production"), change("v5")))
    assert recall(store, "demo", "production").entries[:-1] == log.entries


@pytest.mark.parametrize("num_writes", range(3))
def test_a_promoter_killed_before_any_write_loses_nothing_and_the_next_one_makes_it_good(
    store: Store, num_writes: int
) -> None:
    for number in range(2 * SIZE + 1):  # a log from before there were checkpoints: two of them are missing
        append(store, next_entry(read(store, "demo", "production"), change(f"v{number + 1}")))
    watched = Watched(store, num_writes)
    log = recall(store, "demo", "production")
    try:
        append(watched, next_entry(log, change("v8")))
        keep(watched, log)
    except KeyboardInterrupt:
        pass
    after = read(store, "demo", "production")
    assert after.entries[: 2 * SIZE + 1] == log.entries
    assert len(after.entries) == 2 * SIZE + 1 + min(num_writes, 1)
    assert recall(store, "demo", "production") == after
    extend(store, 1)
    assert store.list("checkpoints") == [key(3), key(6)]
    assert recall(store, "demo", "production").entries[:-1] == after.entries


def test_two_promoters_that_write_the_same_checkpoint_write_the_same_bytes(store: Store) -> None:
    log = extend(store, SIZE + 1)
    before = store.get(key(3))
    store.delete(key(3))
    keep(store, log)
    keep(store, log)
    assert store.get(key(3)) == before


@pytest.mark.parametrize(
    "damage",
    [
        lambda data, _: b"",
        lambda data, _: data[:-9],
        lambda data, _: data.replace(b'"v2"', b'"v9"'),
        lambda data, log: Checkpoint(entries=log.entries[:2]).to_bytes(),
        lambda data, log: Checkpoint(entries=log.entries[1:4]).to_bytes(),
        lambda data, log: Checkpoint(entries=log.entries[2::-1]).to_bytes(),
    ],
    ids=["empty", "cut off", "edited", "too short", "other entries", "other order"],
)
def test_a_damaged_checkpoint_is_not_used(file_store: Store, damage: object, caplog: pytest.LogCaptureFixture) -> None:
    log = extend(file_store, 2 * SIZE + 1)
    file_store.put_bytes(key(3), damage(file_store.get(key(3)), log))  # type: ignore[operator]
    with caplog.at_level(logging.WARNING):
        assert recall(file_store, "demo", "production") == log
    assert "is not used" in caplog.text


def forged(count: int) -> Log:
    """Another history, whole in itself."""
    log = Log("demo", "production", ())
    for number in range(count):
        entry = next_entry(log, change(f"w{number}", actor="mallory"))
        log = Log("demo", "production", (*log.entries, entry))
    return log


@pytest.mark.parametrize("count", [SIZE, SIZE + 1, 2 * SIZE])
def test_a_checkpoint_whole_in_itself_that_says_something_else_than_the_log_is_an_error(
    file_store: Store, count: int
) -> None:
    extend(file_store, count)
    other = forged(SIZE).entries
    file_store.put_bytes(key(SIZE), Checkpoint(entries=other).to_bytes())
    with pytest.raises(
        HistoryLostError, match="entry 1 of demo/production is another than the one that its checkpoint"
    ):
        recall(file_store, "demo", "production")


@pytest.mark.parametrize("num_lost", [1, 2, SIZE])
def test_entries_that_a_checkpoint_holds_are_missed_by_a_reader_that_never_saw_them(
    file_store: Store, tmp_path: Path, num_lost: int
) -> None:
    log = extend(file_store, SIZE)
    keep(file_store, log)
    for number in range(SIZE - num_lost + 1, SIZE + 1):
        file_store.delete(f"channels/demo/production/{number:010d}.json")
    store = open_store(str(tmp_path / "store"))
    for look in (channel.read, channel.head, recall):
        with pytest.raises(HistoryLostError, match=rf"and entry {SIZE} was there \(checkpoints/demo/production/"):
            look(store, "demo", "production")
    shorter = Log("demo", "production", log.entries[:-num_lost])
    with pytest.raises(HistoryLostError):
        append(store, next_entry(shorter, change("other")))
    assert len(store.list("channels")) == SIZE - num_lost


def test_an_entry_that_took_the_place_of_one_in_a_checkpoint_is_found(file_store: Store, tmp_path: Path) -> None:
    log = extend(file_store, SIZE)
    keep(file_store, log)
    other = next_entry(Log("demo", "production", log.entries[:-1]), change("other"))
    file_store.put_bytes(f"channels/demo/production/{SIZE:010d}.json", other.to_bytes())
    with pytest.raises(HistoryLostError, match=f"entry {SIZE} of demo/production is another"):
        recall(open_store(str(tmp_path / "store")), "demo", "production")


def test_a_store_whose_checkpoints_may_not_be_listed_is_read_with_a_warning(
    file_store: Store, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    log = extend(file_store, SIZE + 1)
    original = file_store.list

    def refuse(prefix: str) -> list[str]:
        if prefix.startswith("checkpoints"):
            raise StoreError("AccessDenied")
        return original(prefix)

    monkeypatch.setattr(file_store, "list", refuse)
    assert recall(file_store, "demo", "production") == log
    assert "is not compared with its checkpoints: AccessDenied" in caplog.text


def test_checkpoints_that_no_answer_comes_for_are_no_absence_of_checkpoints(
    file_store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    extend(file_store, 2)
    original = file_store.list

    def fail(prefix: str) -> list[str]:
        if prefix.startswith("checkpoints"):
            raise StoreUnavailableError("SlowDown")
        return original(prefix)

    monkeypatch.setattr(file_store, "list", fail)
    with pytest.raises(StoreUnavailableError, match="SlowDown"):
        recall(file_store, "demo", "production")


def test_a_lost_or_edited_newer_entry_is_found_as_before(store: Store) -> None:
    log = extend(store, SIZE + 2)
    newest = f"channels/demo/production/{SIZE + 1:010d}.json"
    edited = log.entries[SIZE].model_copy(update={"change": change("v9")})
    store.put_bytes(newest, edited.to_bytes())
    with pytest.raises(StoreError, match="as the entry before"):
        recall(store, "demo", "production")
    store.delete(newest)
    with pytest.raises(StoreError, match="is missing, and later ones are there"):
        recall(store, "demo", "production")


def test_a_lost_old_entry_is_found_though_a_checkpoint_has_it(store: Store) -> None:
    extend(store, SIZE + 2)
    store.delete("channels/demo/production/0000000002.json")
    with pytest.raises(StoreError, match=r"0000000002\.json is missing"):
        recall(store, "demo", "production")


def test_an_edited_old_entry_is_found_by_who_reads_every_entry(store: Store) -> None:
    log = extend(store, SIZE + 2)
    edited = log.entries[1].model_copy(update={"change": change("v9")})
    store.put_bytes("channels/demo/production/0000000002.json", edited.to_bytes())
    assert recall(store, "demo", "production") == log  # as it was written
    with pytest.raises(StoreError, match="as the entry before"):
        read(store, "demo", "production")


def test_a_store_that_refuses_checkpoints_is_used_without(file_store: Store, caplog: pytest.LogCaptureFixture) -> None:
    class Refusing(Watched):
        def get(self, key: str) -> bytes | None:
            if key.startswith("checkpoints/"):
                raise StoreError("AccessDenied")
            return super().get(key)

        def create(self, key: str, data: bytes) -> None:
            if key.startswith("checkpoints/"):
                raise StoreError("AccessDenied")
            super().create(key, data)

    refusing = Refusing(file_store)
    log = extend(refusing, SIZE + 2)
    assert recall(refusing, "demo", "production") == log
    assert "no checkpoint of demo/production was written: AccessDenied" in caplog.text


def test_rollback_asks_for_as_much_with_a_long_history_as_with_a_short_one(file_store: Store, tmp_path: Path) -> None:
    first, second = (make_package(tmp_path / seed, seed) for seed in "ab")
    for seed in "ab":
        publish(file_store, tmp_path / seed)
    asked = []
    for history in (2, 40):
        while (length := len(read(file_store, "demo", "production").entries)) < history:
            manifest = (first, second)[length % 2]
            entry = change(manifest.version, release=manifest.digest)
            append(file_store, next_entry(read(file_store, "demo", "production"), entry))
        watched = Watched(file_store)
        rollback(watched, pipeline="demo", to_channel="production", actor="ada", reason="errors rose")
        asked.append(len(watched.asked))
    assert asked[0] <= asked[1] <= asked[0] + 1  # the first entry has none before it


def test_a_conflict_is_told_with_checkpoints_as_without(store: Store) -> None:
    log = extend(store, SIZE)
    append(store, next_entry(log, change("v4", release=of_bytes(b"v4"))))
    with pytest.raises(ConflictError, match="entry 4 was written first by ci"):
        append(store, next_entry(log, change("other")))
