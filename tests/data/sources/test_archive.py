"""Members of wheels and npm tarballs, some of them hostile."""

import gzip
import io
import stat
import tarfile
import zipfile
from pathlib import Path

import pytest

from graftline.data.sources import packages
from graftline.data.sources.packages import extract_member
from graftline.errors import SourceError
from graftline.logs import silent


def make_tar(path: Path, files: dict[str, bytes], *, prefix: str = "package/") -> Path:
    with tarfile.open(path, "w:gz") as tar:
        for name, data in files.items():
            info = tarfile.TarInfo(prefix + name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def make_zip(path: Path, files: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as opened:
        for name, data in files.items():
            opened.writestr(name, data)
    return path


@pytest.fixture
def out(tmp_path: Path) -> Path:
    folder = tmp_path / "out"
    folder.mkdir()
    return folder


@pytest.mark.parametrize("make", [make_tar, make_zip])
def test_a_member_is_written_under_its_own_name(tmp_path: Path, out: Path, make: object) -> None:
    made = make(tmp_path / "a", {"dict/other": b"no", "dict/data.noun": b"yes" * 1_000_000})  # type: ignore[operator]

    arrived = extract_member(made, "dict/data.noun", out, silent)

    assert arrived.path == out / "data.noun"
    assert arrived.path.read_bytes() == b"yes" * 1_000_000


def test_a_tarball_may_name_its_first_folder_as_it_likes(tmp_path: Path, out: Path) -> None:
    made = make_tar(tmp_path / "a.tgz", {"x": b"1"}, prefix="node-v1/")

    assert extract_member(made, "x", out, silent).path.read_bytes() == b"1"


@pytest.mark.parametrize("make", [make_tar, make_zip])
def test_a_missing_member_names_the_nearest(tmp_path: Path, out: Path, make: object) -> None:
    made = make(tmp_path / "a", {"dict/data.noun": b"1", "dict/data.verb": b"2", "README": b""})  # type: ignore[operator]

    with pytest.raises(SourceError, match=r"a holds no 'dict/data\.nuon'; it holds 3 files, nearest: dict/data\.noun"):
        extract_member(made, "dict/data.nuon", out, silent)

    assert list(out.iterdir()) == []


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.DIRTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE])
def test_a_tar_member_that_is_no_plain_file_is_refused(tmp_path: Path, out: Path, kind: bytes) -> None:
    with tarfile.open(tmp_path / "a.tgz", "w:gz") as tar:
        info = tarfile.TarInfo("package/x")
        info.type = kind
        info.linkname = "/etc/passwd"
        tar.addfile(info)

    with pytest.raises(SourceError, match=r"'x' in a\.tgz is a folder or a link; expected a plain file"):
        extract_member(tmp_path / "a.tgz", "x", out, silent)


def test_a_zip_member_that_is_a_link_is_refused(tmp_path: Path, out: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.whl", "w") as opened:
        info = zipfile.ZipInfo("x")
        info.external_attr = (stat.S_IFLNK | 0o777) << 16
        opened.writestr(info, "/etc/passwd")

    with pytest.raises(SourceError, match="is a folder or a link"):
        extract_member(tmp_path / "a.whl", "x", out, silent)


def test_a_zip_that_holds_a_name_twice_is_refused(tmp_path: Path, out: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.whl", "w") as opened:
        opened.writestr("x", "1")
        with pytest.warns(UserWarning, match="Duplicate name"):
            opened.writestr("x", "2")

    with pytest.raises(SourceError, match="holds 'x' 2 times; expected once"):
        extract_member(tmp_path / "a.whl", "x", out, silent)


@pytest.mark.parametrize("make", [make_tar, make_zip])
def test_a_bomb_is_stopped(tmp_path: Path, out: Path, make: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packages, "SMALLEST_LIMIT_BYTES", 1 << 20)
    made = make(tmp_path / "a", {"x": b"\0" * (32 << 20)})  # type: ignore[operator]

    with pytest.raises(SourceError, match=r"unpacks to more than \d+ bytes, 200 times its size"):
        extract_member(made, "x", out, silent)


def test_a_bomb_before_the_member_is_stopped_too(tmp_path: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packages, "SMALLEST_LIMIT_BYTES", 1 << 20)
    made = make_tar(tmp_path / "a.tgz", {"bomb": b"\0" * (32 << 20), "x": b"1"})

    with pytest.raises(SourceError, match="unpacks to more than"):
        extract_member(made, "x", out, silent)


def test_a_zip_whose_directory_lies_about_the_size_is_refused(tmp_path: Path, out: Path) -> None:
    made = make_zip(tmp_path / "a.whl", {"x": b"12345678" * 100})
    data = bytearray(made.read_bytes())
    place = data.rfind(b"PK\x01\x02") + 24
    data[place : place + 4] = (10).to_bytes(4, "little")
    made.write_bytes(bytes(data))

    with pytest.raises(SourceError, match=r"is damaged|were announced"):
        extract_member(made, "x", out, silent)


@pytest.mark.parametrize("cut", [100, 1000, 4000])
@pytest.mark.parametrize("make", [make_tar, make_zip])
def test_a_truncated_archive_is_an_error(tmp_path: Path, out: Path, make: object, cut: int) -> None:
    body = bytes(hash((i, "x")) & 255 for i in range(5000))
    made = make(tmp_path / "a", {"x": body})  # type: ignore[operator]
    made.write_bytes(made.read_bytes()[:-cut])

    with pytest.raises(SourceError, match=r"is damaged|were announced"):
        extract_member(made, "x", out, silent)


@pytest.mark.parametrize("data", [b"", b"no archive at all", gzip.compress(b"no tar", mtime=0), b"PK\x05\x06"])
def test_a_file_that_is_no_archive_is_an_error(tmp_path: Path, out: Path, data: bytes) -> None:
    (tmp_path / "a.whl").write_bytes(data)

    with pytest.raises(SourceError, match=r"a\.whl (is damaged|holds no 'x')"):
        extract_member(tmp_path / "a.whl", "x", out, silent)


def test_a_flipped_bit_in_a_member_is_found(tmp_path: Path, out: Path) -> None:
    made = make_zip(tmp_path / "a.whl", {"x": bytes(range(256)) * 50})
    data = bytearray(made.read_bytes())
    data[60] ^= 1
    made.write_bytes(bytes(data))

    with pytest.raises(SourceError, match=r"a\.whl is damaged"):
        extract_member(made, "x", out, silent)
