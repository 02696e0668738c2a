"""A store in a folder: objects appear by rename, and objects that must not exist yet by a hard link.

``link(2)`` fails if the name exists, on local file systems and on NFS alike, and the linked file is complete before it
gets its name, so a killed promoter leaves no partial entry. On file systems without hard links (exFAT, some network and
cloud mounts) a folder is renamed instead, see `graftline.registry.file_system`.
"""

import contextlib
import os
import re
import stat
import tempfile
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import IO

from graftline.digest import Digest, HashingFile, of_file
from graftline.errors import ConflictError, StoreError
from graftline.logs import OnProgress, silent
from graftline.registry.file_system import (
    CLAIM,
    NO_HARD_LINKS,
    create_without_links,
    explain,
    make_folder,
    sync,
    sync_folder,
    walk,
)
from graftline.registry.objects import (
    ForeignObjects,
    ListedObject,
    ObjectInfo,
    Seen,
    UnfinishedWrite,
    check_key,
    checksum_of,
    is_key,
    reading,
)

_CHUNK_BYTES = 4 << 20
_PART = re.compile(r"\.(.*)\.[a-z0-9_]{8}\.part")
_TRIES = 20  # to create a file in a folder that others remove whenever it is empty


class FileStore:
    """A store in a local or mounted folder, which is created at the first write."""

    def __init__(self, root: Path, *, seen: Path | None = None) -> None:
        self._root = root.absolute()
        self.seen = Seen(self.url, seen)
        self._foreign = ForeignObjects(self.url)

    @property
    def url(self) -> str:
        """The folder as a ``file://`` address."""
        return self._root.as_uri()

    def put_file(self, key: str, path: Path, *, digest: Digest, on_progress: OnProgress = silent) -> None:
        """Copy a file, hashed on the way. See `Store.put_file`."""
        target = self._path(key)
        with reading(path):
            num_bytes = path.stat().st_size
        with _temporary(target, num_bytes, self._root) as (stream, temporary):
            found = _copy(path, stream, num_bytes, on_progress)
            if found != digest:
                raise StoreError(
                    f"{path} has digest {found}, expected {digest}; it changed since its manifest was written"
                )
            temporary.replace(target)

    def put_bytes(self, key: str, data: bytes) -> None:
        """Write bytes; an object of that key is replaced."""
        target = self._path(key)
        with _temporary(target, len(data), self._root) as (stream, temporary):
            stream.write(data)
            sync(stream)
            temporary.replace(target)

    def create(self, key: str, data: bytes) -> None:
        """Write bytes only if the key is absent. See `Store.create`."""
        target = self._path(key)
        with _temporary(target, len(data), self._root) as (stream, temporary):
            stream.write(data)
            sync(stream)
            if not _create(temporary, target) and self._read(key) != data:
                raise ConflictError(f"{self.url}/{key} exists already: somebody else wrote it first")

    def get(self, key: str) -> bytes | None:
        """The object's bytes; None if there is none."""
        return None if self._look(key) is None else self._read(key)

    def get_file(self, key: str, path: Path, *, on_progress: OnProgress = silent) -> Digest:
        """Copy an object into a file. See `Store.get_file`."""
        num_bytes = self._present(key).st_size
        with _temporary(path, num_bytes, None) as (stream, temporary):
            digest = _copy(self._path(key), stream, num_bytes, on_progress)
            temporary.replace(path)
        return digest

    def read_digest(self, key: str) -> Digest:
        """Digest of the file's bytes as they are on the disk now."""
        self._present(key)
        with self._explained("read", key):
            return of_file(self._path(key))

    def head(self, key: str) -> ObjectInfo | None:
        """Size and checksum of the file as it is on the disk now: it is read."""
        found = self._look(key)
        return ObjectInfo(found.st_size, checksum_of(self.read_digest(key))) if found else None

    def list(self, prefix: str) -> list[str]:
        """Keys below the folder ``prefix``, sorted."""
        return [listed.key for listed in self.listing(prefix)]

    def listing(self, prefix: str) -> tuple[ListedObject, ...]:
        """Objects below the folder ``prefix``. See `Store.listing`."""
        found = []
        for path, status in self._walk(prefix):
            key = self._key(path)
            if _part_of(key):
                continue
            if is_key(key) and stat.S_ISREG(status.st_mode):
                found.append(ListedObject(key, status.st_size, _time(status)))
            else:
                self._foreign.name(key)
        return tuple(sorted(found))

    def unfinished(self, prefix: str) -> tuple[UnfinishedWrite, ...]:
        """Hidden files that are being written, or were left by somebody who was killed. See `Store.unfinished`."""
        found = []
        for path, status in self._walk(prefix):
            if key := _part_of(self._key(path)):
                found.append(UnfinishedWrite(key, status.st_size, _time(status), self._key(path)))
        return tuple(sorted(found))

    def discard(self, unfinished: UnfinishedWrite) -> None:
        """Remove a hidden file. See `Store.discard`."""
        if not _part_of(unfinished.handle):
            raise StoreError(f"{unfinished.handle} was given; expected the hidden file of an unfinished write")
        self._remove(self._root / unfinished.handle, unfinished.handle)

    def delete(self, key: str) -> None:
        """Remove an object, and its folders when they become empty."""
        self._remove(self._path(key), key)

    def _remove(self, path: Path, key: str) -> None:
        with self._explained("remove", key):
            try:
                path.unlink()
            except (FileNotFoundError, NotADirectoryError):
                return
        with contextlib.suppress(OSError):
            for folder in path.parents:
                if folder == self._root:
                    break
                folder.rmdir()

    def _walk(self, prefix: str) -> Iterator[tuple[Path, os.stat_result]]:
        with self._explained("list", prefix):
            # Hidden folders of other programs (snapshots, trash) may be unreadable; they hold nothing of the store.
            yield from walk(
                self._path(prefix), enter=lambda name: not name.startswith(".") or _part_of(name) is not None
            )

    def _look(self, key: str) -> os.stat_result | None:
        """The file's status; None if there is no such file. Raises StoreError where that cannot be told."""
        path = self._path(key)
        with self._explained("read", key):
            try:
                found = path.stat()
            except FileNotFoundError:
                if path.is_symlink():
                    raise
                return None
        if not stat.S_ISREG(found.st_mode):
            raise StoreError(f"{self.url}/{key} is no plain file; find out who put it there, then move it away")
        return found

    def _present(self, key: str) -> os.stat_result:
        found = self._look(key)
        if found is None:
            raise StoreError(f"the store {self.url} has no object {key}")
        return found

    def _read(self, key: str) -> bytes:
        with self._explained("read", key):
            return self._path(key).read_bytes()

    def now(self) -> datetime | None:
        """The time that the file system gives a file written now; None while there is no folder."""
        if not self._root.is_dir():
            return None
        with _temporary(self._root / "clock", 1, self._root) as (stream, temporary):
            stream.write(b".")
            sync(stream)
            return datetime.fromtimestamp(temporary.stat().st_mtime, UTC)

    def _path(self, key: str) -> Path:
        return self._root / check_key(key)

    def _key(self, path: Path) -> str:
        return path.relative_to(self._root).as_posix()

    @contextlib.contextmanager
    def _explained(self, doing: str, key: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise explain(error, f"cannot {doing} {self.url}/{key}") from error


def _part_of(key: str) -> str | None:
    """The key that an unfinished write would have got, from the path of its hidden file; None for other paths."""
    components = key.split("/")
    for index, component in enumerate(components):
        if part := _PART.fullmatch(component):
            return "/".join([*components[:index], part[1] or "unknown"])
        if component.startswith(".") and component.endswith(CLAIM):
            return "/".join([*components[:index], component[1 : -len(CLAIM)]])
    return None


def _create(temporary: Path, target: Path) -> bool:
    """Give a complete file its name, unless the name is taken; returns whether it was free."""
    try:
        os.link(temporary, target)
    except FileExistsError:
        return False
    except OSError as error:
        if error.errno not in NO_HARD_LINKS:
            raise
        return create_without_links(temporary, target)
    return True


@contextlib.contextmanager
def _temporary(target: Path, num_bytes: int, root: Path | None) -> Iterator[tuple[IO[bytes], Path]]:
    """A hidden file beside ``target``, always removed at the end; then the folder is synced."""
    try:
        handle, temporary = _make_part(target, root)
        try:
            with os.fdopen(handle, "wb") as stream:
                with contextlib.suppress(OSError):  # some file systems have no modes
                    temporary.chmod(0o644)
                yield stream, temporary
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        what = f"cannot write {target} ({num_bytes} bytes)"
        raise explain(error, what, after="the store is as it was") from error
    try:
        sync_folder(target.parent)
    except OSError as error:
        after = "it is written, and may be lost if the machine loses power now; look before you write it again"
        raise explain(error, f"cannot sync the folder of {target}", after=after) from error


def _make_part(target: Path, root: Path | None) -> tuple[int, Path]:
    # Shortened, so that the part's name is not too long where the target's is just short enough.
    prefix = f".{target.name.encode()[:80].decode(errors='ignore')}."
    for left in reversed(range(_TRIES)):
        try:
            make_folder(target.parent, root=root)
            handle, name = tempfile.mkstemp(prefix=prefix, suffix=".part", dir=target.parent)
        except FileNotFoundError:
            # Another process has just removed the folder, because it was empty.
            if not left:
                raise
        else:
            return handle, Path(name)
    raise AssertionError("the loop returns or raises")


def _copy(path: Path, stream: IO[bytes], num_bytes: int, on_progress: OnProgress) -> Digest:
    """Copy a file into an open one, synced to the disk; returns the digest of the bytes."""
    out = HashingFile(stream)
    with reading(path):
        reader = path.open("rb")
    with reader:
        while True:
            with reading(path):
                chunk = reader.read(_CHUNK_BYTES)
            if not chunk:
                break
            out.write(chunk)
            on_progress(out.num_bytes, num_bytes)
    sync(stream)
    return out.digest


def _time(status: os.stat_result) -> datetime:
    return datetime.fromtimestamp(status.st_mtime, UTC)
