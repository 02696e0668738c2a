"""Ask an S3 server which promises it keeps, by trying them on objects that are removed again.

Some look-alikes answer 200 to a conditional write and replace the object, and some repeat the checksum they were sent
without comparing it. Documentation does not tell; a try does.
"""

import secrets
from dataclasses import dataclass
from typing import Any

from botocore.exceptions import ClientError

from graftline.digest import of_bytes
from graftline.registry.objects import checksum_of
from graftline.s3_errors import is_transient, status_of


@dataclass(frozen=True)
class StoreCapabilities:
    """What the server did when it was tried."""

    preconditions: bool
    """``If-None-Match: *`` on an existing key was refused, and the object stayed as it was."""
    checksums: bool
    """An object whose bytes do not have the SHA-256 that was sent along was refused."""


def probe(client: Any, bucket: str, prefix: str) -> StoreCapabilities:
    """Try both promises under a random key below ``<prefix>probe/``.

    Raises:
        ClientError: the server refuses to write there at all, or is out of order.
    """
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
        if status_of(error) == status:
            return True
        if is_transient(error):
            raise
        return False
    return False
