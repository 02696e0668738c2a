"""The folder that releases are served from: ``<folder>/<pipeline>/<version>``, kept while a server uses it.

Several servers on one machine share it. Each holds a shared lock on every release that it uses, which the operating
system releases when the process ends; a release without a lock is removed.
"""

import fcntl
import logging
import os
import shutil
import time
from pathlib import Path

from graftline.registry.objects import is_name

_LOCKS = ".locks"
_ABANDONED_SECONDS = 24 * 3600
_LOG = logging.getLogger(__name__)


class ServedFolder:
    """The releases that one server uses, below ``root``, which is made when the first is used."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._held: dict[tuple[str, str], int] = {}

    def use(self, pipeline: str, version: str) -> Path:
        """The folder of a release, which need not exist yet; it is kept until `keep` is called without it."""
        if (pipeline, version) not in self._held:
            lock = self._lock(pipeline, version)
            lock.parent.mkdir(parents=True, exist_ok=True)
            self._held[pipeline, version] = _take(lock)
        folder = self.root / pipeline / version
        folder.parent.mkdir(parents=True, exist_ok=True)
        return folder

    def keep(self, wanted: set[tuple[str, str]], pipelines: set[str]) -> None:
        """Release the locks on what is no longer wanted, and remove unused releases of these pipelines."""
        for key in set(self._held) - wanted:
            os.close(self._held.pop(key))
        for pipeline in pipelines:
            folder = self.root / pipeline
            paths = folder.iterdir() if folder.is_dir() else ()
            found = [path for path in paths if path.is_dir() and not path.is_symlink()]
            for path in found:
                if path.name.startswith("."):
                    _remove_abandoned(path)
                elif (pipeline, path.name) not in wanted and is_name(path.name):
                    self._remove(pipeline, path.name)

    def _remove(self, pipeline: str, version: str) -> None:
        """Remove a release unless another server uses it."""
        lock = self._lock(pipeline, version)
        try:
            lock.parent.mkdir(parents=True, exist_ok=True)
            handle = os.open(lock, os.O_RDWR | os.O_CREAT, 0o666)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(self.root / pipeline / version)
                lock.unlink(missing_ok=True)
            finally:
                os.close(handle)
        except BlockingIOError:
            return
        except OSError as error:
            _LOG.warning("%s/%s is no longer served and stays on the disk: %s", pipeline, version, error)

    def _lock(self, pipeline: str, version: str) -> Path:
        return self.root / _LOCKS / pipeline / version


def _remove_abandoned(part: Path) -> None:
    """Remove what a server killed while fetching has left, a day after it was last written to."""
    try:
        if part.suffix == ".part" and time.time() - part.stat().st_mtime > _ABANDONED_SECONDS:
            shutil.rmtree(part, ignore_errors=True)
    except FileNotFoundError:
        return  # its download has just finished


def _take(lock: Path) -> int:
    """Open a lock file and take a shared lock; again, if the file was removed in between."""
    while True:
        handle = os.open(lock, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(handle, fcntl.LOCK_SH)
        except OSError as error:  # a file system without locks: then other servers remove nothing either
            _LOG.warning("%s cannot be locked: %s", lock, error)
            return handle
        if lock.exists() and os.path.samestat(os.fstat(handle), lock.stat()):
            return handle
        os.close(handle)
