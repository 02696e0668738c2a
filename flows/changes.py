"""Which pipelines differ between two revisions, by DVC's graph: nothing is checked out and nothing runs.

A stage changed if its command, the value of one of its parameters or a file of the repository that it depends on
differs, or if a stage that it depends on changed. Files that a run makes are no input of a revision; the scripts and
local files that a pipeline's sources name are.
"""

import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, reduce
from pathlib import Path
from typing import Any

from dvc.dependency import ParamsDependency
from dvc.exceptions import DvcException
from dvc.repo import Repo
from ruamel.yaml import YAML

from flows.worktree import git
from graftline.errors import GraftlineError


@dataclass(frozen=True)
class Change:
    """A pipeline that differs. ``reasons`` are parameters and files; ``stages`` in the line's order."""

    pipeline: str
    stages: tuple[str, ...]
    reasons: tuple[str, ...]


@dataclass(frozen=True)
class Stage:
    """What a stage depends on at one revision, besides other stages."""

    inputs: dict[str, Any]
    needs: frozenset[str]


Graph = dict[str, dict[str, Stage]]
"""Pipeline to stage to what it depends on."""


def find_changes(root: Path, base: str, head: str) -> list[Change]:
    """Pipelines of ``head`` that differ from ``base``, in the order of dvc.yaml.

    Args:
        root: a checkout of the repository.
        base: commit to compare with.
        head: commit to look at.

    Raises:
        GraftlineError: dvc.yaml or pipelines.yaml cannot be read at one of the commits.
    """
    before, after = read_graph(root, base), read_graph(root, head)
    changes = []
    for pipeline, stages in after.items():
        changed, reasons = _compare(before.get(pipeline, {}), stages)
        if changed:
            changes.append(Change(pipeline, tuple(changed), tuple(dict.fromkeys(reasons))))
    return changes


def _compare(before: dict[str, Stage], after: dict[str, Stage]) -> tuple[list[str], list[str]]:
    changed: list[str] = []
    reasons: list[str] = []
    for name, stage in after.items():
        old = before[name].inputs if name in before else {}
        differing = [key for key in sorted(old.keys() | stage.inputs.keys()) if old.get(key) != stage.inputs.get(key)]
        reasons += differing
        if differing or stage.needs & set(changed):
            changed.append(name)
    return changed, reasons


def read_graph(root: Path, commit: str) -> Graph:
    """What every stage of every pipeline depends on at a commit.

    Raises:
        GraftlineError: dvc.yaml or pipelines.yaml cannot be read there.
    """
    objects = _objects(root, commit)

    @cache
    def read(path: str) -> Any:
        # DVC would read the file again for each stage: that grows with the square of the pipelines.
        return YAML(typ="safe").load(git(root, "show", f"{commit}:{path}"))

    try:
        repo = Repo(str(root))
        with repo.switch(commit):
            stages = list(repo.index.stages)
            made = {str(out.def_path): _short_name(stage.addressing)[0] for stage in stages for out in stage.outs}
            graph: Graph = {}
            for stage in stages:
                name, pipeline = _short_name(stage.addressing)
                graph.setdefault(pipeline, {})[name] = _read_stage(stage, made, objects, read)
            return graph
    except DvcException as error:
        reason = " ".join(f"{error}: {error.__cause__ or ''}".split())
        raise GraftlineError(f"the graph of {commit[:12]} cannot be read: {reason}; fix dvc.yaml there") from error


def _short_name(addressing: str) -> tuple[str, str]:
    """``dvc.yaml:train@demo`` -> train, demo; a stage of no pipeline belongs to the pipeline ``""``."""
    name, _, pipeline = addressing.rpartition(":")[2].partition("@")
    return name, pipeline


def _read_stage(stage: Any, made: dict[str, str], objects: dict[str, str], read: Callable[[str], Any]) -> Stage:
    inputs: dict[str, Any] = {"command": stage.cmd}
    needs = set()
    for dependency in stage.deps:
        path = str(dependency.def_path)
        # By the path's own folders: looking through all outputs would grow with the square of the pipelines.
        maker = next((made[str(place)] for place in (Path(path), *Path(path).parents) if str(place) in made), None)
        if maker:
            needs.add(maker)
        elif not isinstance(dependency, ParamsDependency):
            inputs[path] = objects.get(path)
        elif path in objects:
            for key in dependency.params:
                value = reduce(lambda found, part: (found or {}).get(part), key.split("."), read(path))
                inputs |= _flatten(".".join(key.split(".")[2:]), value)
                inputs |= {file: objects.get(file) for file in _files(value)}
    return Stage(inputs, frozenset(needs))


def _flatten(key: str, value: Any) -> dict[str, Any]:
    """``train``, {"steps": 3} -> {"train.steps": 3}: so that a reason names the setting, not its section.

    The key of a whole pipeline is empty.
    """
    if not isinstance(value, dict) or not value:
        return {key: value}
    below = f"{key}." if key else ""
    return {path: item for name, inner in value.items() for path, item in _flatten(f"{below}{name}", inner).items()}


def _files(value: Any) -> Iterator[str]:
    """What a section of pipelines.yaml names in the repository: scripts that make rows, task folders, local sources."""
    if not isinstance(value, dict):
        return
    for key in ("prepare", "folder"):
        if isinstance(value.get(key), str):
            yield value[key].rstrip("/")
    source = value.get("source")
    if isinstance(source, str) and source.startswith("path:"):
        yield source.removeprefix("path:").rstrip("/")
    for inner in value.values():
        yield from _files(inner)


def _objects(root: Path, commit: str) -> dict[str, str]:
    """Git's object of every file and folder of a commit: equal objects have equal content."""
    listed = subprocess.run(
        ["git", "ls-tree", "-r", "-t", "-z", "--full-tree", commit],
        cwd=root,
        capture_output=True,
        encoding="utf-8",
        errors="surrogateescape",
        check=True,
    )
    entries = (line.partition("\t") for line in listed.stdout.split("\0") if line)
    return {path: about.split()[2] for about, _, path in entries}
