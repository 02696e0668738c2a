"""Make a fresh clone fit for one flow run: the machine's shared caches, and nothing else from outside it.

    python -m graftline.workflow.checkout          in the clone, before the flow starts (prefect.yaml, step `pull`)

Each run works in its own clone, so two of them never see each other's files, and what a run leaves goes with its
folder. What is shared lies in two folders of the machine, named by the environment:

    GRAFTLINE_DVC_CACHE   DVC's cache and run cache: what any run has made
    GRAFTLINE_CACHE       sources, converted bases, and each pipeline's shelf (`shelf_folder`)
"""

import json
import os
import re
import shutil
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from graftline import settings
from graftline.digest import of_bytes, write_json, write_text
from graftline.errors import ConfigError, GraftlineError
from graftline.workflow import owner
from graftline.workflow.git import fetch, git
from graftline.workflow.outcome import explained_errors
from graftline.workflow.worktree import write_cache_dir

# Which project a checkout belongs to: pipelines of two projects may have one name and share a machine and a server.

_MAX_HOPS = 5  # A clone of a clone of a clone: enough, and no circle.


def project_key(root: Path) -> str:
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


# What a pipeline's runs leave for the next one, whatever checkout that works in.
#
# The folder ``runs/<pipeline>/.work``, or what it links to, holds
#
# * ``.lock``: one run at a time;
# * ``train-<digest>/``: checkpoints of a training that was interrupted;
# * ``resolved.json``: what the last whole run had resolved, and ``release.json``: what was released last;
# * ``last.json``: what that run was made of, and how it ended.

_KEPT = {"resolved.json": "resolved.json", "release.json": "release/release.json"}


@dataclass(frozen=True)
class LastRun:
    """How the last whole run of a pipeline ended. ``inputs`` is a digest; empty if they could not be told."""

    inputs: str
    outcome: str
    version: str | None
    finished: str
    """UTC, ISO 8601."""


def shelf_folder(root: Path, pipeline: str) -> Path:
    """The pipeline's shelf."""
    return root / "runs" / pipeline / ".work"


def keep_run(root: Path, pipeline: str, *, inputs: str, outcome: str, version: str | None) -> None:
    """Keep what the next run needs; ``last.json`` last, so that it never tells of what is not there."""
    runs, shelf = root / "runs" / pipeline, shelf_folder(root, pipeline)
    for name, place in _KEPT.items():
        if (runs / place).is_file():
            write_text(shelf / name, (runs / place).read_text(encoding="utf-8"))
    finished = datetime.now(UTC).isoformat(timespec="seconds")
    write_json(shelf / "last.json", asdict(LastRun(inputs, outcome, version, finished)))


def last_run(root: Path, pipeline: str) -> LastRun | None:
    """How the last whole run ended; None if there was none, or its record cannot be read."""
    try:
        return LastRun(**_read(root, pipeline, "last.json"))
    except TypeError:
        return None


def last_resolved(root: Path, pipeline: str) -> dict[str, Any]:
    """What the last whole run had resolved (`workflow.resolve`); empty if there was none, or it cannot be read."""
    return _read(root, pipeline, "resolved.json")


def last_released(root: Path, pipeline: str) -> dict[str, Any]:
    """What was released last (`tasks.release`); empty if nothing was, or it cannot be read."""
    return _read(root, pipeline, "release.json")


def _read(root: Path, pipeline: str, name: str) -> dict[str, Any]:
    try:
        record = json.loads((shelf_folder(root, pipeline) / name).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return record if isinstance(record, dict) else {}


VARIABLES = ("GRAFTLINE_CACHE", "GRAFTLINE_DVC_CACHE")
_MARK = "graftline.disposable"


def prepare(root: Path) -> None:
    """Connect a fresh clone with the shared folders, and mark it as one that goes away.

    Raises:
        GraftlineError: a variable is missing, or pipelines.yaml cannot be read.
    """
    cache, dvc_cache = (_folder_of(name) for name in VARIABLES)
    write_cache_dir(root, dvc_cache)
    document = settings.load(root / settings.DEFAULT_FILE).document
    shelves = cache / "shelves" / project_key(root)
    for pipeline, section in document.pipelines.items():
        _check_store(pipeline, section.release.store)
        shared, link = shelves / pipeline, shelf_folder(root, pipeline)
        shared.mkdir(parents=True, exist_ok=True)
        link.parent.mkdir(parents=True, exist_ok=True)
        if not link.is_symlink():
            link.symlink_to(shared, target_is_directory=True)
    git(root, "config", "--local", _MARK, "true")
    _remove_abandoned(root)


def project_root() -> Path:
    """The current folder, or its repository's root: aliases and people start commands in folders of a project."""
    here = Path.cwd()
    return here if (here / settings.DEFAULT_FILE).is_file() else Path(git(here, "rev-parse", "--show-toplevel").strip())


def deepen(root: Path, *revisions: str) -> None:
    """Get what a disposable checkout lacks of some revisions: a worker clones one commit of one branch.

    Raises:
        GitError: the server does not have one of them.
    """
    if is_disposable(root):
        for revision in revisions:
            fetch(root, revision)


def is_disposable(root: Path) -> bool:
    """Whether `prepare` made this checkout what it is: nobody works in it, and it goes with its run."""
    git_config = root / ".git" / "config"
    return (
        git_config.is_file() and git(root, "config", "--local", "--get", "--default", "false", _MARK).strip() == "true"
    )


def narrow(root: Path, pipeline: str) -> None:
    """Leave one pipeline in the pipelines.yaml of a disposable checkout.

    DVC reads every stage of every pipeline before it looks at one: with a thousand pipelines that costs minutes a
    command. Values stay as they are, so DVC finds the same runs; git is told to see no change.
    """
    path = root / settings.DEFAULT_FILE
    if not is_disposable(root) or len(settings.load(path).names) == 1:
        return
    write_text(path, settings.narrowed(path.read_bytes(), [pipeline], path.name))
    git(root, "update-index", "--skip-worktree", settings.DEFAULT_FILE)


def _remove_abandoned(root: Path) -> None:
    """Say whose checkout this is, and remove those of runs that were killed: a worker that died removes nothing."""
    owner.record(root, os.getppid())  # The flow run: it carries out the deployment's steps.
    if not root.parent.name.endswith("prefect"):
        return  # Not where a process worker makes a folder for each run.
    for record in root.parent.parent.glob(f"*prefect/*/{owner.RECORD}"):
        if record.parents[1] != root and owner.is_abandoned(record.parents[1]):
            shutil.rmtree(record.parents[2], ignore_errors=True)


def _check_store(pipeline: str, store: str) -> None:
    if "://" not in store and not Path(store).is_absolute():
        raise ConfigError(
            f"pipelines.{pipeline}.release.store is {store!r}, a folder of the checkout, which goes with its run; "
            "expected s3://… or an absolute path"
        )


def _folder_of(variable: str) -> Path:
    value = os.environ.get(variable)
    if not value or not Path(value).is_absolute():
        raise ConfigError(
            f"{variable} is {value!r}; expected an absolute path: set {' and '.join(VARIABLES)} where the worker starts"
        )
    return Path(value)


def main() -> None:
    """Command line: exit code 2 for an error that its message explains."""
    with explained_errors():
        prepare(Path.cwd())


if __name__ == "__main__":
    main()
