"""SHA-256 digests as validated values, and files that are written atomically.

A digest is text of the form ``sha256:<64 hex digits>``, validated on input (`Digest.parse`) and typed from then on.
Invariant: ``Digest.parse(str(d)) == d``.
"""

import contextlib
import errno
import hashlib
import json
import os
import re
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from graftline.errors import GraftlineError

_PATTERN = re.compile(r"sha256:[0-9a-f]{64}")
_CHUNK_BYTES = 1 << 20


@dataclass(frozen=True, order=True)
class Digest:
    """A SHA-256 digest. ``hex`` holds 64 lower-case hexadecimal digits."""

    hex: str

    @classmethod
    def parse(cls, text: str) -> "Digest":
        """Read ``sha256:<hex>``.

        Raises:
            GraftlineError: the text has another form.
        """
        if not _PATTERN.fullmatch(text):
            raise GraftlineError(f"digest {text!r} is not of the form sha256:<64 lower-case hex digits>")
        return cls(text.removeprefix("sha256:"))

    @property
    def short(self) -> str:
        """The first 12 digits, for names that people read."""
        return self.hex[:12]

    def __str__(self) -> str:
        return f"sha256:{self.hex}"


def of_bytes(data: bytes) -> Digest:
    """Digest of bytes."""
    return Digest(hashlib.sha256(data).hexdigest())


def of_json(value: Any) -> Digest:
    """Digest of a JSON value in canonical form: sorted keys, no spaces, UTF-8."""
    return of_bytes(canonical_json(value))


def canonical_json(value: Any) -> bytes:
    """JSON with sorted keys and no spaces, UTF-8: equal values give equal bytes."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()


def of_stream(chunks: Iterable[bytes]) -> Digest:
    """Digest of a stream of byte strings."""
    state = hashlib.sha256()
    for chunk in chunks:
        state.update(chunk)
    return Digest(state.hexdigest())


def of_file(path: Path) -> Digest:
    """Digest of a file's bytes, read once in chunks of 1 MiB."""
    with path.open("rb") as stream:
        return of_stream(iter(lambda: stream.read(_CHUNK_BYTES), b""))


def of_folder(folder: Path) -> dict[str, Digest]:
    """Digest of every file below a folder, by POSIX path relative to it, in sorted order."""
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    return {path.relative_to(folder).as_posix(): of_file(path) for path in files}


def of_files(files: Mapping[str, Digest]) -> Digest:
    """One digest of several files' paths and contents, in any order."""
    return of_json({path: str(digest) for path, digest in files.items()})


class HashingFile:
    """A binary file that hashes bytes as they are written."""

    def __init__(self, stream: IO[bytes]) -> None:
        self._stream = stream
        self._state = hashlib.sha256()
        self.num_bytes = 0

    def write(self, data: bytes | memoryview) -> int:
        """Write and hash ``data``; returns the number of bytes."""
        self._state.update(data)
        written = self._stream.write(data)
        self.num_bytes += written
        return written

    @property
    def digest(self) -> Digest:
        """Digest of everything written so far."""
        return Digest(self._state.hexdigest())


@contextlib.contextmanager
def atomic_write(path: Path) -> Iterator[HashingFile]:
    """Write a file that appears under its name only when it is complete.

    The bytes go to a temporary file beside it and are hashed as they are written, flushed to disk, then renamed. On any
    error the temporary file is removed and an existing file stays unchanged.

    Raises:
        GraftlineError: the disk is full, read-only or not writable for us (path and errno are named).
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".part", dir=path.parent)
    except OSError as error:
        raise _cannot_write(path, error) from error
    temporary = Path(name)
    try:
        with os.fdopen(handle, "wb") as stream:
            out = HashingFile(stream)
            yield out
            stream.flush()
            fsync(stream.fileno())
        temporary.chmod(0o644)
        temporary.replace(path)
    except OSError as error:
        raise _cannot_write(path, error) from error
    finally:
        with contextlib.suppress(OSError):  # of a disk that failed, or that may no longer be written
            temporary.unlink(missing_ok=True)


def _cannot_write(path: Path, error: OSError) -> GraftlineError:
    return GraftlineError(
        f"cannot write {path}: {error.strerror or error}; free space or permission is missing there, "
        "the file is left as it was"
    )


NO_SYNC = frozenset({errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EBADF, errno.EISDIR})
"""Errors of ``fsync(2)`` on file systems that do not have it, for folders (CIFS, sshfs) or at all."""


def fsync(handle: int) -> None:
    """Bring an open file or folder to the disk, where the file system can."""
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in NO_SYNC:
            raise


def sync_tree(folder: Path) -> None:
    """Bring a folder to the disk, with every file below it: what is written next may name them.

    A power loss can otherwise leave the later file whole and these empty.

    Raises:
        OSError: the disk refuses.
    """
    for place, _, names in os.walk(folder, topdown=False):
        for path in (*(Path(place, name) for name in names), Path(place)):
            if not path.is_symlink():
                _sync_path(path)


def rename_synced(making: Path, final: Path) -> None:
    """Give a file or folder that is complete its name, once all of it is on the disk.

    Raises:
        OSError: the disk refuses; ``final`` is then as it was.
    """
    if making.is_dir():
        sync_tree(making)
    else:
        _sync_path(making)
    making.rename(final)
    _sync_path(final.parent)


def copy_file(source: Path, target: Path) -> None:
    """Copy a file's bytes, atomically.

    Raises:
        GraftlineError: as `atomic_write`.
    """
    with source.open("rb") as stream, atomic_write(target) as out:
        for chunk in iter(lambda: stream.read(_CHUNK_BYTES), b""):
            out.write(chunk)


def _sync_path(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        fsync(handle)
    finally:
        os.close(handle)


def write_text(path: Path, text: str) -> Digest:
    """Write a UTF-8 text file atomically; returns its digest."""
    with atomic_write(path) as out:
        out.write(text.encode())
    return out.digest


def write_json(path: Path, value: Any) -> Digest:
    """Write JSON that people can read (sorted keys, two spaces) atomically; returns the file's digest."""
    return write_text(path, json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n")
