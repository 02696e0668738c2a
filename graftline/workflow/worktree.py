"""A worktree beside the user's checkout, with the same caches: what is tried in it touches nothing else."""

import contextlib
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from graftline.workflow import likeness
from graftline.workflow.dvc_settings import cache_dir, write_cache_dir
from graftline.workflow.git import GitError, commit_of, git, snapshot

__all__ = [
    "cache_dir",
    "close",
    "commit_of",
    "git",
    "isolated",
    "link_local",
    "open_at",
    "snapshot",
    "switch",
    "write_cache_dir",
]


def open_at(root: Path, tree: Path, commit: str) -> None:
    """A worktree of ``root`` at a commit in the folder ``tree``; one that is there is moved to the commit."""
    if (tree / ".git").exists():
        switch(tree, commit)
        return
    shutil.rmtree(tree, ignore_errors=True)
    if git(root, "config", "--local", "--default", "", "--get", "core.worktree").strip():
        # A submodule: its git folder names its one checkout, and DVC's git takes that for the folder of every worktree.
        git(root, "clone", "--quiet", "--shared", "--no-checkout", "--", str(root), str(tree))
        git(tree, "checkout", "--quiet", "--detach", commit)
    else:
        git(root, "worktree", "prune")
        git(root, "worktree", "add", "--quiet", "--detach", str(tree), commit)
    (root / ".cache").mkdir(exist_ok=True)
    (tree / ".cache").symlink_to(root / ".cache", target_is_directory=True)
    likeness.bring(root, tree)


def close(root: Path, tree: Path) -> None:
    """Remove a worktree and what was made in it."""
    shutil.rmtree(tree)
    git(root, "worktree", "prune")


@contextlib.contextmanager
def isolated(root: Path, commit: str) -> Iterator[Path]:
    """A worktree of ``root`` at a commit, removed at the end; it has the caches, rows and stores of the checkout.

    What killed processes left there is removed first.

    Raises:
        GitError: git refuses it.
    """
    root = root.absolute()
    place = root / ".cache" / "worktrees"
    place.mkdir(parents=True, exist_ok=True)
    name = uuid.uuid4().hex[:12]
    held = FileLock(place / f"{name}.lock")
    with FileLock(place / "lock"):
        _remove_abandoned(root, place)
        held.acquire()
    # At the checkout's own path below the folder, so that names such as ../rows have room to lead somewhere.
    tree = (place / name).joinpath(*root.parts[1:])
    try:
        tree.parent.mkdir(parents=True)
        open_at(root, tree, commit)
        yield tree
    finally:
        _remove(root, place / name)
        held.release()


def switch(tree: Path, commit: str) -> None:
    """Move a worktree to another commit: what git ignores (runs, caches) stays, so DVC sees what changed."""
    likeness.take_out(tree)
    git(tree, "checkout", "--quiet", "--force", "--detach", commit)
    link_local(tree)


def link_local(tree: Path) -> None:
    """Bring into a worktree what its pipelines.yaml names and git does not track: sources, scripts, release stores."""
    likeness.bring((tree / ".cache").readlink().parent, tree)


def _remove_abandoned(root: Path, place: Path) -> None:
    """Remove what killed processes left: the system lets go of a lock, however its holder ended."""
    names = {path.name.removesuffix(".lock") for path in place.iterdir() if path.is_dir() or path.suffix == ".lock"}
    for name in names:
        lock = FileLock(place / f"{name}.lock")
        # What cannot be locked or removed, such as another user's, is left: it must not end this run.
        with contextlib.suppress(Timeout, OSError), lock.acquire(timeout=0):
            _remove(root, place / name)


def _remove(root: Path, folder: Path) -> None:
    """Remove the folder of a worktree, what git knows of it, and its lock, which the caller holds."""
    shutil.rmtree(folder, ignore_errors=True)
    with contextlib.suppress(GitError):
        git(root, "worktree", "prune")
    folder.with_name(f"{folder.name}.lock").unlink(missing_ok=True)
