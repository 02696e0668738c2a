"""What this machine has seen of a store's channels, kept on disk, so that a log that became shorter is noticed.

One file for each channel, ``<folder>/<store>/<pipeline>/<channel>.json``, holds number and digest of the newest entry
that was read or written here. Processes share it: it is replaced as a whole, and never by a lower number.
"""

import json
import logging
import os
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock

from graftline.address import mask_secrets
from graftline.digest import Digest, of_bytes, write_json
from graftline.errors import GraftlineError, StoreError
from graftline.registry.objects import is_name

_LOCK_SECONDS = 10.0
_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class Mark:
    """An entry that a channel's log holds, as far as somebody knows."""

    number: int
    digest: Digest | None
    """None: only the number is known."""
    where: str
    """Who knows it and how to forget it, in words."""


class Seen:
    """The newest entry that was seen of each channel of one store.

    Args:
        place: the store, and the server that it is on.
        folder: where the marks are kept; None: in memory, for as long as the store is open.
    """

    def __init__(self, place: str, folder: Path | None = None) -> None:
        self._place = mask_secrets(place)
        self._folder = folder / of_bytes(self._place.encode()).short if folder else None
        self._marks: dict[tuple[str, str], Mark] = {}

    def mark(self, pipeline: str, channel: str) -> Mark | None:
        """The newest entry that was seen; None if none ever was.

        Raises:
            StoreError: the file that says so cannot be read.
        """
        found = [self._marks.get((pipeline, channel)), self._read(pipeline, channel)]
        return max((mark for mark in found if mark), key=lambda mark: mark.number, default=None)

    def channels(self, pipeline: str) -> set[str]:
        """Channels of a pipeline of which an entry was seen.

        Raises:
            StoreError: the folder that says so cannot be listed.
        """
        names = {name for known, name in self._marks if known == pipeline}
        if self._folder:
            files = [name for name in _names(self._folder / pipeline) if name.endswith(".json")]
            names |= {name.removesuffix(".json") for name in files}
        return {name for name in names if is_name(name)}  # not somebody's "production (copy).json"

    def pipelines(self) -> set[str]:
        """Pipelines that have such channels; raises as `channels`."""
        names = {name for name, _ in self._marks}
        names |= set(_names(self._folder)) if self._folder else set()
        return {name for name in names if is_name(name) and self.channels(name)}

    def note(self, pipeline: str, channel: str, number: int, digest: Digest) -> None:
        """Remember an entry that was read and verified, or written.

        A folder that cannot be written keeps nobody from reading a channel: it is logged, and the mark stays in memory.
        """
        mark = self.mark(pipeline, channel)
        if mark and mark.number >= number:
            return
        self._marks[pipeline, channel] = Mark(number, digest, "seen since the store was opened")
        if not self._folder:
            return
        try:
            (self._folder / pipeline).mkdir(parents=True, exist_ok=True)
            with FileLock(self._folder / pipeline / ".lock", timeout=_LOCK_SECONDS):
                there = self._read(pipeline, channel)  # another process may have seen more meanwhile
                if there is None or there.number < number:
                    value = {"store": self._place, "number": number, "digest": str(digest)}
                    write_json(self._file(pipeline, channel), value)
        except (OSError, NotImplementedError, GraftlineError) as error:
            # filelock: Timeout is an OSError, NotImplementedError a file system without locks.
            _LOG.warning("what was seen of %s/%s is not kept in %s: %s", pipeline, channel, self._folder, error)

    def _read(self, pipeline: str, channel: str) -> Mark | None:
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
        return Mark(number, digest, f"seen here before; if the channel was begun anew on purpose, remove {file}")

    def _file(self, pipeline: str, channel: str) -> Path:
        assert self._folder is not None
        return self._folder / pipeline / f"{channel}.json"


def _names(folder: Path) -> list[str]:
    """What lies in a folder of marks; nothing if there is no such folder."""
    try:
        return os.listdir(folder)
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise StoreError(
            f"{folder} says what was seen of channels and cannot be listed ({error.strerror}); check its permissions"
        ) from error
