"""Local copies of releases: shared by processes, mended when they are damaged, never in the way of what is not ours."""

import multiprocessing
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from graftline.errors import GraftlineError, ReleaseError, StoreError
from graftline.registry import copies
from graftline.registry.releases import fetch, publish, release_key
from graftline.registry.store import Store
from graftline.release.manifest import Manifest, check_folder
from graftline.release.signing import sign_folder
from tests.registry.people import NOW, People
from tests.release.packages import make_package

_FORK = multiprocessing.get_context("fork")


@pytest.fixture
def release(file_store: Store, tmp_path: Path) -> Manifest:
    return People(tmp_path).release(file_store, tmp_path / "package")


def _fetch_often(store: Store, version: str, cache: Path, rounds: int, together: Any, answers: Any) -> None:
    for number in range(rounds):
        together.wait(300)
        try:
            fetch(store, "demo", version, cache / str(number) / version)
            answers.put("")
        except Exception as error:  # noqa: BLE001 - the test says what it was
            answers.put(repr(error))


@pytest.mark.parametrize("has_locks", [True, False])
def test_of_processes_that_fetch_into_one_folder_none_fails(
    file_store: Store, release: Manifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, has_locks: bool
) -> None:
    if not has_locks:

        def refuse(*_: object) -> None:
            raise OSError(38, "Function not implemented")

        monkeypatch.setattr(copies.fcntl, "flock", refuse)
    num_processes, rounds = 6, 10
    together, answers = _FORK.Barrier(num_processes), _FORK.Queue()
    arguments = (file_store, release.version, tmp_path / "cache", rounds, together, answers)
    processes = [_FORK.Process(target=_fetch_often, args=arguments) for _ in range(num_processes)]
    for process in processes:
        process.start()
    assert [answers.get(timeout=300) for _ in range(num_processes * rounds)] == [""] * num_processes * rounds
    for process in processes:
        process.join(60)
    for number in range(rounds):
        check_folder(tmp_path / "cache" / str(number) / release.version, release)
        assert [path.name for path in (tmp_path / "cache" / str(number)).iterdir()] == [release.version]


def _damage_contents(copy: Path) -> None:
    (copy / "README.md").write_text("# b\n")


def _cut(copy: Path) -> None:
    (copy / "adapter" / "adapter_model.safetensors").write_bytes(b"")


def _remove_a_folder(copy: Path) -> None:
    shutil.rmtree(copy / "adapter")


def _empty_the_manifest(copy: Path) -> None:
    (copy / "manifest.json").write_bytes(b"")


def _leave_a_part(copy: Path) -> None:
    (copy / ".README.md.abcd1234.part").write_bytes(b"# ")
    (copy / "adapter" / "adapter_model.safetensors.part").write_bytes(b"aa")


@pytest.mark.parametrize("damage", [_damage_contents, _cut, _remove_a_folder, _empty_the_manifest, _leave_a_part])
def test_a_damaged_copy_is_mended(file_store: Store, release: Manifest, tmp_path: Path, damage: Any) -> None:
    copy = tmp_path / "cache" / release.version
    fetch(file_store, "demo", release.version, copy)
    good = {path.name: path.stat().st_ino for path in copy.rglob("*")}
    damage(copy)
    fetch(file_store, "demo", release.version, copy)
    check_folder(copy, release)
    assert (copy / "manifest.json").read_bytes() == release.to_bytes()
    assert sorted(good) == sorted(path.name for path in copy.rglob("*"))
    untouched = "notes für später.txt"
    assert (copy / untouched).stat().st_ino == good[untouched], "what was whole is not fetched again"


def test_a_signature_made_later_reaches_every_copy(file_store: Store, tmp_path: Path) -> None:
    people = People(tmp_path)
    manifest = people.release(file_store, tmp_path / "package", builder=None)
    copy = tmp_path / "cache" / manifest.version
    fetch(file_store, "demo", manifest.version, copy)
    with pytest.raises(ReleaseError, match=r"no model\.sig"):
        people.keys.verify_release(copy, now=NOW)
    sign_folder(tmp_path / "package", people.private_key("ada"))
    publish(file_store, tmp_path / "package")
    fetch(file_store, "demo", manifest.version, copy)
    assert people.keys.verify_release(copy, now=NOW) == "ada"


def test_a_signature_that_the_store_no_longer_has_is_no_longer_in_a_copy(
    file_store: Store, release: Manifest, tmp_path: Path
) -> None:
    copy = tmp_path / "cache" / release.version
    fetch(file_store, "demo", release.version, copy)
    file_store.delete(release_key("demo", release.version, "model.sig"))
    fetch(file_store, "demo", release.version, copy)
    assert not (copy / "model.sig").exists()


def test_a_release_goes_into_an_empty_folder(file_store: Store, release: Manifest, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    fetch(file_store, "demo", release.version, tmp_path / "empty")
    check_folder(tmp_path / "empty", release)


def test_what_is_below_a_file_is_said_not_to_be_writable(file_store: Store, release: Manifest, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StoreError, match=r"cannot write .*file/x: .*a file is where a folder should be"):
        fetch(file_store, "demo", release.version, tmp_path / "file" / "x")
    with pytest.raises(GraftlineError, match="file"):
        fetch(file_store, "demo", release.version, tmp_path / "file")
    assert (tmp_path / "file").read_bytes() == b""


def test_another_release_or_anybody_elses_file_in_the_folder_is_left_alone(
    file_store: Store, release: Manifest, tmp_path: Path
) -> None:
    make_package(tmp_path / "other", "b")
    before = {path: path.read_bytes() for path in (tmp_path / "other").rglob("*") if path.is_file()}
    with pytest.raises(ReleaseError, match=r"changed: README\.md"):
        fetch(file_store, "demo", release.version, tmp_path / "other")
    assert {path: path.read_bytes() for path in (tmp_path / "other").rglob("*") if path.is_file()} == before

    copy = tmp_path / "cache" / release.version
    fetch(file_store, "demo", release.version, copy)
    (copy / "mine.txt").touch()
    (copy / "README.md").unlink()
    with pytest.raises(ReleaseError, match=r"not in the manifest: mine\.txt.*or move away"):
        fetch(file_store, "demo", release.version, copy)
    assert (copy / "mine.txt").exists()


def test_a_copy_is_on_the_disk_before_it_has_its_name(
    file_store: Store, release: Manifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy, synced = tmp_path / "cache" / release.version, set[str]()
    original = os.fsync

    def fsync(handle: int) -> None:
        if not copy.exists():
            synced.add(Path(os.readlink(f"/proc/self/fd/{handle}")).name)
        original(handle)

    monkeypatch.setattr(os, "fsync", fsync)
    fetch(file_store, "demo", release.version, copy)
    assert {name.split(".")[1] for name in synced if name.endswith(".part")} >= {"README", "adapter_model", "manifest"}
    assert "adapter" in synced


@pytest.mark.parametrize("is_there", [True, False])
def test_a_release_goes_where_a_link_points(
    file_store: Store, release: Manifest, tmp_path: Path, is_there: bool
) -> None:
    if is_there:
        (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "disk")
    assert fetch(file_store, "demo", release.version, tmp_path / "link") == release
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "disk" / "manifest.json").read_bytes() == release.to_bytes()
