"""What a worktree of a commit lacks and its checkout has: what git does not track. It is brought in, and taken out.

* Sources, scripts, folders and stores that pipelines.yaml names and git does not track: links to the checkout's.
* Rows that a .dvc file of the commit decides: checked out from DVC's cache, or pulled.
* Submodules that the checkout has filled: clones at the commit's revision that share the checkout's objects.
* DVC's settings, with paths as they are meant in the checkout (graftline.workflow.dvc_settings).
"""

import json
import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path, PurePath
from typing import Any

from graftline import settings
from graftline.data.sources import parse
from graftline.digest import write_json
from graftline.errors import ConfigError
from graftline.workflow import dvc_settings, script
from graftline.workflow.environment import for_child
from graftline.workflow.git import GitError, git

logger = logging.getLogger("graftline.worktree")

_MAX_LINKS = 40
"""Symbolic links that are followed for one name: as many as Linux follows."""


def bring(root: Path, tree: Path) -> None:
    """Make a worktree what a checkout of its commit in ``root`` would be."""
    take_out(tree)
    dvc_settings.copy(root, tree)
    _Likeness(root, tree).bring()


def take_out(tree: Path) -> None:
    """Remove what `bring` brought: another commit may have files there, or other ones."""
    record = _record(tree)
    if not record.is_file():
        return
    for name in json.loads(record.read_text(encoding="utf-8")):
        _remove(Path(name))
    record.unlink()


def _record(tree: Path) -> Path:
    return Path(git(tree, "rev-parse", "--absolute-git-dir").strip()) / "graftline-brought.json"


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


class _Likeness:
    """One worktree being filled; ``brought`` are the absolute paths of what was put there."""

    def __init__(self, root: Path, tree: Path) -> None:
        self.root, self.tree = root, tree
        self.brought: list[Path] = []
        self.by_dvc: set[str] = set()

    def bring(self) -> None:
        try:
            _fill_submodules(self.root, self.tree, self.brought)
            for name in dict.fromkeys(_local_names(self.root, self.tree)):
                self._link(name)
            self._check_out()
        finally:
            write_json(_record(self.tree), [str(path) for path in self.brought])

    def _link(self, name: str, *, followed: int = 0) -> None:
        """Make ``name``, relative to the checkout, lead to the same thing in the worktree."""
        name = os.path.relpath(self.root / name, self.root)
        if PurePath(name).parts[0] == "..":
            self._put(name)
            return
        for place in [*reversed(PurePath(name).parents), PurePath(name)][1:]:
            here, there = self.root / place, self.tree / place
            if (self.tree / f"{place}.dvc").is_file():
                self.by_dvc.add(str(place))
                return
            if there.is_symlink():
                target = PurePath(os.readlink(there))
                if there not in self.brought and not target.is_absolute() and followed < _MAX_LINKS:
                    self._link(str(place.parent / target / PurePath(name).relative_to(place)), followed=followed + 1)
                return
            if not there.exists():
                if here.exists() and not self._git("ls-files", "-z", place):
                    self._put(str(place))
                return
        if (self.tree / name).is_dir():
            self._fill(name, followed)

    def _fill(self, folder: str, followed: int) -> None:
        """A folder that the commit has in part: what git does not track of the checkout's, and links in it."""
        for path in (self.tree / folder).rglob("*"):
            name = path.relative_to(self.tree)
            if path.is_symlink():
                self._link(str(name), followed=followed + 1)
            elif path.suffix == ".dvc" and path.is_file():
                self.by_dvc.add(str(name.with_suffix("")))
        for entry in self._git("ls-files", "-z", "--others", "--directory", f"{folder}/").split("\0"):
            beside = PurePath(entry)
            if entry and beside.name != "__pycache__" and str(beside) not in self.by_dvc:
                self._put(str(beside))

    def _put(self, name: str) -> None:
        target, place = Path(os.path.normpath(self.root / name)), Path(os.path.normpath(self.tree / name))
        if target.exists() and not os.path.lexists(place) and place.is_relative_to(self.root / ".cache"):
            place.parent.mkdir(parents=True, exist_ok=True)
            place.symlink_to(target, target_is_directory=target.is_dir())
            self.brought.append(place)

    def _git(self, *arguments: Any) -> str:
        *options, name = arguments
        return git(self.root, "--literal-pathspecs", *options, "--", str(name))

    def _check_out(self) -> None:
        """Rows of the commit's .dvc files; a failure is told, and the stage that misses them says what is missing."""
        if not self.by_dvc:
            return
        names = sorted(self.by_dvc)
        self.brought += [self.tree / name for name in names]
        files = [f"{name}.dvc" for name in names]
        if _dvc(self.tree, "checkout", "--force", *files) is None:
            return
        problem = _dvc(self.tree, "pull", "--force", *files)
        if problem is not None:
            logger.warning("%s cannot be checked out; run `dvc pull`: %s", ", ".join(files), problem)
            for name in names:
                _remove(self.tree / name)


def _dvc(tree: Path, *arguments: str) -> str | None:
    """Run DVC in a worktree; its last words if it failed."""
    done = subprocess.run(
        [sys.executable, "-m", "dvc", *arguments],
        cwd=tree,
        env=for_child(tree) | {"DVC_NO_ANALYTICS": "1"},
        capture_output=True,
        encoding="utf-8",
        errors="replace",
    )
    return " ".join((done.stderr or done.stdout).split()) if done.returncode else None


def _local_names(root: Path, tree: Path) -> Iterator[str]:
    """Relative paths that a commit's pipelines.yaml names; none if it cannot be read, which its stages will say."""
    try:
        pipelines = settings.load(tree / settings.DEFAULT_FILE).document.pipelines.values()
    except ConfigError:
        return
    for pipeline in pipelines:
        forgetting, harness = pipeline.evaluate.forgetting, pipeline.evaluate.harness
        sources = (pipeline.base.source, pipeline.data.source, forgetting and forgetting.source)
        paths = [parse(source).name for source in sources if source and source.startswith("path:")]
        scripts = [name for name in (pipeline.data.prepare, forgetting and forgetting.prepare) if name]
        folders = [harness.folder] if harness and harness.folder else []
        stores = [] if "://" in pipeline.release.store else [pipeline.release.store]
        parts = [part for name in scripts for part in script.parts_in(root, name)]
        names = (os.path.expanduser(name) for name in [*paths, *scripts, *parts, *folders, *stores])
        yield from (name for name in names if not os.path.isabs(name))


def _fill_submodules(root: Path, tree: Path, brought: list[Path]) -> None:
    """Clone what the checkout has of the commit's submodules, theirs included."""
    for line in git(tree, "ls-files", "--stage", "-z").split("\0"):
        about, _, name = line.partition("\t")
        if not about.startswith("160000 ") or not (root / name / ".git").exists():
            continue
        commit, place = about.split()[1], tree / name
        shutil.rmtree(place, ignore_errors=True)
        brought.append(place)
        try:
            git(tree, "clone", "--quiet", "--shared", "--no-checkout", "--", str(root / name), name)
            git(place, "checkout", "--quiet", "--detach", commit)
        except GitError as error:
            logger.warning("submodule %s: %s; run: git -C %s fetch", name, error, name)
            continue
        _fill_submodules(root / name, place, brought)
