"""Git without hooks, on the repository of a given folder; and the content of a commit's files."""

import os
import posixpath
import re
import shlex
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from graftline.digest import of_json
from graftline.errors import GraftlineError
from graftline.workflow import environment

_COMMIT = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")
# A name as people write it (local branch, tag, commit); a branch of the server; a revision that `fetch` got.
_PLACES = ("{}", "refs/remotes/origin/{}", "refs/graftline/fetched/{}")
# Those of git's rules for names (man git-check-ref-format) that exclude options, patterns and refspecs.
_NAME = re.compile(r"(?P<name>(?![-+/])(?!.*(\.\.|@\{))[^\s~^:?*\[\\\x00-\x1f\x7f]+(?<![/.]))([~^]\d*)*")
_EVERYTHING = ("+refs/heads/*:refs/remotes/origin/*", "+refs/tags/*:refs/tags/*")


class GitError(GraftlineError):
    """Git failed; the message contains git's."""


def git(folder: Path, *arguments: str, stdin: str | None = None) -> str:
    """Run git on the repository of ``folder`` and return its output; GitError if git fails or is not installed."""
    done = _run(folder, *arguments, stdin=stdin)
    if done.returncode:
        # A problem of the repository itself explains more than the command's message.
        repository = _run(folder, "rev-parse", "--git-dir")
        words = _words(repository if repository.returncode else done)
        raise GitError(f"git {arguments[0]} failed in {folder}: {words}")
    return done.stdout


def commit_of(root: Path, revision: str) -> str:
    """The commit of a revision, as git reads it, else as a branch of ``origin``; GitError if there is none."""
    if "\0" in revision:
        raise GitError(f"{revision!r} was given; expected the name of a branch or a tag, or a commit")
    for place in _PLACES if _NAME.fullmatch(revision) else _PLACES[:1]:
        name = place.format(revision.removeprefix("refs/heads/") if place != "{}" else revision)
        done = _run(root, "rev-parse", "--verify", "--quiet", "--end-of-options", f"{name}^{{commit}}")
        found = done.stdout.strip()
        if done.returncode == 0 and _COMMIT.fullmatch(found):
            return found
        if done.returncode and done.stderr.strip():
            raise GitError(f"revision {revision!r} cannot be looked up in {root}: {_words(done)}")
    raise GitError(f"revision {revision!r} is not in {root}; {_advice(root, revision)}")


def merge_base(root: Path, base: str, head: str) -> str:
    """The newest common commit of two commits; GitError if there is none."""
    done = _run(root, "merge-base", base, head)
    if done.returncode == 0:
        return done.stdout.split()[0]
    if done.stderr.strip():
        raise GitError(f"git merge-base failed: {_words(done)}")
    advice = (
        "this clone is shallow: run git fetch --unshallow (in CI: check out with the whole history)"
        if is_shallow(root)
        else "give a base that the head was branched from"
    )
    raise GitError(f"{base[:12]} and {head[:12]} have no commit in common; {advice}")


def is_shallow(root: Path) -> bool:
    """Whether the clone lacks part of the history."""
    return git(root, "rev-parse", "--is-shallow-repository").strip() == "true"


def fetch(root: Path, revision: str) -> None:
    """Fetch a revision with its history from ``origin``, so that `commit_of` finds it.

    Raises:
        GitError: the server does not have it.
    """
    complete = ("--depth", "2147483647") if is_shallow(root) else ()
    git(root, "fetch", "--quiet", *complete, "origin", *_EVERYTHING)
    if has(root, revision):
        return
    matched = _NAME.fullmatch(revision)
    if not matched:
        raise GitError(f"{revision!r} was given; expected the name of a branch or a tag, or a commit")
    name = matched["name"]
    try:
        git(root, "fetch", "--quiet", "origin", f"+{name}:refs/graftline/fetched/{name}")
    except GitError as error:
        raise GitError(f"revision {revision!r} is neither here nor on the server: {error}") from error


