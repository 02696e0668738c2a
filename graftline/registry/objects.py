"""What stores deal in: keys, facts about objects, and what this machine has seen of a store's channels."""

import base64
import contextlib
import hashlib
import json
import logging
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from filelock import FileLock

from graftline.address import mask_secrets
from graftline.digest import Digest, of_bytes, write_json
from graftline.errors import GraftlineError, StoreError

_LOG = logging.getLogger(__name__)
_MAX_KEY_BYTES = 1024  # S3's limit
_PART_BYTES = 8 << 20
_MAX_PARTS = 9_000
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


@dataclass(frozen=True)
class ObjectInfo:
    """Size and checksum of an object.

    ``checksum`` is computed by the store over its own bytes, in S3's notation: base64 of the SHA-256, or, for an
    object that was uploaded in N parts, base64 of the SHA-256 over the parts' SHA-256 digests followed by ``-N``.
    None: the store gives no checksum, and the bytes have to be read back to be compared.
    """

    num_bytes: int
    checksum: str | None


@dataclass(frozen=True, order=True)
class ListedObject:
    """An object in a listing."""

    key: str
    num_bytes: int
    modified: datetime
    """When it was written, by the store's clock."""


@dataclass(frozen=True, order=True)
class UnfinishedWrite:
    """A write that is going on, or whose writer was killed. Readers never see it."""

    key: str
    """Of the object that it would become, as far as the store can tell."""
    num_bytes: int
    modified: datetime
    """When it was last written to, by the store's clock."""
    handle: str
    """The hidden file's path below the root, or the id of S3's upload."""


class ForeignObjects:
    """Logs each foreign object in a store once; they are neither used nor removed."""

    def __init__(self, url: str) -> None:
        self._url, self._named = url, set[str]()

    def name(self, key: str) -> None:
        """Log a foreign key; of what lies in a hidden folder, the folder alone."""
        components = key.split("/")
        hidden = next((index for index, one in enumerate(components) if one.startswith(".")), len(components))
        key = "/".join(components[: hidden + 1])
        if key not in self._named:
            self._named.add(key)
            _LOG.warning("%s holds %r, which is not of this registry; it is left alone", self._url, key)


def checksum_of(digest: Digest) -> str:
    """A digest in S3's notation: base64 of its 32 bytes."""
    return base64.b64encode(bytes.fromhex(digest.hex)).decode()


