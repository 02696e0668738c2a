"""Which project a checkout belongs to: pipelines of two projects may have one name and share a machine and a server."""

import re
from pathlib import Path

from graftline.digest import of_bytes
from graftline.errors import GraftlineError
from graftline.workflow.worktree import git

_MAX_HOPS = 5  # A clone of a clone of a clone: enough, and no circle.


def key(root: Path) -> str:
    """Eight hexadecimal digits, the same in every clone and worktree of a project, on every machine.

    They follow from where the project's commits come from: the address of ``origin`` without its scheme, user and
    password, through clones of local clones; without one, from the repository's own folder. Several projects of one
    repository are told apart by their folders in it.
    """
    known = f"{_origin(root.resolve(), _MAX_HOPS)}\n{_prefix(root)}"
    return of_bytes(known.encode("utf-8", "surrogateescape")).hex[:8]


def _prefix(root: Path) -> str:
    try:
        return git(root, "rev-parse", "--show-prefix").strip()
    except GraftlineError:
        return ""


def _origin(folder: Path, hops: int) -> str:
    try:
        address = git(folder, "config", "--get", "--default", "", "remote.origin.url").strip()
    except GraftlineError:
        return str(folder)  # No repository, or no git.
    if not address:
        return str(_repository(folder))
    # ../server.git is another folder for each project: git reads it from the repository's own.
    local = _repository(folder) / address.removeprefix("file://")
    if local.is_dir() and hops:
        return _origin(local.resolve(), hops - 1)
    without_scheme = re.sub(r"^[a-z+]+://", "", address)
    host, _, path = re.sub(r"^[^/]*@", "", without_scheme).replace(":", "/", 1).partition("/")
    return f"{host.lower()}/{path.strip('/').removesuffix('.git')}"


def _repository(folder: Path) -> Path:
    """The folder of the repository: all worktrees share it."""
    common = git(folder, "rev-parse", "--path-format=absolute", "--git-common-dir").strip()
    return Path(common).parent if Path(common).name == ".git" else Path(common)
