"""One run at a time in a checkout's pipeline: the second one waits, or says who holds it.

The lock itself is the operating system's (filelock), so it goes when its holder dies, however it dies. The text
beside it only says who holds it.
"""

import contextlib
import json
import os
import socket
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

from filelock import FileLock, Timeout

from graftline.digest import write_json
from graftline.errors import LockedError


@contextlib.contextmanager
def hold(folder: Path, *, wait_seconds: float = 0.0) -> Iterator[None]:
    """Hold a pipeline's run folder.

    Args:
        folder: ``runs/<pipeline>``; made when it is missing.
        wait_seconds: how long to wait for another run to end.

    Raises:
        LockedError: another run still holds it; its process, host and start are named.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lock, holder = FileLock(folder / ".lock"), folder / ".holder.json"
    try:
        lock.acquire(timeout=wait_seconds)
    except Timeout as timeout:
        raise LockedError(
            f"{folder} is held by {_describe(holder)}; wait for that run, stop it, or use another checkout"
        ) from timeout
    try:
        since = datetime.now(UTC).isoformat(timespec="seconds")
        write_json(holder, {"pid": os.getpid(), "host": socket.gethostname(), "since": since})
        yield
    finally:
        holder.unlink(missing_ok=True)
        lock.release()


def _describe(holder: Path) -> str:
    try:
        held = json.loads(holder.read_text(encoding="utf-8"))
        return f"process {held['pid']} on {held['host']} since {held['since']}"
    except (OSError, ValueError, KeyError, TypeError):
        # The other run is between taking the lock and writing who it is, or what it wrote is damaged.
        return "another run, which does not say who it is"
