"""A store in an S3 bucket, or on any server that speaks S3's protocol.

Every write carries the SHA-256 of its bytes, which the server compares with what arrived; every read is compared with
the checksum that the server gives. Some look-alikes answer 200 to a conditional write and replace the object, and some
repeat the checksum they were sent without comparing it. So each store is probed once, with objects that are removed
again.
"""

import functools
import os
import secrets
from collections.abc import Callable, Collection
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any, TypeVar

import boto3
from botocore.config import Config
from botocore.exceptions import ClientError

from graftline.digest import Digest, atomic_write, of_bytes, of_stream
from graftline.errors import ConflictError, StoreError, UnsafeStoreError
from graftline.logs import OnProgress, silent
from graftline.registry.objects import (
    ForeignObjects,
    ListedObject,
    ObjectInfo,
    Seen,
    UnfinishedWrite,
    check_key,
    checksum_of,
    is_key,
    reading,
)
from graftline.registry.s3_transfer import abort, download_in_ranges, unfinished_uploads, upload_in_parts
from graftline.retry import Retry
from graftline.s3_errors import S3_ERRORS, check_listing, explain, is_missing, is_transient, status_of

Result = TypeVar("Result")
_CHUNK_BYTES = 1 << 20
_SINGLE_BYTES = 32 << 20  # up to this size one request is faster than several
_TIMEOUT_SECONDS = 15
_WRITTEN = "sha256-written"


@dataclass(frozen=True)
class StoreCapabilities:
    """What the server did when it was probed."""

    preconditions: bool
    """``If-None-Match: *`` on an existing key was refused, and the object stayed as it was."""
    checksums: bool
    """An object whose bytes do not have the SHA-256 that was sent along was refused."""


