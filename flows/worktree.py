"""A checkout of its own beside the user's, with the same caches: what is tried in it touches nothing else."""

import configparser
import contextlib
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

from graftline import config
from graftline.address import parse
from graftline.errors import GraftlineError


def commit_of(root: Path, revision: str) -> str:
    """The commit that a revision names.

    Raises:
        GraftlineError: there is none in the repository.
    """
    done = subprocess.run(
        ["git", "rev-parse", "--verify", "--quiet", "--end-of-options", f"{revision}^{{commit}}"],
        cwd=root,
        capture_output=True,
        encoding="utf-8",
        errors="surrogateescape",
    )
    if done.returncode:
        raise GraftlineError(f"revision {revision!r} is not in {root}; fetch it first: git fetch origin {revision}")
    return done.stdout.strip()


def snapshot(root: Path) -> str:
    """A commit with the tracked files as they are now: the current one, or one that no branch holds.

    Raises:
        GraftlineError: ``root`` is no git repository with a commit.
    """
    return git(root, "stash", "create").strip() or commit_of(root, "HEAD")


def open_at(root: Path, tree: Path, commit: str) -> None:
    """A worktree of ``root`` at a commit in the folder ``tree``, which is gone on with if it is there."""
    if (tree / ".git").is_file():
        switch(tree, commit)
        return
    shutil.rmtree(tree, ignore_errors=True)
    git(root, "worktree", "prune")
    git(root, "worktree", "add", "--quiet", "--detach", str(tree), commit)
    _share(root, tree)


def close(root: Path, tree: Path) -> None:
    """Remove a worktree and what was made in it."""
    git(root, "worktree", "remove", "--force", str(tree))


@contextlib.contextmanager
def isolated(root: Path, commit: str) -> Iterator[Path]:
    """A worktree of ``root`` at a commit, removed at the end; it shares DVC's cache, the sources and a local store.

    Raises:
        GraftlineError: git refuses it.
    """
    place = root / ".cache" / "worktrees"
    place.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=place) as folder:
        tree = Path(folder) / "checkout"
        open_at(root, tree, commit)
        try:
            yield tree
        finally:
            close(root, tree)


def switch(tree: Path, commit: str) -> None:
    """Go on at another commit: what git ignores (runs, caches) stays, so DVC sees what changed."""
    git(tree, "checkout", "--quiet", "--force", "--detach", commit)
    _link_stores(tree)


def git(folder: Path, *arguments: str, stdin: str | None = None) -> str:
    """Run git; its output.

    Raises:
        GraftlineError: it failed; its message is shown. Or there is no git.
    """
    try:
        done = subprocess.run(
            ["git", *arguments],
            cwd=folder,
            input=stdin,
            capture_output=True,
            encoding="utf-8",
            errors="surrogateescape",
        )
    except FileNotFoundError as error:
        raise GraftlineError("git is not on the PATH; install it: DVC and the manifest's revision need it") from error
    if done.returncode:
        raise GraftlineError(f"git {arguments[0]} failed: {' '.join(done.stderr.split())}")
    return done.stdout


def link_local(tree: Path) -> None:
    """Link what pipelines.yaml names and git does not track: release stores, and sources that are paths."""
    _link_stores(tree)
    root = (tree / ".cache").resolve().parent
    for pipeline in config.load(tree / config.DEFAULT_FILE).document.pipelines.values():
        for source in (parse(pipeline.base.source), parse(pipeline.data.source)):
            if source.kind == "path" and (root / source.name).exists() and not (tree / source.name).exists():
                (tree / source.name).parent.mkdir(parents=True, exist_ok=True)
                (tree / source.name).symlink_to(root / source.name)


def cache_dir(root: Path) -> Path:
    """The DVC cache that a checkout uses."""
    return Path(_read_local(root).get("cache", "dir", fallback=str(root / ".dvc" / "cache")))


def write_cache_dir(root: Path, folder: Path) -> None:
    """Make a checkout use a DVC cache; written here because asking DVC to write it costs a second."""
    settings = _read_local(root)
    if not settings.has_section("cache"):
        settings.add_section("cache")
    settings.set("cache", "dir", str(folder))
    path = root / ".dvc" / "config.local"
    path.parent.mkdir(exist_ok=True)
    with path.open("w", encoding="utf-8") as stream:
        settings.write(stream)


def _read_local(root: Path) -> configparser.ConfigParser:
    settings = configparser.ConfigParser(interpolation=None)
    settings.read(root / ".dvc" / "config.local", encoding="utf-8")
    return settings


def _share(root: Path, tree: Path) -> None:
    (tree / ".cache").symlink_to(root / ".cache", target_is_directory=True)
    write_cache_dir(tree, cache_dir(root))
    _link_stores(tree)


def _link_stores(tree: Path) -> None:
    """Local release stores are ignored by git: what is in production there must be seen here."""
    root = (tree / ".cache").resolve().parent
    for pipeline in config.load(tree / config.DEFAULT_FILE).document.pipelines.values():
        store = pipeline.release.store
        is_inside = "://" not in store and not Path(store).is_absolute() and ".." not in Path(store).parts
        if is_inside and (root / store).is_dir() and not (tree / store).exists():
            (tree / store).parent.mkdir(parents=True, exist_ok=True)
            (tree / store).symlink_to(root / store, target_is_directory=True)