def part_ranges(num_bytes: int) -> list[tuple[int, int]]:
    """Start and size of each part that a large object is transferred in.

    8 MiB, or more where that would make over 9,000 parts (S3's limit is 10,000). They depend on the size alone, so that
    whoever has the file can resume an upload and recompute its checksum.
    """
    size = max(_PART_BYTES, -(-num_bytes // _MAX_PARTS))
    return [(start, min(size, num_bytes - start)) for start in range(0, num_bytes, size)]


def checksum_of_parts(path: Path) -> str:
    """The checksum of a file that was uploaded in parts, see `ObjectInfo`."""
    ranges = part_ranges(path.stat().st_size)
    with path.open("rb") as stream:
        digests = [hashlib.sha256(stream.read(size)).digest() for _, size in ranges]
    return f"{base64.b64encode(hashlib.sha256(b''.join(digests)).digest()).decode()}-{len(ranges)}"


@contextlib.contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turn OSErrors of reading a local file into a `StoreError` that names it."""
    try:
        yield
    except OSError as error:
        raise StoreError(
            f"cannot read {path}: {error.strerror or error}; check that it is there and may be read, then run again"
        ) from error


def is_key(key: str) -> bool:
    """Whether `check_key` accepts it."""
    components = key.split("/")
    bad = [c for c in components if not c or c.startswith(".") or "\\" in c or not c.isprintable()]
    return not bad and len(key.encode(errors="replace")) <= _MAX_KEY_BYTES


def check_key(key: str) -> str:
    """Return ``key`` if it is a relative POSIX path of plain components.

    Raises:
        StoreError: it is empty, absolute or too long, or has a component that is empty or hidden, is ``..``, or holds
            a control character or a backslash.
    """
    if not is_key(key):
        raise StoreError(
            f"key {key!r} cannot be used; expected a relative path of at most {_MAX_KEY_BYTES} bytes whose components "
            "are not empty and hold no leading dot, backslash or control character"
        )
    return key


def is_name(name: str) -> bool:
    """Whether `check_name` accepts it."""
    return _NAME.fullmatch(name) is not None


def check_name(kind: str, name: str) -> str:
    """Return the name of a pipeline, channel or version if it can be one component of a key; StoreError otherwise."""
    if not is_name(name):
        raise StoreError(
            f"{kind} {name!r} cannot be used in a store; use at most 100 letters, digits, '.', '_' and '-'"
        )
    return name


_LOCK_SECONDS = 10.0


@dataclass(frozen=True)
class KnownEntry:
    """An entry that a channel's log is known to have had."""

    number: int
    digest: Digest | None
    """None: only the number is known."""
    where: str
    """How it is known and how to make that forgotten, in words."""
    is_trusted: bool = False
    """Whether it was verified with keys (graftline.registry.trust), so that reading may start from it."""


class Seen:
    """The newest entry that this machine has seen of each channel of a store, so that a lost history is noticed.

    ``<folder>/<store>/<pipeline>/<channel>.json`` holds the entry's number and digest. Processes share the files; each
    is replaced as a whole, and never by a lower number.

    Args:
        place: the store, and the server that it is on.
        folder: where the marks are kept; None: in memory, for as long as the store is open.
    """

    def __init__(self, place: str, folder: Path | None = None) -> None:
        self._place = mask_secrets(place)
        self._folder = folder / of_bytes(self._place.encode()).short if folder else None
        self._marks: dict[tuple[str, str], KnownEntry] = {}

    def mark(self, pipeline: str, channel: str) -> KnownEntry | None:
        """The newest entry that was seen, if any; StoreError where its file cannot be read."""
        found = [self._marks.get((pipeline, channel)), self._read(pipeline, channel)]
        return max((mark for mark in found if mark), key=lambda mark: (mark.number, mark.is_trusted), default=None)

    def channels(self, pipeline: str) -> set[str]:
        """Channels of a pipeline that entries were seen of; StoreError where the folder cannot be listed."""
        names = {name for known, name in self._marks if known == pipeline}
        if self._folder:
            files = [name for name in _names(self._folder / pipeline) if name.endswith(".json")]
            names |= {name.removesuffix(".json") for name in files}
        return {name for name in names if is_name(name)}  # not somebody's "production (copy).json"

    def pipelines(self) -> set[str]:
        """Pipelines with such channels; raises as `channels`."""
        names = {name for name, _ in self._marks}
        names |= set(_names(self._folder)) if self._folder else set()
        return {name for name in names if is_name(name) and self.channels(name)}

    def note(self, pipeline: str, channel: str, number: int, digest: Digest, *, is_trusted: bool = False) -> None:
        """Remember an entry that was read or written. If the folder cannot be written, the mark stays in memory.

        ``is_trusted``: its signature and policy were verified too.
        """

        def is_news(mark: KnownEntry | None) -> bool:
            return mark is None or (mark.number, mark.is_trusted) < (number, is_trusted)

        if not is_news(self.mark(pipeline, channel)):
            return
        self._marks[pipeline, channel] = KnownEntry(number, digest, "seen since the store was opened", is_trusted)
        if not self._folder:
            return
        try:
            (self._folder / pipeline).mkdir(parents=True, exist_ok=True)
            with FileLock(self._folder / pipeline / ".lock", timeout=_LOCK_SECONDS):
                there = self._read(pipeline, channel)  # another process may have seen more meanwhile
                if is_news(there):
                    value = {"store": self._place, "number": number, "digest": str(digest)}
                    value |= {"trusted": True} if is_trusted else {}
                    write_json(self._file(pipeline, channel), value)
        except (OSError, NotImplementedError, GraftlineError) as error:
            # filelock: Timeout is an OSError, NotImplementedError a file system without locks.
            _LOG.warning("what was seen of %s/%s is not kept in %s: %s", pipeline, channel, self._folder, error)

    def _read(self, pipeline: str, channel: str) -> KnownEntry | None:
        if not self._folder:
            return None
        file = self._file(pipeline, channel)
        try:
            value = json.loads(file.read_bytes())
            number, digest = int(value["number"]), Digest.parse(value["digest"])
            if number < 1:
                raise ValueError(f"number is {number}")
        except (FileNotFoundError, NotADirectoryError):
            return None
        except (OSError, ValueError, OverflowError, RecursionError, KeyError, TypeError, GraftlineError) as error:
            raise StoreError(
                f"{file} says what was seen of {pipeline}/{channel} and cannot be read ({error}); look at the "
                "channel's history, then remove the file"
            ) from error
        where = f"seen here before; if the channel was begun anew on purpose, remove {file}"
        return KnownEntry(number, digest, where, value.get("trusted") is True)

    def _file(self, pipeline: str, channel: str) -> Path:
        assert self._folder is not None
        return self._folder / pipeline / f"{channel}.json"


def _names(folder: Path) -> list[str]:
    try:
        return os.listdir(folder)
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise StoreError(
            f"{folder} says what was seen of channels and cannot be listed ({error.strerror}); check its permissions"
        ) from error
