"""Large objects to an S3 store and back: in parts, in parallel, and resumed where an earlier call stopped."""

import base64
import hashlib
import json
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from pathlib import Path
from typing import Any

from graftline.digest import Digest, of_file
from graftline.errors import StoreError
from graftline.logs import OnProgress
from graftline.registry.objects import part_ranges, reading
from graftline.s3_errors import DamagedReadError, code_of

_NUM_WRITERS = 8

Call = Callable[[Callable[[], Any]], Any]
"""Runs a request with retries."""


def upload_in_parts(
    client: Any, where: dict[str, str], path: Path, *, digest: Digest, call: Call, on_progress: OnProgress
) -> None:
    """Upload ``path`` to ``where`` (bucket and key).

    A part that the server has from an earlier call is kept if its number, size and checksum are right. The upload is
    completed only if the whole file had the expected digest while it was read; the parts' digests are sent along, so
    that a server which verifies checksums refuses what it does not hold.

    Raises:
        StoreError: the file's bytes are not those of ``digest``; no object appears.
    """
    with reading(path):
        num_bytes = path.stat().st_size
    upload_id, there = _open(client, where, call)
    target = {**where, "UploadId": upload_id}
    done = 0

    def send(part: tuple[int, tuple[int, int]]) -> dict[str, Any]:
        nonlocal done
        number, (start, size) = part
        sent = _send(client, {**target, "PartNumber": number}, path, start, size, known=there.get(number), call=call)
        done += size
        on_progress(min(done, num_bytes), num_bytes)
        return sent

    with ThreadPoolExecutor(_NUM_WRITERS + 1) as pool:
        whole = pool.submit(_hash, path)
        sent = list(pool.map(send, enumerate(part_ranges(num_bytes), start=1)))
        found = whole.result()
    if found != digest:
        call(lambda: abort(client, where, upload_id))
        raise StoreError(f"{path} has digest {found}, expected {digest}; it changed since its manifest was written")

    def complete() -> None:
        try:
            client.complete_multipart_upload(**target, MultipartUpload={"Parts": sent})
        except client.exceptions.ClientError as error:
            # The answer to an earlier try may have been lost: the caller checks whether the object exists.
            if code_of(error) != "NoSuchUpload":
                raise

    call(complete)


def unfinished_uploads(client: Any, where: dict[str, str]) -> list[tuple[str, int, datetime, str]]:
    """Unfinished uploads below a prefix: key, bytes sent, time of the newest part, and the upload's id."""
    pages = client.get_paginator("list_multipart_uploads").paginate(**where)
    found = []
    for upload in [upload for page in pages for upload in page.get("Uploads", [])]:
        target = {"Bucket": where["Bucket"], "Key": upload["Key"], "UploadId": upload["UploadId"]}
        try:
            parts = _parts(client, target)
        except client.exceptions.ClientError as error:
            if code_of(error) == "NoSuchUpload":  # completed or aborted in the meantime
                continue
            raise
        newest = max([upload["Initiated"], *(part["LastModified"] for part in parts if "LastModified" in part)])
        found.append((upload["Key"], sum(part["Size"] for part in parts), newest, upload["UploadId"]))
    return found


def _parts(client: Any, target: dict[str, str]) -> list[dict[str, Any]]:
    """The parts of an upload that the server has received."""
    pages = client.get_paginator("list_parts").paginate(**target)
    return [part for page in pages for part in page.get("Parts", [])]


def abort(client: Any, where: dict[str, str], upload_id: str) -> None:
    """Remove an unfinished upload with its parts; no error if it is gone."""
    try:
        client.abort_multipart_upload(**where, UploadId=upload_id)
    except client.exceptions.ClientError as error:
        if code_of(error) != "NoSuchUpload":
            raise


def _open(client: Any, where: dict[str, str], call: Call) -> tuple[str, dict[int, dict[str, Any]]]:
    """The id of this key's newest unfinished upload, or of a new one, and the parts that the server has, by number."""

    def find() -> list[dict[str, Any]]:
        pages = client.get_paginator("list_multipart_uploads").paginate(Bucket=where["Bucket"], Prefix=where["Key"])
        return [upload for page in pages for upload in page.get("Uploads", []) if upload["Key"] == where["Key"]]

    unfinished = sorted(call(find), key=lambda upload: upload["Initiated"])
    if not unfinished:
        created = call(lambda: client.create_multipart_upload(**where, ChecksumAlgorithm="SHA256"))
        return created["UploadId"], {}
    upload_id = unfinished[-1]["UploadId"]
    known = call(lambda: _parts(client, {**where, "UploadId": upload_id}))
    return upload_id, {part["PartNumber"]: part for part in known}


def _hash(path: Path) -> Digest:
    with reading(path):
        return of_file(path)


