"""Folders as stores on file systems of every kind: what cannot be seen is said, what they lack is done without."""

import errno
import multiprocessing
import os
import stat
import tempfile
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from graftline.digest import of_bytes
from graftline.errors import ConflictError, StoreError, StoreUnavailableError
from graftline.registry import channel, cleanup, file_store, file_system
from graftline.registry.file_store import FileStore
from graftline.registry.store import open_store

_FORK = multiprocessing.get_context("fork")


def refusing(number: int) -> Any:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number))

    return refuse


@pytest.fixture
def no_links(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "link", refusing(errno.EPERM))


def as_nobody(work: Any) -> str:
    """What ``work`` says, or the error that it ends in, as a user without rights (root reads everything)."""
    if os.getuid() != 0:
        pytest.skip("needs root, to become somebody else")
    answers = _FORK.Queue()

    def run() -> None:
        os.setgid(65534)
        os.setuid(65534)
        try:
            answers.put(f"said {work()}")
        except Exception as error:  # noqa: BLE001 - the test says which it wants
            answers.put(f"{type(error).__name__} {error}")

    process = _FORK.Process(target=run)
    process.start()
    answer = answers.get(timeout=120)
    process.join(60)
    return str(answer)


@pytest.fixture
def shared(tmp_path: Path) -> Iterator[FileStore]:
    """A store whose folders everybody may enter."""
    below = Path(tempfile.gettempdir()).resolve()
    for folder in (tmp_path, *tmp_path.parents):
        if folder.resolve() != below and folder.resolve().is_relative_to(below):
            folder.chmod(0o755)
    (tmp_path / "store").mkdir(mode=0o777)
    (tmp_path / "store").chmod(0o777)
    store = FileStore(tmp_path / "store")
    store.put_bytes("channels/demo/production/1.json", b"entry")
    yield store
    for folder, _, _ in os.walk(tmp_path / "store"):
        Path(folder).chmod(0o777)


@pytest.mark.parametrize("closed", ["channels/demo/production", "channels/demo", "channels", ""])
@pytest.mark.parametrize("mode", [0o700, 0o711])
def test_a_folder_that_may_not_be_listed_is_an_error_and_not_empty(
    shared: FileStore, tmp_path: Path, closed: str, mode: int
) -> None:
    (tmp_path / "store" / closed).chmod(mode)
    if closed == "" and mode == 0o711:
        assert as_nobody(lambda: shared.list("channels")) == "said ['channels/demo/production/1.json']"
        return
    answer = as_nobody(lambda: shared.list("channels"))
    assert answer.startswith("StoreError cannot list file://")
    assert "Permission denied; check the permissions there" in answer


@pytest.mark.parametrize("act", ["get", "head", "read_digest", "put_bytes", "create", "delete", "get_file"])
def test_every_refusal_of_the_operating_system_is_a_store_error(shared: FileStore, tmp_path: Path, act: str) -> None:
    folder = tmp_path / "store" / "channels" / "demo" / "production"
    folder.chmod(0o700)
    more: dict[str, tuple[Any, ...]] = {"put_bytes": (b"",), "create": (b"",), "get_file": (tmp_path / "copy",)}
    key = "channels/demo/production/1.json"
    answer = as_nobody(lambda: getattr(shared, act)(key, *more.get(act, ())))
    assert answer.startswith("StoreError cannot "), answer
    assert "Permission denied" in answer


def test_folders_are_as_open_as_the_stores_root_whatever_somebodys_umask_is(tmp_path: Path) -> None:
    (tmp_path / "store").mkdir()
    (tmp_path / "store").chmod(0o775)
    before = os.umask(0o077)
    try:
        FileStore(tmp_path / "store").put_bytes("channels/demo/production/1.json", b"entry")
    finally:
        os.umask(before)
    folders = [path for path in (tmp_path / "store").rglob("*") if path.is_dir()]
    assert {stat.S_IMODE(path.stat().st_mode) for path in folders} == {0o775}


