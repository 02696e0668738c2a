"""One file over HTTPS, byte for byte as the server holds it."""

import logging
from pathlib import Path, PurePosixPath
from urllib.parse import unquote, urlsplit

import httpx

from graftline.address import Source, mask_secrets
from graftline.data.sources.arrival import CHUNK_BYTES, Arrived, save, with_retries
from graftline.errors import SourceError
from graftline.progress import OnProgress
from graftline.retry import may_pass

_TIMEOUT = httpx.Timeout(60.0, connect=15.0)


class _BusyError(Exception):
    """The server answered that it cannot answer now."""


def download(source: Source, folder: Path, on_progress: OnProgress) -> Arrived:
    """Download the file that a URL names into ``folder``.

    Raises:
        SourceUnavailableError: no answer, or errors, after every retry.
        SourceError: refused (status named), redirected to plain http, or no room.
    """
    target = folder / file_name(source.name)
    _mask_log()
    try:
        return with_retries(lambda: _attempt(source, target, on_progress), transient=_is_transient, what=source.masked)
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise SourceError(f"{source.masked}: {mask_secrets(str(error))}; check the address") from error


class _Masked(logging.Filter):
    """httpx logs every URL at INFO, with the tokens that it may hold."""

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


def _attempt(source: Source, target: Path, on_progress: OnProgress) -> Arrived:
    # `identity`: a compressed transfer would change the bytes that the digest is of.
    headers = {"Accept-Encoding": "identity"}
    with (
        httpx.Client(timeout=_TIMEOUT, follow_redirects=True, max_redirects=10, headers=headers) as client,
        client.stream("GET", source.name) as response,
    ):
        _check(source, response)
        length = response.headers.get("Content-Length", "")
        total_bytes = int(length) if length.isdigit() else None
        return save(response.iter_raw(CHUNK_BYTES), target, total_bytes=total_bytes, on_progress=on_progress)


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
