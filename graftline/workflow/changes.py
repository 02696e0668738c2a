"""Which pipelines differ between two revisions, by DVC's graph: nothing is checked out and nothing runs.

A stage changed if its command, its outputs, the value of one of its parameters or a file that it depends on differs,
if it comes after other stages than before, or if one of those changed. Files that a run makes are not an input of a
revision; the scripts and local files that a pipeline's sources name are. What a commit does not decide (rows that git
does not track, links out of the repository) counts as changed, and the reason says why.
"""

import posixpath
import re
import tomllib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

from dvc.dependency import ParamsDependency
from dvc.exceptions import DvcException
from dvc.repo import Repo
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from graftline.data.sources import Source, local_part
from graftline.digest import of_json
from graftline.errors import GraftlineError
from graftline.settings import DEFAULT_FILE
from graftline.workflow import code, script
from graftline.workflow.git import CommitFiles, merge_base, unknown, why_unknown
from graftline.workflow.resolve import RESOLVED
from graftline.workflow.stage_settings import SECTIONS

# The environment that a commit declares: its packages, which can change every number that a stage computes.

CONSTRAINTS, PROJECT = "constraints.txt", "pyproject.toml"
STAGES_NEED = ("flow", "s3", "serve")
"""Extras whose packages stages call: what they make can change with them."""
_NAME = re.compile(r"\s*([A-Za-z0-9][\w.-]*)")


def declared_packages(read: Callable[[str], bytes | None]) -> dict[str, Any]:
    """Versions that a commit pins and packages that it asks for, by the file that says so.

    Packages that only an extra asks for that no stage needs (formatters, test tools) are left out; what those need in
    turn is not known to be theirs alone, and counts.

    Args:
        read: the bytes of a file of the commit; None if there is none.
    """
    found: dict[str, Any] = {}
    project = _project(read(PROJECT))
    extras = project.get("optional-dependencies", {})
    needed_lines = [*project.get("dependencies", []), *(line for name in STAGES_NEED for line in extras.get(name, []))]
    if project:
        found[PROJECT] = [project.get("requires-python"), *sorted(needed_lines)]
    if (pins := read(CONSTRAINTS)) is not None:
        extra = _names([line for lines in extras.values() for line in lines]) - _names(needed_lines)
        lines = [line.partition("#")[0].strip() for line in pins.decode("utf-8", "replace").splitlines()]
        found[CONSTRAINTS] = sorted(line for line in lines if line and not _names([line]) & extra)
    return found


def _project(text: bytes | None) -> dict[str, Any]:
    try:
        project = tomllib.loads((text or b"").decode("utf-8")).get("project", {})
    except (tomllib.TOMLDecodeError, UnicodeDecodeError):
        return {}
    return project if isinstance(project, dict) else {}


def _names(requirements: list[str]) -> set[str]:
    found = (_NAME.match(line) for line in requirements)
    return {re.sub(r"[-_.]+", "-", match[1]).lower() for match in found if match}


@dataclass(frozen=True)
class PipelineChange:
    """A pipeline that differs. ``reasons`` are parameters and files; ``stages`` in the line's order.

    ``removed``: the head no longer has the pipeline, whose channels go on serving its last release.
    """

    pipeline: str
    stages: tuple[str, ...]
    reasons: tuple[str, ...]
    removed: bool = False


@dataclass(frozen=True)
class StageInputs:
    """What a stage depends on at one revision, besides other stages of its pipeline."""

    inputs: dict[str, Any]
    needs: frozenset[str]


Graph = dict[str, dict[str, StageInputs]]
"""Pipeline to stage to what it depends on."""


def find_changes(root: Path, base: str, head: str) -> list[PipelineChange]:
    """Pipelines that ``head`` changed since it left ``base``: its own in the order of dvc.yaml, then those it removed.

    What came to the base's branch since then is not the head's: the two are compared from their merge base.

    Args:
        root: a checkout of the repository.
        base: commit that the head was branched from, or a later one of the same branch.
        head: commit to look at.

    Raises:
        GraftlineError: the two have no commit in common; dvc.yaml or pipelines.yaml cannot be read at one of them.
    """
    base = merge_base(root, base, head)
    if base == head:
        return []
    before, after = read_graph(root, base), read_graph(root, head)
    changes = []
    for pipeline, stages in after.items():
        changed, reasons = _compare(before.get(pipeline, {}), stages)
        if changed or reasons:
            changes.append(PipelineChange(pipeline, tuple(changed), tuple(dict.fromkeys(reasons))))
    removed = [pipeline for pipeline in before if pipeline not in after]
    return changes + [PipelineChange(name, tuple(before[name]), ("the pipeline is removed",), True) for name in removed]