@pytest.mark.parametrize(
    ("number", "kind", "hint"),
    [
        (errno.EIO, StoreUnavailableError, "the disk or the mount has failed"),
        (errno.ESTALE, StoreUnavailableError, "the disk or the mount has failed"),
        (errno.ENOTCONN, StoreUnavailableError, "the disk or the mount has failed"),
        (errno.EROFS, StoreError, "mounted read-only"),
        (errno.ENOSPC, StoreError, "free some space"),
        (errno.EDQUOT, StoreError, "quota"),
        (errno.ENAMETOOLONG, StoreError, "use a shorter one"),
        (errno.EMFILE, StoreError, "permissions and free space"),
    ],
)
def test_errors_of_a_disk_say_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, kind: type[StoreError], hint: str
) -> None:
    store = FileStore(tmp_path)
    store.put_bytes("a/b", b"1")
    with monkeypatch.context() as patched:
        patched.setattr(os, "scandir", refusing(number))
        with pytest.raises(kind, match=f"cannot list .*{hint}"):
            store.list("a")
    with monkeypatch.context() as patched:
        patched.setattr(Path, "read_bytes", refusing(number))
        with pytest.raises(kind, match=f"cannot read .*{hint}"):
            store.get("a/b")
    with monkeypatch.context() as patched:
        patched.setattr(file_store, "of_file", refusing(number))
        with pytest.raises(kind, match=f"cannot read .*{hint}"):
            store.head("a/b")
    with monkeypatch.context() as patched:
        patched.setattr(Path, "replace", refusing(number))
        with pytest.raises(kind, match=rf"cannot write .*\(1 bytes\).*{hint}.*the store is as it was"):
            store.put_bytes("a/b", b"2")
    assert store.get("a/b") == b"1"


def test_a_name_that_is_too_long_is_a_store_error(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="use a shorter one"):
        FileStore(tmp_path).put_bytes(f"a/{'x' * 300}", b"")
    longest = "ü" * 127  # 254 bytes: the hidden name beside it must not be longer
    FileStore(tmp_path).put_bytes(f"a/{longest}", b"1")
    assert FileStore(tmp_path).get(f"a/{longest}") == b"1"


def test_a_source_that_cannot_be_read_is_named_and_not_the_store(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match=r"cannot read .*absent: No such file"):
        FileStore(tmp_path / "store").put_file("a/b", tmp_path / "absent", digest=of_bytes(b""))


@pytest.mark.parametrize("name", [".DS_Store", ".snapshot/1.json", "a\nb", "back\\slash", os.fsdecode(b"\xff")])
def test_what_is_not_ours_is_named_once_and_left_alone(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str
) -> None:
    store = FileStore(tmp_path)
    store.put_bytes("channels/demo/production/1.json", b"entry")
    foreign = tmp_path / "channels" / "demo" / "production" / name
    foreign.parent.mkdir(exist_ok=True)
    foreign.touch()
    for _ in range(3):
        assert store.list("channels") == ["channels/demo/production/1.json"]
    assert caplog.text.count("is not of this registry; it is left alone") == 1
    assert foreign.exists()


def test_a_link_to_a_folder_is_followed_and_one_to_nothing_is_an_error(tmp_path: Path) -> None:
    store = FileStore(tmp_path / "store")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "1.json").write_bytes(b"entry")
    (tmp_path / "store" / "channels").mkdir(parents=True)
    (tmp_path / "store" / "channels" / "production").symlink_to(tmp_path / "elsewhere")
    assert store.list("channels") == ["channels/production/1.json"]
    (tmp_path / "elsewhere").rename(tmp_path / "unmounted")
    with pytest.raises(StoreError, match="a link points at what is not there; mount it"):
        store.list("channels")
    with pytest.raises(StoreError, match="a link points at what is not there; mount it"):
        store.list("channels/production")
    (tmp_path / "store" / "circle").mkdir()
    (tmp_path / "store" / "circle" / "again").symlink_to(tmp_path / "store" / "circle")
    with pytest.raises(StoreError, match=r"links there form a circle"):
        store.list("circle")


