"""A log that became shorter, or other than it was, is noticed by whoever has seen it before."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from graftline.digest import of_bytes
from graftline.errors import HistoryLostError, StoreError
from graftline.registry import channel
from graftline.registry.channel import Entry, Log, append, head, names, newer, newest, next_entry, read
from graftline.registry.log_checkpoints import recall
from graftline.registry.objects import Seen
from graftline.registry.store import Store, open_store
from tests.registry.test_channel import change, fill, key

LOOKS: list[Callable[[Store, str, str], object]] = [
    read,
    recall,
    head,
    lambda store, pipeline, name: newest(store, pipeline, name, 2),
    lambda store, pipeline, name: list(channel.backwards(store, pipeline, name)),
]


@pytest.fixture
def reopen(tmp_path: Path) -> Callable[[], Store]:
    """The store again, as another command on the same machine opens it."""
    return lambda: open_store(str(tmp_path / "store"), seen=tmp_path / "seen")


@pytest.mark.parametrize("look", LOOKS)
@pytest.mark.parametrize("lost", [(3,), (2, 3), (1, 2, 3)])
def test_entries_that_were_seen_are_missed(
    reopen: Callable[[], Store], look: Callable[[Store, str, str], object], lost: tuple[int, ...]
) -> None:
    fill(reopen(), 3)
    for number in lost:
        reopen().delete(key(number))
    with pytest.raises(HistoryLostError, match=r"the history went back: it .*, and entry 3 was there \(seen here"):
        look(reopen(), "demo", "production")


@pytest.mark.parametrize("look", LOOKS)
def test_a_store_that_is_not_mounted_is_no_empty_channel(
    reopen: Callable[[], Store], look: Callable[[Store, str, str], object], tmp_path: Path
) -> None:
    fill(reopen(), 2)
    (tmp_path / "store").rename(tmp_path / "elsewhere")
    with pytest.raises(HistoryLostError, match=r"it is empty, and entry 2 was there .* mounted"):
        look(reopen(), "demo", "production")
    assert names(reopen(), "demo") == ["production"]
    (tmp_path / "elsewhere").rename(tmp_path / "store")
    look(reopen(), "demo", "production")


@pytest.mark.parametrize("look", LOOKS)
def test_another_history_in_the_place_of_the_one_that_was_seen_is_found(
    reopen: Callable[[], Store], look: Callable[[Store, str, str], object], tmp_path: Path
) -> None:
    fill(reopen(), 2)
    shutil.rmtree(tmp_path / "store")
    other = open_store(str(tmp_path / "store"))
    for version in ("w1", "w2", "w3"):
        append(other, next_entry(read(other, "demo", "production"), change(version)))
    with pytest.raises(HistoryLostError, match="entry 2 is another than it was"):
        look(reopen(), "demo", "production")


def test_no_second_entry_of_a_number_is_written(reopen: Callable[[], Store]) -> None:
    log = fill(reopen(), 3)
    reopen().delete(key(3))
    stale = Log("demo", "production", log.entries[:2])
    with pytest.raises(HistoryLostError, match="entry 3 was there"):
        append(reopen(), next_entry(stale, change("other")))
    assert reopen().get(key(3)) is None


def test_an_entry_that_was_seen_and_is_put_back_is_read_again(reopen: Callable[[], Store]) -> None:
    log = fill(reopen(), 3)
    data = reopen().get(key(3))
    reopen().delete(key(3))
    with pytest.raises(HistoryLostError):
        read(reopen(), "demo", "production")
    reopen().put_bytes(key(3), data or b"")
    assert read(reopen(), "demo", "production") == log


def test_from_a_known_entry_its_loss_or_exchange_is_found(reopen: Callable[[], Store]) -> None:
    log = fill(reopen(), 2)
    reopen().delete(key(2))
    with pytest.raises(HistoryLostError, match="entry 2 was read before and is not there now"):
        newer(reopen(), log.entries[1])
    other = next_entry(Log("demo", "production", log.entries[:1]), change("other"))
    reopen().put_bytes(key(2), other.to_bytes())
    with pytest.raises(HistoryLostError, match="entry 2 was read before"):
        newer(reopen(), log.entries[1])


@pytest.mark.parametrize("is_kept", [True, False])
def test_what_was_seen_of_a_channel_never_gets_older_and_says_whether_it_was_verified(
    tmp_path: Path, is_kept: bool
) -> None:
    first = Seen("store", tmp_path if is_kept else None)
    seen = [first, Seen("store", tmp_path)] if is_kept else [first]
    for number, trusted, expected in [(2, False, (2, False)), (1, True, (2, False)), (2, True, (2, True))]:
        first.note("demo", "production", number, of_bytes(b"entry"), is_trusted=trusted)
        for each in seen:
            mark = each.mark("demo", "production")
            assert mark
            assert (mark.number, mark.is_trusted) == expected


def test_without_a_folder_a_store_remembers_for_as_long_as_it_is_open(file_store: Store) -> None:
    fill(file_store, 2)
    file_store.delete(key(2))
    with pytest.raises(HistoryLostError, match="seen since the store was opened"):
        head(file_store, "demo", "production")


def test_stores_pipelines_and_channels_are_kept_apart(tmp_path: Path) -> None:
    one, other = (open_store(str(tmp_path / name), seen=tmp_path / "seen") for name in ("one", "other"))
    fill(one, 2)
    for store, pipeline, name in ((other, "demo", "production"), (one, "demo", "staging"), (one, "else", "production")):
        assert read(store, pipeline, name).entries == ()


def test_a_mark_never_becomes_lower(tmp_path: Path) -> None:
    digests = [of_bytes(b"%d" % number) for number in range(4)]
    first, second = Seen("store", tmp_path), Seen("store", tmp_path)
    first.note("demo", "production", 2, digests[2])
    second.note("demo", "production", 3, digests[3])
    first.note("demo", "production", 1, digests[1])
    first.note("demo", "production", 2, digests[2])
    for seen in (first, second, Seen("store", tmp_path)):
        mark = seen.mark("demo", "production")
        assert mark is not None
        assert (mark.number, mark.digest) == (3, digests[3])


def test_many_processes_that_note_at_once_leave_the_highest_mark(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from graftline.digest import of_bytes; from graftline.registry.objects "
        "import Seen\nfor n in range(int(sys.argv[2]), 400, 8): Seen('store', Path(sys.argv[1])).note('demo', 'p', n, "
        "of_bytes(b'%d' % n))"
    )
    running = [subprocess.Popen([sys.executable, "-c", code, str(tmp_path), str(first)]) for first in range(1, 9)]
    assert [process.wait() for process in running] == [0] * 8
    mark = Seen("store", tmp_path).mark("demo", "p")
    assert mark is not None
    assert (mark.number, mark.digest) == (399, of_bytes(b"399"))


@pytest.mark.parametrize(
    "data", [b"", b"{", b"[]", b'{"number": 3}', b'{"number": "x", "digest": "sha256:0"}', b"\xff"]
)
def test_a_damaged_mark_is_an_error_that_names_the_file(tmp_path: Path, data: bytes) -> None:
    Seen("store", tmp_path).note("demo", "production", 3, of_bytes(b"3"))
    (file,) = tmp_path.rglob("production.json")
    file.write_bytes(data)
    with pytest.raises(StoreError, match=r"production\.json says what was seen of demo/production and cannot be read"):
        Seen("store", tmp_path).mark("demo", "production")


def test_a_folder_that_cannot_be_written_keeps_nobody_from_reading(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").touch()
    store = open_store(str(tmp_path / "store"), seen=tmp_path / "file" / "below")
    log = fill(store, 2)
    assert read(store, "demo", "production") == log
    assert "what was seen of demo/production is not kept in" in caplog.text


def test_a_mark_holds_no_credentials(tmp_path: Path) -> None:
    Seen("s3://models at http://user:word@host:9000", tmp_path).note("demo", "p", 1, of_bytes(b"1"))
    (file,) = tmp_path.rglob("p.json")
    assert json.loads(file.read_text())["store"] == "s3://models at http://***@host:9000"


def test_the_first_entry_names_none_before_it(file_store: Store) -> None:
    made = next_entry(Log("demo", "production", ()), change())
    entry = Entry.model_validate({**dict(made), "previous": of_bytes(b"another")})
    file_store.put_bytes(key(1), entry.to_bytes())
    for look in LOOKS:
        with pytest.raises(StoreError, match="as the entry before, expected None"):
            look(file_store, "demo", "production")


@pytest.mark.parametrize("look", [read, head])
def test_an_entry_that_is_written_while_a_log_is_read_is_no_loss(
    file_store: Store, look: Callable[[Store, str, str], object], monkeypatch: pytest.MonkeyPatch
) -> None:
    log = fill(file_store, 2)
    original = file_store.get

    def get(name: str) -> bytes | None:
        data = original(name)
        if name == key(3) and data is None:
            monkeypatch.undo()
            append(file_store, next_entry(log, change("v3")))  # just after the reader was told that it is not there
        return data

    monkeypatch.setattr(file_store, "get", get)
    look(file_store, "demo", "production")
    assert len(read(file_store, "demo", "production").entries) == 3


@pytest.mark.parametrize("number", [0, -1])
def test_a_mark_of_no_entry_is_damaged(tmp_path: Path, number: int) -> None:
    Seen("store", tmp_path).note("demo", "production", 3, of_bytes(b"3"))
    (file,) = tmp_path.rglob("production.json")
    file.write_text(json.dumps({"number": number, "digest": str(of_bytes(b"3"))}), encoding="utf-8")
    with pytest.raises(StoreError, match=rf"cannot be read \(number is {number}\)"):
        Seen("store", tmp_path).mark("demo", "production")


@pytest.mark.parametrize("data", [b'{"number": Infinity, "digest": "x"}', b"[" * 100_000])
def test_a_mark_that_no_number_can_be_read_from_is_damaged(tmp_path: Path, data: bytes) -> None:
    Seen("store", tmp_path).note("demo", "production", 3, of_bytes(b"3"))
    (file,) = tmp_path.rglob("production.json")
    file.write_bytes(data)
    with pytest.raises(StoreError, match="look at the channel's history, then remove the file"):
        Seen("store", tmp_path).mark("demo", "production")


def test_marks_that_may_not_be_listed_are_no_absence_of_channels(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Seen("store", tmp_path).note("demo", "production", 3, of_bytes(b"3"))
    assert Seen("store", tmp_path).channels("demo") == {"production"}
    assert Seen("store", tmp_path).pipelines() == {"demo"}

    def refuse(path: object) -> list[str]:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(os, "listdir", refuse)
    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(StoreError, match=r"cannot be listed \(Permission denied\); check its permissions"):
        Seen("store", tmp_path).channels("demo")


def test_somebodys_file_among_the_marks_is_no_channel(tmp_path: Path) -> None:
    Seen("store", tmp_path).note("demo", "production", 3, of_bytes(b"3"))
    (file,) = tmp_path.rglob("production.json")
    shutil.copy(file, file.with_name("production (copy).json"))
    file.parent.with_name("my notes").mkdir()
    file.parent.with_name(".DS_Store").touch()
    seen = Seen("store", tmp_path)
    assert seen.channels("demo") == {"production"}
    assert seen.pipelines() == {"demo"}
