"""Files and folders of this machine: copied into the cache, so that a run can be repeated after they have moved on."""

import contextlib
import difflib
from collections.abc import Iterator
from pathlib import Path

from graftline.address import Source
from graftline.data.sources.arrival import Arrived, read_chunks, save
from graftline.digest import Digest, of_file, of_folder, of_json
from graftline.errors import SourceError
from graftline.progress import OnProgress, silent


def find(source: Source, root: Path) -> Path:
    """The path that a ``path:`` address names.

    Raises:
        SourceError: there is nothing there (the nearest name beside it is given), or ``~name`` is nobody's home here.
    """
    try:
        path = (root / Path(source.name).expanduser()).absolute()
    except RuntimeError as error:
        raise SourceError(f"{source}: {error}; write the whole path") from error
    if path.is_file() or path.is_dir():
        return path
    beside = [other.name for other in path.parent.iterdir()] if path.parent.is_dir() else []
    near = difflib.get_close_matches(path.name, beside, n=1)
    advice = f"did you mean {near[0]}?" if near else f"paths start in {root.absolute()}"
    raise SourceError(f"{source}: there is no file or folder {path}; {advice}")


def stamps(path: Path) -> dict[str, tuple[int, int]]:
    """Size and time of change of a file, or of every file in a folder: what differs when somebody writes there."""
    found = {}
    for file in [path] if path.is_file() else sorted(path.rglob("*")):
        with contextlib.suppress(OSError):  # Gone in between, or not ours to read: that is an answer too.
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
    return of_json({name: str(digest) for name, digest in files.items()})


def copy(path: Path, folder: Path, on_progress: OnProgress) -> Arrived:
    """Copy a file, or the files of a folder, below ``folder``, hashing on the way.

    Raises:
        SourceError: a file cannot be read, or there is no room.
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
        digests[name] = str(arrived.digest)
    return Arrived(folder, of_json(digests))


def _read(path: Path, num_bytes: int) -> Iterator[bytes]:
    """The first ``num_bytes`` of a file: one that grows as fast as it is read would have no end."""
    try:
        for chunk in read_chunks(path):
            yield chunk[:num_bytes]
            num_bytes -= len(chunk)
            if num_bytes <= 0:
                break
    except OSError as error:
        raise SourceError(f"cannot read {path}: {error.strerror or error}; check its owner and the disk") from error
