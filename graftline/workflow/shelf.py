"""What a pipeline's runs leave for the next one, in whatever checkout that works."""

import json
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from graftline.digest import write_json, write_text

_KEPT = {"resolved.json": "resolved.json", "release.json": "release/release.json"}


@dataclass(frozen=True)
class LastRun:
    """How the last complete run of a pipeline ended. ``inputs`` is a digest; empty if they could not be determined."""

    inputs: str
    outcome: str
    version: str | None
    finished: str
    """UTC, ISO 8601."""


def shelf_folder(root: Path, pipeline: str) -> Path:
    """The pipeline's shelf: what its runs leave for the next one, in whatever checkout that works.

    * ``.lock``: one run at a time;
    * ``train-<digest>/``: checkpoints of an interrupted training;
    * ``resolved.json``: what the last complete run resolved; ``release.json``: the last release;
    * ``last.json``: that run's inputs, and how it ended.
    """
    return root / "runs" / pipeline / ".work"


def keep_run(root: Path, pipeline: str, *, inputs: str, outcome: str, version: str | None) -> None:
    """Keep what the next run needs; ``last.json`` last, so that it never refers to missing files."""
    runs, shelf = root / "runs" / pipeline, shelf_folder(root, pipeline)
    for name, place in _KEPT.items():
        if (runs / place).is_file():
            write_text(shelf / name, (runs / place).read_text(encoding="utf-8"))
    finished = datetime.now(UTC).isoformat(timespec="seconds")
    write_json(shelf / "last.json", asdict(LastRun(inputs, outcome, version, finished)))


def last_run(root: Path, pipeline: str) -> LastRun | None:
    """How the last complete run ended; None if there was none, or its record cannot be read."""
    try:
        return LastRun(**_read(root, pipeline, "last.json"))
    except TypeError:
        return None


def last_resolved(root: Path, pipeline: str) -> dict[str, Any]:
    """What the last complete run resolved (`workflow.resolve`); empty if there is no readable record."""
    return _read(root, pipeline, "resolved.json")


def last_released(root: Path, pipeline: str) -> dict[str, Any]:
    """The last release (`tasks.release`); empty if there is no readable record."""
    return _read(root, pipeline, "release.json")


def _read(root: Path, pipeline: str, name: str) -> dict[str, Any]:
    try:
        record = json.loads((shelf_folder(root, pipeline) / name).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return record if isinstance(record, dict) else {}
