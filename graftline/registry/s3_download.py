"""Download a large object in ranges: parallel, and resumed where an earlier call stopped.

Ranges land in ``<name>.part``; ``<name>.part.json`` says which are there and of which version (entity tag) of the
object. Every request names that version, so that bytes of two versions are never mixed. The digest of the whole is
computed from what was written, range after range; then the file gets its name.
"""

import hashlib
import json
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from graftline.digest import Digest
from graftline.errors import StoreError
from graftline.progress import OnProgress
from graftline.registry.objects import part_ranges
from graftline.s3_errors import DamagedReadError

_NUM_THREADS = 10
_CHUNK_BYTES = 1 << 18  # stays in a core's cache on its way from the socket to the file

Call = Callable[[Callable[[], Any]], Any]
"""Runs a request with retries."""


def download_in_ranges(
    client: Any, where: dict[str, str], path: Path, *, head: dict[str, Any], call: Call, on_progress: OnProgress
) -> Digest:
    """Download the version of ``where`` (bucket and key) that ``head`` describes; returns the digest of its bytes.

    Raises:
        StoreError: the file cannot be written.
    """
    try:
        return _download(client, where, path, head=head, call=call, on_progress=on_progress)
    except OSError as error:
        raise StoreError(
            f"cannot write {path} ({head['ContentLength']} bytes): {error.strerror or error}; check the folder's "
            "permissions and free space, then run the same command again: it goes on where it stopped"
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
    with part.open("r+b" if there else "w+b") as stream, ThreadPoolExecutor(_NUM_THREADS) as pool:
        stream.truncate(num_bytes)

        def get(start: int, size: int) -> None:
            if start not in there:
                call(lambda: _get_range(client, where, stream.fileno(), etag=etag, start=start, size=size))

        # In order, so that what has arrived is hashed while the rest is on its way.
        for (start, size), _ in zip(ranges, pool.map(get, *zip(*ranges, strict=True)), strict=True):
            _hash_range(hashed, stream.fileno(), start, size)
            there.add(start)
            # Not synced to the disk: a journal that is ahead of its bytes shows in the digest, and is started again.
            journal.write_text(json.dumps({"etag": etag, "starts": sorted(there)}), encoding="utf-8")
            on_progress(start + size, num_bytes)
        os.fsync(stream.fileno())
    part.replace(path)
    journal.unlink(missing_ok=True)
    return Digest(hashed.hexdigest())


def _read_journal(part: Path, journal: Path, etag: str) -> set[int]:
    """Starts of the ranges that an earlier call has got of this version."""
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
