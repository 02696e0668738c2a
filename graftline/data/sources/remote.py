"""Network sources: objects in S3 stores, files over HTTPS, snapshots from the Hugging Face Hub."""

import logging
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar
from urllib.parse import unquote, urlsplit

import boto3
import httpx
import httpx2  # HTTP client of huggingface_hub 2, which does not wrap its errors
from botocore.config import Config
from botocore.exceptions import ClientError
from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError

from graftline.address import Source, mask_secrets
from graftline.data.sources.cache import CHUNK_BYTES, Downloaded, digest_of, measure, save, with_retries
from graftline.errors import SourceError, SourceUnavailableError
from graftline.logs import OnProgress
from graftline.retry import may_pass
from graftline.s3_errors import S3_ERRORS, check_listing, code_of, hint, is_transient, status_of

Result = TypeVar("Result")

# The current content of an address, opened once, with the server's identifiers for these bytes.

_EACH_BYTES_ANEW = "W/"  # Prefix of a weak ETag, which other bytes may have too.


@dataclass(frozen=True)
class Version:
    """A server's identifiers for its current bytes; None where the server gives none."""

    etag: str | None = None
    version_id: str | None = None
    """Version of an object in a versioned bucket; with it the same bytes can be fetched again."""
    modified: str | None = None

    @property
    def strong_etag(self) -> str | None:
        """The ETag, if it is strong: no other bytes can have it."""
        return None if self.etag is None or self.etag.startswith(_EACH_BYTES_ANEW) else self.etag

    def names(self) -> dict[str, str]:
        """The identifiers that the server gives, for a record."""
        return {name: value for name, value in vars(self).items() if value}


@dataclass(frozen=True)
class Body:
    """A response: the version of its bytes, how many there are (None: unknown), and the bytes."""

    version: Version
    total_bytes: int | None
    chunks: Iterable[bytes]


def ask(source: Source, take: Callable[[Body], Result], *, unless: str | None = None) -> Result | None:
    """Open an S3 object or an HTTPS file and ``take`` its body; None if it still has the ETag ``unless``.

    Raises:
        SourceUnavailableError: no response, or only errors, after all retries.
        SourceError: refused, not found, no credentials, unusable settings, redirected to plain http, or disk full.
    """
    opened, explained, transient = (
        (_object, _s3_explained, is_transient) if source.kind == "s3" else (_file, _https_explained, _is_transient)
    )

    def attempt() -> Result | None:
        with opened(source, unless) as body:
            # Some servers ignore the condition and send what we already have.
            if body is None or (unless is not None and body.version.etag == unless):
                return None
            return take(body)

    with explained(source):
        return with_retries(attempt, transient=transient, what=source.masked)


def download(source: Source, folder: Path, on_progress: OnProgress) -> Downloaded:
    """Download an object or a file into ``folder``; if an object version is given, that version.

    Raises:
        SourceError: as in `ask`.
    """
    arrived = ask(source, lambda body: save_body(source, body, folder, on_progress))
    assert arrived is not None  # None is only possible with a condition
    return arrived


def save_body(source: Source, body: Body, folder: Path, on_progress: OnProgress) -> Downloaded:
    """Write the bytes of a response into ``folder``, under the file name in the address."""
    name = file_name(source.name) if source.kind == "https" else PurePosixPath(source.name).name or "download"
    return save(body.chunks, folder / name, total_bytes=body.total_bytes, on_progress=on_progress)


# S3 objects. Credentials, region and endpoint come from boto3's own chain, never from an address.

# One attempt each: `with_retries` also covers truncated bodies, which botocore does not retry.
_CONFIG = Config(connect_timeout=15, read_timeout=60, retries={"total_max_attempts": 1})
_ABSENT = ("NoSuchBucket", "NoSuchKey", "NoSuchVersion")


@contextmanager
def _object(source: Source, unless: str | None) -> Iterator[Body | None]:
    bucket, _, key = source.name.removeprefix("s3://").partition("/")
    only = {"IfNoneMatch": unless} if unless else {}
    only |= {"VersionId": source.version} if source.version else {}
    try:
        answer = boto3.Session().client("s3", config=_CONFIG).get_object(Bucket=bucket, Key=key, **only)
    except ClientError as error:
        if unless is None or status_of(error) != 304:
            raise
        yield None
        return
    # In a bucket that was never versioned, every object has the version "null".
    version_id = answer.get("VersionId")
    version = Version(answer.get("ETag"), None if version_id == "null" else version_id, _time(answer))
    with closing(answer["Body"]) as body:
        yield Body(version, int(answer["ContentLength"]), body.iter_chunks(CHUNK_BYTES))


def list_objects(source: Source, bucket: str, prefix: str) -> dict[str, str]:
    """ETags, by key, of all objects in a bucket whose key starts with ``prefix``.

    Args:
        source: the address, for messages.
        bucket: the address's bucket.
        prefix: prefix of the keys.

    Raises:
        SourceError: as in `ask`.
    """

    def attempt() -> dict[str, str]:
        client = boto3.Session().client("s3", config=_CONFIG)
        pages = list(client.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix))
        check_listing(pages)
        return {each["Key"]: each["ETag"] for page in pages for each in page.get("Contents", ())}

    with _s3_explained(source):
        return with_retries(attempt, transient=is_transient, what=source.masked)


def _time(answer: Mapping[str, Any]) -> str | None:
    changed = answer.get("LastModified")
    return changed.isoformat() if isinstance(changed, datetime) else None


