"""The settings that each stage depends on, by value, which DVC compares to decide whether a stage must run again.

Defaults count like values from pipelines.yaml, so that a changed default reruns a stage, and writing a default down
does not. A setting that a newer graftline adds is left out of the record while it has its first default, so that an
upgrade alone reruns nothing.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from types import MappingProxyType
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from graftline.settings import Pipeline
from graftline.settings.fields import Section
from graftline.workflow import shelf

SECTIONS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "fetch": ("base", "data"),
        "validate": ("base", "data"),
        "init": ("quantize", "adapter"),
        "train": ("base.template", "adapter", "train", "data"),
        "evaluate": ("base.template", "evaluate", "data"),
        "merge": ("base.template", "package"),
        "gate": tuple(name for name in Pipeline.model_fields if name not in ("resources", "prices")),
        "package": ("base.template", "package", "prices"),
        "release": ("release",),
    }
)
"""The parts of a pipeline's settings that each stage uses."""


@dataclass(frozen=True)
class Recorded:
    """Settings as a run records them."""

    values: dict[str, dict[str, Any]] = field(default_factory=dict)
    """By stage and section; DVC compares them."""
    implied: dict[str, Any] = field(default_factory=dict)
    """By path (``train.new_setting``): settings that are newer than ``values``, with the default then."""


def record(pipeline: Pipeline, before: Recorded) -> Recorded:
    """The settings of every stage, without those that are newer than ``before`` and still have their first default."""
    implied: dict[str, Any] = {}
    values: dict[str, dict[str, Any]] = {}
    for stage, sections in SECTIONS.items():
        known = before.values.get(stage)
        values[stage] = {}
        for path in sections:
            value = _at(pipeline, path)
            is_new = known is not None and path not in known and "." not in path
            if is_new and _is_implied(pipeline, path, path, before.implied):
                implied[path] = _plain(value)
                continue
            old = None if known is None else known.get(path)
            values[stage][path] = _without_new(value, old, path, before.implied, implied)
    if pipeline.quantize.weighting != "none":
        values["fetch"]["calibration"] = {"held_out_rows": pipeline.train.held_out_rows}
        values["init"]["calibration"] = {name: _plain(_at(pipeline, name)) for name in _ENCODING}
    if pipeline.package.calibrates:
        values["merge"]["calibration"] = {"held_out_rows": pipeline.train.held_out_rows, "seed": pipeline.data.seed}
        values["merge"]["calibration"] |= {name: _plain(_at(pipeline, name)) for name in _ENCODING}
    if pipeline.quantize.init_kind != "plain" and pipeline.train.seed != _FIRST_SEED:
        values["init"]["start"] = {"seed": pipeline.train.seed}
    return Recorded(values, dict(sorted(implied.items())))


_ENCODING = ("base.template", "data.max_tokens", "data.overlength")
"""What decides the ids of the training rows on which a quantized model is calibrated."""
_FIRST_SEED = 0
"""Default of `train.seed`, which LoftQ and QPiSSA draw with. It is not recorded, so that an upgrade reruns nothing."""


def _without_new(value: Any, old: Any, path: str, before: Mapping[str, Any], implied: dict[str, Any]) -> Any:
    """``value`` as plain data, without settings that ``old`` lacks and that still have their first default."""
    if not isinstance(old, dict):
        return _plain(value)
    if isinstance(value, dict):
        return {
            name: _without_new(item, old.get(name), f"{path}.{name}", before, implied) for name, item in value.items()
        }
    if not isinstance(value, Section):
        return _plain(value)
    kept: dict[str, Any] = {}
    for name in type(value).model_fields:
        below, item = f"{path}.{name}", getattr(value, name)
        if name not in old and _is_implied(value, name, below, before):
            implied[below] = _plain(item)
        else:
            kept[name] = _without_new(item, old.get(name), below, before, implied)
    return kept


def _is_implied(section: Section, name: str, path: str, before: Mapping[str, Any]) -> bool:
    """Whether a setting that the record lacks still has the value that was in force for the record."""
    value = getattr(section, name)
    if path in before:
        return bool(_plain(value) == before[path])
    field_ = type(section).model_fields[name]
    return not field_.is_required() and bool(value == field_.get_default(call_default_factory=True, validated_data={}))


def _at(section: Section, path: str) -> Any:
    value: Any = section
    for name in path.split("."):
        value = getattr(value, name)
    return value


def _plain(value: Any) -> Any:
    """The value as JSON types."""
    if isinstance(value, Section):
        return value.model_dump(mode="json")
    if isinstance(value, dict):
        return {name: _plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value


LOCK = "dvc.lock"


def before(root: Path, pipeline: str) -> Recorded:
    """The settings that the last run recorded in runs/ or on the shelf, else those in dvc.lock; empty if none did."""
    found = last(root, pipeline)
    if isinstance(found.get("settings"), dict):
        return Recorded(found["settings"], found.get("implied") or {})
    return Recorded(_locked(root, pipeline))


def last(root: Path, pipeline: str) -> dict[str, Any]:
    """The whole record of the last run that started here, else of the last complete one; empty if there is none."""
    try:
        found = json.loads((root / "runs" / pipeline / "resolved.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        found = None
    return found if isinstance(found, dict) else shelf.last_resolved(root, pipeline)


def _locked(root: Path, pipeline: str) -> dict[str, dict[str, Any]]:
    """The settings in dvc.lock, which a fresh clone has."""
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
