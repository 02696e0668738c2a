"""Before a run: pin what moves, so that DVC can see whether it moved.

Writes ``runs/<pipeline>/resolved.json``:

    {"sources": {"base" | "data" | "forgetting": {"source", "sha256", "prepare"}}, "champion": {"version", "release"},
     "harness": digest, "code": {stage: digest},
     "code_parts": {"modules": {name: digest}, "libraries": {name: version}},
     "settings": {stage: {section: value}}, "implied": {path: value}}

``code`` is what each stage executes (`graftline.workflow.code`) and ``settings`` what it is told
(`graftline.workflow.stage_settings`); the parts and what is implied say why one differs from the last run's.
``prepare`` is the digest of the script that makes rows and of what it is made of (`graftline.workflow.script`),
``champion`` what the release's channel holds now (null at first), ``harness`` the digest of
``evaluate.harness.folder`` (null without one). It is no stage of dvc.yaml: it runs before each of them is asked whether
it is up to date.

The file belongs to the run that holds the pipeline's lock, from its start to its end: while there is one, nobody else
writes it. Whoever only wants to know what has moved asks `look_up`, which writes nothing.
"""

import json
import socket
from functools import cache
from pathlib import Path
from typing import Any

import psutil
from filelock import FileLock, Timeout

from graftline import settings
from graftline.address import store_address
from graftline.data.sources import parse, resolve
from graftline.digest import of_file, of_files, of_folder, of_json, write_json
from graftline.errors import LockedError, SourceError
from graftline.logs import Reporter
from graftline.plan.resources import check_machine, needs, origins, this_machine
from graftline.registry import channel
from graftline.registry.store import open_store
from graftline.workflow import code, stage, stage_settings
from graftline.workflow.script import parts_in
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
    moves = {
        "sources": _sources(pipeline, at),
        "champion": _champion(pipeline.release, at),
        "harness": _harness(pipeline.evaluate.harness, at.root),
    }
    return moves | (executed or code_record(at.root)) | settings_of(pipeline, at)


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


def _sources(pipeline: settings.Pipeline, at: Workspace) -> dict[str, Any]:
    sources: dict[str, Any] = {"base": _pin(pipeline.base, at), "data": _pin(pipeline.data, at)}
    if pipeline.evaluate.forgetting:
        sources["forgetting"] = _pin(pipeline.evaluate.forgetting, at)
    return sources


def _pin(section: settings.Base | settings.Data | settings.Forgetting, at: Workspace) -> dict[str, Any]:
    source = parse(section.source)
    sha256 = section.sha256
    if sha256 is None:
        sha256 = resolve(source, cache=at.cache, root=at.root, on_progress=Reporter("fetch", "bytes")).hex
    script = getattr(section, "prepare", None)
    return {"source": source.masked, "sha256": sha256, "prepare": _script_digest(at.root, script)}


def _script_digest(root: Path, script: str | None) -> str | None:
    if script is None:
        return None
    if not (root / script).is_file():
        raise SourceError(
            f"prepare names {script}, which is not there; expected a Python file relative to pipelines.yaml"
        )
    # The modules that it imports and the files that it names make rows as much as the script does.
    parts = parts_in(root, script)
    if len(parts) == 1:
        return str(of_file(root / script))
    return str(of_json({path: str(of_file(root / path)) for path in parts}))


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
