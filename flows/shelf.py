"""What a pipeline's runs leave for the next one, whatever checkout that works in.

The folder ``runs/<pipeline>/.work``, or what it links to (flows.checkout), holds

* ``.lock``: one run at a time;
* ``train-<digest>/``: checkpoints of a training that was interrupted;
* ``resolved.json``, ``release.json``: what the last whole run had resolved and released;
* ``last.json``: what that run was made of, and how it ended.
"""

import json
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from graftline.digest import write_json, write_text

# Without them a fresh checkout would take its own release in production for somebody else's, and judge again.
_CARRIED = {"resolved.json": "resolved.json", "release.json": "release/release.json"}


@dataclass(frozen=True)
class LastRun:
    """How the last whole run of a pipeline ended. ``inputs`` is a digest; empty if they could not be told."""

    inputs: str
    outcome: str
    version: str | None
    finished: str
    """UTC, ISO 8601."""


def folder(root: Path, pipeline: str) -> Path:
    """The pipeline's shelf."""
    return root / "runs" / pipeline / ".work"


def restore(root: Path, pipeline: str) -> None:
    """Bring what the last whole run left into a checkout that has no runs of its own."""
    runs = root / "runs" / pipeline
    for name, place in _CARRIED.items():
        kept = folder(root, pipeline) / name
        if kept.is_file() and not (runs / place).exists():
            write_text(runs / place, kept.read_text(encoding="utf-8"))


def save(root: Path, pipeline: str, *, inputs: str, outcome: str, version: str | None) -> None:
    """Keep what the next run needs; ``last.json`` last, so that it never tells of what is not there."""
    runs, shelf = root / "runs" / pipeline, folder(root, pipeline)
    for name, place in _CARRIED.items():
        if (runs / place).is_file():
            write_text(shelf / name, (runs / place).read_text(encoding="utf-8"))
    finished = datetime.now(UTC).isoformat(timespec="seconds")
    write_json(shelf / "last.json", asdict(LastRun(inputs, outcome, version, finished)))


def last(root: Path, pipeline: str) -> LastRun | None:
    """How the last whole run ended; None if there was none, or its record cannot be read."""
    try:
        record: dict[str, Any] = json.loads((folder(root, pipeline) / "last.json").read_text(encoding="utf-8"))
        return LastRun(**record)
    except (OSError, ValueError, TypeError):
        return None