class S3Store:
    """A store under ``prefix`` of ``bucket``; thread-safe."""

    def __init__(
        self,
        bucket: str,
        prefix: str = "",
        *,
        retry: Retry | None = None,
        timeout_seconds: float = _TIMEOUT_SECONDS,
        seen: Path | None = None,
    ) -> None:
        self._bucket, self._prefix = bucket, f"{check_key(prefix)}/" if prefix else ""
        self._retry = retry or Retry()
        self._foreign, self._has_bucket = ForeignObjects(self.url), False
        self._client = self._connect(timeout_seconds)
        self.seen = Seen(f"{self.url} at {self._endpoint}", seen)

    @property
    def url(self) -> str:
        """The store's ``s3://`` address."""
        return f"s3://{self._bucket}/{self._prefix}".rstrip("/")

    def put_file(self, key: str, path: Path, *, digest: Digest, on_progress: OnProgress = silent) -> None:
        """Upload a file, in parts if it is large. See `Store.put_file`."""
        with reading(path):
            num_bytes = path.stat().st_size
            data = path.read_bytes() if num_bytes <= _SINGLE_BYTES else None
        call = functools.partial(self._call, doing=f"writing {key} to")
        if data is None:
            upload_in_parts(self._client, self._at(key), path, digest=digest, call=call, on_progress=on_progress)
            return
        if of_bytes(data) != digest:
            raise StoreError(
                f"{path} has digest {of_bytes(data)}, expected {digest}; it changed since its manifest was written"
            )
        call(lambda: self._put(key, data))
        on_progress(num_bytes, num_bytes)

    def put_bytes(self, key: str, data: bytes) -> None:
        """Upload bytes; an object of that key is replaced."""
        self._call(lambda: self._put(key, data), f"writing {key} to")

    def create(self, key: str, data: bytes) -> None:
        """Upload bytes only if the key is absent. See `Store.create`."""
        if not self._promises.preconditions:
            raise UnsafeStoreError(
                f"the store {self.url} at {self._endpoint} ignores 'If-None-Match: *': two promoters could "
                "both win; promote on Amazon S3, on a server that honours conditional writes, or on a file store"
            )
        put = functools.partial(self._put, key, data, IfNoneMatch="*", Metadata=_name_of(data))
        try:
            self._call(put, f"creating {key} in", expected={412})
        except _AlreadyThereError:
            # The answer to an earlier try may have been lost: then the object is ours.
            if self._read_back(lambda: self._read(key), key) != data:
                raise ConflictError(f"{self.url}/{key} exists already: somebody else wrote it first") from None
        else:
            if not self._promises.checksums:
                self._repair(key, data)

    def _repair(self, key: str, data: bytes) -> None:
        """Make sure that an object just created holds our bytes, on a server that does not compare checksums.

        Raises:
            ConflictError: it holds another writer's. Such servers may also check and write in two steps (moto's threads
                do) and let two simultaneous writers through; the last one has won.
        """
        for _ in range(3):
            writer, found = self._read_back(lambda: self._read_claimed(key), key)
            if writer != of_bytes(data).hex:
                raise ConflictError(f"{self.url}/{key}: somebody else wrote it at the same moment, and was last")
            if found == of_bytes(data):
                return
            self._call(lambda: self._put(key, data, Metadata=_name_of(data)), f"writing {key} to")
        raise StoreError(f"{self.url}/{key} does not hold what was written; the way to {self._endpoint} changes bytes")

    def _read_back(self, read: Callable[[], Result], key: str) -> Result:
        """Read an object that was written: "no such object" is retried. StoreError if it stays the answer."""
        try:
            return self._retry.call(
                lambda: self._call(read, f"reading {key} from", expected={404}),
                transient=lambda error: isinstance(error, _MissingError),
            )
        except _MissingError:
            raise StoreError(
                f"{self.url}/{key} was written, and the store says at every try that it is not there; look whether it "
                "is (`graftline history` for an entry) before you run the command again"
            ) from None

    def _read_claimed(self, key: str) -> tuple[str | None, Digest]:
        """The digest that an object's writer recorded in its metadata, and the digest that it has."""
        answer = self._client.get_object(**self._at(key))
        return answer["Metadata"].get(_WRITTEN), of_stream(answer["Body"].iter_chunks(_CHUNK_BYTES))

    def get(self, key: str) -> bytes | None:
        """The object's bytes; None if there is none."""
        try:
            return self._call(lambda: self._read(key), f"reading {key} from", expected={404})
        except _MissingError:
            return None

    def _read(self, key: str) -> bytes:
        data: bytes = self._client.get_object(**self._at(key), ChecksumMode="ENABLED")["Body"].read()
        return data

    def get_file(self, key: str, path: Path, *, on_progress: OnProgress = silent) -> Digest:
        """Download an object, in parallel ranges if it is large. See `Store.get_file`."""
        call = functools.partial(self._call, doing=f"reading {key} from", expected={404, 412})
        try:
            head = call(lambda: self._client.head_object(**self._at(key)))
            if int(head["ContentLength"]) > _SINGLE_BYTES:
                return download_in_ranges(
                    self._client, self._at(key), path, head=head, call=call, on_progress=on_progress
                )
        except _MissingError:
            raise self._no_such(key) from None
        except _AlreadyThereError:
            raise StoreError(f"{self.url}/{key} was replaced while it was read; run the same command again") from None
        data = self.get(key)
        if data is None:
            raise self._no_such(key)
        with atomic_write(path) as out:
            out.write(data)
        on_progress(len(data), len(data))
        return out.digest

    def read_digest(self, key: str) -> Digest:
        """Read an object and return the digest of its bytes, whatever they are. See `Store.read_digest`."""

        def read() -> Digest:
            answer = self._client.get_object(
                **self._at(key)
            )  # no checksum mode: damage is an answer here, not an error
            return of_stream(answer["Body"].iter_chunks(_CHUNK_BYTES))

        try:
            return self._call(read, f"reading {key} from", expected={404})
        except _MissingError:
            raise self._no_such(key) from None

    def head(self, key: str) -> ObjectInfo | None:
        """Size and checksum; the checksum is None on a server that repeats it without comparing."""
        ask = functools.partial(self._client.head_object, **self._at(key), ChecksumMode="ENABLED")
        try:
            answer = self._call(ask, f"looking up {key} in", expected={404})
        except _MissingError:
            self._check_bucket()
            return None
        checksum = answer.get("ChecksumSHA256") if self._promises.checksums else None
        return ObjectInfo(int(answer["ContentLength"]), checksum)

    def list(self, prefix: str) -> list[str]:
        """Keys below the folder ``prefix``, sorted."""
        return [listed.key for listed in self.listing(prefix)]

    def listing(self, prefix: str) -> tuple[ListedObject, ...]:
        """Objects below the folder ``prefix``. See `Store.listing`."""
        ask = {"Bucket": self._bucket, "Prefix": f"{self._prefix}{check_key(prefix)}/"}

        def read() -> list[ListedObject]:
            pages = list(self._client.get_paginator("list_objects_v2").paginate(**ask))
            check_listing(pages)
            return [
                ListedObject(item["Key"].removeprefix(self._prefix), int(item["Size"]), item["LastModified"])
                for page in pages
                for item in page.get("Contents", [])
            ]

        found = self._call(read, f"listing {prefix} in")
        for listed in found:
            if not is_key(listed.key):  # such as the folder markers that consoles create
                self._foreign.name(listed.key)
        return tuple(sorted(listed for listed in found if is_key(listed.key)))

    def unfinished(self, prefix: str) -> tuple[UnfinishedWrite, ...]:
        """Multipart uploads that were neither completed nor aborted. See `Store.unfinished`."""
        where = {"Bucket": self._bucket, "Prefix": f"{self._prefix}{check_key(prefix)}/"}
        found = self._call(
            lambda: unfinished_uploads(self._client, where), f"listing unfinished uploads of {prefix} in"
        )
        return tuple(
            sorted(
                UnfinishedWrite(key.removeprefix(self._prefix), num_bytes, newest, upload_id)
                for key, num_bytes, newest, upload_id in found
                if key.startswith(where["Prefix"])
            )
        )

    def discard(self, unfinished: UnfinishedWrite) -> None:
        """Abort an upload. See `Store.discard`."""
        where = self._at(unfinished.key)
        self._call(
            lambda: abort(self._client, where, unfinished.handle), f"removing an unfinished {unfinished.key} from"
        )

    def delete(self, key: str) -> None:
        """Remove an object; no error if there is none."""
        self._call(lambda: self._client.delete_object(**self._at(key)), f"removing {key} from")

    def now(self) -> datetime | None:
        """The server's clock, as it dates its answers; None if it does not."""

        def ask() -> dict[str, Any]:
            try:
                answer: dict[str, Any] = self._client.head_object(**self._at("probe/clock"))
            except ClientError as error:
                if is_transient(error):
                    raise
                return error.response  # "no such object" is dated, too
            return answer

        headers = self._call(ask, "asking the time of").get("ResponseMetadata", {}).get("HTTPHeaders", {})
        try:
            there = parsedate_to_datetime(headers["date"])
        except (KeyError, ValueError):
            return None
        return there if there.tzinfo else there.replace(tzinfo=UTC)  # "-0000" is UTC and parsed without a zone

    @functools.cached_property
    def _promises(self) -> StoreCapabilities:
        return self._call(lambda: _probe(self._client, self._bucket, self._prefix), "probing")

    def _check_bucket(self) -> None:
        """Raise StoreError if there is no bucket: HEAD answers 404 for a missing object and a missing bucket alike."""
        if self._has_bucket:
            return
        try:
            self._call(
                lambda: self._client.list_objects_v2(Bucket=self._bucket, Prefix=self._prefix, MaxKeys=1), "looking at"
            )
        except StoreError as error:
            # Whoever may not list is told 403 of a missing object, not 404: so the bucket exists.
            if "AccessDenied" not in str(error.__cause__):
                raise
        self._has_bucket = True

    @property
    def _endpoint(self) -> str:
        return str(self._client.meta.endpoint_url)

    def _connect(self, timeout_seconds: float) -> Any:
        try:
            return _connect(timeout_seconds)
        except (*S3_ERRORS, ValueError) as error:  # ValueError: what botocore says of an endpoint's address
            endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or "Amazon S3"
            raise explain(error, url=self.url, endpoint=endpoint, doing="opening") from error

    def _no_such(self, key: str) -> StoreError:
        return StoreError(f"the store {self.url} has no object {key}")

    def _at(self, key: str) -> dict[str, str]:
        return {"Bucket": self._bucket, "Key": self._prefix + check_key(key)}

    def _put(self, key: str, data: bytes, **more: Any) -> None:
        checksum = checksum_of(of_bytes(data))
        self._client.put_object(**self._at(key), Body=data, ChecksumAlgorithm="SHA256", ChecksumSHA256=checksum, **more)

    def _call(self, operation: Callable[[], Result], doing: str, *, expected: Collection[int] = ()) -> Result:
        """Run a request with retries.

        Raises:
            _MissingError: no such object, if 404 is expected.
            _AlreadyThereError: a precondition failed, if 412 is expected.
            StoreError: everything else.
        """
        try:
            return self._retry.call(operation, transient=is_transient)
        except S3_ERRORS as error:
            if 404 in expected and is_missing(error):
                raise _MissingError from error
            if 412 in expected and status_of(error) == 412:
                raise _AlreadyThereError from error
            raise explain(error, url=self.url, endpoint=self._endpoint, doing=doing) from error