def _send(
    client: Any, target: dict[str, Any], path: Path, start: int, size: int, *, known: dict[str, Any] | None, call: Call
) -> dict[str, Any]:
    """Upload one part, unless the server has it; returns what completing the upload needs of it."""
    with reading(path), path.open("rb") as stream:
        stream.seek(start)
        data = stream.read(size)
    checksum = base64.b64encode(hashlib.sha256(data).digest()).decode()
    if not (known and _is_same(known, data, checksum)):
        known = call(lambda: client.upload_part(**target, Body=data, ChecksumSHA256=checksum))
    return {"PartNumber": target["PartNumber"], "ETag": known["ETag"], "ChecksumSHA256": checksum}


def _is_same(known: dict[str, Any], data: bytes, checksum: str) -> bool:
    """Whether a part that the server lists has these bytes, by SHA-256 or, where there is none, by its entity tag.

    The tag is the MD5 of the bytes, except under KMS encryption, where it never matches and the part is sent again.
    """
    if known["Size"] != len(data):
        return False
    if "ChecksumSHA256" in known:
        return bool(known["ChecksumSHA256"] == checksum)
    return bool(known["ETag"].strip('"') == hashlib.md5(data, usedforsecurity=False).hexdigest())


_NUM_READERS = 10
_CHUNK_BYTES = 1 << 18  # fits a core's cache


def download_in_ranges(
    client: Any, where: dict[str, str], path: Path, *, head: dict[str, Any], call: Call, on_progress: OnProgress
) -> Digest:
    """Download the version of ``where`` (bucket and key) that ``head`` describes; returns the digest of its bytes.

    Ranges are written into ``<name>.part``; ``<name>.part.json`` records which are there, and of which version (entity
    tag) of the object. Every request names that version, so that two versions are never mixed. The digest is computed
    from what was written; then the file gets its name.

    Raises:
        StoreError: the file cannot be written.
    """
    try:
        return _download(client, where, path, head=head, call=call, on_progress=on_progress)
    except OSError as error:
        raise StoreError(
            f"cannot write {path} ({head['ContentLength']} bytes): {error.strerror or error}; check the folder's "
            "permissions and free space, then run the same command again: it resumes where it stopped"
        ) from error


def _download(
    client: Any, where: dict[str, str], path: Path, *, head: dict[str, Any], call: Call, on_progress: OnProgress
) -> Digest:
    num_bytes, etag = int(head["ContentLength"]), str(head["ETag"])
    part, journal = path.with_name(f"{path.name}.part"), path.with_name(f"{path.name}.part.json")
    path.parent.mkdir(parents=True, exist_ok=True)
    there = _read_journal(part, journal, etag)
    ranges = part_ranges(num_bytes)
    hashed = hashlib.sha256()
    with part.open("r+b" if there else "w+b") as stream, ThreadPoolExecutor(_NUM_READERS) as pool:
        stream.truncate(num_bytes)

        def get(start: int, size: int) -> None:
            if start not in there:
                call(lambda: _get_range(client, where, stream.fileno(), etag=etag, start=start, size=size))

        # In order, so that what has arrived is hashed while the rest is still being downloaded.
        for (start, size), _ in zip(ranges, pool.map(get, *zip(*ranges, strict=True)), strict=True):
            _hash_range(hashed, stream.fileno(), start, size)
            there.add(start)
            # Not synced: a journal that is ahead of its bytes shows in the digest, and the download starts again.
            journal.write_text(json.dumps({"etag": etag, "starts": sorted(there)}), encoding="utf-8")
            on_progress(start + size, num_bytes)
        os.fsync(stream.fileno())
    part.replace(path)
    journal.unlink(missing_ok=True)
    return Digest(hashed.hexdigest())


def _read_journal(part: Path, journal: Path, etag: str) -> set[int]:
    """Starts of the ranges of this version that an earlier call has downloaded."""
    try:
        found = json.loads(journal.read_bytes())
        return set(found["starts"]) if found["etag"] == etag and part.is_file() else set()
    except (OSError, ValueError, KeyError, TypeError):
        return set()


def _hash_range(hashed: Any, handle: int, start: int, size: int) -> None:
    buffer = memoryview(bytearray(min(_CHUNK_BYTES, size)))
    for position in range(start, start + size, len(buffer)):
        count = os.preadv(handle, [buffer[: min(len(buffer), start + size - position)]], position)
        hashed.update(buffer[:count])


def _get_range(client: Any, where: dict[str, str], handle: int, *, etag: str, start: int, size: int) -> None:
    answer = client.get_object(**where, Range=f"bytes={start}-{start + size - 1}", IfMatch=etag)
    position = start
    for chunk in answer["Body"].iter_chunks(_CHUNK_BYTES):
        os.pwrite(handle, chunk, position)
        position += len(chunk)
    if position != start + size:
        raise DamagedReadError(f"{position - start} of {size} bytes arrived")