def has(root: Path, revision: str) -> bool:
    """Whether `commit_of` finds a revision."""
    try:
        commit_of(root, revision)
    except GitError:
        return False
    return True


def snapshot(root: Path) -> str:
    """A commit with the tracked files as they are now: HEAD, or a new one on no branch."""
    return git(root, "stash", "create").strip() or commit_of(root, "HEAD")


def _run(folder: Path, *arguments: str, stdin: str | None = None) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(
            ["git", *arguments],
            cwd=folder,
            env=environment.for_git(),
            input=stdin,
            capture_output=True,
            encoding="utf-8",
            errors="surrogateescape",
        )
    except FileNotFoundError as error:
        raise GitError("git is not on the PATH; install it: DVC and the manifest's revision need it") from error


def _words(done: subprocess.CompletedProcess[str]) -> str:
    return " ".join(done.stderr.split()) or f"exit code {done.returncode}"


def _advice(root: Path, revision: str) -> str:
    """How to get a revision; ``origin/main`` is the branch ``main`` of the server ``origin``."""
    matched = _NAME.fullmatch(revision)
    if not matched:
        return "expected the name of a branch or a tag, or a commit"
    name = matched["name"].removeprefix("refs/remotes/").removeprefix("refs/heads/")
    if name != revision and has(root, name):
        return "this clone is shallow: git fetch --unshallow" if is_shallow(root) else "its history is not that long"
    server, _, branch = name.partition("/")
    known = git(root, "remote").split()
    if server not in known or not branch:
        server, branch = "origin", name
    return f"fetch it first: git fetch {server} {shlex.quote(branch)}"


_LINK, _SUBMODULE, _FOLDER = "120000", "160000", "040000"
MAX_LINKS = 40
"""Symbolic links that are followed for one name, as in Linux."""


def unknown(reason: str) -> dict[str, str]:
    """Content that a commit does not determine; it counts as changed, see `why_unknown`."""
    return {"unknown": reason}


def why_unknown(content: Any) -> str | None:
    """The reason, if this is an `unknown` content."""
    return content.get("unknown") if isinstance(content, dict) and content.keys() == {"unknown"} else None


@dataclass(frozen=True)
class CommitEntry:
    """Git's mode and object of a path in a commit."""

    mode: str
    object: str


