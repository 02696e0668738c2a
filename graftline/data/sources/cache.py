"""The content-addressed cache: entries appear atomically, verified and locked between processes.

::

    <cache>/entries/<key>/record.json       digest, size and number of files
    <cache>/entries/<key>/content/...       one file under its own name, or the files of a folder
    <cache>/pins/<digest of an address>     the digest found at a pinned address; for an object that may change, the
                                            digest and the ETag that it had last
    <cache>/partial/<key>/                  being written; the next process to lock the key removes it
    <cache>/locks/<key>

The key of a download is its SHA-256 and suffix; the key of a member is the digest of (archive, member).
"""

import difflib
import errno
import json
import logging
import math
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from filelock import FileLock

from graftline.address import Source, mask_secrets
from graftline.digest import (
    Digest,
    HashingFile,
    of_bytes,
    of_file,
    of_files,
    of_folder,
    rename_synced,
    write_json,
    write_text,
)
from graftline.errors import GraftlineError, SourceError, SourceUnavailableError
from graftline.logs import OnProgress, silent
from graftline.retry import Retry

Result = TypeVar("Result")
_LOG = logging.getLogger(__name__)
_FORMAT = 1
"""Format of an entry's record."""

# Writing downloads to disk: bytes are counted and hashed on the way, and free space is checked first.

CHUNK_BYTES = 1 << 20
RETRY = Retry(attempts=4, base_seconds=1.0, deadline_seconds=math.inf)
"""Each attempt restarts the download, which may take hours: attempts are limited, their time is not."""


@dataclass(frozen=True)
class Downloaded:
    """The result of a download: a file, or the folder itself, and its digest."""

    path: Path
    digest: Digest


def with_retries(attempt: Callable[[], Result], *, transient: Callable[[Exception], bool], what: str) -> Result:
    """Call ``attempt`` until it succeeds or fails permanently.

    Args:
        attempt: one download, from its first byte.
        transient: whether an error may be gone at the next attempt; any other error is raised at once.
        what: masked address, for messages.

    Raises:
        SourceUnavailableError: the last attempt failed too.
    """
    try:
        return RETRY.call(attempt, transient=transient)
    except Exception as error:
        if not transient(error):
            raise
        reason = mask_secrets(f"{type(error).__name__}: {error}")
        raise SourceUnavailableError(
            f"{what} could not be fetched in {RETRY.attempts} attempts: {reason}; check the network, then run again"
        ) from error


def save(chunks: Iterable[bytes], path: Path, *, total_bytes: int | None, on_progress: OnProgress) -> Downloaded:
    """Write a stream to a file, hashing it on the way.

    Args:
        chunks: the stream.
        path: file to write; the caller renames its folder once everything is verified.
        total_bytes: the stream's length, if known; free space is checked before the first byte.
        on_progress: called with bytes done and in total (0 if unknown).

    Raises:
        SourceError: there is no space for ``total_bytes``, or the stream had fewer or more bytes.
    """
    if total_bytes is not None:
        _check_room(path.parent, total_bytes)
    with path.open("wb") as stream:
        out = HashingFile(stream)
        for chunk in chunks:
            out.write(chunk)
            on_progress(out.num_bytes, total_bytes or 0)
        stream.flush()
        os.fsync(stream.fileno())
    if total_bytes is not None and out.num_bytes != total_bytes:
        raise SourceError(f"{out.num_bytes} bytes came, {total_bytes} were announced; try again")
    return Downloaded(path, out.digest)


def read_chunks(path: Path) -> Iterator[bytes]:
    """A file's bytes in chunks of 1 MiB."""
    with path.open("rb") as stream:
        yield from iter(lambda: stream.read(CHUNK_BYTES), b"")


def _check_room(folder: Path, needed_bytes: int) -> None:
    free_bytes = shutil.disk_usage(folder).free
    if free_bytes < needed_bytes:
        raise SourceError(
            f"{needed_bytes} bytes are to be written below {folder}, {free_bytes} are free there; "
            "free some, or set GRAFTLINE_CACHE to a folder on a larger disk"
        )