def test_what_is_no_plain_file_is_not_read(tmp_path: Path) -> None:
    store = FileStore(tmp_path)
    (tmp_path / "a").mkdir()
    os.mkfifo(tmp_path / "a" / "pipe")
    assert store.list("a") == []
    for look in (store.get, store.head, store.read_digest):
        with pytest.raises(StoreError, match="is no plain file"):
            look("a/pipe")


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOTSUP, errno.ENOSYS, errno.EBADF])
@pytest.mark.parametrize("everything", [False, True])
def test_where_folders_cannot_be_synced_an_entry_is_in_force_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, everything: bool
) -> None:
    original = os.fsync

    def fsync(handle: int) -> None:
        if everything or stat.S_ISDIR(os.fstat(handle).st_mode):
            raise OSError(number, os.strerror(number))
        original(handle)

    monkeypatch.setattr(os, "fsync", fsync)
    store = FileStore(tmp_path)
    store.create("log/1", b"mine")
    store.put_bytes("a/b", b"1")
    assert store.get("log/1") == b"mine"
    with pytest.raises(ConflictError):
        store.create("log/1", b"theirs")


def test_a_folder_whose_sync_fails_is_said_to_hold_what_was_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = os.fsync

    def fsync(handle: int) -> None:
        if stat.S_ISDIR(os.fstat(handle).st_mode):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        original(handle)

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(StoreUnavailableError, match="it is written, and may be lost if the machine loses power now"):
        FileStore(tmp_path).create("log/1", b"mine")
    assert (tmp_path / "log" / "1").read_bytes() == b"mine"


def test_where_files_have_no_modes_they_are_written_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Path, "chmod", refusing(errno.EPERM))
    FileStore(tmp_path).put_bytes("a/b/c", b"1")
    assert FileStore(tmp_path).get("a/b/c") == b"1"


