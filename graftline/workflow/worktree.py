"""Worktrees of the user's checkout that share its caches, for runs that must not touch the checkout.

A worktree lacks what git does not track, so this is brought in, and removed again before another commit:

* sources, scripts, folders and stores that pipelines.yaml names: links to the checkout's;
* rows of the commit's .dvc files: checked out from DVC's cache, or pulled;
* submodules that the checkout has cloned: clones at the commit's revision that share the checkout's objects;
* DVC's settings. DVC resolves a relative path from the folder of the file that contains it, so what a team commits in
  .dvc/config or keeps in .dvc/config.local would point into the worktree; paths are written as in the checkout.
"""

import configparser
import contextlib
import json
import logging
import os
import shutil
import subprocess
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path, PurePath
from typing import Any

from filelock import FileLock, Timeout

from graftline import settings
from graftline.data.sources import local_part, parse
from graftline.digest import write_json
from graftline.errors import ConfigError
from graftline.workflow import script
from graftline.workflow.environment import for_child
from graftline.workflow.git import MAX_LINKS, GitError, git

_CONFIG, _LOCAL = Path(".dvc", "config"), Path(".dvc", "config.local")


def cache_dir(root: Path) -> Path:
    """A checkout's DVC cache, by the configuration of machine, user and project."""
    from dvc.config import Config  # takes half a second to import

    named = Config(str(root / ".dvc"), validate=False).get("cache", {}).get("dir")
    return Path(named) if named else root / ".dvc" / "cache"


def copy_dvc_settings(root: Path, tree: Path) -> None:
    """Write the checkout's DVC settings into a worktree's .dvc/config.local, with paths as in the checkout."""
    from dvc.config import Config, merge

    settings: dict[str, Any] = _read(tree / _CONFIG, meant_in=root / _CONFIG)
    merge(settings, _read(root / _LOCAL, meant_in=root / _LOCAL))
    merge(settings, {"cache": {"dir": str(cache_dir(root))}})
    (tree / ".dvc").mkdir(exist_ok=True)
    (tree / _LOCAL).unlink(missing_ok=True)
    with Config(str(tree / ".dvc"), validate=False).edit("local", validate=False) as local:
        merge(local, settings)


def _read(path: Path, *, meant_in: Path) -> dict[str, Any]:
    from dvc.config import Config

    if not path.is_file():
        return {}
    settings = Config._load_paths(Config.load_file(str(path)), str(meant_in))
    # Strings, because DVC would write its resolved paths relative to the file again.
    absolute: dict[str, Any] = Config._map_dirs(settings, lambda path: str(path))
    return absolute


def write_cache_dir(root: Path, folder: Path) -> None:
    """Make a checkout use a DVC cache; written here because DVC would take a second."""
    settings = configparser.ConfigParser(interpolation=None)
    settings.read(root / _LOCAL, encoding="utf-8")
    if not settings.has_section("cache"):
        settings.add_section("cache")
    settings.set("cache", "dir", str(folder))
    (root / _LOCAL).parent.mkdir(exist_ok=True)
    with (root / _LOCAL).open("w", encoding="utf-8") as stream:
        settings.write(stream)


logger = logging.getLogger("graftline.worktree")


def bring_untracked(root: Path, tree: Path) -> None:
    """Make a worktree equal to a checkout of its commit in ``root``."""
    take_out_untracked(tree)
    copy_dvc_settings(root, tree)
    _Likeness(root, tree).bring()


def take_out_untracked(tree: Path) -> None:
    """Remove what `bring_untracked` brought, because another commit may have files there."""
    record = _record(tree)
    if not record.is_file():
        return
    for name in json.loads(record.read_text(encoding="utf-8")):
        _remove_untracked(Path(name))
    record.unlink()


def _record(tree: Path) -> Path:
    return Path(git(tree, "rev-parse", "--absolute-git-dir").strip()) / "graftline-brought.json"


