"""A store in a folder: objects appear by rename, entries that must be absent by a hard link.

``link(2)`` fails if the name exists, on local file systems and on NFS alike, and the linked file is complete before it
has its name: a promoter that is killed leaves no half entry.
"""

import contextlib
import os
import tempfile
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import IO

from graftline.digest import Digest, HashingFile, of_file
from graftline.errors import ConflictError, StoreError
from graftline.progress import OnProgress, silent
from graftline.registry.objects import Stored, check_key, checksum_of
from graftline.registry.seen import Seen

_CHUNK_BYTES = 4 << 20


class FileStore:
    """A store in a local or mounted folder, which is made at the first write."""

    def __init__(self, root: Path, *, seen: Path | None = None) -> None:
        self._root = root.absolute()
        self.seen = Seen(self.url, seen)

    @property
    def url(self) -> str:
        """The folder as a ``file://`` address."""
        return self._root.as_uri()

    def put_file(self, key: str, path: Path, *, digest: Digest, on_progress: OnProgress = silent) -> None:
        """Copy a file, hashed on the way. See `Store.put_file`."""
        target = self._path(key)
        num_bytes = path.stat().st_size
        with _temporary(target, num_bytes) as (stream, temporary):
            found = _copy(path, stream, num_bytes, on_progress)
            if found != digest:
                raise StoreError(
                    f"{path} has digest {found}, expected {digest}; it changed since its manifest was written"
                )
            temporary.replace(target)

    def put_bytes(self, key: str, data: bytes) -> None:
        """Write bytes; an object of that key is replaced."""
        target = self._path(key)
        with _temporary(target, len(data)) as (stream, temporary):
            stream.write(data)
            _flush(stream)
            temporary.replace(target)

    def create(self, key: str, data: bytes) -> None:
        """Write bytes only if the key is absent. See `Store.create`."""
        target = self._path(key)
        with _temporary(target, len(data)) as (stream, temporary):
            stream.write(data)
            _flush(stream)
            try:
                os.link(temporary, target)
            except FileExistsError:
                if target.read_bytes() != data:
                    raise ConflictError(f"{self.url}/{key} exists already: somebody else wrote it first") from None

    def get(self, key: str) -> bytes | None:
        """The object's bytes; None if there is none."""
        try:
            return self._path(key).read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            raise self._cannot_read(key, error) from error

    def get_file(self, key: str, path: Path, *, on_progress: OnProgress = silent) -> Digest:
        """Copy an object into a file. See `Store.get_file`."""
        source = self._path(key)
        if not source.is_file():
            raise StoreError(f"the store {self.url} has no object {key}")
        num_bytes = source.stat().st_size
        with _temporary(path, num_bytes) as (stream, temporary):
            digest = _copy(source, stream, num_bytes, on_progress)
            temporary.replace(path)
        return digest

    def read_digest(self, key: str) -> Digest:
        """Digest of the file's bytes as they are on the disk now."""
        path = self._path(key)
        if not path.is_file():
            raise StoreError(f"the store {self.url} has no object {key}")
        try:
            return of_file(path)
        except OSError as error:
            raise self._cannot_read(key, error) from error

    def head(self, key: str) -> Stored | None:
        """Size and checksum of the file as it is on the disk now: it is read."""
        path = self._path(key)
        if not path.is_file():
            return None
        return Stored(path.stat().st_size, checksum_of(self.read_digest(key)))

    def list(self, prefix: str) -> list[str]:
        """Keys below the folder ``prefix``, sorted. Files still being written have hidden names and are left out."""
        found: list[str] = []
        for folder, _, names in os.walk(self._path(prefix)):
            relative = Path(folder).relative_to(self._root)
            found += [(relative / name).as_posix() for name in names if not name.startswith(".")]
        return sorted(found)

    def delete(self, key: str) -> None:
        """Remove an object, and its folder when that becomes empty."""
        path = self._path(key)
        path.unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            path.parent.rmdir()

    def now(self) -> datetime | None:
        """The clock of the machine that the folder lies on: what a file that is just written is dated."""
        if not self._root.is_dir():
            return None
        with _temporary(self._root / "clock", 1) as (stream, temporary):
            stream.write(b".")
            _flush(stream)
            return datetime.fromtimestamp(temporary.stat().st_mtime, UTC)

    def _path(self, key: str) -> Path:
        return self._root / check_key(key)

    def _cannot_read(self, key: str, error: OSError) -> StoreError:
        return StoreError(f"cannot read {self.url}/{key}: {error.strerror or error}; check the folder's permissions")


@contextlib.contextmanager
def _temporary(target: Path, num_bytes: int) -> Iterator[tuple[IO[bytes], Path]]:
    """A hidden file beside ``target``, removed at the end whatever happened; then the folder is synced."""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{target.name[:80]}.", suffix=".part", dir=target.parent)
        temporary = Path(name)
        try:
            with os.fdopen(handle, "wb") as stream:
                temporary.chmod(0o644)
                yield stream, temporary
            _sync_folder(target.parent)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise StoreError(
            f"cannot write {target} ({num_bytes} bytes): {error.strerror or error}; "
            "check the folder's permissions and free space, the store is as it was"
        ) from error


def _copy(source: Path, stream: IO[bytes], num_bytes: int, on_progress: OnProgress) -> Digest:
    """Copy a file into an open one; returns the digest of the bytes, which are on the disk then."""
    out = HashingFile(stream)
    with source.open("rb") as reader:
        while chunk := reader.read(_CHUNK_BYTES):
            out.write(chunk)
            on_progress(out.num_bytes, num_bytes)
    _flush(stream)
    return out.digest


def _flush(stream: IO[bytes]) -> None:
    stream.flush()
    os.fsync(stream.fileno())


def _sync_folder(folder: Path) -> None:
    """Make a rename or a link in ``folder`` survive a power failure."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
