"""The content-addressed cache: entries that appear whole, verified and locked between processes.

::

    <cache>/entries/<key>/record.json       digest, size and number of files
    <cache>/entries/<key>/content/...       one file under its own name, or the files of a folder
    <cache>/pins/<digest of an address>     the digest that a pinned address was found to have
    <cache>/partial/<key>/                  being written; whoever locks the key next removes it
    <cache>/locks/<key>

The key of a download is its SHA-256 and suffix, that of a member the digest of (archive, member).
"""

import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock

from graftline.data.sources.arrival import Arrived
from graftline.digest import Digest, of_bytes, write_json, write_text
from graftline.errors import GraftlineError

_LOG = logging.getLogger(__name__)
_FORMAT = 1


@dataclass(frozen=True)
class Entry:
    """Something in the cache: ``path`` is a file or a folder."""

    path: Path
    digest: Digest


def default_cache(root: Path) -> Path:
    """The cache of the project in ``root``: $GRAFTLINE_CACHE, or .cache/graftline in it."""
    chosen = os.environ.get("GRAFTLINE_CACHE")
    return Path(chosen).expanduser() if chosen else root / ".cache" / "graftline"


class Cache:
    """A cache folder; made when the first entry is written."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder.absolute()

    def find(self, key: str) -> Entry | None:
        """The entry of that key, if its size and number of files are as recorded."""
        folder = self.folder / "entries" / key
        if not folder.exists():
            return None
        try:
            record = json.loads((folder / "record.json").read_text(encoding="utf-8"))
            entry = Entry(_content(folder, record["name"]), Digest.parse(record["digest"]))
            if record["format"] == _FORMAT and _measure(folder / "content") == (record["files"], record["bytes"]):
                return entry
        except (OSError, ValueError, KeyError, TypeError, GraftlineError) as error:
            _LOG.debug("record of %s cannot be read: %s", folder, error)
        _LOG.warning("%s is not as recorded; it is fetched again", folder)
        return None

    @contextmanager
    def lock(self, key: str) -> Iterator[None]:
        """Hold a key against other processes; the operating system frees it when its holder dies."""
        path = self.folder / "locks" / key
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(path):
            yield

    def put(self, key: str, fill: Callable[[Path], Arrived], *, publish_as: Callable[[Digest], str]) -> Entry:
        """Make an entry; the key must be locked.

        Args:
            key: names the folder that is filled; what a killed process left there is removed first.
            fill: writes below the folder that it is given, verifies, and says what it wrote.
            publish_as: the entry's key, given the digest of what came.
        """
        partial = self.folder / "partial" / key
        shutil.rmtree(partial, ignore_errors=True)
        content = partial / "content"
        content.mkdir(parents=True)
        try:
            arrived = fill(content)
            return self._publish(partial, publish_as(arrived.digest), arrived)
        finally:
            shutil.rmtree(partial, ignore_errors=True)

    def _publish(self, partial: Path, key: str, arrived: Arrived) -> Entry:
        name = None if arrived.path == partial / "content" else arrived.path.name
        files, num_bytes = _measure(partial / "content")
        record = {"format": _FORMAT, "digest": str(arrived.digest), "name": name, "files": files, "bytes": num_bytes}
        write_json(partial / "record.json", record)
        target = self.folder / "entries" / key
        target.parent.mkdir(parents=True, exist_ok=True)
        if target.exists():
            # Another process was first, under another lock (two addresses may name the same content), or it is damaged.
            found = self.find(key)
            if found:
                return found
            shutil.rmtree(target)
        partial.rename(target)
        return Entry(_content(target, name), arrived.digest)

    def recall(self, address: str) -> Digest | None:
        """The digest that a pinned address was found to have, if it was fetched before."""
        try:
            return Digest.parse(self._pin(address).read_text(encoding="utf-8").strip())
        except (FileNotFoundError, GraftlineError):
            return None

    def remember(self, address: str, digest: Digest) -> None:
        """Note the digest of a pinned address, so that the next time needs no network."""
        write_text(self._pin(address), f"{digest}\n")

    def _pin(self, address: str) -> Path:
        return self.folder / "pins" / of_bytes(address.encode()).hex


def _content(folder: Path, name: str | None) -> Path:
    return folder / "content" if name is None else folder / "content" / name


def _measure(folder: Path) -> tuple[int, int]:
    """Number of files and bytes below a folder."""
    sizes = [path.stat().st_size for path in folder.rglob("*") if path.is_file()]
    return len(sizes), sum(sizes)
