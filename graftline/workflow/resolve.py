"""Before a run: pin what moves, so that DVC can see whether it moved.

Writes ``runs/<pipeline>/resolved.json``:

    {"sources": {"base" | "data" | "evaluation" | "forgetting": record}, "versions": {address: {"etag", "version_id"}},
     "champion": {"version", "release", "anchor": {"version", "release"}}, "harness": digest, "code": {stage: digest},
     "code_parts": {"modules": {name: digest}, "libraries": {name: version}},
     "settings": {stage: {section: value}}, "implied": {path: value}}

``code`` is what each stage executes (`graftline.workflow.code`) and ``settings`` what it is told
(`graftline.workflow.stage_settings`); the parts and what is implied say why one differs from the last run's.
A source's record is described in `graftline.workflow.pinned_sources`; ``versions`` is there if a server names some.
``champion`` is what the release's channel holds now (null at first), with its anchor where there is one, ``harness``
the digest of the project's files that the evaluation reads: ``evaluate.harness.folder``, and what own metrics are made
of (null without any). It is no stage of dvc.yaml: it runs before each of them is asked whether it is up to date.

The file belongs to the run that holds the pipeline's lock, from its start to its end: while there is one, nobody else
writes it. Whoever only wants to know what has moved asks `look_up`, which writes nothing.
"""

import json
import socket
from collections.abc import Mapping
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any

import psutil
from filelock import FileLock, Timeout

from graftline import settings
from graftline.address import store_address
from graftline.digest import of_file, of_files, of_folder, of_json, write_json
from graftline.errors import LockedError, SourceError
from graftline.evaluate.extraction import NAMES as EXTRACTION
from graftline.evaluate.extraction import JsonSchema
from graftline.evaluate.judge import JUDGE, read_labels
from graftline.plan.resources import check_machine, needs, origins, this_machine
from graftline.registry import channel
from graftline.registry.releases import load_manifest
from graftline.registry.store import open_store
from graftline.registry.trust import EntryJudge, open_trust
from graftline.settings.gate_metrics import ANCHOR, PRODUCTION
from graftline.workflow import code, pinned_sources, stage, stage_settings
from graftline.workflow.stages import STAGES
from graftline.workflow.workspace import Workspace

RESOLVED = "resolved.json"
START = "start"
"""Key of the release that training starts from, among the settings of the stage ``train``."""


def run(pipeline: settings.Pipeline, at: Workspace) -> None:
    """Pin what moves for this run: sources without a digest, and what production holds.

    Raises:
        ConfigError: a stage asks for more than this machine has.
        EvaluationError: a file of ``evaluate.answers`` cannot be used.
    """
    machine, config = this_machine(), settings.load(at.root / settings.DEFAULT_FILE)
    check_machine(needs(pipeline, machine, origin=origins(config, at.name)), machine, at.name)
    found = look_up(pipeline, at, anchored=config.is_anchored(at.name))
    check_answers(pipeline.evaluate.answers, at.root)
    write_json(at.runs / RESOLVED, found)


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


def look_up(
    pipeline: settings.Pipeline, at: Workspace, executed: dict[str, Any] | None = None, *, anchored: bool = False
) -> dict[str, Any]:
    """What moves, as it is now: the content of ``resolved.json``. Nothing is written.

    Args:
        pipeline: its settings.
        at: its place.
        executed: `code_record` of the project, where many pipelines are looked up at once.
        anchored: whether candidates are compared with the channel's anchor too (`Config.is_anchored`).

    Raises:
        SourceError: a source is not there.
        StoreError: the release store cannot be read.
    """
    sources, versions = pinned_sources.pin_all(pipeline, at)
    champion = _champion(pipeline.release, at)
    moves: dict[str, Any] = {
        "sources": sources,
        "champion": champion if anchored else _without_anchor(champion),
        "harness": evaluation_digest(pipeline.evaluate, at.root),
    }
    moves |= {"versions": versions} if versions else {}
    moves |= (executed or code_record(at.root)) | settings_of(pipeline, at)
    if pipeline.train.start_from:
        # Among the train stage's settings, so that DVC trains again when it is another release.
        moves["settings"]["train"][START] = _start(pipeline, at, champion)
    return moves