@contextmanager
def disk_errors_explained(folder: Path) -> Iterator[None]:
    """Turn the operating system's errors below ``folder`` into a `SourceError` that says what to do."""
    try:
        yield
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        advice = "free some space there" if full else "make it writable"
        raise SourceError(
            f"cannot write the cache {folder}: {error.strerror or error}; {advice}, "
            "or set GRAFTLINE_CACHE to another folder; nothing half written is left"
        ) from error


@dataclass(frozen=True)
class CacheEntry:
    """A cache entry; ``path`` is a file or a folder."""

    path: Path
    digest: Digest


def default_cache(root: Path) -> Path:
    """The cache of the project in ``root``: $GRAFTLINE_CACHE, or .cache/graftline in ``root``."""
    chosen = os.environ.get("GRAFTLINE_CACHE")
    return Path(chosen).expanduser() if chosen else root / ".cache" / "graftline"


class Cache:
    """A cache folder, created when the first entry is written."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder.absolute()

    def find(self, key: str) -> CacheEntry | None:
        """The key's entry, if its size and number of files match the record."""
        folder = self.folder / "entries" / key
        if not folder.exists():
            return None
        try:
            record = json.loads((folder / "record.json").read_text(encoding="utf-8"))
            entry = CacheEntry(_content(folder, record["name"]), Digest.parse(record["digest"]))
            if record["format"] == _FORMAT and measure(folder / "content") == (record["files"], record["bytes"]):
                return entry
        except (OSError, ValueError, KeyError, TypeError, GraftlineError) as error:
            _LOG.debug("record of %s cannot be read: %s", folder, error)
        _LOG.warning("%s is not as recorded; it is fetched again", folder)
        return None

    @contextmanager
    def lock(self, key: str) -> Iterator[None]:
        """Lock a key against other processes; the operating system releases it when its holder dies."""
        path = self.folder / "locks" / key
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(path):
            yield

    def put(self, key: str, fill: Callable[[Path], Downloaded], *, publish_as: Callable[[Digest], str]) -> CacheEntry:
        """Create an entry; the key must be locked.

        Args:
            key: names the folder to fill; leftovers of a killed process are removed first.
            fill: writes into the given folder, verifies, and returns what it wrote.
            publish_as: maps the digest of the content to the entry's key.
        """
        partial = self.folder / "partial" / key
        shutil.rmtree(partial, ignore_errors=True)
        content = partial / "content"
        content.mkdir(parents=True)
        try:
            arrived = fill(content)
            return self._publish(partial, publish_as(arrived.digest), arrived)
        finally:
            shutil.rmtree(partial, ignore_errors=True)

    def _publish(self, partial: Path, key: str, arrived: Downloaded) -> CacheEntry:
        name = None if arrived.path == partial / "content" else arrived.path.name
        files, num_bytes = measure(partial / "content")
        record = {"format": _FORMAT, "digest": str(arrived.digest), "name": name, "files": files, "bytes": num_bytes}
        write_json(partial / "record.json", record)
        target = self.folder / "entries" / key
        target.parent.mkdir(parents=True, exist_ok=True)
        if target.exists() and not self.find(key):
            shutil.rmtree(target)  # damaged
        try:
            rename_synced(partial, target)
        except OSError as error:
            # Another process was first, under another lock: two addresses may name the same content.
            found = self.find(key) if error.errno in (errno.ENOTEMPTY, errno.EEXIST) else None
            if not found:
                raise
            return found
        return CacheEntry(_content(target, name), arrived.digest)

    def recall(self, address: str) -> Digest | None:
        """The digest recorded for a pinned address, if it was fetched before."""
        try:
            return Digest.parse(self._pin(address).read_text(encoding="utf-8").strip())
        except (FileNotFoundError, GraftlineError):
            return None

    def remember(self, address: str, digest: Digest) -> None:
        """Record the digest of a pinned address, so that the next fetch needs no network."""
        write_text(self._pin(address), f"{digest}\n")

    def last_look(self, address: str) -> dict[str, Any]:
        """What `note_look` recorded for an address that may change; empty if missing or unreadable."""
        try:
            found = json.loads(self._pin(address).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return found if isinstance(found, dict) else {}

    def note_look(self, address: str, found: dict[str, Any]) -> None:
        """Record the content of an address that may change, so that the next look can check whether it did."""
        write_json(self._pin(address), found)

    def _pin(self, address: str) -> Path:
        return self.folder / "pins" / of_bytes(address.encode()).hex


def _content(folder: Path, name: str | None) -> Path:
    return folder / "content" if name is None else folder / "content" / name


def measure(folder: Path) -> tuple[int, int]:
    """Number of files and of bytes below a folder."""
    sizes = [path.stat().st_size for path in folder.rglob("*") if path.is_file()]
    return len(sizes), sum(sizes)


# Local files and folders, copied into the cache so that a run can be repeated after they change.


def place_of(source: Source, root: Path) -> Path:
    """The path that a ``path:`` address names, whether it exists or not.

    Raises:
        SourceError: ``~name`` has no home folder here.
    """
    try:
        return (root / Path(source.name).expanduser()).absolute()
    except RuntimeError as error:
        raise SourceError(f"{source}: {error}; write the whole path") from error


def find(source: Source, root: Path) -> Path:
    """The existing path that a ``path:`` address names.

    Raises:
        SourceError: nothing exists there (the closest name is suggested), or ``~name`` has no home folder here.
    """
    path = place_of(source, root)
    if path.is_file() or path.is_dir():
        return path
    beside = [other.name for other in path.parent.iterdir()] if path.parent.is_dir() else []
    near = difflib.get_close_matches(path.name, beside, n=1)
    advice = f"did you mean {near[0]}?" if near else f"paths start in {root.absolute()}"
    raise SourceError(f"{source}: there is no file or folder {path}; {advice}")


def stamps(path: Path) -> dict[str, tuple[int, int]]:
    """Size and modification time of a file, or of every file in a folder, to detect writes."""
    found = {}
    for file in [path] if path.is_file() else sorted(path.rglob("*")):
        with suppress(OSError):  # Deleted meanwhile, or unreadable: its absence counts too.
            status = file.stat()
            found[str(file)] = (status.st_size, status.st_mtime_ns)
    return found


def digest_of(path: Path) -> Digest:
    """Digest of a file, or of the canonical JSON of a folder's file digests by path.

    Raises:
        SourceError: a file cannot be read, or the folder holds no file.
    """
    try:
        if path.is_file():
            return of_file(path)
        files = of_folder(path)
    except OSError as error:
        raise SourceError(
            f"cannot read {error.filename or path}: {error.strerror or error}; check its owner"
        ) from error
    if not files:
        raise SourceError(f"{path} holds no file; expected a file, or a folder with some")
    return of_files(files)


def copy(path: Path, folder: Path, on_progress: OnProgress) -> Downloaded:
    """Copy a file, or the files of a folder, into ``folder``, hashing on the way.

    Raises:
        SourceError: a file cannot be read, or there is no space.
    """
    if path.is_file():
        size = path.stat().st_size
        return save(_read(path, size), folder / path.name, total_bytes=size, on_progress=on_progress)
    files = sorted(file for file in path.rglob("*") if file.is_file())
    total_bytes, done_bytes = sum(file.stat().st_size for file in files), 0
    digests = {}
    for file in files:
        name = file.relative_to(path).as_posix()
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        size = file.stat().st_size
        arrived = save(_read(file, size), target, total_bytes=size, on_progress=silent)
        done_bytes += target.stat().st_size
        on_progress(done_bytes, total_bytes)
        digests[name] = arrived.digest
    return Downloaded(folder, of_files(digests))


def _read(path: Path, num_bytes: int) -> Iterator[bytes]:
    """The first ``num_bytes`` of a file: a file that grows as fast as it is read would never end."""
    try:
        for chunk in read_chunks(path):
            yield chunk[:num_bytes]
            num_bytes -= len(chunk)
            if num_bytes <= 0:
                break
    except OSError as error:
        raise SourceError(f"cannot read {path}: {error.strerror or error}; check its owner and the disk") from error
