"""What file systems do differently: folders without fsync, files without modes, errors and what to do about them."""

import contextlib
import errno
import os
import shutil
import stat
import tempfile
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


# Create a file only if its name is free, on a file system without hard links.
#
# A folder can be renamed onto a name that is free or that of an empty folder, and not onto that of a folder with
# something in it (rename(2): ENOTEMPTY). So a writer puts its complete file into a hidden folder and renames that to
# the name's claim, ``.<name>.claim``: one writer can, and from then on it is decided which bytes the name will have.
# Then the file gets its name and the claim goes. A writer that was killed in between has left a claim with the whole
# file in it: whoever comes next finishes its work before it looks whether the name is free.
#
# All writers of a store have to reach it in a way that has, or has not, hard links.

CLAIM = ".claim"
"""How the name of a claim ends."""
_TAKEN = frozenset({errno.ENOTEMPTY, errno.EEXIST})
_CONTENT = "content"


def create_without_links(source: Path, target: Path) -> bool:
    """Give the bytes of ``source`` the name ``target`` if it is free; returns whether it was.

    Raises:
        OSError: the file system refuses.
    """
    claim = target.with_name(f".{target.name}{CLAIM}")
    while True:
        _finish(claim, target)
        if target.exists():
            return False
        mine = Path(tempfile.mkdtemp(prefix=".claim.", suffix=".part", dir=target.parent))
        try:
            with contextlib.suppress(OSError):
                mine.chmod(0o755)  # whoever comes next has to be able to finish
            _copy(source, mine / _CONTENT)
            mine.rename(claim)
        except OSError as error:
            if error.errno not in _TAKEN:
                raise
            continue  # somebody else has the claim
        finally:
            shutil.rmtree(mine, ignore_errors=True)
        # Somebody may have had the claim, given the file its name and let the claim go after we looked.
        if target.exists():
            _remove(claim)
            return False
        _finish(claim, target)
        return True


def _finish(claim: Path, target: Path) -> None:
    """Give a claimed file its name. Several may do so at once: they all give it the same bytes."""
    try:
        data = (claim / _CONTENT).read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        return
    if not target.exists():
        handle, name = tempfile.mkstemp(prefix=f".{target.name[:20]}.", suffix=".part", dir=target.parent)
        try:
            with os.fdopen(handle, "wb") as stream:
                stream.write(data)
                sync(stream)
            with contextlib.suppress(OSError):
                Path(name).chmod(0o644)
            Path(name).replace(target)
        finally:
            Path(name).unlink(missing_ok=True)
        sync_folder(target.parent)
    _remove(claim)


def _remove(claim: Path) -> None:
    with contextlib.suppress(OSError):  # another may have removed it, or it is another's claim by now
        (claim / _CONTENT).unlink()
        claim.rmdir()


def _copy(source: Path, target: Path) -> None:
    with target.open("wb") as stream:
        stream.write(source.read_bytes())
        sync(stream)
