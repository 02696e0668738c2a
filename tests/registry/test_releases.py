import itertools
import os
from datetime import timedelta
from pathlib import Path

import pytest

from graftline.digest import Digest
from graftline.errors import ReleaseError, StoreError
from graftline.logs import OnProgress, silent
from graftline.registry import releases
from graftline.registry.keys import KeyRing
from graftline.registry.releases import (
    fetch,
    is_whole,
    list_versions,
    load_manifest,
    publish,
    release_key,
    signer,
    verify,
    verify_stored,
)
from graftline.registry.store import Store, open_store
from graftline.release.manifest import MANIFEST_NAME, check_folder, describe, write_manifest
from tests.registry.people import NOW, People
from tests.release.packages import CREATED, LINEAGE, VERDICT, make_package


def test_a_published_release_comes_back_equal(store: Store, tmp_path: Path) -> None:
    manifest = make_package(tmp_path / "package")
    (tmp_path / "package" / "model.sig").write_text("{}")

    published = publish(store, tmp_path / "package")
    fetched = fetch(store, "demo", manifest.version, tmp_path / "fetched")

    assert published == fetched == manifest
    assert list_versions(store, "demo") == [manifest.version]
    assert verify(store, "demo", manifest.version) == manifest
    check_folder(tmp_path / "fetched", manifest)
    assert (tmp_path / "fetched" / "model.sig").read_text() == "{}"


