"""What a pipeline's last run recorded of settings and code: in runs/, on its shelf, or in dvc.lock of a fresh clone."""

import json
from functools import lru_cache
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from graftline.workflow import shelf
from graftline.workflow.stage_settings import SECTIONS, Recorded

LOCK = "dvc.lock"


def before(root: Path, pipeline: str) -> Recorded:
    """The settings of each stage as the last run recorded them; empty if none did."""
    found = last(root, pipeline)
    if isinstance(found.get("settings"), dict):
        return Recorded(found["settings"], found.get("implied") or {})
    return Recorded(_locked(root, pipeline))


def last(root: Path, pipeline: str) -> dict[str, Any]:
    """The whole record of the last run that began here, else of the last one that ended; empty if there is none."""
    try:
        found = json.loads((root / "runs" / pipeline / "resolved.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        found = None
    return found if isinstance(found, dict) else shelf.resolved(root, pipeline)


def _locked(root: Path, pipeline: str) -> dict[str, dict[str, Any]]:
    """From the parameters that DVC locked with each stage's outputs."""
    path, key = root / LOCK, f"runs/{pipeline}/resolved.json"
    try:
        stages = _lock(path, path.stat().st_mtime_ns)
    except (OSError, YAMLError):
        return {}
    found = {}
    for stage in SECTIONS:
        locked = stages.get(f"{stage}@{pipeline}") or {}
        values = (locked.get("params") or {}).get(key) or {}
        if isinstance(values.get(f"settings.{stage}"), dict):
            found[stage] = values[f"settings.{stage}"]
    return found


@lru_cache(maxsize=4)
def _lock(path: Path, _changed: int) -> dict[str, Any]:
    document = YAML(typ="safe").load(path.read_text(encoding="utf-8"))
    stages = document.get("stages") if isinstance(document, dict) else None
    return stages if isinstance(stages, dict) else {}
