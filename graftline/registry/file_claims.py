"""Create a file only if its name is free, on a file system without hard links.

A folder can be renamed onto a name that is free or that of an empty folder, and not onto that of a folder with
something in it (rename(2): ENOTEMPTY). So a writer puts its complete file into a hidden folder and renames that to the
name's claim, ``.<name>.claim``: one writer can, and from then on it is decided which bytes the name will have. Then the
file gets its name and the claim goes. A writer that was killed in between has left a claim with the whole file in it:
whoever comes next finishes its work before it looks whether the name is free.

All writers of a store have to reach it in a way that has, or has not, hard links.
"""

import contextlib
import errno
import os
import shutil
import tempfile
from pathlib import Path

from graftline.registry.file_system import sync, sync_folder

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
