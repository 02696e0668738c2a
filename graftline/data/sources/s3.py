"""One object of an S3 store. Credentials, region and endpoint come from boto3's own chain, never from an address."""

from pathlib import Path, PurePosixPath

import boto3
from botocore.config import Config
from botocore.exceptions import (
    BotoCoreError,
    ClientError,
    ConnectionError,
    HTTPClientError,
    IncompleteReadError,
    NoCredentialsError,
    ProfileNotFound,
    ResponseStreamingError,
)

from graftline.address import Source, mask_secrets
from graftline.data.sources.arrival import CHUNK_BYTES, Arrived, save
from graftline.data.sources.retry import TransientError, with_retries
from graftline.errors import SourceError
from graftline.progress import OnProgress

# One attempt each: `with_retries` also covers bodies that end early, which botocore does not try again.
_CONFIG = Config(connect_timeout=15, read_timeout=60, retries={"total_max_attempts": 1})
_PASSING = (ConnectionError, HTTPClientError, IncompleteReadError, ResponseStreamingError)
_WORTH_RETRYING = {408, 429, 500, 502, 503, 504}


def download(source: Source, folder: Path, on_progress: OnProgress) -> Arrived:
    """Download an object into ``folder``.

    Raises:
        SourceUnavailableError: no answer, or errors, after every retry.
        SourceError: no credentials, no such bucket or object, or no room.
    """
    bucket, _, key = source.name.removeprefix("s3://").partition("/")
    target = folder / (PurePosixPath(key).name or "download")
    return with_retries(lambda: _attempt(source, bucket, key, target, on_progress), what=source.masked)


def _attempt(source: Source, bucket: str, key: str, target: Path, on_progress: OnProgress) -> Arrived:
    try:
        client = boto3.Session().client("s3", config=_CONFIG)
        answer = client.get_object(Bucket=bucket, Key=key)
        chunks = answer["Body"].iter_chunks(CHUNK_BYTES)
        return save(chunks, target, total_bytes=int(answer["ContentLength"]), on_progress=on_progress)
    except ClientError as error:
        status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode")
        code = error.response.get("Error", {}).get("Code", "unknown error")
        if status in _WORTH_RETRYING:
            raise TransientError(f"the store answered {status} {code}") from error
        raise SourceError(
            f"{source.masked}: the store answered {status} {code}; check bucket, key and the right to read it"
        ) from error
    except _PASSING as error:
        raise TransientError(f"{type(error).__name__}: {mask_secrets(str(error))}") from error
    except (NoCredentialsError, ProfileNotFound) as error:
        raise SourceError(
            f"{source.masked}: {error}; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE"
        ) from error
    except BotoCoreError as error:
        raise SourceError(
            f"{source.masked}: {mask_secrets(str(error))}; check the address and AWS's settings"
        ) from error
