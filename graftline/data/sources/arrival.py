"""Bytes arriving on the disk: counted, hashed on the way, and stopped before the disk is full."""

import errno
import math
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from graftline.address import mask_secrets
from graftline.digest import Digest, HashingFile
from graftline.errors import SourceError, SourceUnavailableError
from graftline.progress import OnProgress
from graftline.retry import Retry

CHUNK_BYTES = 1 << 20
RETRY = Retry(attempts=4, base_seconds=1.0, deadline_seconds=math.inf)
"""Each try begins the download again, which may take hours: tries are counted, their time is not."""


@dataclass(frozen=True)
class Arrived:
    """What a download left in its folder: a file, or the folder itself, and its digest."""

    path: Path
    digest: Digest


def with_retries(attempt: Callable[[], Arrived], *, transient: Callable[[Exception], bool], what: str) -> Arrived:
    """Call ``attempt`` until it returns or fails for good.

    Args:
        attempt: one download, from its first byte.
        transient: whether an error of it may be gone at the next try; every other error ends them, and is raised.
        what: masked address, for messages.

    Raises:
        SourceUnavailableError: the last try failed too.
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


def save(chunks: Iterable[bytes], path: Path, *, total_bytes: int | None, on_progress: OnProgress) -> Arrived:
    """Write a stream to a file, hashing it on the way.

    Args:
        chunks: the stream.
        path: file to write; the caller renames the folder it is in when all is verified.
        total_bytes: the stream's length, if it is known: room is checked before the first byte.
        on_progress: called with bytes done and in all (0 when unknown).

    Raises:
        SourceError: there is no room for ``total_bytes``, or fewer or more bytes came.
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
    return Arrived(path, out.digest)


def read_chunks(path: Path) -> Iterator[bytes]:
    """A file's bytes in pieces of 1 MiB."""
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