def _name_of(data: bytes) -> dict[str, str]:
    """Metadata that tell whose write an object is; servers store them together with the bytes."""
    return {_WRITTEN: of_bytes(data).hex}


class _MissingError(Exception):
    """No object of that key."""


class _AlreadyThereError(Exception):
    """A conditional write found the key taken."""


def _probe(client: Any, bucket: str, prefix: str) -> StoreCapabilities:
    """Try both guarantees under a random key below ``<prefix>probe/``."""
    where = {"Bucket": bucket, "Key": f"{prefix}probe/{secrets.token_hex(8)}"}
    try:
        client.put_object(**where, Body=b"first")
        second_refused = _refused(client, 412, **where, Body=b"second", IfNoneMatch="*")
        kept = client.get_object(**where)["Body"].read() != b"second"
        wrong = checksum_of(of_bytes(b"other bytes"))
        damage_refused = _refused(client, 400, **where, Body=b"third", ChecksumAlgorithm="SHA256", ChecksumSHA256=wrong)
    finally:
        client.delete_object(**where)
    return StoreCapabilities(preconditions=second_refused and kept, checksums=damage_refused)


def _refused(client: Any, status: int, **request: Any) -> bool:
    try:
        client.put_object(**request)
    except ClientError as error:
        if status_of(error) != status and is_transient(error):
            raise
        return status_of(error) == status
    return False


def _connect(timeout_seconds: float) -> Any:
    """A client with one try a call (`Retry` does the rest, reads of the body included)."""
    own_server = bool(os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL"))
    config = Config(
        connect_timeout=min(10, timeout_seconds),
        read_timeout=timeout_seconds,
        retries={"total_max_attempts": 1},
        max_pool_connections=32,
        # Only where asked for (`get`): damage must be readable where bytes are read to be compared.
        response_checksum_validation="when_required",
        s3={
            # A self-hosted server seldom has a DNS name for every bucket.
            "addressing_style": "path" if own_server else "auto",
            # The signature covers the body's SHA-256 as a header, so the body need not be hashed again for it.
            "payload_signing_enabled": False,
        },
    )
    return boto3.client("s3", config=config)
