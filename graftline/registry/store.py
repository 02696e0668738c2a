"""A store holds bytes under keys: what is written once stays, and an entry can be created only if it is absent.

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
        """Where it is, for messages and for logs. Never holds credentials."""

    @property
    def seen(self) -> Seen:
        """What this machine has seen of the store's channels."""

    def now(self) -> datetime | None:
        """The store's own clock; None if it has none."""

    def put_file(self, key: str, path: Path, *, digest: Digest, on_progress: OnProgress = silent) -> None:
        """Store a file's bytes, checked against ``digest`` on the way. The object appears whole or not at all.

        Raises:
            StoreError: the file's bytes are not those of ``digest``, or the store refuses them.
            StoreUnavailableError: no answer after every retry.
        """

    def put_bytes(self, key: str, data: bytes) -> None:
        """Store bytes; an object of that key is replaced."""

    def create(self, key: str, data: bytes) -> None:
        """Store bytes only if the key is absent. To do so twice with equal bytes is no error: the first did it.

        Raises:
            ConflictError: the key exists with other bytes.
            UnsafeStoreError: the store does not keep the promise (it was asked once, with a probe).
        """

    def get(self, key: str) -> bytes | None:
        """The object's bytes; None if there is none."""

    def get_file(self, key: str, path: Path, *, on_progress: OnProgress = silent) -> Digest:
        """Read an object into a file that appears under its name only when it is complete.

        Returns:
            Digest of the bytes, hashed while they were written.

        Raises:
            StoreError: there is no such object.
        """

    def read_digest(self, key: str) -> Digest:
        """Read every byte of an object and return their digest, be they damaged or not.

        Raises:
            StoreError: there is no such object.
        """

    def head(self, key: str) -> ObjectInfo | None:
        """Size and checksum of what the store holds now; None if there is none."""

    def list(self, prefix: str) -> list[str]:
        """Keys below the folder ``prefix``, sorted."""

    def listing(self, prefix: str) -> tuple[ListedObject, ...]:
        """Objects below the folder ``prefix`` with size and time, sorted by key; `list` gives the keys alone.

        What is not of this registry (hidden files, markers of folders, names that no key has) is left out, and named
        in the log once.

        Raises:
            StoreError: a part of it may not be listed. "There is none" is said only of what was looked at.
        """

    def unfinished(self, prefix: str) -> tuple[UnfinishedWrite, ...]:
        """Writes below the folder ``prefix`` that have not ended: of somebody at work, or who was killed."""

    def discard(self, unfinished: UnfinishedWrite) -> None:
        """Remove an unfinished write; no error if it is gone."""

    def delete(self, key: str) -> None:
        """Remove an object; no error if there is none."""


def open_store(url: str, *, seen: Path | None = None) -> Store:
    """Open ``s3://bucket/prefix``, ``file:///absolute/path`` or a folder's path, which may begin with ``~``.

    S3's endpoint, region and credentials come from boto3's usual places (``AWS_ENDPOINT_URL``, profiles, roles).
    ``seen`` is the folder in which is kept what this machine has seen of the store's channels.

    Raises:
        StoreError: the address is of none of these forms.
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
        # Imported here because boto3 costs 0.4 s, which a file store need not pay.
        from graftline.registry.s3_store import S3Store

        return S3Store(bucket, prefix.strip("/"), seen=seen)
    return FileStore(folder_of(url), seen=seen)


def folder_of(url: str) -> Path:
    """The folder that an address names.

    Raises:
        StoreError: it is neither a folder's path nor ``file:///absolute/path``.
    """
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
