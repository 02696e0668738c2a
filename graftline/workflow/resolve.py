"""Before a run: pin what moves, so that DVC can see whether it moved.

Writes ``runs/<pipeline>/resolved.json``:

    {"sources": {"base" | "data" | "evaluation" | "forgetting": record}, "versions": {address: {"etag", "version_id"}},
     "champion": {"version", "release"}, "harness": digest, "code": {stage: digest},
     "code_parts": {"modules": {name: digest}, "libraries": {name: version}},
     "settings": {stage: {section: value}}, "implied": {path: value}}

``code`` is what each stage executes (`graftline.workflow.code`) and ``settings`` what it is told
(`graftline.workflow.stage_settings`); the parts and what is implied say why one differs from the last run's.
A source's record is described in `graftline.workflow.pinned_sources`; ``versions`` is there if a server names some.
``champion`` is what the release's channel holds now (null at first), ``harness`` the digest of
``evaluate.harness.folder`` (null without one). It is no stage of dvc.yaml: it runs before each of them is asked whether
it is up to date.

The file belongs to the run that holds the pipeline's lock, from its start to its end: while there is one, nobody else
writes it. Whoever only wants to know what has moved asks `look_up`, which writes nothing.
"""

import json
import socket
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import psutil
from filelock import FileLock, Timeout

from graftline import settings
from graftline.address import store_address
from graftline.digest import of_files, of_folder, write_json
from graftline.errors import LockedError, SourceError
from graftline.plan.resources import check_machine, needs, origins, this_machine
from graftline.registry import channel
from graftline.registry.store import open_store
from graftline.workflow import code, pinned_sources, stage, stage_settings
from graftline.workflow.stages import STAGES
from graftline.workflow.workspace import Workspace

RESOLVED = "resolved.json"


def run(pipeline: settings.Pipeline, at: Workspace) -> None:
    """Pin what moves for this run: sources without a digest, and what production holds.

    Raises:
        ConfigError: a stage asks for more than this machine has.
    """
    machine, config = this_machine(), settings.load(at.root / settings.DEFAULT_FILE)
    check_machine(needs(pipeline, machine, origin=origins(config, at.name)), machine, at.name)
    write_json(at.runs / RESOLVED, look_up(pipeline, at))


def run_alone(pipeline: settings.Pipeline, at: Workspace) -> None:
    """Pin what moves for this run, unless another run reads the file.

    Raises:
        LockedError: a run that did not start this command holds the pipeline.
    """
    folder = at.runs / ".work"
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(folder / ".lock", timeout=0):
            run(pipeline, at)
    except Timeout as timeout:
        if not _is_held_by_caller(folder / ".holder.json"):
            raise LockedError(
                f"a run of {at.name} reads {at.runs / RESOLVED} and holds {folder}; wait for that run, stop "
                "it, or use another checkout"
            ) from timeout
        run(pipeline, at)


def _is_held_by_caller(holder: Path) -> bool:
    """Whether the run that holds the pipeline (`graftline.workflow.leases`) is the one that started this process."""
    try:
        held = json.loads(holder.read_text(encoding="utf-8"))
        callers = {process.pid for process in psutil.Process().parents()}
        return held["host"] == socket.gethostname() and held["pid"] in callers
    except (OSError, ValueError, KeyError, TypeError, psutil.Error):
        return False


def look_up(pipeline: settings.Pipeline, at: Workspace, executed: dict[str, Any] | None = None) -> dict[str, Any]:
    """What moves, as it is now: the content of ``resolved.json``. Nothing is written.

    Args:
        pipeline: its settings.
        at: its place.
        executed: `code_record` of the project, where many pipelines are looked up at once.

    Raises:
        SourceError: a source is not there.
        StoreError: the release store cannot be read.
    """
    sources, versions = pinned_sources.pin_all(pipeline, at)
    moves = {
        "sources": sources,
        "champion": _champion(pipeline.release, at),
        "harness": _harness(pipeline.evaluate.harness, at.root),
    }
    moves |= {"versions": versions} if versions else {}
    return moves | (executed or code_record(at.root)) | settings_of(pipeline, at)


def what_counts(resolved: Mapping[str, Any]) -> dict[str, Any]:
    """What `look_up` found, without what may differ where nothing has moved.

    Those are the names that servers give to bytes, and settings that a newer graftline knows, with the values that
    were in force before it did.
    """
    return {key: value for key, value in resolved.items() if key not in ("versions", "implied")}


def code_record(root: Path) -> dict[str, Any]:
    """What every stage executes, as one digest a stage, and the modules and libraries that these are made of."""
    read = cache(code.in_folder(root))
    stages = {stage: code.of_stage(stage, read) for stage in STAGES}
    modules = {name: digest[:16] for made in stages.values() for name, digest in made.modules.items()}
    libraries = {name: version for made in stages.values() for name, version in made.libraries.items()}
    parts = {"modules": dict(sorted(modules.items())), "libraries": dict(sorted(libraries.items()))}
    return {"code": {stage: made.digest for stage, made in stages.items()}, "code_parts": parts}


def settings_of(pipeline: settings.Pipeline, at: Workspace) -> dict[str, Any]:
    """The settings of every stage, by value (`graftline.workflow.stage_settings`)."""
    found = stage_settings.record(pipeline, stage_settings.before(at.root, at.name))
    return {"settings": found.values, "implied": found.implied}


def harness_folder(section: settings.Harness | None, root: Path) -> Path | None:
    """Further task definitions for lm-evaluation-harness.

    Raises:
        SourceError: the folder is not there.
    """
    if section is None or section.folder is None:
        return None
    folder = root / section.folder
    if not folder.is_dir():
        raise SourceError(
            f"evaluate.harness.folder names {section.folder}, which is not there; expected a folder of task "
            "definitions (YAML) relative to pipelines.yaml"
        )
    return folder


def _harness(section: settings.Harness | None, root: Path) -> str | None:
    folder = harness_folder(section, root)
    return str(of_files(of_folder(folder))) if folder else None


def _champion(section: settings.Release, at: Workspace) -> dict[str, Any]:
    store = open_store(store_address(section.store, at.root), seen=at.cache / "seen")
    entry = channel.head(store, at.name, section.channel)
    if entry is None:
        return {"version": None, "release": None}
    return {"version": entry.change.version, "release": str(entry.change.release)}


def load(at: Workspace) -> dict[str, Any]:
    """What `run` wrote.

    Raises:
        SourceError: it has not run.
    """
    path = at.runs / RESOLVED
    if not path.is_file():
        raise SourceError(f"{path} is missing; run `python -m graftline.workflow.resolve {at.name}` first")
    resolved: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return resolved


def main() -> None:
    """Command line."""
    stage.main("resolve", run_alone, measure=False, package="graftline.workflow")


if __name__ == "__main__":
    main()