def _remove_untracked(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


class _Likeness:
    """Fills one worktree; ``brought`` are the absolute paths of what was put there."""

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
        """Make the path ``name`` lead to the same file in the worktree as in the checkout."""
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
                if there not in self.brought and not target.is_absolute() and followed < MAX_LINKS:
                    self._link(str(place.parent / target / PurePath(name).relative_to(place)), followed=followed + 1)
                return
            if not there.exists():
                if here.exists() and not self._git("ls-files", "-z", place):
                    self._put(str(place))
                return
        if (self.tree / name).is_dir():
            self._fill(name, followed)

    def _fill(self, folder: str, followed: int) -> None:
        """Complete a folder of the commit: the checkout's untracked files in it, and the targets of its links."""
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
        """Check out the commit's .dvc files; a failure is only logged, since a stage will name the missing file."""
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
                _remove_untracked(self.tree / name)


def _dvc(tree: Path, *arguments: str) -> str | None:
    """Run DVC in a worktree; returns its message if it failed."""
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
    """Relative paths that a commit's pipelines.yaml names; none if it cannot be read, which its stages will report."""
    try:
        pipelines = settings.load(tree / settings.DEFAULT_FILE).document.pipelines.values()
    except ConfigError:
        return
    for pipeline in pipelines:
        harness, read = pipeline.evaluate.harness, pipeline.read_sections
        named = [parse(section.source) for section in (pipeline.base, *read)]
        paths = [local_part(source) for source in named if source.kind == "path"]
        scripts = [section.prepare for section in read if section.prepare]
        scripts += pipeline.read_files
        folders = [harness.folder] if harness and harness.folder else []
        stores = [] if "://" in pipeline.release.store else [pipeline.release.store]
        parts = [part for name in scripts for part in script.parts_in(root, name)]
        names = (os.path.expanduser(name) for name in [*paths, *scripts, *parts, *folders, *stores])
        yield from (name for name in names if not os.path.isabs(name))


def _fill_submodules(root: Path, tree: Path, brought: list[Path]) -> None:
    """Clone the commit's submodules that the checkout has, recursively."""
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


def open_at(root: Path, tree: Path, commit: str) -> None:
    """Open a worktree of ``root`` at a commit in the folder ``tree``; an existing one is switched to the commit."""
    if (tree / ".git").exists():
        switch(tree, commit)
        return
    shutil.rmtree(tree, ignore_errors=True)
    if git(root, "config", "--local", "--default", "", "--get", "core.worktree").strip():
        # A submodule's git folder names one checkout, which DVC's git library uses for every worktree.
        git(root, "clone", "--quiet", "--shared", "--no-checkout", "--", str(root), str(tree))
        git(tree, "checkout", "--quiet", "--detach", commit)
    else:
        git(root, "worktree", "prune")
        git(root, "worktree", "add", "--quiet", "--detach", str(tree), commit)
    (root / ".cache").mkdir(exist_ok=True)
    (tree / ".cache").symlink_to(root / ".cache", target_is_directory=True)
    bring_untracked(root, tree)


def close(root: Path, tree: Path) -> None:
    """Remove a worktree and everything in it."""
    shutil.rmtree(tree)
    git(root, "worktree", "prune")


@contextlib.contextmanager
def isolated(root: Path, commit: str) -> Iterator[Path]:
    """A temporary worktree of ``root`` at a commit, with the checkout's caches, rows and stores.

    Worktrees of killed processes are removed first.

    Raises:
        GitError: git cannot make it.
    """
    root = root.absolute()
    place = root / ".cache" / "worktrees"
    place.mkdir(parents=True, exist_ok=True)
    name = uuid.uuid4().hex[:12]
    held = FileLock(place / f"{name}.lock")
    with FileLock(place / "lock"):
        _remove_abandoned(root, place)
        held.acquire()
    # With the checkout's path below the folder, so that links for names such as ../rows are inside it.
    tree = (place / name).joinpath(*root.parts[1:])
    try:
        tree.parent.mkdir(parents=True)
        open_at(root, tree, commit)
        yield tree
    finally:
        _remove(root, place / name)
        held.release()


def switch(tree: Path, commit: str) -> None:
    """Switch a worktree to another commit; ignored files (runs, caches) stay, so that DVC sees what changed."""
    take_out_untracked(tree)
    git(tree, "checkout", "--quiet", "--force", "--detach", commit)
    link_local(tree)


def link_local(tree: Path) -> None:
    """`bring_untracked` from the checkout that the worktree belongs to, for a changed pipelines.yaml."""
    bring_untracked((tree / ".cache").readlink().parent, tree)


def _remove_abandoned(root: Path, place: Path) -> None:
    """Remove what killed processes left, whose locks the system has released."""
    names = {path.name.removesuffix(".lock") for path in place.iterdir() if path.is_dir() or path.suffix == ".lock"}
    for name in names:
        lock = FileLock(place / f"{name}.lock")
        # What cannot be locked or removed, such as another user's, must not end this run.
        with contextlib.suppress(Timeout, OSError), lock.acquire(timeout=0):
            _remove(root, place / name)


def _remove(root: Path, folder: Path) -> None:
    """Remove a worktree's folder, git's record of it, and its lock, which the caller holds."""
    shutil.rmtree(folder, ignore_errors=True)
    with contextlib.suppress(GitError):
        git(root, "worktree", "prune")
    folder.with_name(f"{folder.name}.lock").unlink(missing_ok=True)
