"""Git, as everything here runs it: on the repository of the folder it is given, without hooks, with its own words."""

import re
import shlex
import subprocess
from pathlib import Path

from graftline.errors import GraftlineError
from graftline.workflow import environment

_COMMIT = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")
# A name as a person writes it, of a local branch or tag or commit; of a branch of the server; of what `fetch` got.
_PLACES = ("{}", "refs/remotes/origin/{}", "refs/graftline/fetched/{}")
# Of git's rules for names (man git-check-ref-format) those that tell a name from an option, a pattern, a refspec.
_NAME = re.compile(r"(?P<name>(?![-+/])(?!.*(\.\.|@\{))[^\s~^:?*\[\\\x00-\x1f\x7f]+(?<![/.]))([~^]\d*)*")
_EVERYTHING = ("+refs/heads/*:refs/remotes/origin/*", "+refs/tags/*:refs/tags/*")


class GitError(GraftlineError):
    """Git refused; its own words say why."""


def git(folder: Path, *arguments: str, stdin: str | None = None) -> str:
    """Run git on the repository that ``folder`` lies in; its output.

    Raises:
        GitError: it failed; its message is shown. Or git is not installed.
    """
    done = _run(folder, *arguments, stdin=stdin)
    if done.returncode:
        # What is wrong with the repository itself, before what a command makes of it.
        repository = _run(folder, "rev-parse", "--git-dir")
        words = _words(repository if repository.returncode else done)
        raise GitError(f"git {arguments[0]} failed in {folder}: {words}")
    return done.stdout


def commit_of(root: Path, revision: str) -> str:
    """The commit that a revision names: as git reads it, else as a branch of the server ``origin``.

    Raises:
        GitError: there is none in the repository, or git cannot read the repository.
    """
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
    """The newest commit that two commits have in common: what a branch is compared with.

    Raises:
        GitError: there is none.
    """
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
    """Whether the clone lacks a part of the history."""
    return git(root, "rev-parse", "--is-shallow-repository").strip() == "true"


def fetch(root: Path, revision: str) -> None:
    """Get a revision from ``origin``, with its history, so that `commit_of` finds it.

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
    """A commit with the tracked files as they are now: the current one, or one that no branch holds.

    Raises:
        GitError: ``root`` is not a git repository with a commit.
    """
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
    """How to get a revision: ``origin/main`` is the branch ``main`` of the server ``origin``."""
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
