"""One suite that every store passes."""

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from graftline.address import store_address
from graftline.digest import of_bytes
from graftline.errors import ConflictError, StoreError
from graftline.registry.file_store import FileStore
from graftline.registry.objects import check_key, checksum_of
from graftline.registry.store import Store, open_store


def test_what_is_put_comes_back(store: Store, tmp_path: Path) -> None:
    data = bytes(range(256)) * 1000
    source = tmp_path / "source.bin"
    source.write_bytes(data)

    store.put_file("a/b.bin", source, digest=of_bytes(data))

    assert store.get("a/b.bin") == data
    assert store.get_file("a/b.bin", tmp_path / "copy.bin") == of_bytes(data)
    assert (tmp_path / "copy.bin").read_bytes() == data
    assert store.read_digest("a/b.bin") == of_bytes(data)


def test_empty_and_unicode_named_objects_are_stored(store: Store, tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    store.put_file("a/für später (1).txt", tmp_path / "empty", digest=of_bytes(b""))
    assert store.get("a/für später (1).txt") == b""
    assert store.list("a") == ["a/für später (1).txt"]


def test_absent_objects_are_none_or_an_error_that_names_them(store: Store, tmp_path: Path) -> None:
    assert store.get("a/none") is None
    assert store.head("a/none") is None
    assert store.list("a") == []
    store.delete("a/none")
    with pytest.raises(StoreError, match="has no object a/none"):
        store.get_file("a/none", tmp_path / "none")
    with pytest.raises(StoreError, match="has no object a/none"):
        store.read_digest("a/none")
    assert not (tmp_path / "none").exists()


def test_head_tells_size_and_a_checksum_that_can_be_trusted(store: Store) -> None:
    store.put_bytes("a/b", b"hello")
    stored = store.head("a/b")
    assert stored is not None
    assert stored.num_bytes == 5
    assert stored.checksum in {None, checksum_of(of_bytes(b"hello"))}


def test_a_file_whose_bytes_are_not_those_of_its_digest_is_refused(store: Store, tmp_path: Path) -> None:
    source = tmp_path / "changed.bin"
    source.write_bytes(b"changed")
    with pytest.raises(StoreError, match=r"changed\.bin has digest .* expected .*changed since"):
        store.put_file("a/b", source, digest=of_bytes(b"original"))
    assert store.get("a/b") is None
    assert store.list("a") == []


def test_put_bytes_replaces(store: Store) -> None:
    store.put_bytes("a/b", b"one")
    store.put_bytes("a/b", b"two")
    assert store.get("a/b") == b"two"


def test_create_refuses_a_key_that_is_taken(store: Store) -> None:
    store.create("log/1", b"mine")
    with pytest.raises(ConflictError, match="log/1 exists already"):
        store.create("log/1", b"theirs")
    assert store.get("log/1") == b"mine"


def test_create_twice_with_equal_bytes_is_one_creation(store: Store) -> None:
    store.create("log/1", b"mine")
    store.create("log/1", b"mine")
    assert store.list("log") == ["log/1"]


def test_create_leaves_no_trace_of_its_probe(store: Store) -> None:
    store.create("log/1", b"mine")
    assert store.list("probe") == []


def test_list_is_sorted_and_goes_into_folders_but_not_into_neighbours(store: Store) -> None:
    for key in ("a/2", "a/1", "a/b/3", "ab/4"):
        store.put_bytes(key, b"x")
    assert store.list("a") == ["a/1", "a/2", "a/b/3"]


def test_a_listing_of_several_pages_is_whole(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOTO_S3_DEFAULT_MAX_KEYS", "10")  # S3's own page has 1,000
    count = 25
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda number: store.put_bytes(f"many/{number:05d}", b""), range(count)))
    assert store.list("many") == [f"many/{number:05d}" for number in range(count)]


def test_delete_removes_one_object(store: Store) -> None:
    store.put_bytes("a/1", b"x")
    store.put_bytes("a/2", b"x")
    store.delete("a/1")
    assert store.list("a") == ["a/2"]


@pytest.mark.parametrize(
    "key", ["", "/a", "a/", "a//b", "../a", "a/../b", ".a", "a/.b", "a\\b", "a\nb", "a\0b", "x" * 1025]
)
def test_keys_that_leave_the_store_or_hide_are_refused(store: Store, key: str) -> None:
    with pytest.raises(StoreError, match="cannot be used"):
        store.put_bytes(key, b"")
    with pytest.raises(StoreError, match="cannot be used"):
        check_key(key)


@pytest.mark.parametrize(
    "url",
    [
        "",
        "  ",
        "ftp://host/path",
        "s3://",
        "s3://key:secret@bucket",
        "gs://bucket",
        "s3:/bucket/x",
        "S3:bucket",
        "file:/x",
    ],
)
def test_addresses_of_other_forms_are_refused(url: str) -> None:
    with pytest.raises(StoreError, match="store address"):
        open_store(url)


@pytest.mark.parametrize("text", ["s3:/bucket/x", "S3:bucket", "file:/x"])
def test_an_address_that_lacks_a_slash_is_not_taken_for_a_folder_of_the_project(text: str, tmp_path: Path) -> None:
    with pytest.raises(StoreError, match=r"is unknown; use s3://bucket/prefix"):
        open_store(store_address(text, tmp_path))


def test_addresses_of_folders(tmp_path: Path) -> None:
    folder = tmp_path / "a b"
    assert open_store(str(folder)).url == open_store(folder.as_uri()).url == folder.as_uri()


def test_files_being_written_are_not_listed(tmp_path: Path) -> None:
    store = FileStore(tmp_path)
    store.put_bytes("a/b", b"")
    (tmp_path / "a" / ".c.xyz.part").touch()
    assert store.list("a") == ["a/b"]


def test_a_folder_that_cannot_be_written_is_named_with_the_bytes_it_needs(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StoreError, match=r"cannot write .*file/a/b \(3 bytes\).*permissions and free space"):
        FileStore(tmp_path / "file").put_bytes("a/b", b"abc")


def test_the_registry_does_not_import_torch() -> None:
    code = (
        "import sys, graftline.registry.channel, graftline.registry.releases, graftline.registry.s3_store;"
        "print([name for name in ('torch', 'transformers', 'matplotlib') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_disk_that_is_full_is_named_and_nothing_half_is_left(tmp_path: Path) -> None:
    code = (
        "import resource, sys; from pathlib import Path; from graftline.digest import of_file;"
        "from graftline.registry.store import open_store; source = Path(sys.argv[1]); digest = of_file(source);"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000));"
        "open_store(sys.argv[2]).put_file('a/b', source, digest=digest)"
    )
    (tmp_path / "source").write_bytes(bytes(5_000_000))
    command = [sys.executable, "-c", code, str(tmp_path / "source"), str(tmp_path / "store")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert "StoreError: cannot write" in done.stderr
    assert "store/a/b (5000000 bytes): File too large" in done.stderr
    assert list((tmp_path / "store" / "a").iterdir()) == []