def test_publishing_twice_writes_nothing_twice(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_package(tmp_path / "package")
    publish(store, tmp_path / "package")
    monkeypatch.setattr(type(store), "put_file", _never)
    monkeypatch.setattr(type(store), "put_bytes", _never)
    publish(store, tmp_path / "package")


def _never(*_: object, **__: object) -> None:
    raise AssertionError("nothing should be written")


def test_progress_ends_at_the_size_of_all_files(store: Store, tmp_path: Path) -> None:
    manifest = make_package(tmp_path / "package")
    seen: list[tuple[int, int]] = []
    publish(store, tmp_path / "package", on_progress=lambda done, total: seen.append((done, total)))
    assert seen == sorted(seen)
    assert seen[-1] == (manifest.num_bytes, manifest.num_bytes)


def test_progress_of_verifying_is_told_in_bytes_of_all(file_store: Store, tmp_path: Path) -> None:
    manifest = make_package(tmp_path / "package")
    publish(file_store, tmp_path / "package")
    seen: list[tuple[int, int]] = []
    verify(file_store, "demo", manifest.version, on_progress=lambda done, total: seen.append((done, total)))
    assert [done for done, _ in seen] == list(itertools.accumulate(entry.num_bytes for entry in manifest.files))
    assert {total for _, total in seen} == {manifest.num_bytes}


def test_a_release_is_whole_with_its_manifest_and_every_file_of_it(file_store: Store, tmp_path: Path) -> None:
    manifest = make_package(tmp_path / "package")
    assert not is_whole(file_store, "demo", manifest.version)
    publish(file_store, tmp_path / "package")
    assert is_whole(file_store, "demo", manifest.version)
    for path in (manifest.files[0].path, MANIFEST_NAME):
        key = release_key("demo", manifest.version, path)
        data = file_store.get(key)
        file_store.delete(key)
        assert not is_whole(file_store, "demo", manifest.version)
        file_store.put_bytes(key, data or b"")
    assert is_whole(file_store, "demo", manifest.version)


def test_an_interrupted_publish_is_invisible_and_the_next_one_finishes_it(store: Store, tmp_path: Path) -> None:
    manifest = make_package(tmp_path / "package")
    for _ in manifest.files:  # each call writes one file, and is killed at the next write
        with pytest.raises(KeyboardInterrupt):
            publish(_Interrupted(store, 1), tmp_path / "package")
        assert list_versions(store, "demo") == []
    publish(store, tmp_path / "package")
    assert verify(store, "demo", manifest.version) == manifest


class _Interrupted:
    """A store at which the process is killed before write number ``num_writes``."""

    def __init__(self, store: Store, num_writes: int) -> None:
        self._store, self._left = store, num_writes

    def __getattr__(self, name: str) -> object:
        return getattr(self._store, name)

    def put_file(self, key: str, path: Path, *, digest: Digest, on_progress: OnProgress = silent) -> None:
        self._count()
        self._store.put_file(key, path, digest=digest, on_progress=on_progress)

    def put_bytes(self, key: str, data: bytes) -> None:
        self._count()
        self._store.put_bytes(key, data)

    def _count(self) -> None:
        if self._left == 0:
            raise KeyboardInterrupt
        self._left -= 1


def test_a_store_that_loses_a_file_gets_no_manifest(tmp_path: Path) -> None:
    class Losing(_Interrupted):
        def put_file(self, key: str, path: Path, *, digest: Digest, on_progress: OnProgress = silent) -> None:
            """Answers as if it had stored the file."""

    store = open_store(str(tmp_path / "store"))
    make_package(tmp_path / "package")
    with pytest.raises(StoreError, match="does not hold what was written"):
        publish(Losing(store, 99), tmp_path / "package")
    assert list_versions(store, "demo") == []


def test_a_package_that_is_not_what_its_manifest_says_is_not_published(store: Store, tmp_path: Path) -> None:
    package = tmp_path / "package"
    make_package(package)
    (package / "extra").touch()
    with pytest.raises(ReleaseError, match=r"not in the manifest \['extra'\]"):
        publish(store, package)
    (package / "extra").unlink()
    (package / "README.md").write_text("edited")
    with pytest.raises(StoreError, match="changed since its manifest"):
        publish(store, package)
    (package / "README.md").unlink()
    with pytest.raises(ReleaseError, match=r"missing \['README.md'\]"):
        publish(store, package)
    assert list_versions(store, "demo") == []


def test_a_package_without_manifest_is_not_published(store: Store, tmp_path: Path) -> None:
    with pytest.raises(ReleaseError, match=r"has no manifest\.json"):
        publish(store, tmp_path)


def test_damage_in_the_store_is_found(store: Store, tmp_path: Path) -> None:
    manifest = make_package(tmp_path / "package")
    publish(store, tmp_path / "package")
    key = release_key("demo", manifest.version, "README.md")
    good = store.get(key)
    assert good

    store.put_bytes(key, b"!" + good[1:])
    with pytest.raises(ReleaseError, match=r"damaged: changed: README\.md"):
        verify(store, "demo", manifest.version)
    with pytest.raises(ReleaseError, match=r"README\.md has digest"):
        fetch(store, "demo", manifest.version, tmp_path / "fetched")
    assert not (tmp_path / "fetched").exists()

    store.delete(key)
    with pytest.raises(ReleaseError, match=r"missing: README\.md"):
        verify(store, "demo", manifest.version)

    store.put_bytes(key, good)
    store.put_bytes(release_key("demo", manifest.version, "extra"), b"")
    with pytest.raises(ReleaseError, match="not in the manifest: extra"):
        verify(store, "demo", manifest.version)


def test_a_damaged_file_is_written_again_by_publishing_again(store: Store, tmp_path: Path) -> None:
    manifest = make_package(tmp_path / "package")
    publish(store, tmp_path / "package")
    store.put_bytes(release_key("demo", manifest.version, "README.md"), b"###\n"[: manifest.files[0].num_bytes])
    publish(store, tmp_path / "package")
    assert verify(store, "demo", manifest.version) == manifest


def test_an_unknown_version_is_answered_with_those_that_exist(store: Store, tmp_path: Path) -> None:
    manifest = make_package(tmp_path / "package")
    publish(store, tmp_path / "package")
    with pytest.raises(ReleaseError, match=f"no release '20990101' of 'demo'; the newest there: {manifest.version}"):
        load_manifest(store, "demo", "20990101")


def test_a_manifest_under_another_version_is_refused(store: Store, tmp_path: Path) -> None:
    manifest = make_package(tmp_path / "package")
    store.put_bytes(release_key("demo", "20990101T000000Z-000000000000", "manifest.json"), manifest.to_bytes())
    with pytest.raises(ReleaseError, match="changed or moved"):
        load_manifest(store, "demo", "20990101T000000Z-000000000000")


def test_an_interrupted_fetch_keeps_what_it_has(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest = make_package(tmp_path / "package")
    publish(store, tmp_path / "package")
    last = release_key("demo", manifest.version, manifest.files[-1].path)
    read: list[str] = []
    original = type(store).get_file

    def get_file(self: Store, key: str, path: Path, *, on_progress: OnProgress = silent) -> Digest:
        read.append(key)
        if key == last and len(read) <= len(manifest.files):
            raise KeyboardInterrupt
        return original(self, key, path, on_progress=on_progress)

    monkeypatch.setattr(type(store), "get_file", get_file)
    with pytest.raises(KeyboardInterrupt):
        fetch(store, "demo", manifest.version, tmp_path / "fetched")
    assert not (tmp_path / "fetched").exists()
    read_before = len(read)
    fetch(store, "demo", manifest.version, tmp_path / "fetched")
    assert read[read_before:] == [last]


def test_fetching_into_a_folder_with_something_else_is_refused(store: Store, tmp_path: Path) -> None:
    manifest = make_package(tmp_path / "package")
    publish(store, tmp_path / "package")
    (tmp_path / "fetched").mkdir()
    (tmp_path / "fetched" / "mine.txt").touch()
    with pytest.raises(ReleaseError, match=r"not in the manifest: mine\.txt"):
        fetch(store, "demo", manifest.version, tmp_path / "fetched")
    assert (tmp_path / "fetched" / "mine.txt").exists()


def test_a_removed_release_is_gone(store: Store, tmp_path: Path) -> None:
    manifest = make_package(tmp_path / "package")
    publish(store, tmp_path / "package")
    releases.remove(store, "demo", manifest.version)
    assert list_versions(store, "demo") == []
    assert store.list(release_key("demo", manifest.version)) == []


def test_versions_of_different_content_differ(tmp_path: Path) -> None:
    first, second = make_package(tmp_path / "1", "a"), make_package(tmp_path / "2", "b")
    assert first.version != second.version
    assert first.version.startswith("20261124T061800Z-")
    write_manifest(tmp_path / "1", first)  # writing it again changes nothing
    assert first.digest.short == first.version.rpartition("-")[2]


def test_what_servers_would_take_is_found_good_in_the_store(store: Store, tmp_path: Path) -> None:
    people = People(tmp_path)
    manifest = people.release(store, tmp_path / "package")
    assert verify_stored(store, "demo", manifest.version, people.keys, now=NOW) == manifest
    assert signer(store, manifest, people.keys, now=NOW) == "bob"


@pytest.mark.parametrize(
    "name", ["README.md", "adapter/adapter_model.safetensors", "empty.txt", "notes für später.txt"]
)
def test_a_file_that_the_store_lost_or_changed_is_refused_whatever_a_copy_holds(
    store: Store, tmp_path: Path, name: str
) -> None:
    people = People(tmp_path)
    manifest = people.release(store, tmp_path / "package")
    fetch(store, "demo", manifest.version, tmp_path / "copy")
    key = release_key("demo", manifest.version, name)
    good = store.get(key)
    assert good is not None
    for data in {b"!" + good[1:], good + b"!", good[:-1]} - {good}:
        store.put_bytes(key, data)
        with pytest.raises(ReleaseError, match=f"damaged: changed: {name}"):
            verify_stored(store, "demo", manifest.version, people.keys, now=NOW, copy=tmp_path / "copy")
    store.delete(key)
    with pytest.raises(ReleaseError, match=f"damaged: missing: {name}"):
        verify_stored(store, "demo", manifest.version, None, now=NOW, copy=tmp_path / "copy")


def test_a_signature_that_the_store_lost_or_changed_is_refused_whatever_a_copy_holds(
    store: Store, tmp_path: Path
) -> None:
    people = People(tmp_path)
    manifest, other = (people.release(store, tmp_path / seed, seed) for seed in "ab")
    key = release_key("demo", manifest.version, "model.sig")
    of_another = store.get(release_key("demo", other.version, "model.sig"))
    assert of_another is not None
    for data in (b"", b"{}", of_another):
        store.put_bytes(key, data)
        with pytest.raises(ReleaseError, match=rf"{manifest.version}.*signature is of none whose key"):
            verify_stored(store, "demo", manifest.version, people.keys, now=NOW)
    store.delete(key)
    with pytest.raises(ReleaseError, match=r"has no model\.sig: it was never signed, or the signature was lost"):
        verify_stored(store, "demo", manifest.version, people.keys, now=NOW)
    assert verify_stored(store, "demo", manifest.version, None, now=NOW) == manifest


def test_a_builder_who_has_left_counts_no_longer_in_the_store(store: Store, tmp_path: Path) -> None:
    people = People(tmp_path)
    manifest = people.release(store, tmp_path / "package")
    keys = KeyRing({name: key for name, key in people.keys.keys.items() if name != "bob"})
    with pytest.raises(ReleaseError, match=r"of none whose key has the role 'builder' now \(ada\)"):
        verify_stored(store, "demo", manifest.version, keys, now=NOW)


def test_a_builder_s_key_counts_in_the_store_until_it_expires(file_store: Store, tmp_path: Path) -> None:
    people = People(tmp_path, expires={"bob": NOW})
    manifest = people.release(file_store, tmp_path / "package")
    assert signer(file_store, manifest, people.keys, now=NOW - timedelta(hours=1)) == "bob"
    with pytest.raises(ReleaseError, match=r"of none whose key has the role 'builder' now \(ada\)"):
        signer(file_store, manifest, people.keys, now=NOW + timedelta(hours=1))


def test_a_large_file_is_compared_with_a_copy_or_read(
    ministack_store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, package = ministack_store, tmp_path / "package"
    package.mkdir()
    (package / "model.bin").write_bytes(os.urandom(1 << 20) * 40)
    manifest = describe(package, pipeline="demo", created=CREATED, lineage=LINEAGE, verdict=VERDICT)
    write_manifest(package, manifest)
    publish(store, package)
    read: list[str] = []
    original = type(store).read_digest
    monkeypatch.setattr(type(store), "read_digest", lambda self, key: (read.append(key), original(self, key))[1])

    verify_stored(store, "demo", manifest.version, None, now=NOW, copy=package)
    assert read == []
    verify_stored(store, "demo", manifest.version, None, now=NOW)
    assert read == [release_key("demo", manifest.version, "model.bin")]
    (package / "model.bin").write_bytes(b"the copy is damaged, the store is not")
    verify_stored(store, "demo", manifest.version, None, now=NOW, copy=package)
    assert len(read) == 2
    (package / "model.bin").unlink()
    verify_stored(store, "demo", manifest.version, None, now=NOW, copy=package)
    assert len(read) == 3
