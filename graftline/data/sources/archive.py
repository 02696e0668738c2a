"""One file out of a wheel or an npm tarball, read as hostile input: no links, no traversal, no bombs."""

import difflib
import gzip
import stat
import tarfile
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath
from typing import Protocol

from graftline.data.sources.arrival import CHUNK_BYTES, Arrived, save
from graftline.errors import SourceError
from graftline.progress import OnProgress

MAX_EXPANSION = 200
"""An archive may unpack to this many times its own size ..."""
SMALLEST_LIMIT_BYTES = 64 << 20
"""... or to this, when it is small."""

_DAMAGED = (zipfile.BadZipFile, tarfile.TarError, zlib.error, gzip.BadGzipFile, EOFError, NotImplementedError)


def extract_member(archive: Path, member: str, folder: Path, on_progress: OnProgress) -> Arrived:
    """Write one member's bytes to a file of its own name below ``folder``.

    Args:
        archive: a zip file (a wheel) or a gzipped tar file.
        member: path inside the archive; in a tarball without its first folder, which npm calls ``package``.
        folder: where the file goes.
        on_progress: called with bytes done and in all.

    Raises:
        SourceError: no such member (nearest names given), a link, a damaged archive, or one that unpacks to too much.
    """
    limit_bytes = max(SMALLEST_LIMIT_BYTES, MAX_EXPANSION * archive.stat().st_size)
    target = folder / PurePosixPath(member).name
    read = _from_zip if zipfile.is_zipfile(archive) else _from_tar
    try:
        return read(archive, member, target, limit_bytes, on_progress)
    except _DAMAGED as error:
        raise SourceError(f"{archive.name} is damaged: {error}; expected a wheel or an npm tarball") from error


def _from_zip(archive: Path, member: str, target: Path, limit_bytes: int, on_progress: OnProgress) -> Arrived:
    with zipfile.ZipFile(archive) as opened:
        found = [info for info in opened.infolist() if info.filename == member]
        if not found:
            raise _missing(archive, member, (info.filename for info in opened.infolist()))
        if len(found) > 1:
            raise SourceError(f"{archive.name} holds {member!r} {len(found)} times; expected once; do not trust it")
        info = found[0]
        mode = info.external_attr >> 16
        if info.is_dir() or (stat.S_IFMT(mode) and not stat.S_ISREG(mode)):
            raise SourceError(f"{member!r} in {archive.name} is a folder or a link; expected a plain file")
        if info.flag_bits & 1:
            raise SourceError(f"{member!r} in {archive.name} is encrypted; expected a plain file")
        with opened.open(info) as stream:
            chunks = _chunks(_Bounded(stream, limit_bytes, archive.name))
            return save(chunks, target, total_bytes=min(info.file_size, limit_bytes + 1), on_progress=on_progress)


def _from_tar(archive: Path, member: str, target: Path, limit_bytes: int, on_progress: OnProgress) -> Arrived:
    names = []
    with gzip.open(archive) as unzipped:
        # The stream is bounded below tarfile, so that what stands before the member counts too.
        bounded = _Bounded(unzipped, limit_bytes, archive.name)
        with tarfile.open(fileobj=bounded, mode="r|") as opened:  # type: ignore[call-overload]
            for info in opened:
                name = info.name.partition("/")[2]
                names.append(name)
                if name != member:
                    continue
                stream = opened.extractfile(info) if info.isreg() else None
                if stream is None:
                    raise SourceError(f"{member!r} in {archive.name} is a folder or a link; expected a plain file")
                return save(_chunks(stream), target, total_bytes=info.size, on_progress=on_progress)
    raise _missing(archive, member, names)


class _Readable(Protocol):
    def read(self, size: int, /) -> bytes: ...


class _Bounded:
    """A readable stream that refuses to give more than ``limit_bytes``."""

    def __init__(self, stream: _Readable, limit_bytes: int, name: str) -> None:
        self._stream, self._limit_bytes, self._name = stream, limit_bytes, name
        self._num_bytes = 0

    def read(self, size: int, /) -> bytes:
        """At most ``size`` bytes."""
        data = self._stream.read(size)
        self._num_bytes += len(data)
        if self._num_bytes > self._limit_bytes:
            raise SourceError(
                f"{self._name} unpacks to more than {self._limit_bytes} bytes, {MAX_EXPANSION} times its size; "
                "that is how archive bombs look; unpack it yourself and use path:"
            )
        return data


def _chunks(stream: _Readable) -> Iterator[bytes]:
    return iter(lambda: stream.read(CHUNK_BYTES), b"")


def _missing(archive: Path, member: str, names: Iterable[str]) -> SourceError:
    known = sorted(name for name in names if name and not name.endswith("/"))
    near = difflib.get_close_matches(member, known, n=3, cutoff=0.4)
    listed = ", ".join(near or known[:5]) or "nothing"
    return SourceError(f"{archive.name} holds no {member!r}; it holds {len(known)} files, nearest: {listed}")