@contextmanager
def _s3_explained(source: Source) -> Iterator[None]:
    try:
        yield
    except (*S3_ERRORS, ValueError) as error:  # ValueError: botocore rejects an endpoint's address
        code = code_of(error)
        reason = f"the store answered {status_of(error)} {code}" if code else mask_secrets(str(error))
        advice = "check bucket, key and the right to read it" if code in _ABSENT else hint(error)
        raise SourceError(f"{source.masked}: {reason}; {advice}") from error


# Files over HTTPS, byte for byte as the server holds them.

_TIMEOUT = httpx.Timeout(60.0, connect=15.0)


class _BusyError(Exception):
    """The server responded with a temporary error."""


@contextmanager
def _file(source: Source, unless: str | None) -> Iterator[Body | None]:
    _mask_log()
    # `identity`: a compressed transfer would change the bytes that are hashed.
    headers = {"Accept-Encoding": "identity"} | ({"If-None-Match": unless} if unless else {})
    with (
        httpx.Client(timeout=_TIMEOUT, follow_redirects=True, max_redirects=10, headers=headers) as client,
        client.stream("GET", source.name) as response,
    ):
        if unless is not None and response.status_code == 304:
            yield None
            return
        _check(source, response)
        length = response.headers.get("Content-Length", "")
        version = Version(response.headers.get("ETag"), modified=response.headers.get("Last-Modified"))
        yield Body(version, int(length) if length.isdigit() else None, response.iter_raw(CHUNK_BYTES))


@contextmanager
def _https_explained(source: Source) -> Iterator[None]:
    try:
        yield
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise SourceError(f"{source.masked}: {mask_secrets(str(error))}; check the address") from error


class _Masked(logging.Filter):
    """Masks tokens in the URLs that httpx logs at INFO."""

    def filter(self, record: logging.LogRecord) -> bool:
        record.msg, record.args = mask_secrets(record.getMessage()), ()
        return True


def _mask_log() -> None:
    logger = logging.getLogger("httpx")
    if not any(isinstance(each, _Masked) for each in logger.filters):
        logger.addFilter(_Masked())


def file_name(url: str) -> str:
    """The last part of a URL's path, as a plain file name."""
    name = PurePosixPath(unquote(urlsplit(url).path)).name.replace("\0", "")
    return name if name not in ("", ".", "..") else "download"


def _is_transient(error: Exception) -> bool:
    return isinstance(error, (_BusyError, httpx.TransportError))


def _check(source: Source, response: httpx.Response) -> None:
    if source.name.startswith("https://") and response.url.scheme != "https":
        raise SourceError(f"{source.masked} redirects to plain http; expected https all the way; use its final address")
    if may_pass(response.status_code):
        raise _BusyError(f"status {response.status_code} {response.reason_phrase}")
    if response.status_code != 200:
        raise SourceError(
            f"{source.masked} answered {response.status_code} {response.reason_phrase}; expected 200; "
            "check the address and that it needs no login"
        )


# Snapshots from the Hugging Face Hub. Token, endpoint and offline mode come from the Hub's own environment variables.

LEFT_OUT = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl", "*.pickle", "*.h5", "*.msgpack", "*.py")
"""Files that could run code when loaded, or that duplicate the weights."""

_FAILURES = (HfHubHTTPError, httpx2.HTTPError, OSError, ValueError)


def pin_snapshot(source: Source) -> Source:
    """The same source, pinned to the commit that its branch or tag points to now.

    Raises:
        SourceError: no such repository or revision, no permission to read it, or unreachable.
    """
    repository, kind = _repository(source)
    try:
        info = HfApi().repo_info(repository, revision=source.version, repo_type=kind)
    except _FAILURES as error:
        raise _explained(source, error) from error
    return replace(source, version=info.sha)


def download_snapshot(source: Source, folder: Path, on_progress: OnProgress) -> Downloaded:
    """Download a snapshot into ``folder``, without the files in `LEFT_OUT`.

    Raises:
        SourceError: as in `pin_snapshot`.
    """
    repository, kind = _repository(source)
    try:
        snapshot_download(
            repository,
            repo_type=kind,
            revision=source.version,
            local_dir=folder,
            ignore_patterns=list(LEFT_OUT),
            tqdm_class=None,
        )
    except _FAILURES as error:
        raise _explained(source, error) from error
    shutil.rmtree(folder / ".cache", ignore_errors=True)  # the Hub's own bookkeeping
    _, num_bytes = measure(folder)
    on_progress(num_bytes, num_bytes)
    return Downloaded(folder, digest_of(folder))


def _repository(source: Source) -> tuple[str, str]:
    if source.name.startswith("datasets/"):
        return source.name.removeprefix("datasets/"), "dataset"
    return source.name, "model"


def _explained(source: Source, error: Exception) -> SourceError:
    if isinstance(error, GatedRepoError):
        return SourceError(f"{source} is gated; accept its terms on its page and set HF_TOKEN")
    if isinstance(error, RevisionNotFoundError):
        return SourceError(f"{source}: there is no revision {source.version!r}; expected a commit, tag or branch")
    if isinstance(error, RepositoryNotFoundError):
        return SourceError(f"{source}: there is no such repository, or it is private; check the name, or set HF_TOKEN")
    status = error.response.status_code if isinstance(error, HfHubHTTPError) else 0
    passing = isinstance(error, httpx2.TransportError) or may_pass(status)
    reason = mask_secrets(" ".join(str(error).split())[:300])
    kind = SourceUnavailableError if passing else SourceError
    return kind(f"{source} could not be fetched: {type(error).__name__}: {reason}; check the network")
