"""A store in memory with a clock of its own: quick enough to go through thousands of orders of steps."""

from datetime import UTC, datetime, timedelta
from pathlib import Path

from graftline.digest import Digest, of_bytes
from graftline.errors import ConflictError, StoreError
from graftline.logs import OnProgress, silent
from graftline.registry.objects import ListedObject, ObjectInfo, Seen, UnfinishedWrite, check_key, checksum_of

START = datetime(2026, 1, 1, tzinfo=UTC)


class MemoryStore:
    """Every write is a second after the one before it."""

    url = "memory://store"

    def __init__(self) -> None:
        self._objects: dict[str, tuple[bytes, datetime]] = {}
        self._num_writes = 0
        self.seen = Seen(self.url)

    def now(self) -> datetime:
        return START + timedelta(seconds=self._num_writes)

    def put_file(self, key: str, path: Path, *, digest: Digest, on_progress: OnProgress = silent) -> None:
        self.put_bytes(key, path.read_bytes())

    def put_bytes(self, key: str, data: bytes) -> None:
        self._num_writes += 1
        self._objects[check_key(key)] = data, START + timedelta(seconds=self._num_writes)

    def create(self, key: str, data: bytes) -> None:
        if self._objects.get(key, (data,))[0] != data:
            raise ConflictError(f"{key} exists already")
        self.put_bytes(key, data)

    def get(self, key: str) -> bytes | None:
        return self._objects[key][0] if key in self._objects else None

    def get_file(self, key: str, path: Path, *, on_progress: OnProgress = silent) -> Digest:
        data = self._present(key)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        return of_bytes(data)

    def read_digest(self, key: str) -> Digest:
        return of_bytes(self._present(key))

    def head(self, key: str) -> ObjectInfo | None:
        data = self.get(key)
        return None if data is None else ObjectInfo(len(data), checksum_of(of_bytes(data)))

    def list(self, prefix: str) -> list[str]:
        return [listed.key for listed in self.listing(prefix)]

    def listing(self, prefix: str) -> tuple[ListedObject, ...]:
        found = sorted(self._objects.items())
        return tuple(ListedObject(key, len(data), when) for key, (data, when) in found if key.startswith(f"{prefix}/"))

    def unfinished(self, prefix: str) -> tuple[UnfinishedWrite, ...]:
        return ()

    def discard(self, unfinished: UnfinishedWrite) -> None:
        raise AssertionError(unfinished)

    def delete(self, key: str) -> None:
        self._objects.pop(key, None)

    def _present(self, key: str) -> bytes:
        data = self.get(key)
        if data is None:
            raise StoreError(f"no object {key}")
        return data