@pytest.mark.parametrize("number", sorted(file_system.NO_HARD_LINKS))
def test_an_entry_is_created_once_without_hard_links(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    monkeypatch.setattr(os, "link", refusing(number))
    store = FileStore(tmp_path)
    store.create("log/1", b"mine")
    store.create("log/1", b"mine")
    with pytest.raises(ConflictError, match="log/1 exists already"):
        store.create("log/1", b"theirs")
    assert store.get("log/1") == b"mine"
    assert [path.name for path in (tmp_path / "log").iterdir()] == ["1"]


def _create_often(root: Path, number: int, rounds: int, together: Any, answers: Any) -> None:
    for entry in range(rounds):
        together.wait(300)
        try:
            FileStore(root).create(f"log/{entry}", f"{number}".encode() * 1000)
            answers.put((entry, number))
        except ConflictError:
            answers.put((entry, None))


def test_of_many_creators_without_hard_links_one_wins(tmp_path: Path, no_links: None) -> None:
    num_processes, rounds = 8, 15
    together, answers = _FORK.Barrier(num_processes), _FORK.Queue()
    processes = [
        _FORK.Process(target=_create_often, args=(tmp_path, number, rounds, together, answers))
        for number in range(num_processes)
    ]
    for process in processes:
        process.start()
    told = [answers.get(timeout=300) for _ in range(num_processes * rounds)]
    for process in processes:
        process.join(60)
    winners = sorted((entry, number) for entry, number in told if number is not None)
    assert [entry for entry, _ in winners] == list(range(rounds))
    for entry, number in winners:
        assert FileStore(tmp_path).get(f"log/{entry}") == f"{number}".encode() * 1000
    assert len(list((tmp_path / "log").iterdir())) == rounds


def _die_at(step: int, root: Path) -> None:
    left = step

    def counted(original: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal left
            left -= 1
            if left == 0:
                os.kill(os.getpid(), 9)
            return original(*args, **kwargs)

        return call

    for name in ("rename", "replace", "fsync", "unlink", "mkdir", "rmdir"):
        setattr(os, name, counted(getattr(os, name)))
    FileStore(root).create("log/1", b"first " * 100)


def test_a_creator_without_hard_links_that_is_killed_leaves_nothing_half(tmp_path: Path, no_links: None) -> None:
    killed, step = True, 0
    while killed:
        step += 1
        root = tmp_path / str(step)
        process = _FORK.Process(target=_die_at, args=(step, root))
        process.start()
        process.join(60)
        killed = process.exitcode == -9
        store = FileStore(root)
        seen = store.get("log/1")
        assert seen in {None, b"first " * 100}
        try:
            store.create("log/1", b"second")
            assert seen is None
            assert store.get("log/1") == b"second"
        except ConflictError:
            assert store.get("log/1") == b"first " * 100
    assert step > 8


def test_a_claim_of_somebody_who_was_killed_is_finished_by_the_next(tmp_path: Path, no_links: None) -> None:
    store = FileStore(tmp_path)
    claim = tmp_path / "log" / f".1{file_system.CLAIM}"
    claim.mkdir(parents=True)
    (claim / "content").write_bytes(b"theirs, and whole")
    with pytest.raises(ConflictError):
        store.create("log/1", b"mine")
    assert store.get("log/1") == b"theirs, and whole"
    assert not claim.exists()


def test_a_folder_that_somebody_removes_because_it_is_empty_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, original = FileStore(tmp_path), file_store.make_folder
    left = [3]

    def made_and_removed(folder: Path, *, root: Path | None) -> None:
        original(folder, root=root)
        if left[0]:
            left[0] -= 1
            folder.rmdir()

    monkeypatch.setattr(file_store, "make_folder", made_and_removed)
    store.put_bytes("leases/demo/host.json", b"1")
    assert store.get("leases/demo/host.json") == b"1"


def test_hidden_parts_of_writers_who_were_killed_are_seen_and_can_be_removed(tmp_path: Path) -> None:
    store = FileStore(tmp_path)
    store.put_bytes("releases/demo/v/README.md", b"x")
    part = tmp_path / "releases" / "demo" / "v" / ".weights.bin.abcd_123.part"
    part.write_bytes(bytes(100))
    (tmp_path / "releases" / "demo" / "v" / ".hidden").touch()
    (found,) = store.unfinished("releases")
    assert (found.key, found.num_bytes) == ("releases/demo/v/weights.bin", 100)
    assert abs(found.modified.timestamp() - part.stat().st_mtime) < timedelta(seconds=1).total_seconds()
    store.discard(found)
    store.discard(found)
    assert store.unfinished("releases") == ()
    assert store.list("releases") == ["releases/demo/v/README.md"]


@pytest.mark.parametrize("name", ["st#1", "a?b", "100%", "a b", "ä"])
def test_a_folder_whose_name_means_something_in_an_address_is_that_folder(tmp_path: Path, name: str) -> None:
    folder = tmp_path / name
    plain = f"file://{tmp_path}/{name.replace('%', '%25')}"
    for address in (str(folder), folder.as_uri(), plain, plain.replace("file", "FILE")):
        store = open_store(address)
        store.put_bytes("a/b", b"1")
        assert store.url == folder.as_uri()
    assert (folder / "a" / "b").read_bytes() == b"1"


def test_a_tilde_is_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert open_store("~/store").url == (tmp_path / "store").as_uri()
    with pytest.raises(StoreError, match="names no folder"):
        open_store("~nobody-of-that-name/store")


@pytest.mark.parametrize(
    "address",
    ["file://server/share", "file://~/store", "file://", "s3://bucket/a#b", "s3://bucket/a?b", "a\0b", "a\nb"],
)
def test_addresses_that_would_be_read_as_others_are_refused(address: str) -> None:
    with pytest.raises(StoreError, match="store address"):
        open_store(address)


@pytest.mark.parametrize("place", ["", "channels", "channels/demo", "channels/demo/production"])
def test_a_file_where_a_folder_should_be_never_reads_as_nothing_there(tmp_path: Path, place: str) -> None:
    path = tmp_path / "store" / place
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"mine")
    store = FileStore(tmp_path / "store")
    key = "channels/demo/production/0000000001.json"
    looks: list[Callable[[], object]] = [
        lambda: store.get(key),
        lambda: store.head(key),
        lambda: store.list("channels/demo/production"),
        lambda: channel.read(store, "demo", "production"),
        lambda: cleanup.plan_cleanup(store, "demo", rules=cleanup.RetentionRules(), now=datetime.now(UTC)),
    ]
    for look in looks:
        with pytest.raises(StoreError, match="a file is where a folder should be"):
            look()
    assert path.read_bytes() == b"mine"