def _start(pipeline: settings.Pipeline, at: Workspace, champion: dict[str, Any]) -> dict[str, Any]:
    """The release that training starts from, its version and digest; nulls while nothing is in production."""
    version = pipeline.train.start_from
    if version == ANCHOR:
        return _without_anchor(champion.get(ANCHOR, champion))
    if version is None or version == PRODUCTION:
        return _without_anchor(champion)
    store = open_store(store_address(pipeline.release.store, at.root), seen=at.cache / "seen")
    return {"version": version, "release": str(load_manifest(store, at.name, version).digest)}


def _without_anchor(champion: Mapping[str, Any]) -> dict[str, Any]:
    return {"version": champion["version"], "release": champion["release"]}


def with_champion_of(now: Mapping[str, Any], before: Mapping[str, Any]) -> dict[str, Any]:
    """What `look_up` found, as if production still held what it held for another record."""
    found = {**now, "champion": before.get("champion")}
    train = dict(now.get("settings", {}).get("train", {}))
    old = before.get("settings", {}).get("train", {})
    if START in old and now.get("champion") and train.get(START) == _without_anchor(now["champion"]):
        found["settings"] = {**now["settings"], "train": {**train, START: old[START]}}
    return found


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
    answers = pipeline.evaluate.answers
    # validate holds rows and their own answers against these
    read = {"suite": pipeline.data.suite, "json_schema": answers.json_schema if answers else None}
    for name, path in read.items():
        if path is not None:
            _require_file(at.root, path)
            found.values["validate"][name] = str(of_file(at.root / path))
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


def _require_file(root: Path, path: str) -> None:
    if not (root / path).is_file():
        raise SourceError(f"pipelines.yaml names {path}, which is not there; expected a file of the project")


def own_digests(section: settings.Evaluate, root: Path) -> dict[str, str]:
    """What computes each metric of a project's own files, by the metric's name.

    Raises:
        SourceError: a file is not there.
    """
    answers = section.answers
    if answers is None:
        return {}
    for path in answers.files:
        _require_file(root, path)
    found = {name: pinned_sources.script_digest(root, script) for name, script in answers.scores.items()}
    if answers.json_schema:
        found |= dict.fromkeys(EXTRACTION, str(of_file(root / answers.json_schema)))
    if judge := answers.judge:
        found[JUDGE] = str(of_json([judge.address, judge.model, str(of_file(root / judge.rubric))]))
    return found


def check_answers(section: settings.Answers | None, root: Path) -> None:
    """Refuse files of own metrics that cannot be used.

    Raises:
        EvaluationError: the schema is not one, or a line of the human labels.
    """
    if section and section.json_schema:
        JsonSchema.read(root / section.json_schema)
    if section and section.judge and section.judge.human_labels:
        read_labels(root / section.judge.human_labels)


def evaluation_digest(section: settings.Evaluate, root: Path) -> str | None:
    """Digest of the project's files that the evaluation reads; None if it reads none.

    Raises:
        SourceError: one is not there.
    """
    harness, own = _harness(section.harness, root), own_digests(section, root)
    if not own:
        return harness
    labels = section.answers and section.answers.judge and section.answers.judge.human_labels
    return str(of_json([harness, own, str(of_file(root / labels)) if labels else None]))


def _champion(section: settings.Release, at: Workspace) -> dict[str, Any]:
    """What the channel holds, and its anchor; nulls and no anchor while it is empty."""
    store = open_store(store_address(section.store, at.root), seen=at.cache / "seen")
    entry = channel.head(store, at.name, section.channel)
    if entry is None:
        return {"version": None, "release": None}
    trust = open_trust(at.root, settings.load(at.root / settings.DEFAULT_FILE).channels)
    if trust:
        # A champion of yesterday does no harm: a promotion compares with what production holds then.
        now = datetime.now(UTC)
        entry = EntryJudge(store, at.name, trust, now=now).read(section.channel, may_be_stale=True).log.head or entry
    held = {"version": entry.change.version, "release": str(entry.change.release)}
    return held | {ANCHOR: channel.anchor_of(entry).model_dump(mode="json")}


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
