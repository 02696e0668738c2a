"""The disk: is there room, asked before work starts; and what to say when it refuses all the same."""

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path

from graftline.errors import CheckpointError


def check_free_space(folder: Path, num_bytes: int) -> None:
    """Refuse to start when ``folder``'s disk has less than ``num_bytes`` free. The folder need not exist yet.

    Raises:
        CheckpointError: too little room; path, bytes needed and bytes free are named.
    """
    existing = folder.absolute()
    while not existing.exists():
        existing = existing.parent
    free = shutil.disk_usage(existing).free
    if free < num_bytes:
        raise CheckpointError(
            f"writing {folder} takes {num_bytes} bytes, its disk has {free} free; "
            f"free {num_bytes - free} bytes or choose another disk"
        )


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn the operating system's refusal to write ``path`` into an error that names it.

    Raises:
        CheckpointError: disk full, read-only, permission denied.
    """
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        raise CheckpointError(f"cannot write {path}: {reason}; free space or permission is missing there") from error
