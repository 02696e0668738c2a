"""Which stages the next run of each pipeline would run again, and why, to know before an upgrade or a change.

    graftline plan --all

Nothing is written and nothing runs: current sources, settings and code are compared with the last run's record. All
stages after the first changed one are named too; DVC skips those whose inputs turn out to be the same.
"""

import argparse
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from graftline import plain_text, settings
from graftline.program import guarded
from graftline.workflow import code, inputs, stage_settings
from graftline.workflow.stages import STAGES

_MOST_NAMED = 6
"""Modules that are named per stage; the others are only counted."""


@dataclass(frozen=True)
class Upcoming:
    """What a pipeline's next run would do."""

    pipeline: str
    reasons: dict[str, list[str]]
    """By stage whose own inputs differ."""
    problem: str = ""
    """Why this is unknown; empty if it is known."""
    is_new: bool = False
    """Whether no run is recorded here."""

    @property
    def stages(self) -> list[str]:
        """The first stage that differs and every one after it."""
        first = min((STAGES.index(stage) for stage in self.reasons), default=len(STAGES))
        return list(STAGES if self.is_new else STAGES[first:])

    def text(self) -> str:
        """For a terminal."""
        if self.problem:
            return f"{self.pipeline}: unknown: {self.problem}"
        if self.is_new:
            return f"{self.pipeline}: every stage would run: no run of it is recorded here"
        if not self.stages:
            return f"{self.pipeline}: up to date"
        head = f"{self.pipeline}: {plain_text.count(len(self.stages), 'stage')} would run, from {self.stages[0]} on"
        return "\n".join([head, *(f"  {stage}: {'; '.join(why)}" for stage, why in self.reasons.items())])


def predict(root: Path, pipelines: Sequence[str]) -> list[Upcoming]:
    """Find out what the next run of each pipeline would run again."""
    found = inputs.look_up_all(root, pipelines)
    read = cache(code.in_folder(root))
    executed = {stage: code.of_stage(stage, read) for stage in STAGES}
    return [_of(root, name, found[name], executed) for name in pipelines]


def _of(root: Path, pipeline: str, found: inputs.MovingInputs, executed: Mapping[str, code.Code]) -> Upcoming:
    if found.problem:
        return Upcoming(pipeline, {}, problem=found.problem)
    before = stage_settings.last(root, pipeline)
    if not before:
        return Upcoming(pipeline, {}, is_new=True)
    reasons = {stage: list(_reasons(stage, before, found.resolved, executed[stage])) for stage in STAGES}
    return Upcoming(pipeline, {stage: why for stage, why in reasons.items() if why})


def _reasons(stage: str, before: dict[str, Any], now: dict[str, Any], made: code.Code) -> Iterator[str]:
    """Why a stage would run again, in words."""
    moved = {"fetch": ("sources",), "evaluate": ("champion", "harness")}.get(stage, ())
    yield from (f"{key} moved" for key in moved if before.get(key) != now[key])
    old, new = (_settings(record, stage) for record in (before, now))
    for path in sorted(old.keys() | new.keys()):
        if old.get(path) != new.get(path):
            yield f"{path} {_shown(old, path)} → {_shown(new, path)}"
    if (before.get("code") or {}).get(stage) != now["code"][stage]:
        yield from _code(before, now, made)


def _code(before: dict[str, Any], now: dict[str, Any], made: code.Code) -> Iterator[str]:
    """The modules and libraries that differ, among those that a stage executes now (``made``)."""
    old, new = (record.get("code_parts") or {"modules": {}, "libraries": {}} for record in (before, now))
    libraries = [name for name in code.differences(old["libraries"], new["libraries"]) if name in made.libraries]
    yield from (f"{name} {_shown(old['libraries'], name)} → {_shown(new['libraries'], name)}" for name in libraries)
    modules = [name for name in code.differences(old["modules"], new["modules"]) if name in made.modules]
    if modules:
        more = (
            f" and {plain_text.count(len(modules) - _MOST_NAMED, 'further module')}"
            if len(modules) > _MOST_NAMED
            else ""
        )
        yield f"code of {', '.join(modules[:_MOST_NAMED])}{more}"
    elif not libraries:
        yield "code that it executed before is gone"


def _settings(record: dict[str, Any], stage: str) -> dict[str, Any]:
    return dict(_flat((record.get("settings") or {}).get(stage) or {}, ""))


def _flat(value: Any, path: str) -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict) and value:
        for name, item in value.items():
            yield from _flat(item, f"{path}.{name}" if path else name)
    else:
        yield path, value


def _shown(values: dict[str, Any], name: str) -> str:
    return json.dumps(values[name], ensure_ascii=False) if name in values else "(none)"


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="graftline plan --all", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--json", action="store_true", help="as JSON")
    arguments = parser.parse_args()
    root = Path.cwd()
    found = predict(root, settings.load(root / settings.DEFAULT_FILE).names)
    if arguments.json:
        pipelines = {each.pipeline: {"stages": each.stages, "reasons": each.reasons} for each in found}
        print(json.dumps({"format": 1, "pipelines": pipelines}, ensure_ascii=False, indent=2))
    else:
        print("\n".join(each.text() for each in found))


if __name__ == "__main__":
    with guarded():
        main()
