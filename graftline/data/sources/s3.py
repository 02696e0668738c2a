"""One object of an S3 store. Credentials, region and endpoint come from boto3's own chain, never from an address."""

from pathlib import Path, PurePosixPath

import boto3
from botocore.config import Config

from graftline.address import Source, mask_secrets
from graftline.data.sources.arrival import CHUNK_BYTES, Arrived, save, with_retries
from graftline.errors import SourceError
from graftline.progress import OnProgress
from graftline.s3_errors import S3_ERRORS, code_of, hint, is_transient, status_of

# One attempt each: `with_retries` also covers bodies that end early, which botocore does not try again.
_CONFIG = Config(connect_timeout=15, read_timeout=60, retries={"total_max_attempts": 1})
_ABSENT = ("NoSuchBucket", "NoSuchKey")


def download(source: Source, folder: Path, on_progress: OnProgress) -> Arrived:
    """Download an object into ``folder``.

    Raises:
        SourceUnavailableError: no answer, or errors, after every retry.
        SourceError: no credentials, no such bucket or object, unusable settings of AWS, or no room.
    """
    bucket, _, key = source.name.removeprefix("s3://").partition("/")
    target = folder / (PurePosixPath(key).name or "download")

    def attempt() -> Arrived:
        answer = client.get_object(Bucket=bucket, Key=key)
        chunks = answer["Body"].iter_chunks(CHUNK_BYTES)
        return save(chunks, target, total_bytes=int(answer["ContentLength"]), on_progress=on_progress)

    try:
        client = boto3.Session().client("s3", config=_CONFIG)
        return with_retries(attempt, transient=is_transient, what=source.masked)
    except (*S3_ERRORS, ValueError) as error:  # ValueError: what botocore says of an endpoint's address
        code = code_of(error)
        reason = f"the store answered {status_of(error)} {code}" if code else mask_secrets(str(error))
        advice = "check bucket, key and the right to read it" if code in _ABSENT else hint(error)
        raise SourceError(f"{source.masked}: {reason}; {advice}") from error
