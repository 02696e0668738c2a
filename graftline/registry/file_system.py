"""What file systems do differently: folders without fsync, files without modes, errors and what to do about them."""

import contextlib
import errno
import os
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

from graftline.errors import StoreError, StoreUnavailableError

NO_HARD_LINKS = frozenset({errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EXDEV, errno.EMLINK})
"""What ``link(2)`` says where there are none (exFAT and FAT: EPERM; FUSE: ENOSYS; SMB: EOPNOTSUPP)."""
_NO_SYNC = frozenset({errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EBADF, errno.EISDIR})
_MAY_NOT_OPEN = frozenset({errno.EACCES, errno.EPERM})
_MAX_DEPTH = 100  # a key of 1,024 bytes may have more, ours have seven; links that form a circle end here

_HINTS = {
    errno.EACCES: "check the permissions there: whoever uses the store must be able to list and read all of it",
    errno.EPERM: "check the permissions there: whoever uses the store must be able to list and read all of it",
    errno.EROFS: "it is mounted read-only; mount it for writing, or use a machine that may write there",
    errno.ENOSPC: "free some space there",
    errno.EDQUOT: "free some space there, or have the quota raised",
    errno.EFBIG: "check the folder's permissions and free space",
    errno.ENAMETOOLONG: "the name is longer than that file system takes; use a shorter one",
    errno.ENOENT: "something there is gone, or a link points at what is not there; mount it, or remove the link",
    errno.ENOTDIR: "a file is where a folder should be; move it away, then check permissions and free space there",
    errno.EEXIST: "a file is where a folder should be; move it away, then check permissions and free space there",
    errno.EISDIR: "a folder is where a file should be; move it away",
    errno.ELOOP: "links there form a circle; remove them",
}
_MOUNT_IS_GONE = "the disk or the mount has failed; check it (`dmesg`, `mount`), then run the same command again"
_UNAVAILABLE = frozenset(
    {errno.EIO, errno.ESTALE, errno.ENOTCONN, errno.EHOSTDOWN, errno.ETIMEDOUT, errno.EHOSTUNREACH, errno.ENODEV}
)


def explain(error: OSError, what: str, *, after: str = "") -> StoreError:
    """The error that a user sees.

    Args:
        error: the operating system's.
        what: what could not be done, and where.
        after: what state the store is in.
    """
    unavailable = error.errno in _UNAVAILABLE
    hint = _MOUNT_IS_GONE if unavailable else _HINTS.get(error.errno or 0, _HINTS[errno.EFBIG])
    found = f"{what}: {error.strerror or error}; {hint}{after and f'; {after}'}"
    return StoreUnavailableError(found) if unavailable else StoreError(found)


def make_folder(folder: Path, *, root: Path | None) -> None:
    """Make a folder and those above it. Below ``root`` each has the mode of the one above it.

    A store's root says who may use the store. Otherwise the umask of whoever comes first would decide who may list a
    channel.
    """
    if root is None or root not in folder.parents:
        folder.mkdir(parents=True, exist_ok=True)
        return
    if folder.is_dir():
        return
    make_folder(folder.parent, root=root)
    try:
        folder.mkdir()
    except FileExistsError:
        if not folder.is_dir():
            raise
        return
    above = stat.S_IMODE(folder.parent.stat().st_mode)
    with contextlib.suppress(OSError):  # some file systems have no modes
        folder.chmod(above & 0o777 | stat.S_IMODE(folder.stat().st_mode) & ~0o777)


def sync(stream: IO[bytes]) -> None:
    """Bring an open file's bytes to the disk, where the file system knows how."""
    stream.flush()
    _fsync(stream.fileno())


def sync_folder(folder: Path) -> None:
    """Make a rename or a link in ``folder`` survive a power failure, where the file system knows how.

    Some do not (CIFS, sshfs, many FUSE mounts): the name is in force all the same.
    """
    try:
        handle = os.open(folder, os.O_RDONLY)
    except OSError as error:
        if error.errno in _NO_SYNC | _MAY_NOT_OPEN | {errno.ENOENT}:  # ENOENT: removed since, because it was empty
            return
        raise
    try:
        _fsync(handle)
    finally:
        os.close(handle)


def walk(folder: Path, *, enter: Callable[[str], bool], depth: int = 0) -> Iterator[tuple[Path, os.stat_result]]:
    """Everything below a folder that is not a folder to enter, links followed; nothing if there is no such folder.

    Args:
        folder: where to begin.
        enter: whether to look into a folder of that name.
        depth: of ``folder`` below the first one.

    Raises:
        OSError: a folder that may not be listed, a file where it or one above it should be, or a link to something that
            is not there: not to be able to look is not the same as that there is nothing.
    """
    if depth > _MAX_DEPTH:
        raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), str(folder))
    try:
        with os.scandir(folder) as found:
            names = sorted(entry.name for entry in found)
    except (FileNotFoundError, NotADirectoryError) as error:
        if folder.is_symlink() or (depth == 0 and isinstance(error, NotADirectoryError)):
            raise
        return  # none, or removed while we walked
    for path in (folder / name for name in names):
        try:
            status = path.stat()
        except FileNotFoundError:
            if path.is_symlink():
                raise
            continue
        if stat.S_ISDIR(status.st_mode) and enter(path.name):
            yield from walk(path, enter=enter, depth=depth + 1)
        else:
            yield path, status


def _fsync(handle: int) -> None:
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in _NO_SYNC:
            raise
