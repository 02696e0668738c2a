"""Which S3 errors are transient, and what the others mean."""

from collections.abc import Mapping, Sequence
from typing import Any

from boto3.exceptions import Boto3Error
from botocore.exceptions import (
    BotoCoreError,
    ClientError,
    ConnectionError,
    FlexibleChecksumError,
    HTTPClientError,
    IncompleteReadError,
    NoCredentialsError,
    NoRegionError,
    ParamValidationError,
    PartialCredentialsError,
    ProfileNotFound,
    ResponseStreamingError,
)
from botocore.parsers import ResponseParserError

from graftline.address import mask_secrets
from graftline.errors import StoreError, StoreUnavailableError
from graftline.retry import may_pass

# Codes with a status below 500 that a retry can cure: server clock and load, and bytes corrupted in transit (the server
# compared them with the checksum that was sent along).
_TRANSIENT_CODES = frozenset(
    {
        "SlowDown",
        "Throttling",
        "ThrottlingException",
        "RequestTimeout",
        "RequestTimeTooSkewed",
        "TooManyRequestsException",
        "BadDigest",
        "InvalidDigest",
        "XAmzContentSHA256Mismatch",
        "XAmzContentChecksumMismatch",
        "ConditionalRequestConflict",
        "OperationAborted",
        "IncompleteBody",
    }
)
_TRANSIENT_TYPES = (
    ConnectionError,  # refused, reset, timed out, closed
    HTTPClientError,
    ResponseStreamingError,
    IncompleteReadError,
    FlexibleChecksumError,
    ResponseParserError,
)


class DamagedReadError(Exception):
    """The bytes of a response are not those that the store says it holds: worth a retry."""


def status_of(error: Exception) -> int:
    """HTTP status of a response; 0 if there was none."""
    if isinstance(error, ClientError):
        return int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
    return 0


def code_of(error: Exception) -> str:
    """S3's error code, such as ``NoSuchKey``; empty if there was none."""
    return str(error.response.get("Error", {}).get("Code", "")) if isinstance(error, ClientError) else ""


def is_transient(error: Exception) -> bool:
    """Whether the same request may succeed later."""
    if _CERTIFICATE in str(error):
        return False
    if isinstance(error, ClientError):
        return may_pass(status_of(error)) or code_of(error) in _TRANSIENT_CODES
    return isinstance(error, (DamagedReadError, *_TRANSIENT_TYPES))


def check_listing(pages: Sequence[Mapping[str, Any]]) -> None:
    """Check that the pages of a listing are S3's and complete.

    A web server's XML page parses as an empty listing. A server that knows only version 1 of listings says that there
    is more, but not where: the client then stops silently.

    Raises:
        DamagedReadError: they are not.
    """
    if not pages or any("IsTruncated" not in page for page in pages):
        raise DamagedReadError("the answer is not the listing of an S3 server")
    if pages[-1]["IsTruncated"]:
        raise DamagedReadError("the listing is cut off: the server says that there is more, and not how to get it")


def is_missing(error: Exception) -> bool:
    """Whether S3 says that there is no such object.

    A response to HEAD has no body, so only its status counts. Elsewhere a 404 without S3's code comes from a server
    that does not speak S3 and says nothing about an object.
    """
    is_head = isinstance(error, ClientError) and error.operation_name == "HeadObject"
    return code_of(error) == "NoSuchKey" or (is_head and status_of(error) == 404)


def explain(error: Exception, *, url: str, endpoint: str, doing: str) -> StoreError:
    """The error that a user sees: what was done where, what was returned, what to check."""
    where, error_text = f"{doing} {url} at {mask_secrets(endpoint)}", mask_secrets(str(error) or type(error).__name__)
    if isinstance(error, FlexibleChecksumError):
        return StoreError(
            f"{where}: the bytes are not those of the checksum that the store names, at every try; "
            "the object is damaged, publish the release again or use another"
        )
    if is_transient(error):
        return StoreUnavailableError(
            f"{where}: no good answer after every retry (last: {error_text}); check that the endpoint is up and "
            "reachable (AWS_ENDPOINT_URL), then run the same command again: it goes on where it stopped"
        )
    return StoreError(f"{where}: {error_text}; {hint(error)}")


def hint(error: Exception) -> str:
    """Advice for an error that is not transient."""
    for types, advice in _HINTS_BY_TYPE:
        if isinstance(error, types):
            return advice
    if _CERTIFICATE in str(error):
        return "the server's certificate is not trusted here; name its authority's certificate in AWS_CA_BUNDLE"
    if not isinstance(error, ClientError):
        return "check the store's address and the AWS_* settings"
    return _HINTS_BY_CODE.get(code_of(error), "check the store's address and the AWS_* settings")


_CERTIFICATE = "CERTIFICATE_VERIFY_FAILED"
_HINTS_BY_TYPE: tuple[tuple[tuple[type[Exception], ...], str], ...] = (
    (
        (NoCredentialsError, PartialCredentialsError),
        "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, AWS_PROFILE or a role",
    ),
    ((ProfileNotFound,), "AWS_PROFILE names a profile that ~/.aws/config does not have; correct one of them"),
    ((NoRegionError,), "set AWS_DEFAULT_REGION to the bucket's region"),
    # botocore asks the server for the bucket's region at each redirect, and follows that response's redirect, too.
    ((RecursionError,), "every answer leads elsewhere, as a login page's does; check the endpoint (AWS_ENDPOINT_URL)"),
    ((ParamValidationError,), "bucket or key has a form that S3 does not take; correct the store's address"),
)
_HINTS_BY_CODE = {
    "": "the answer is not that of an S3 server; check the endpoint (AWS_ENDPOINT_URL)",
    "404": "the answer is not that of an S3 server; check the endpoint (AWS_ENDPOINT_URL)",
    "NoSuchBucket": "create the bucket or correct the store's address",
    "NoSuchKey": "the object is not there; run the same command again",
    "NotImplemented": "the server lacks this part of S3; use another, or a newer version of it",
    "NoSuchUpload": "the unfinished upload was removed meanwhile; run the same command again",
    "AccessDenied": "the credentials lack a permission on this bucket and prefix",
    "403": "the credentials lack a permission on this bucket and prefix",
    "ExpiredToken": "the credentials have expired; log in again",
    "InvalidAccessKeyId": "the access key is unknown there; check AWS_ACCESS_KEY_ID and the endpoint",
    "SignatureDoesNotMatch": "the secret key is wrong; check AWS_SECRET_ACCESS_KEY",
    "PermanentRedirect": "the bucket is in another region; set AWS_DEFAULT_REGION",
    "AuthorizationHeaderMalformed": "the bucket is in another region; set AWS_DEFAULT_REGION",
}


S3_ERRORS = (ClientError, BotoCoreError, Boto3Error, ResponseParserError, DamagedReadError, RecursionError)
"""Everything that a call may raise and `explain` can turn into a `StoreError`."""
