"""A store holds bytes under keys, and can create an object only if its key is free.

```python
store = open_store("s3://models/graftline")  # or a folder: open_store("store")
store.put_file("releases/demo/v1/adapter.safetensors", path, digest=digest)
store.create("channels/demo/production/0000000001.json", entry)  # ConflictError for everybody but the first
```

Two implementations: `FileStore` (a folder) and `S3Store` (Amazon S3 or a server that speaks its protocol).
"""

from datetime import datetime
from pathlib import Path
from typing import Protocol
from urllib.parse import unquote

from graftline.address import SCHEME
from graftline.digest import Digest
from graftline.errors import StoreError
from graftline.logs import OnProgress, silent
from graftline.registry.file_store import FileStore
from graftline.registry.objects import ListedObject, ObjectInfo, Seen, UnfinishedWrite


class Store(Protocol):
    """What the registry needs from a store. Keys are POSIX paths without ``..``, empty or hidden components."""

    @property
    def url(self) -> str:
        """Its address, for messages and logs; never with credentials."""

    @property
    def seen(self) -> Seen:
        """What this machine has seen of the store's channels."""

    def now(self) -> datetime | None:
        """The time by the store's clock; None if it has none."""

    def put_file(self, key: str, path: Path, *, digest: Digest, on_progress: OnProgress = silent) -> None:
        """Store a file's bytes, checked against ``digest`` on the way. The object appears complete or not at all.

        Raises:
            StoreError: the file's bytes are not those of ``digest``, or the store refuses them.
            StoreUnavailableError: no answer after all retries.
        """

    def put_bytes(self, key: str, data: bytes) -> None:
        """Store bytes; an object of that key is replaced."""

    def create(self, key: str, data: bytes) -> None:
        """Store bytes only if the key is free. Doing so twice with equal bytes is not an error.

        Raises:
            ConflictError: the key exists with other bytes.
            UnsafeStoreError: the store does not guarantee it (a probe found that once).
        """

    def get(self, key: str) -> bytes | None:
        """The object's bytes; None if there is none."""

    def get_file(self, key: str, path: Path, *, on_progress: OnProgress = silent) -> Digest:
        """Read an object into a file, which appears when it is complete; returns the digest of its bytes.

        Raises:
            StoreError: there is no such object.
        """

    def read_digest(self, key: str) -> Digest:
        """Read an object and return the digest of its bytes, damaged or not; StoreError if there is none."""

    def head(self, key: str) -> ObjectInfo | None:
        """Size and checksum of the object that the store holds now; None if there is none."""

    def list(self, prefix: str) -> list[str]:
        """Keys below the folder ``prefix``, sorted."""

    def listing(self, prefix: str) -> tuple[ListedObject, ...]:
        """Objects below the folder ``prefix`` with size and time, sorted by key; `list` gives the keys alone.

        Foreign objects (hidden files, folder markers, names that cannot be keys) are left out, and logged once.

        Raises:
            StoreError: a part of it cannot be listed.
        """

    def unfinished(self, prefix: str) -> tuple[UnfinishedWrite, ...]:
        """Writes below the folder ``prefix`` that have not ended, whether their writers still live or not."""

    def discard(self, unfinished: UnfinishedWrite) -> None:
        """Remove an unfinished write; no error if it is gone."""

    def delete(self, key: str) -> None:
        """Remove an object; no error if there is none."""


def open_store(url: str, *, seen: Path | None = None) -> Store:
    """Open ``s3://bucket/prefix``, ``file:///absolute/path`` or a folder's path, which may begin with ``~``.

    S3's endpoint, region and credentials come from boto3's usual places (``AWS_ENDPOINT_URL``, profiles, roles).
    ``seen`` is the folder for what this machine has seen of the store's channels; None: in memory.

    Raises:
        StoreError: the address has none of these forms.
    """
    scheme, separator, rest = url.partition("://")
    if not url.strip() or not url.isprintable():
        raise StoreError(f"store address {url!r} is empty or holds a control character; {_FORMS}")
    if not separator:
        return FileStore(folder_of(url), seen=seen)
    if scheme.lower() == "s3":
        bucket, _, prefix = rest.partition("/")
        if not bucket or "@" in bucket or any(character in rest for character in "?#"):
            raise StoreError(
                f"store address {url!r} is not of the form s3://bucket/prefix; credentials go into the environment"
            )
        # Imported here because importing boto3 takes 0.4 s, which file stores need not wait for.
        from graftline.registry.s3_store import S3Store

        return S3Store(bucket, prefix.strip("/"), seen=seen)
    return FileStore(folder_of(url), seen=seen)


def folder_of(url: str) -> Path:
    """The folder that an address names; StoreError unless it is a path or ``file:///absolute/path``."""
    scheme, separator, path = url.partition("://")
    try:
        if not separator and not SCHEME.match(url):
            return Path(url).expanduser()
        if scheme.lower() == "file" and path.startswith("/"):
            # Not parsed as a URL: a folder's name may hold '#' and '?'.
            return Path(unquote(path, errors="strict"))
    except (RuntimeError, UnicodeDecodeError) as error:
        raise StoreError(f"store address {url!r} names no folder: {error}; {_FORMS}") from error
    raise StoreError(f"store address {url!r} is unknown; {_FORMS}")


_FORMS = "use s3://bucket/prefix, file:///path or a folder's path"