def _compare(before: dict[str, StageInputs], after: dict[str, StageInputs]) -> tuple[list[str], list[str]]:
    """The stages that changed, in the order of ``after``, and why."""
    changed: set[str] = set()
    reasons: list[str] = []
    for name, stage in after.items():
        old = before.get(name, StageInputs({}, stage.needs))
        found = [*_differing(old.inputs, stage.inputs)]
        found += [f"{name} no longer needs {need}" for need in sorted(old.needs - stage.needs)]
        found += [f"{name} needs {need}" for need in sorted(stage.needs - old.needs)]
        if found:
            changed.add(name)
            reasons += found
    reasons += [f"the stage {name} is removed" for name in before if name not in after]
    # dvc.yaml may name a stage before what it needs.
    while more := {name for name, stage in after.items() if stage.needs & changed} - changed:
        changed |= more
    return [name for name in after if name in changed], reasons


def _differing(old: dict[str, Any], new: dict[str, Any]) -> Iterator[str]:
    for key in sorted(old.keys() | new.keys()):
        reason = why_unknown(new.get(key))
        if reason:
            yield f"{key} ({reason})"
        elif old.get(key) != new.get(key):
            yield key


def read_graph(root: Path, commit: str) -> Graph:
    """What every stage of every pipeline depends on at a commit.

    Raises:
        GraftlineError: dvc.yaml or pipelines.yaml cannot be read there.
    """
    files = CommitFiles(root, commit)
    try:
        repo = Repo(str(root))
        with repo.switch(commit):
            return _Reader(files, list(repo.index.stages), repo.root_dir).graph()
    except DvcException as error:
        reason = " ".join(f"{error}: {error.__cause__ or ''}".split())
        raise GraftlineError(f"the graph of {commit[:12]} cannot be read: {reason}; fix dvc.yaml there") from error


def _short_name(addressing: str) -> tuple[str, str]:
    """``dvc.yaml:train@demo`` -> train, demo; a stage of no pipeline belongs to the pipeline ``""``."""
    name, _, pipeline = addressing.rpartition(":")[2].partition("@")
    return name, pipeline


