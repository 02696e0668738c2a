import json
from datetime import UTC, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from graftline.digest import of_bytes
from graftline.errors import ConflictError, ReleaseError, StoreError
from graftline.registry.channel import ChannelChange, Entry, Log, append, head, newer, next_entry, read
from graftline.registry.store import Store
from tests.release.packages import VERDICT

TIME = datetime(2026, 11, 24, 7, 0, 0, tzinfo=UTC)


def change(version: str = "v1", **other: object) -> ChannelChange:
    values = {
        "action": "promote",
        "version": version,
        "release": of_bytes(version.encode()),
        "verdict": VERDICT,
        "actor": "ci",
        "reason": "nightly",
        "time": TIME,
    }
    return ChannelChange.model_validate({**values, **other})


def fill(store: Store, count: int) -> Log:
    for number in range(1, count + 1):
        append(store, next_entry(read(store, "demo", "production"), change(f"v{number}")))
    return read(store, "demo", "production")


def key(number: int) -> str:
    return f"channels/demo/production/{number:010d}.json"


def test_a_channel_nobody_wrote_to_is_empty(store: Store) -> None:
    assert read(store, "demo", "production") == Log("demo", "production", ())
    assert head(store, "demo", "production") is None


def test_entries_are_numbered_and_chained(store: Store) -> None:
    log = fill(store, 3)
    assert [entry.number for entry in log.entries] == [1, 2, 3]
    assert [entry.change.version for entry in log.entries] == ["v1", "v2", "v3"]
    assert log.entries[0].previous is None
    assert log.entries[2].previous == log.entries[1].digest
    assert head(store, "demo", "production") == log.head == log.entries[2]


def test_channels_do_not_see_each_other(store: Store) -> None:
    fill(store, 1)
    assert head(store, "demo", "staging") is None
    assert head(store, "other", "production") is None


def test_the_second_writer_of_a_number_is_told_who_was_first(store: Store) -> None:
    log = read(store, "demo", "production")
    append(store, next_entry(log, change("v1", actor="ada")))
    with pytest.raises(
        ConflictError, match=r"entry 1 was written first by ada at 2026-11-24 07:00:00 UTC \(promote v1\)"
    ):
        append(store, next_entry(log, change("v2", actor="bob")))
    assert [entry.change.actor for entry in read(store, "demo", "production").entries] == ["ada"]


def test_two_entries_for_one_change_are_not_mistaken_for_one(store: Store) -> None:
    log = read(store, "demo", "production")
    append(store, next_entry(log, change()))
    with pytest.raises(ConflictError):
        append(store, next_entry(log, change()))


def test_writing_the_same_entry_again_after_a_lost_answer_is_no_conflict(store: Store) -> None:
    entry = next_entry(read(store, "demo", "production"), change())
    append(store, entry)
    append(store, entry)
    assert len(read(store, "demo", "production").entries) == 1


def test_from_an_entry_that_is_known_the_newest_one_is_found(store: Store) -> None:
    log = fill(store, 3)
    assert newer(store, log.entries[0]) == newer(store, log.entries[2]) == log.entries[2]
    edited = log.entries[2].model_copy(update={"previous": of_bytes(b"another")})
    store.put_bytes(key(3), edited.to_bytes())
    with pytest.raises(StoreError, match="as the entry before"):
        newer(store, log.entries[1])


def test_a_first_entry_that_names_one_before_it_is_refused(store: Store) -> None:
    first = next_entry(Log("demo", "production", ()), change("v1")).model_copy(
        update={"previous": of_bytes(b"cut off")}
    )
    store.put_bytes(key(1), first.to_bytes())
    with pytest.raises(StoreError, match="as the entry before, expected None"):
        read(store, "demo", "production")


def test_a_rollback_is_a_new_entry(store: Store) -> None:
    log = fill(store, 2)
    first = log.entries[0].change
    append(store, next_entry(log, change("v1", action="rollback", release=first.release, verdict=None)))
    newest = head(store, "demo", "production")
    assert newest is not None
    assert (newest.number, newest.change.action, newest.change.version) == (3, "rollback", "v1")


def test_a_gap_is_found(store: Store) -> None:
    fill(store, 4)
    store.delete(key(3))
    with pytest.raises(StoreError, match=r"0000000003\.json is missing, and later ones are there"):
        read(store, "demo", "production")
    with pytest.raises(StoreError, match=r"0000000003\.json is missing"):
        head(store, "demo", "production")


def test_an_edited_entry_is_found(store: Store) -> None:
    log = fill(store, 3)
    edited = log.entries[1].model_copy(update={"change": change("v9")})
    store.put_bytes(key(2), edited.to_bytes())
    with pytest.raises(StoreError, match=r"0000000003\.json names sha256:.* as the entry before, expected"):
        read(store, "demo", "production")
    with pytest.raises(StoreError, match="as the entry before"):
        head(store, "demo", "production")