class CommitFiles:
    """The files of a commit of the repository in ``root``, through links, submodules and folders."""

    def __init__(self, root: Path, commit: str) -> None:
        if inside := git(root, "rev-parse", "--show-prefix").strip():
            raise GraftlineError(f"{root} is the folder {inside} of a repository; expected the repository's own root")
        self.root, self.commit = root, commit
        listed = git(root, "ls-tree", "-r", "-t", "-z", "--full-tree", commit)
        entries = (line.partition("\t") for line in listed.split("\0") if line)
        self.entries = {path: _entry(about) for about, _, path in entries}
        self.made: Callable[[str], Any] = lambda path: None
        """Content of what DVC makes or tracks at exactly this path; None for other paths."""
        self._untracked: dict[str, list[str]] = {}

    def content(self, name: str, *, as_source: bool = False, followed: int = 0) -> Any:
        """A digest or an object's name, equal for equal content, or `unknown`.

        Args:
            name: a path as people write it: ``./rows.jsonl``, ``rows/``, absolute, through links.
            as_source: whether untracked files of a folder in the checkout count too.
            followed: number of links that led here.
        """
        path = self.normalize(name)
        if path is None:
            return unknown("outside the repository")
        pieces = path.split("/")
        for length in range(1, len(pieces) + 1):
            place, rest = "/".join(pieces[:length]), pieces[length:]
            made = self.made(place)
            if made is not None:
                return made if why_unknown(made) or not rest else of_json([str(made), rest])
            entry = self.entries.get(place)
            if entry is None:
                return unknown("not in git")
            if entry.mode == _LINK:
                return self._through_link(place, rest, as_source=as_source, followed=followed)
            if entry.mode == _SUBMODULE:
                return str(of_json([entry.object, rest]))
        return self._folder(path, as_source, followed) if entry and entry.mode == _FOLDER else entry and entry.object

    def normalize(self, name: str, *, followed: int = 0) -> str | None:
        """The path from the repository's root, with forward slashes; None if it is outside."""
        name = os.path.expanduser(name)
        pieces = (os.path.relpath(name, self.root) if os.path.isabs(name) else name).split("/")
        place = ""
        for index, piece in enumerate(pieces):
            rest = pieces[index + 1 :]
            place = posixpath.normpath(posixpath.join(place, piece))
            if place.startswith(".."):
                return None
            # ``link/..`` is the folder above the link's target.
            if ".." in rest and followed < MAX_LINKS and self._is_link(place):
                return self.normalize(self._target(place, rest), followed=followed + 1)
        return place

    def _is_link(self, place: str) -> bool:
        return place in self.entries and self.entries[place].mode == _LINK

    def _target(self, place: str, rest: list[str]) -> str:
        """The path to which a path through a link leads."""
        return posixpath.join(
            posixpath.dirname(place), git(self.root, "cat-file", "blob", self.entries[place].object), *rest
        )

    def read(self, name: str) -> bytes | None:
        """The bytes of a file, through links; None if the commit has none there."""
        for _ in range(MAX_LINKS):
            path = self.normalize(name)
            if path is None:
                return None
            pieces = path.split("/")
            places = ["/".join(pieces[:length]) for length in range(1, len(pieces) + 1)]
            link = next((place for place in places if self._is_link(place)), None)
            if link is None:
                entry = self.entries.get(path)
                if entry is None or entry.mode in (_FOLDER, _SUBMODULE):
                    return None
                return git(self.root, "cat-file", "blob", entry.object).encode("utf-8", "surrogateescape")
            name = self._target(link, pieces[len(link.split("/")) :])
        return None

    def _through_link(self, place: str, rest: list[str], *, as_source: bool, followed: int) -> Any:
        if followed >= MAX_LINKS:
            return unknown("a link that leads back to itself")
        link = self.entries[place].object
        target = self._target(place, rest)
        content = self.content(target, as_source=as_source, followed=followed + 1)
        if why_unknown(content):
            return unknown(f"a link to {posixpath.normpath(target)}, {why_unknown(content)}")
        return str(of_json([link, content]))

    def _folder(self, path: str, as_source: bool, followed: int) -> Any:
        """A folder's object and the content behind its links, of which git's object only has the names."""
        inside = f"{path}/"
        links = [name for name, entry in self.entries.items() if entry.mode == _LINK and name.startswith(inside)]
        contents = [self.content(link, as_source=as_source, followed=followed + 1) for link in links]
        lost = next(
            (f"with {link}, {why}" for link, one in zip(links, contents, strict=True) if (why := why_unknown(one))),
            None,
        )
        if lost is None and as_source:
            lost = next((f"with {name}, not in git" for name in self._beside_git(path)), None)
        if lost:
            return unknown(lost)
        own = self.entries[path].object
        return str(of_json([own, *map(str, contents)])) if links else own

    def _beside_git(self, path: str) -> list[str]:
        """Files of the checkout in a folder that neither git tracks nor DVC makes."""
        if path not in self._untracked:
            listed = git(
                self.root, "--literal-pathspecs", "ls-files", "-z", "--others", "--directory", "--", f"{path}/"
            )
            names = [name.rstrip("/") for name in listed.split("\0") if name]
            self._untracked[path] = [
                name for name in names if posixpath.basename(name) != "__pycache__" and self.made(name) is None
            ]
        return self._untracked[path]


def _entry(about: str) -> CommitEntry:
    mode, _, name = about.split()[:3]
    return CommitEntry(mode, name)
