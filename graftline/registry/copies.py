"""Local copies of releases, shared by the servers, workers and commands of one machine.

A copy appears under its name once it is complete, verified and on the disk. One process fetches while the others wait;
on a file system without locks each fetches for itself, and the first to finish wins. A copy that was damaged later, or
whose signature is no longer the store's, is repaired file by file. Each file is replaced in one step, so a reader sees
either the old one or the new one.
"""

import contextlib
import errno
import fcntl
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from graftline.digest import atomic_write, of_file
from graftline.errors import ReleaseError
from graftline.registry.file_system import explain, sync_folder
from graftline.release.manifest import MANIFEST_NAME, SIGNATURE_NAME, FileEntry, Manifest, check_folder

_NO_LOCKS = frozenset({errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK, errno.EINVAL})
_LEFT_OVER = re.compile(r"\..*\.[a-z0-9_]{8}\.part|.*\.part(\.json)?")
"""Names of the files that a killed download leaves."""


@dataclass(frozen=True)
class CopyContents:
    """What a copy has to hold."""

    manifest: Manifest
    signature: bytes | None
    """The bytes of ``model.sig`` in the store; None: unsigned."""
    get: Callable[[FileEntry, Path], None]
    """Fetches a file of the release to a path and verifies it."""

    @cached_property
    def paths(self) -> frozenset[str]:
        """The files of the release, its manifest and signature included."""
        return frozenset({entry.path for entry in self.manifest.files} | {MANIFEST_NAME, SIGNATURE_NAME})


def bring(folder: Path, wanted: CopyContents) -> None:
    """Make ``folder`` a copy of the release.

    Raises:
        ReleaseError: the folder holds something else; it is left as it is.
        StoreError: it cannot be written, or a file cannot be fetched.
    """
    if folder.is_symlink() and _is_absent(folder):
        folder = Path(os.path.realpath(folder))  # nothing can be renamed onto a link
    try:
        if not _is_copy(folder, wanted):
            folder.parent.mkdir(parents=True, exist_ok=True)
            part = folder.parent / f".{folder.name}.{wanted.manifest.version}.part"
            with _alone(part.with_suffix(".lock")) as is_alone:
                _bring(folder, part if is_alone else part.with_suffix(f".{secrets.token_hex(4)}.part"), wanted)
    except OSError as error:
        raise explain(error, f"cannot write {folder}", after="what is there already is kept") from error


def _bring(folder: Path, part: Path, wanted: CopyContents) -> None:
    if _is_copy(folder, wanted):
        return  # another process has just finished it
    part.mkdir(exist_ok=True)
    if _is_absent(folder):
        for entry in wanted.manifest.files:
            if not _holds(part, entry):
                wanted.get(entry, part / entry.path)
        _write_others(part, wanted)
        _remove_left_overs(part, wanted, everything=True)
        _sync(part)
        with contextlib.suppress(OSError):  # another process was first, where there are no locks; checked below
            part.replace(folder)
    else:
        _check_may_be_mended(folder, wanted)
        for entry in wanted.manifest.files:
            if not _holds(folder, entry):
                wanted.get(entry, part / entry.path)
                (folder / entry.path).parent.mkdir(parents=True, exist_ok=True)
                (part / entry.path).replace(folder / entry.path)
        _write_others(folder, wanted)
        _sync(folder)
    if part.exists():
        shutil.rmtree(part, ignore_errors=True)
    sync_folder(folder.parent)
    check_folder(folder, wanted.manifest)


def _is_absent(folder: Path) -> bool:
    return not folder.exists() or (folder.is_dir() and not any(folder.iterdir()))


def _is_copy(folder: Path, wanted: CopyContents) -> bool:
    """Whether a folder holds the release, and its signature as the store has it now."""
    if _is_absent(folder) or _read(folder / MANIFEST_NAME) != wanted.manifest.to_bytes():
        return False
    if _read(folder / SIGNATURE_NAME) != wanted.signature:
        return False
    try:
        check_folder(folder, wanted.manifest)
    except ReleaseError:
        return False
    return True


def _check_may_be_mended(folder: Path, wanted: CopyContents) -> None:
    """Raise ReleaseError unless the folder holds a damaged copy of this release, and nothing else."""
    named = folder.name == wanted.manifest.version
    if not folder.is_dir() or not (named or _read(folder / MANIFEST_NAME) == wanted.manifest.to_bytes()):
        check_folder(folder, wanted.manifest)
        raise ReleaseError(f"{folder} has no {MANIFEST_NAME} of this release; give an empty folder, or another name")
    _remove_left_overs(folder, wanted, everything=False)
    try:
        check_folder(folder, wanted.manifest)
    except ReleaseError as error:
        files = (path for path in folder.rglob("*") if not path.is_dir() or path.is_symlink())
        if any(path.is_symlink() or path.relative_to(folder).as_posix() not in wanted.paths for path in files):
            raise ReleaseError(f"{error}; or move away what does not belong to the release") from error


def _holds(folder: Path, entry: FileEntry) -> bool:
    path = folder / entry.path
    return path.is_file() and path.stat().st_size == entry.num_bytes and of_file(path) == entry.digest


def _write_others(folder: Path, wanted: CopyContents) -> None:
    """Write the signature and the manifest, which the manifest does not list."""
    for name, data in ((SIGNATURE_NAME, wanted.signature), (MANIFEST_NAME, wanted.manifest.to_bytes())):
        if data is None:
            (folder / name).unlink(missing_ok=True)
        elif _read(folder / name) != data:
            with atomic_write(folder / name) as out:
                out.write(data)


def _remove_left_overs(folder: Path, wanted: CopyContents, *, everything: bool) -> None:
    """Remove the temporary files of a killed call; with ``everything``, all that is not part of the release."""
    for path in folder.rglob("*"):
        is_part = path.relative_to(folder).as_posix() in wanted.paths
        if path.is_file() and not is_part and (everything or _LEFT_OVER.fullmatch(path.name)):
            path.unlink(missing_ok=True)


def _sync(folder: Path) -> None:
    for path in (folder, *folder.rglob("*")):
        if path.is_dir():
            sync_folder(path)


def _read(path: Path) -> bytes | None:
    try:
        return path.read_bytes()
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
        return None


@contextlib.contextmanager
def _alone(path: Path) -> Iterator[bool]:
    """Hold a lock file against other processes and threads, and remove it; False: this file system has no locks."""
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)
            # The holder before us may have removed the file that we waited for: then others lock a new one.
            if path.exists() and os.path.samestat(os.fstat(handle), path.stat()):
                break
        except FileNotFoundError:
            pass  # removed between the two looks
        except OSError as error:
            os.close(handle)
            if error.errno not in _NO_LOCKS:
                raise
            path.unlink(missing_ok=True)
            yield False
            return
        os.close(handle)
    try:
        yield True
    finally:
        path.unlink(missing_ok=True)
        os.close(handle)
