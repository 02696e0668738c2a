"""Channels as git tags for DVC's registry, named as GTO names them (https://dvc.org/doc/gto/user-guide).

    wordnet-category@v0.0.3            a version: the commit whose dvc.lock holds that release's package
    wordnet-category#production!#6     the channel no longer holds the version at this commit
    wordnet-category#production#7      what the channel holds from then on

The tags follow from the channel and say in their message what they stand for, so that writing them again changes
nothing. ``dvc artifacts get REPOSITORY wordnet-category --stage production`` fetches the package.
"""

import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from graftline.errors import ReleaseError
from graftline.registry.channel import Entry
from graftline.release.manifest import MANIFEST_NAME, SIGNATURE_NAME, list_files
from graftline.workflow.git import git

_LOCK = "dvc.lock"
_VERSION = re.compile(r"@v(0|[1-9]\d*)\.(0|[1-9]\d*)\.(0|[1-9]\d*)")
_ASSIGNED = re.compile(r"#(?P<stage>[a-z0-9-]+)!?#(?P<count>[0-9]+)")


@dataclass(frozen=True)
class Tagging:
    """The tags of one channel's newest entry."""

    version: str
    stage: str
    commit: str
    made: tuple[str, ...]
    """Those that were not there before."""


def write_tags(root: Path, entry: Entry, package: Path) -> Tagging:
    """Tag what a channel holds: its release as a version, and the channel's name as a stage of it.

    Args:
        root: the project's folder, in its git repository.
        entry: the channel's newest entry; of a rollout, what the channel holds counts.
        package: the verified release that it holds.

    Raises:
        ReleaseError: no commit's dvc.lock holds this release's package.
        GitError: git refuses a tag.
    """
    tags, artifact = _Tags(root), _artifact(root, entry.pipeline)
    release = f"graftline release {entry.change.version}"
    version = tags.with_subject(f"{artifact}@v", release)
    if version is None:
        commit = _commit_of(root, entry.pipeline, entry.change.version, package)
        version = tags.make(_next_version(artifact, tags), commit, release, f"manifest {entry.change.release}")
    commit = tags.commit(version)
    assignment = f"{release} in {entry.channel}"
    stage = tags.newest(artifact, entry.channel)
    if stage is None or tags.subjects[stage] != assignment:
        if stage is not None and "!" not in stage:
            # In GTO a stage may hold several versions, of which the greatest is shown, also after a rollback from it.
            name = f"{artifact}#{entry.channel}!#{tags.next_count(artifact)}"
            tags.make(name, tags.commit(stage), f"{tags.subjects[stage]} no more", f"entry {entry.number}")
        name = f"{artifact}#{entry.channel}#{tags.next_count(artifact)}"
        stage = tags.make(name, commit, assignment, f"entry {entry.number}, {entry.digest}")
    return Tagging(version, stage, commit, tuple(tags.made))


class _Tags:
    """The annotated tags of a repository; GTO ignores others."""

    def __init__(self, root: Path) -> None:
        self._root = root
        form = "%(objecttype)%09%(refname:strip=2)%09%(contents:subject)"
        listed = git(root, "for-each-ref", f"--format={form}", "refs/tags")
        lines = [line.split("\t", 2) for line in listed.splitlines()]
        self.subjects = {name: subject for kind, name, subject in lines if kind == "tag"}
        self.made: list[str] = []

    def with_subject(self, start: str, subject: str) -> str | None:
        """The tag whose name has this beginning and whose message has this first line."""
        return next((name for name, said in self.subjects.items() if name.startswith(start) and said == subject), None)

    def newest(self, artifact: str, channel: str) -> str | None:
        """The tag with the highest number that says something about a stage."""
        counts = {count: name for count, name, stage in self._counted(artifact) if stage == channel}
        return counts[max(counts)] if counts else None

    def next_count(self, artifact: str) -> int:
        """The next number; GTO numbers the assignments of all stages of an artifact together."""
        return max((count for count, _, _ in self._counted(artifact)), default=0) + 1

    def commit(self, name: str) -> str:
        """The commit that a tag names."""
        return git(self._root, "rev-parse", f"refs/tags/{name}^{{commit}}").strip()

    def make(self, name: str, commit: str, subject: str, more: str) -> str:
        """Write a tag; returns its name."""
        git(self._root, "tag", "--annotate", "--message", subject, "--message", more, name, commit)
        self.subjects[name] = subject
        self.made.append(name)
        return name

    def _counted(self, artifact: str) -> Iterator[tuple[int, str, str]]:
        for name in self.subjects:
            if name.startswith(f"{artifact}#") and (match := _ASSIGNED.fullmatch(name.removeprefix(artifact))):
                yield int(match["count"]), name, match["stage"]


def _artifact(root: Path, pipeline: str) -> str:
    """GTO's name of a pipeline's package in tags; a project in a folder of the repository is named by that folder."""
    folder = git(root, "rev-parse", "--show-prefix").strip().rstrip("/")
    return f"{folder}={pipeline}" if folder else pipeline


def _next_version(artifact: str, tags: _Tags) -> str:
    """The version after the greatest one, as `gto register` counts: the first is v0.0.1."""
    names = [name.removeprefix(artifact) for name in tags.subjects if name.startswith(f"{artifact}@")]
    numbers = [tuple(map(int, match.groups())) for name in names if (match := _VERSION.match(name))]
    major, minor, patch = max(numbers, default=(0, 0, 0))
    return f"{artifact}@v{major}.{minor}.{patch + 1}"


def _commit_of(root: Path, pipeline: str, version: str, package: Path) -> str:
    """The oldest commit, of any branch, whose dvc.lock holds a package; ReleaseError if none does."""
    for name in _names_in_dvc(package):
        listed = git(root, "log", "--all", "--reverse", "--format=%H", f"-S{name}", "--", _LOCK)
        for commit in listed.split():
            if name in git(root, "show", f"{commit}:./{_LOCK}"):
                return commit
    raise ReleaseError(
        f"no commit's {_LOCK} holds release {version} of {pipeline}, so no tag can name it; commit {_LOCK} after the "
        "run that made it (if others did, git fetch first)"
    )


def _names_in_dvc(package: Path) -> list[str]:
    """What DVC calls a package in dvc.lock: with its signature, and without one that was added later.

    A folder's name is the MD5 of the list of its files, each with the MD5 of its bytes, and ``.dir``.
    """
    paths = [*list_files(package), MANIFEST_NAME, *([SIGNATURE_NAME] if (package / SIGNATURE_NAME).is_file() else [])]
    files = {path: _md5_of(package / path) for path in sorted(paths)}
    without = {path: digest for path, digest in files.items() if path != SIGNATURE_NAME}
    found = []
    for each in (files, without):
        listed = json.dumps([{"md5": digest, "relpath": path} for path, digest in each.items()], sort_keys=True)
        found.append(f"{hashlib.md5(listed.encode(), usedforsecurity=False).hexdigest()}.dir")
    return list(dict.fromkeys(found))


def _md5_of(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()