class _Reader:
    """Reads DVC's stages of one commit; each stage once, because others may ask for it."""

    def __init__(self, files: CommitFiles, stages: list[Any], top: str) -> None:
        self.files, self.stages = files, stages
        self.makers = {_path_of(out, top): (stage, out) for stage in stages for out in stage.outs}
        self.inside: dict[str, list[Any]] = {}
        for path, (stage, _) in self.makers.items():
            for folder in Path(path).parents[:-1]:
                self.inside.setdefault(str(folder), []).append(stage)
        files.made = cache(self._made)
        self.top, self.environment = top, declared_packages(files.read)
        self._being_read: set[str] = set()
        # DVC would read a file of parameters again for each stage: that grows with the square of the pipelines.
        self._parameters: Callable[[str], Any] = cache(self._read_yaml)
        self._digest: Callable[[Any], Any] = cache(self._digest_of)
        self._code: Callable[[str], code.Code] = cache(partial(code.of_stage, read=cache(files.read)))

    def graph(self) -> Graph:
        document = self._parameters(DEFAULT_FILE)
        pipelines = document.get("pipelines") if isinstance(document, dict) else None
        graph: Graph = {}
        for stage in self.stages:
            name, pipeline = _short_name(stage.addressing)
            # Other stages, and files that `dvc add` tracks, count where a pipeline needs what they make.
            if isinstance(pipelines, dict) and pipeline in map(str, pipelines):
                read = self._stage(stage)
                graph.setdefault(pipeline, {})[name] = StageInputs(read.inputs | self.environment, read.needs)
        return graph

    def _read_yaml(self, path: str) -> Any:
        text = self.files.read(path)
        try:
            return None if text is None else YAML(typ="safe").load(text)
        except YAMLError as error:
            where = f"{path} of {self.files.commit[:12]}"
            raise GraftlineError(f"{where} cannot be read: {' '.join(str(error).split())}") from error

    def _stage(self, stage: Any) -> StageInputs:
        pipeline = _short_name(stage.addressing)[1]
        inputs: dict[str, Any] = {"command": stage.cmd}
        inputs["outputs"] = sorted(f"{out.def_path}{'' if out.use_cache else ' (not cached)'}" for out in stage.outs)
        # What DVC takes from its cache instead of running the stage.
        inputs["dvc.lock"] = {str(out.def_path): out.hash_info.value for out in stage.outs if out.hash_info}
        needs: set[str] = set()
        for dependency in stage.deps:
            path = _path_of(dependency, self.top)
            if isinstance(dependency, ParamsDependency):
                keys = list(dependency.params)
                if path in self.files.entries:
                    inputs |= self._values(path, keys)
                elif posixpath.basename(path) == RESOLVED:
                    inputs |= self._resolved(keys, pipeline)
                continue
            makers = [_short_name(maker.addressing) for maker in self._makers(path)]
            needs |= {name for name, of in makers if pipeline and of == pipeline}
            others = any(not pipeline or of != pipeline for _, of in makers)
            if others or not makers or path in self.files.entries:
                inputs[path] = self.files.content(path)
        return StageInputs(inputs, frozenset(needs))

    def _resolved(self, keys: list[str], pipeline: str) -> dict[str, Any]:
        """What a run of this commit would record under these keys, as far as a commit decides it."""
        inputs: dict[str, Any] = {}
        for key in keys:
            kind, _, stage = key.partition(".")
            if kind == "code":
                inputs |= {f"code: {name}": digest for name, digest in self._code(stage).modules.items()}
            elif kind == "settings":
                sections = SECTIONS.get(stage, ())
                inputs |= self._values(DEFAULT_FILE, [f"pipelines.{pipeline}.{section}" for section in sections])
        return inputs

    def _makers(self, path: str) -> list[Any]:
        """The stage that makes a path, or those that make something in it."""
        # By the path's own folders: looking through all outputs would grow with the square of the pipelines.
        places = (path, *map(str, Path(path).parents))
        maker = next((self.makers[place][0] for place in places if place in self.makers), None)
        return [maker] if maker else self.inside.get(path, [])

    def _made(self, path: str) -> Any:
        """What DVC makes or tracks at a path: by its digest if it was added, else by all that its stage depends on."""
        stage, out = self.makers.get(path, (None, None))
        if stage is None:
            return None
        if not stage.cmd:
            return str(out.hash_info.value) if out.hash_info else unknown("its .dvc file has no digest")
        return self._digest(stage)

    def _digest_of(self, stage: Any) -> Any:
        address = str(stage.addressing)
        if address in self._being_read:
            return unknown(f"made by {address}, which needs it")
        self._being_read.add(address)
        read = self._stage(stage)
        pipeline = _short_name(address)[1]
        named = {_short_name(other.addressing): other for other in self.stages} if read.needs else {}
        before = [self._digest(named[need, pipeline]) for need in sorted(read.needs)]
        self._being_read.discard(address)
        lost = next((why for one in [*read.inputs.values(), *before] if (why := why_unknown(one))), None)
        return unknown(f"made by {address}: {lost}") if lost else str(of_json([read.inputs, before]))

    def _values(self, path: str, keys: list[str]) -> dict[str, Any]:
        """The values of parameters, and what the files are that they name."""
        if not keys:
            return {path: self.files.content(path)}
        inputs: dict[str, Any] = {}
        for key in keys:
            value = self._parameters(path)
            for part in key.split("."):
                value = value.get(part) if isinstance(value, dict) else None
            inputs |= _flatten(_short_key(path, key), value)
            inputs |= dict(self._files(value))
        return inputs

    def _files(self, value: Any) -> Iterator[tuple[str, Any]]:
        """What a section names in the repository: scripts that make rows and what they import, folders, sources."""
        if not isinstance(value, dict):
            return
        prepare, folder, source = (value.get(key) for key in ("prepare", "folder", "source"))
        if isinstance(prepare, str):
            for path in script.parts(prepare, is_file=self._is_file, read=lambda path: self.files.read(path) or b""):
                yield path, self.files.content(path)
        if isinstance(folder, str):
            yield posixpath.normpath(folder), self.files.content(folder, as_source=True)
        if isinstance(source, str) and source.startswith("path:"):
            path = source.removeprefix("path:")
            content = self.files.content(path, as_source=True)
            if why_unknown(content) and (searched := local_part(Source("path", path))) != path:
                # A pattern: whatever changes in the folder that it looks in may be one of its files.
                path, content = searched, self.files.content(searched, as_source=True)
            # A digest in the settings decides the content, wherever the file lies.
            if not (value.get("sha256") and why_unknown(content)):
                # Not as it is written: two sources may be ``rows.jsonl`` and ``link/../rows.jsonl``.
                whole = self.files.normalize(path) if ".." in path else None
                yield whole or posixpath.normpath(path), content
        for inner in value.values():
            for each in inner if isinstance(inner, list) else [inner]:
                yield from self._files(each)

    def _is_file(self, path: str) -> bool:
        # One that lies in the checkout only is part of the script too: what is in it cannot be known from the commit.
        return self.files.read(path) is not None or script.is_file(self.files.root / path)


def _path_of(output: Any, top: str) -> str:
    """Path of an output or a dependency from the repository's root; the address of one that lies elsewhere."""
    if output.def_path and "://" in str(output.def_path):
        return str(output.def_path)
    return posixpath.relpath(str(output.fs_path), top)


def _short_key(path: str, key: str) -> str:
    """``pipelines.demo.train`` -> ``train``; any other parameter by its whole key, and by its file."""
    first, *below = key.split(".")
    if path != DEFAULT_FILE:
        return f"{path}:{key}"
    return ".".join(below[1:]) if first == "pipelines" and below else key


def _flatten(key: str, value: Any) -> dict[str, Any]:
    """``train``, {"steps": 3} -> {"train.steps": 3}: so that a reason names the setting, not its section.

    The key of a whole pipeline is empty.
    """
    if not isinstance(value, dict) or not value:
        return {key: value}
    below = f"{key}." if key else ""
    return {path: item for name, inner in value.items() for path, item in _flatten(f"{below}{name}", inner).items()}
