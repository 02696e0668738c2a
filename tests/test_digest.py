import errno
import hashlib
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from graftline import digest
from graftline.digest import Digest, copy_file, rename_synced, write_text
from graftline.errors import GraftlineError

HEX = hashlib.sha256(b"rows").hexdigest()


@given(st.binary())
def test_a_digest_is_read_back_from_its_text(data: bytes) -> None:
    assert Digest.parse(str(digest.of_bytes(data))) == digest.of_bytes(data)


@pytest.mark.parametrize(
    "text", ["", HEX, f"sha256:{HEX[:-1]}", f"sha256:{HEX.upper()}", f"md5:{HEX}", f"sha256:{HEX}\n"]
)
def test_text_of_another_form_is_refused(text: str) -> None:
    with pytest.raises(GraftlineError, match="not of the form sha256:<64 lower-case hex digits>"):
        Digest.parse(text)


@given(st.dictionaries(st.text(), st.integers() | st.text() | st.none()))
def test_equal_values_have_equal_digests_whatever_the_order_of_their_keys(value: dict[str, object]) -> None:
    assert digest.of_json(dict(reversed(value.items()))) == digest.of_json(value)


def test_a_file_and_a_folder_are_hashed_by_their_bytes(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "x").write_bytes(b"rows")
    assert digest.of_file(tmp_path / "b" / "x").hex == HEX
    assert digest.of_folder(tmp_path) == {"b/x": Digest(HEX)}


def test_a_written_file_has_the_digest_that_was_taken_on_the_way(tmp_path: Path) -> None:
    with digest.atomic_write(tmp_path / "new" / "file") as out:
        out.write(b"ro")
        assert not (tmp_path / "new" / "file").exists()
        out.write(b"ws")
    assert (tmp_path / "new" / "file").read_bytes() == b"rows"
    assert out.digest.hex == HEX
    assert out.num_bytes == 4


def test_an_error_on_the_way_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(TypeError), digest.atomic_write(path) as out:
        out.write([out.write(b"half")])
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_full_disk_is_named_with_the_file(tmp_path: Path) -> None:
    full = OSError(errno.ENOSPC, "No space left on device")
    with pytest.raises(GraftlineError, match=r"cannot write .*file: No space left on device"):
        _write_and_raise(tmp_path / "file", full)
    assert list(tmp_path.iterdir()) == []


def _write_and_raise(path: Path, error: OSError) -> None:
    with digest.atomic_write(path) as out:
        out.write(b"half")
        raise error


def test_a_folder_gets_its_name_once_every_file_in_it_is_on_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "making" / "below").mkdir(parents=True)
    for name in ("a", "below/b"):
        (tmp_path / "making" / name).write_bytes(b"x")
    synced: list[str] = []
    original = os.fsync

    def fsync(handle: int) -> None:
        synced.append(os.path.relpath(os.readlink(f"/proc/self/fd/{handle}"), tmp_path))
        original(handle)

    monkeypatch.setattr(os, "fsync", fsync)
    rename_synced(tmp_path / "making", tmp_path / "made")
    assert set(synced[:-1]) == {"making/a", "making/below/b", "making/below", "making"}
    assert synced[-1] == "."
    assert (tmp_path / "made" / "below" / "b").read_bytes() == b"x"


def test_a_folder_keeps_its_name_in_making_if_the_disk_refuses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "making").mkdir()

    def refuse(handle: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(OSError, match="Input/output"):
        rename_synced(tmp_path / "making", tmp_path / "made")
    assert [path.name for path in tmp_path.iterdir()] == ["making"]


def test_a_folder_on_a_file_system_that_cannot_sync_gets_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "making").mkdir()

    def unknown(handle: int) -> None:
        raise OSError(errno.EINVAL, "Invalid argument")

    monkeypatch.setattr(os, "fsync", unknown)
    rename_synced(tmp_path / "making", tmp_path / "made")
    assert (tmp_path / "made").is_dir()


def test_a_disk_that_takes_no_more_removals_is_told_as_what_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(os, "fsync", refuse)
    monkeypatch.setattr(Path, "unlink", refuse)
    with pytest.raises(GraftlineError, match=r"cannot write .*/a\.txt: Read-only file system"):
        write_text(tmp_path / "a.txt", "text")


def test_a_copied_file_is_whole_or_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "source").write_bytes(b"x" * 3_000_000)
    copy_file(tmp_path / "source", tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == (tmp_path / "source").read_bytes()

    def refuse(handle: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(GraftlineError, match="No space left"):
        copy_file(tmp_path / "source", tmp_path / "another")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["copy", "source"]