def test_a_removed_beginning_is_found(store: Store) -> None:
    fill(store, 3)
    store.delete(key(1))
    with pytest.raises(StoreError, match=r"0000000001\.json is missing"):
        read(store, "demo", "production")


def test_an_entry_copied_to_another_number_is_found(store: Store) -> None:
    log = fill(store, 2)
    store.put_bytes(key(3), log.entries[1].to_bytes())
    with pytest.raises(StoreError, match=r"0000000003\.json says that it is demo/production number 2"):
        read(store, "demo", "production")


def test_an_entry_of_another_channel_is_found(store: Store) -> None:
    entry = next_entry(Log("demo", "staging", ()), change())
    store.put_bytes(key(1), entry.to_bytes())
    with pytest.raises(StoreError, match="says that it is demo/staging number 1"):
        read(store, "demo", "production")


@pytest.mark.parametrize(
    "name", ["1.json", "0000000001.json.bak", "notes.txt", "0000000000.json", "sub/0000000001.json"]
)
def test_two_names_for_one_number_and_foreign_files_are_found(store: Store, name: str) -> None:
    fill(store, 1)
    store.put_bytes(f"channels/demo/production/{name}", b"{}")
    with pytest.raises(StoreError, match="which is no entry"):
        read(store, "demo", "production")


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda data: data[:-20], "JSON"),
        (lambda data: b"", "JSON"),
        (lambda data: b"\xff\xfe" + data, "JSON"),
        (lambda data: data.replace(b'"promote"', b'"delete"'), "change.action"),
        (lambda data: data.replace(b'"number": 1', b'"number": 0'), "number"),
        (lambda data: data.replace(b'"number": 1', b'"number": "1"'), "number"),
        (lambda data: data.replace(b'"format": 1', b'"format": 2'), "format"),
        (lambda data: data.replace(b'"reason"', b'"Reason"'), "reason"),
        (lambda data: data.replace(b"sha256:", b"md5:"), "digest"),
        (lambda data: data.replace(b"07:00:00Z", b"07:00:00+01:00"), "UTC"),
        (lambda data: json.dumps(json.loads(data)).encode(), "canonical"),
        (lambda data: data.replace(b"{\n", b'{\n  "number": 1,\n', 1), "canonical"),
    ],
)
def test_an_entry_that_cannot_be_read_names_its_key_and_problem(store: Store, edit: object, message: str) -> None:
    fill(store, 1)
    data = store.get(key(1))
    store.put_bytes(key(1), edit(data))  # type: ignore[operator]
    with pytest.raises(StoreError, match=rf"0000000001\.json cannot be read \(.*{message}"):
        read(store, "demo", "production")


@pytest.mark.parametrize("name", ["", "a/b", "..", ".hidden", "a b", "ä", "x" * 101])
def test_names_that_are_no_component_of_a_key_are_refused(store: Store, name: str) -> None:
    with pytest.raises(StoreError, match="cannot be used in a store"):
        read(store, "demo", name)
    with pytest.raises(StoreError, match="cannot be used in a store"):
        read(store, name, "production")


def test_a_store_that_lists_late_shows_no_old_head(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    log = fill(store, 2)
    original = type(store).list
    monkeypatch.setattr(type(store), "list", lambda self, prefix: original(self, prefix)[:-1])
    assert read(store, "demo", "production") == log
    assert head(store, "demo", "production") == log.head


def test_an_entry_is_read_back_equal(store: Store) -> None:
    entry = next_entry(read(store, "demo", "production"), change(reason="größer, 15 % “better”\n"))
    assert Entry.parse(entry.to_bytes()) == entry


@given(st.binary(max_size=300) | st.text(max_size=300).map(str.encode))
def test_no_bytes_make_the_parser_fail_in_another_way(data: bytes) -> None:
    with pytest.raises(ReleaseError):
        Entry.parse(data)


@given(
    actor=st.text(),
    reason=st.text(),
    number=st.integers(1, 10**10 - 1),
    action=st.sampled_from(["promote", "rollback"]),
)
def test_any_entry_is_read_back_equal(actor: str, reason: str, number: int, action: str) -> None:
    made = next_entry(Log("demo", "production", ()), change(actor=actor, reason=reason, action=action))
    entry = made.model_copy(update={"number": number})
    assert Entry.parse(entry.to_bytes()) == entry


@given(st.data())
def test_any_changed_byte_of_an_entry_breaks_it_or_the_chain(data: st.DataObject) -> None:
    first = next_entry(Log("demo", "production", ()), change("v1"))
    second = next_entry(Log("demo", "production", (first,)), change("v2"))
    raw = bytearray(first.to_bytes())
    raw[data.draw(st.integers(0, len(raw) - 1))] ^= data.draw(st.integers(1, 255))
    try:
        changed = Entry.parse(bytes(raw))
    except ReleaseError:
        return
    assert changed.digest != second.previous
