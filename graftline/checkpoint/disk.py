"""Is there room on the disk? Asked before work starts, not found out after an hour of it."""

import shutil
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
