"""A key file that is read again whenever it changes: who is taken out of it no longer counts, without a restart."""

import os
from pathlib import Path

from graftline.errors import PromotionError
from graftline.registry.keys import KeyRing


class KeyFile:
    """The key ring in a file, as it is now.

    Args:
        path: ``keys.yaml``.
        may_be_absent: until there is such a file there is no key ring; False: a missing file is an error at once.

    Raises:
        PromotionError: the file is wrong at the start, when there is no ring before it to keep to.
    """

    def __init__(self, path: Path, *, may_be_absent: bool = False) -> None:
        self.path = path
        self.problem: str | None = None
        """Why the file cannot be used as it is; the last good one counts meanwhile."""
        self._ring: KeyRing | None = None
        self._data = _read(path)
        if os.path.lexists(path) or not may_be_absent:
            self._ring = self._load(self._data)

    @property
    def ring(self) -> KeyRing | None:
        """Whose signatures count; None: there has not been a file yet.

        Raises:
            PromotionError: the first file that there was is wrong: nobody can be said to count.
        """
        if self._ring is None and self.problem:
            raise PromotionError(self.problem)
        return self._ring

    def refresh(self) -> bool:
        """Read the file if it has changed; True if another ring counts from now on."""
        data = _read(self.path)
        if data == self._data and (data is not None or (self._ring is None and not os.path.lexists(self.path))):
            return False
        before, self._data = self._ring, data
        try:
            self._ring, self.problem = self._load(data), None
        except PromotionError as error:
            kept = "; the keys that were read before count until it is right" if before else ""
            self.problem = f"{error}{kept}"
            return False
        return before is None or dict(self._ring.keys) != dict(before.keys)

    def _load(self, data: bytes | None) -> KeyRing:
        if data is None:
            return KeyRing.load(self.path)  # says why it cannot be read
        try:
            return KeyRing.parse(data.decode(), origin=str(self.path))
        except UnicodeDecodeError as error:
            raise PromotionError(f"cannot read the key file {self.path}: {error}; write it in UTF-8") from error


def _read(path: Path) -> bytes | None:
    try:
        return path.read_bytes()
    except OSError:
        return None
