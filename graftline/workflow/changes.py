"""Which pipelines differ between two revisions, by DVC's graph, without a checkout or a run.

A stage changed if its command, its outputs, the value of a parameter or a file that it depends on differs, if it
depends on other stages than before, or if one of those changed. Scripts and local files that a pipeline's sources name
are inputs of a revision; files that a run makes are not. What a commit does not determine (rows that git does not
track, links out of the repository) counts as changed, and the reason says so.
"""

import posixpath
import re
import tomllib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

from dvc.config import ConfigError
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

CONSTRAINTS, PROJECT = "constraints.txt", "pyproject.toml"
STAGES_NEED = ("flow", "s3", "serve")
"""Extras whose packages the stages use, so that they can change results."""
_NAME = re.compile(r"\s*([A-Za-z0-9][\w.-]*)")


def declared_packages(read: Callable[[str], bytes | None]) -> dict[str, Any]:
    """Packages that a commit requires and versions that it pins, by file.

    Packages of extras that no stage needs (formatters, test tools) are left out, but not their dependencies, which
    stages may need too. ``read`` returns the bytes of a file of the commit; None if there is none.
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
    """A pipeline that differs. ``reasons`` are parameters and files; ``stages`` are in the line's order.

    ``removed``: the head no longer has the pipeline; its channels still serve its last release.
    """

    pipeline: str
    stages: tuple[str, ...]
    reasons: tuple[str, ...]
    removed: bool = False


@dataclass(frozen=True)
class StageInputs:
    """What a stage depends on at one revision: its inputs by name, and ``needs``, stages of its pipeline."""

    inputs: dict[str, Any]
    needs: frozenset[str]


Graph = dict[str, dict[str, StageInputs]]
"""By pipeline and stage."""


def find_changes(root: Path, base: str, head: str) -> list[PipelineChange]:
    """Pipelines that ``head`` changed since its merge base with ``base``, in dvc.yaml's order, then removed ones.

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
    # dvc.yaml may name a stage before those that it needs.
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
    """The graph of a commit; GraftlineError if dvc.yaml or pipelines.yaml cannot be read there."""
    files = CommitFiles(root, commit)
    try:
        repo = Repo(str(root))
        with repo.switch(commit):
            return _Reader(files, list(repo.index.stages), repo.root_dir).graph()
    except ConfigError as error:
        reason = " ".join(str(error).split())
        raise GraftlineError(
            f"DVC's configuration cannot be read: {reason}; `graftline doctor` names the file: correct it"
        ) from error
    except DvcException as error:
        reason = " ".join(f"{error}: {error.__cause__ or ''}".split())
        raise GraftlineError(f"the graph of {commit[:12]} cannot be read: {reason}; fix dvc.yaml there") from error


def _short_name(addressing: str) -> tuple[str, str]:
    """``dvc.yaml:train@demo`` -> train, demo; the pipeline is empty for a stage outside the pipelines."""
    name, _, pipeline = addressing.rpartition(":")[2].partition("@")
    return name, pipeline


class _Reader:
    """Reads DVC's stages of one commit, each once, although several may depend on it."""

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
        # DVC would read a parameter file again for each stage, which is quadratic in the number of pipelines.
        self._parameters: Callable[[str], Any] = cache(self._read_yaml)
        self._digest: Callable[[Any], Any] = cache(self._digest_of)
        self._code: Callable[[str], code.Code] = cache(partial(code.of_stage, read=cache(files.read)))

    def graph(self) -> Graph:
        document = self._parameters(DEFAULT_FILE)
        pipelines = document.get("pipelines") if isinstance(document, dict) else None
        graph: Graph = {}
        for stage in self.stages:
            name, pipeline = _short_name(stage.addressing)
            # Other stages, and files that `dvc add` tracks, count through the pipelines that need them.
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
        # DVC takes these from its cache instead of running the stage.
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
        """What a run of this commit would record under these keys, as far as the commit determines it."""
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
        # By the path's parents: a search through all outputs would be quadratic in the number of pipelines.
        places = (path, *map(str, Path(path).parents))
        maker = next((self.makers[place][0] for place in places if place in self.makers), None)
        return [maker] if maker else self.inside.get(path, [])

    def _made(self, path: str) -> Any:
        """The digest of what DVC makes or tracks at a path: of the file if it was added, else of its stage's inputs."""
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
        """The values of parameters, and the content of files that they name."""
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
        """Content that a section names in the repository: scripts with their imports, folders, sources."""
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
                # One key for a file, although it may be written as ``rows.jsonl`` and as ``link/../rows.jsonl``.
                whole = self.files.normalize(path) if ".." in path else None
                yield whole or posixpath.normpath(path), content
        for inner in value.values():
            for each in inner if isinstance(inner, list) else [inner]:
                yield from self._files(each)

    def _is_file(self, path: str) -> bool:
        # A file that is only in the checkout is part of the script too; its content is unknown.
        return self.files.read(path) is not None or script.is_file(self.files.root / path)


def _path_of(output: Any, top: str) -> str:
    """Path of an output or a dependency from the repository's root, or its address if it is elsewhere."""
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
    """``train``, {"steps": 3} -> {"train.steps": 3}, so that a reason names the setting; a pipeline's key is empty."""
    if not isinstance(value, dict) or not value:
        return {key: value}
    below = f"{key}." if key else ""
    return {path: item for name, inner in value.items() for path, item in _flatten(f"{below}{name}", inner).items()}
