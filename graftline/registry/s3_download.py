"""Download a large object in ranges: parallel, and resumed where an earlier call stopped.

Ranges land in ``<name>.part``; ``<name>.part.json`` says which are there and of which version (entity tag) of the
object. Every request names that version, so that bytes of two versions are never mixed. The digest of the whole is
computed from the file that was written, which then gets its name.
"""

import json
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from graftline.digest import Digest, of_file, write_json
from graftline.progress import OnProgress
from graftline.registry.objects import part_ranges
from graftline.registry.s3_errors import DamagedReadError

_NUM_THREADS = 8
_CHUNK_BYTES = 1 << 20

Call = Callable[[Callable[[], Any]], Any]
"""Runs a request with retries."""


def download_in_ranges(
    client: Any, where: dict[str, str], path: Path, *, head: dict[str, Any], call: Call, on_progress: OnProgress
) -> Digest:
    """Download the version of ``where`` (bucket and key) that ``head`` describes; returns the digest of its bytes."""
    num_bytes, etag = int(head["ContentLength"]), str(head["ETag"])
    part, journal = path.with_name(f"{path.name}.part"), path.with_name(f"{path.name}.part.json")
    path.parent.mkdir(parents=True, exist_ok=True)
    there = _read_journal(part, journal, etag)
    with part.open("r+b" if there else "wb") as stream:
        stream.truncate(num_bytes)

        def get(start: int, size: int) -> int:
            if start not in there:
                call(lambda: _get_range(client, where, stream.fileno(), etag=etag, start=start, size=size))
            return start

        with ThreadPoolExecutor(_NUM_THREADS) as pool:
            for start in pool.map(lambda one: get(*one), part_ranges(num_bytes)):
                # Results come in order, so the journal never names a range whose bytes may be missing.
                if start not in there:
                    there.add(start)
                    write_json(journal, {"etag": etag, "starts": sorted(there)})
                on_progress(min(start + part_ranges(num_bytes)[0][1], num_bytes), num_bytes)
        os.fsync(stream.fileno())
    digest = of_file(part)
    part.replace(path)
    journal.unlink(missing_ok=True)
    return digest


def _read_journal(part: Path, journal: Path, etag: str) -> set[int]:
    """Starts of the ranges that an earlier call has got of this version."""
    try:
        found = json.loads(journal.read_bytes())
        return set(found["starts"]) if found["etag"] == etag and part.is_file() else set()
    except (OSError, ValueError, KeyError, TypeError):
        return set()


def _get_range(client: Any, where: dict[str, str], handle: int, *, etag: str, start: int, size: int) -> None:
    answer = client.get_object(**where, Range=f"bytes={start}-{start + size - 1}", IfMatch=etag)
    position = start
    for chunk in answer["Body"].iter_chunks(_CHUNK_BYTES):
        os.pwrite(handle, chunk, position)
        position += len(chunk)
    if position != start + size:
        raise DamagedReadError(f"{position - start} of {size} bytes arrived")
