"""What a pipeline's runs leave for the next one, whatever checkout that works in.

The folder ``runs/<pipeline>/.work``, or what it links to (graftline.workflow.checkout), holds

* ``.lock``: one run at a time;
* ``train-<digest>/``: checkpoints of a training that was interrupted;
* ``resolved.json``: what the last whole run had resolved, and ``release.json``: what was released last;
* ``last.json``: what that run was made of, and how it ended.
"""

import json
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from graftline.digest import write_json, write_text

_KEPT = {"resolved.json": "resolved.json", "release.json": "release/release.json"}


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


def save(root: Path, pipeline: str, *, inputs: str, outcome: str, version: str | None) -> None:
    """Keep what the next run needs; ``last.json`` last, so that it never tells of what is not there."""
    runs, shelf = root / "runs" / pipeline, folder(root, pipeline)
    for name, place in _KEPT.items():
        if (runs / place).is_file():
            write_text(shelf / name, (runs / place).read_text(encoding="utf-8"))
    finished = datetime.now(UTC).isoformat(timespec="seconds")
    write_json(shelf / "last.json", asdict(LastRun(inputs, outcome, version, finished)))


def last(root: Path, pipeline: str) -> LastRun | None:
    """How the last whole run ended; None if there was none, or its record cannot be read."""
    try:
        return LastRun(**_read(root, pipeline, "last.json"))
    except TypeError:
        return None


def resolved(root: Path, pipeline: str) -> dict[str, Any]:
    """What the last whole run had resolved (`workflow.resolve`); empty if there was none, or it cannot be read."""
    return _read(root, pipeline, "resolved.json")


def released(root: Path, pipeline: str) -> dict[str, Any]:
    """What was released last (`tasks.release`); empty if nothing was, or it cannot be read."""
    return _read(root, pipeline, "release.json")


def _read(root: Path, pipeline: str, name: str) -> dict[str, Any]:
    try:
        record = json.loads((folder(root, pipeline) / name).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return record if isinstance(record, dict) else {}
