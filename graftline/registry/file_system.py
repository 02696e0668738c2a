"""How file systems differ: folders without fsync, files without modes, no hard links; their errors, and remedies."""

import contextlib
import errno
import os
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

from graftline.digest import NO_SYNC, fsync
from graftline.errors import StoreError, StoreUnavailableError

NO_HARD_LINKS = frozenset({errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EXDEV, errno.EMLINK})
"""Errors of ``link(2)`` on file systems without hard links (exFAT and FAT: EPERM; FUSE: ENOSYS; SMB: EOPNOTSUPP)."""
_MAY_NOT_OPEN = frozenset({errno.EACCES, errno.EPERM})
_MAX_DEPTH = 100  # our keys have at most seven folders; circular links end here

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
    """The error that a user sees: ``what`` could not be done, why, the remedy, and ``after``, the store's state now."""
    unavailable = error.errno in _UNAVAILABLE
    hint = _MOUNT_IS_GONE if unavailable else _HINTS.get(error.errno or 0, _HINTS[errno.EFBIG])
    found = f"{what}: {error.strerror or error}; {hint}{after and f'; {after}'}"
    return StoreUnavailableError(found) if unavailable else StoreError(found)


def make_folder(folder: Path, *, root: Path | None) -> None:
    """Make a folder and its parents. Below ``root`` each gets the mode of its parent.

    So the mode of a store's root decides who may use the store, and not the umask of whoever writes first.
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
    """Sync an open file to the disk, where the file system can."""
    stream.flush()
    fsync(stream.fileno())


def sync_folder(folder: Path) -> None:
    """Make a rename or a link in ``folder`` survive a power failure, where the file system can (not CIFS or sshfs)."""
    try:
        handle = os.open(folder, os.O_RDONLY)
    except OSError as error:
        if error.errno in NO_SYNC | _MAY_NOT_OPEN | {errno.ENOENT}:  # ENOENT: removed since, because it was empty
            return
        raise
    try:
        fsync(handle)
    finally:
        os.close(handle)


def walk(folder: Path, *, enter: Callable[[str], bool], depth: int = 0) -> Iterator[tuple[Path, os.stat_result]]:
    """Every file below a folder, following links; nothing if the folder does not exist.

    Folders whose name ``enter`` refuses are given like files.

    Raises:
        OSError: a folder cannot be listed, a file is where it should be, or a link is dangling.
    """
    if depth > _MAX_DEPTH:
        raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), str(folder))
    try:
        with os.scandir(folder) as found:
            names = sorted(entry.name for entry in found)
    except (FileNotFoundError, NotADirectoryError) as error:
        if folder.is_symlink() or (depth == 0 and isinstance(error, NotADirectoryError)):
            raise
        return  # none, or removed in the meantime
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


# Create a file only if its name is free, on a file system without hard links.
#
# A folder can be renamed onto a free name or an empty folder, but not onto a folder that has contents (rename(2):
# ENOTEMPTY). So a writer puts its complete file into a hidden folder and renames that to the name's claim,
# ``.<name>.claim``. Only one writer succeeds, and that decides which bytes the name gets. Then the file gets its name
# and the claim is removed. A writer that is killed in between leaves a claim with the complete file; the next writer
# finishes its work before it checks whether the name is free.
#
# This protects only if no writer of the store uses hard links: all must mount it in the same way.

CLAIM = ".claim"
"""Suffix of a claim's name."""
_TAKEN = frozenset({errno.ENOTEMPTY, errno.EEXIST})
_CONTENT = "content"


def create_without_links(source: Path, target: Path) -> bool:
    """Give the bytes of ``source`` the name ``target`` unless that is taken; returns whether it was free."""
    claim = target.with_name(f".{target.name}{CLAIM}")
    while True:
        _finish(claim, target)
        if target.exists():
            return False
        mine = Path(tempfile.mkdtemp(prefix=".claim.", suffix=".part", dir=target.parent))
        try:
            with contextlib.suppress(OSError):
                mine.chmod(0o755)  # the next writer must be able to finish the work
            _copy(source, mine / _CONTENT)
            mine.rename(claim)
        except OSError as error:
            if error.errno not in _TAKEN:
                raise
            continue  # another writer has the claim
        finally:
            shutil.rmtree(mine, ignore_errors=True)
        # Since the check above, another writer may have claimed the name and finished.
        if target.exists():
            _remove(claim)
            return False
        _finish(claim, target)
        return True


def _finish(claim: Path, target: Path) -> None:
    """Give a claimed file its name. Several writers may do so at once, with the same bytes."""
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
    with contextlib.suppress(OSError):  # another writer may have removed it, or claimed the name again
        (claim / _CONTENT).unlink()
        claim.rmdir()


def _copy(source: Path, target: Path) -> None:
    with target.open("wb") as stream:
        stream.write(source.read_bytes())
        sync(stream)
